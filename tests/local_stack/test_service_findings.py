"""`sdft doctor` on database, broker and inference servers: real ones, and ones that are wrong."""

import json
import sqlite3
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import psycopg
import pytest
from sqlalchemy import make_url

from core.ids import new_token
from core.schema_revision import HEAD
from core.settings import Settings
from local_stack import service_findings
from local_stack.directories import filesystem_of
from local_stack.service_findings import broker_finding, database_finding, inference_findings
from migrations.upgrade import upgrade

MakeSettings = Callable[..., Settings]


def test_a_database_that_is_still_to_be_made(settings: Settings) -> None:
    assert database_finding(settings).problem is None
    assert not settings.data_dir.exists()


def test_revisions_of_the_schema(make_settings: MakeSettings, empty_database_url: str) -> None:
    settings = make_settings(database_url=empty_database_url)
    upgrade(empty_database_url, "0001")
    older = database_finding(settings)
    assert (older.problem, f"schema 0001; the start will migrate it to {HEAD}" in older.what) == (None, True)
    upgrade(empty_database_url)
    current = database_finding(settings)
    assert (current.problem, current.what.endswith(f"(schema {HEAD})")) == (None, True)


def test_a_newer_schema_is_a_problem(make_settings: MakeSettings, database_url: str, database) -> None:
    with database.transaction() as session:
        session.connection().exec_driver_sql("update alembic_version set version_num = '9999'")
    finding = database_finding(make_settings(database_url=database_url))
    assert "revision 9999" in str(finding.problem)
    assert "install the newer version" in finding.mend


def test_a_file_that_is_no_database(settings: Settings) -> None:
    settings.data_dir.mkdir()
    (settings.data_dir / "database.sqlite3").write_text("not a database at all, but long enough to look like a file of some kind" * 20)
    finding = database_finding(settings)
    assert "it can't be read" in str(finding.problem)
    assert "restore it" in finding.mend


def test_an_empty_file_is_an_empty_database(settings: Settings) -> None:
    settings.data_dir.mkdir()
    sqlite3.connect(settings.data_dir / "database.sqlite3").close()
    assert database_finding(settings).problem is None


def test_sqlite_on_a_network_file_system(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service_findings, "filesystem_of", lambda path: "nfs4")
    finding = database_finding(settings)
    assert "unreliable on a network file system (nfs4)" in str(finding.problem)
    assert "SDFT_DATABASE_URL" in finding.mend


def test_the_file_system_is_that_of_the_nearest_mount(tmp_path: Path) -> None:
    mounts = tmp_path / "mounts"
    (tmp_path / "my data" / "deep").mkdir(parents=True)
    escaped = str(tmp_path / "my data").replace(" ", "\\040")
    mounts.write_text(f"/dev/root / ext4 rw 0 0\nserver:/x {escaped} nfs4 rw 0 0\n")
    assert filesystem_of(tmp_path / "my data" / "deep" / "not there", mounts) == "nfs4"
    assert filesystem_of(tmp_path, mounts) == "ext4"
    assert filesystem_of(tmp_path, tmp_path / "none") is None


@pytest.mark.parametrize(
    ("url", "problem"),
    [
        ("nonsense", "it is no URL"),
        ("mysql://user@host/name", "mysql is not supported"),
        ("postgresql://user:canary@127.0.0.1:1/name", "it can't be used: connection"),
    ],
)
def test_urls_that_lead_nowhere(make_settings: MakeSettings, url: str, problem: str) -> None:
    finding = database_finding(make_settings(database_url=url))
    assert str(finding.problem).startswith(problem)
    assert "canary" not in repr(finding)


def test_a_postgres_user_without_rights(make_settings: MakeSettings, postgres_url: str) -> None:
    user = f"reader_{new_token()}"
    url = make_url(postgres_url)
    with psycopg.connect(url.set(drivername="postgresql").render_as_string(hide_password=False), autocommit=True) as connection:
        connection.execute(f"CREATE ROLE \"{user}\" LOGIN PASSWORD 'secret'")
    settings = make_settings(database_url=url.set(username=user, password="secret").render_as_string(hide_password=False))
    finding = database_finding(settings)
    assert f"the user {user} may make no tables" in str(finding.problem)
    assert finding.mend == f'as its owner: GRANT USAGE, CREATE ON SCHEMA "public" TO "{user}"'
    with psycopg.connect(url.set(drivername="postgresql").render_as_string(hide_password=False), autocommit=True) as connection:
        connection.execute(f'GRANT USAGE, CREATE ON SCHEMA "public" TO "{user}"')
        connection.execute(f'GRANT SELECT ON alembic_version TO "{user}"')
    assert database_finding(settings).problem is None


def test_brokers(valkey: str) -> None:
    assert broker_finding(valkey).problem is None
    assert broker_finding("redis://127.0.0.1:1/0").problem == "it doesn't answer a ping"
    assert "no URL of a Redis" in str(broker_finding("amqp://host").problem)


class Server:
    """Answers GET /v1/models, and `others` with the same, with the key `right`."""

    def __init__(self, body: bytes, *others: str) -> None:
        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                right = self.path in ("/v1/models", *others) and self.headers["authorization"] == "Bearer right"
                self.send_response(200 if right else 401)
                self.end_headers()
                self.wfile.write(body if right else b"{}")

            def log_message(self, *arguments: object) -> None: ...

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_address[1]}"
        threading.Thread(target=self.http.serve_forever, daemon=True).start()


@pytest.fixture
def start_server() -> Iterator[Callable[..., Server]]:
    started: list[Server] = []

    def start(body: bytes, *others: str) -> Server:
        started.append(Server(body, *others))
        return started[-1]

    yield start
    for server in started:
        server.http.shutdown()
        server.http.server_close()


def models(*ids: str) -> bytes:
    return json.dumps({"object": "list", "data": [{"id": model_id} for model_id in ids]}).encode()


@pytest.mark.parametrize(
    ("body", "key", "problem"),
    [
        (models("smollm2-135m-instruct", "an-adapter"), "right", None),
        (models("llama"), "right", "it serves llama, and no base model of the catalogue (smollm2-135m-instruct)"),
        (models("smollm2-135m-instruct"), "wrong", "it refuses SDFT_INFERENCE_API_KEY"),
        (models("smollm2-135m-instruct"), None, "it asks for a key, and SDFT_INFERENCE_API_KEY is not set"),
        (b"<html>", "right", "it answers, but not as an inference server does"),
    ],
)
def test_inference_servers(make_settings: MakeSettings, start_server: Callable[..., Server], body: bytes, key: str | None, problem: str | None) -> None:
    server = start_server(body)
    (finding,) = inference_findings(make_settings(inference_urls=[server.url], inference_api_key=key))
    assert finding.problem == problem
    assert not finding.is_warning


@pytest.mark.parametrize("taken", [True, False])
def test_an_inference_server_that_is_to_be_sent_adapters(make_settings: MakeSettings, start_server: Callable[..., Server], taken: bool) -> None:
    server = start_server(models("smollm2-135m-instruct"), *(["/adapter_files"] if taken else []))
    (finding,) = inference_findings(make_settings(inference_urls=[server.url], inference_api_key="right", inference_adapters="upload"))
    assert (finding.problem is None) == taken
    assert taken or "ADAPTER_UPLOADS_DIR" in finding.mend


def test_an_inference_server_that_is_away_is_a_warning(make_settings: MakeSettings) -> None:
    (finding,) = inference_findings(make_settings(inference_urls=["http://127.0.0.1:1"]))
    assert "it doesn't answer" in str(finding.problem)
    assert finding.is_warning


def test_a_server_that_the_start_makes_is_not_asked(settings: Settings) -> None:
    assert inference_findings(settings) == []
