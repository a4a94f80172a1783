import hashlib
import os
import pty
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
from sqlalchemy import func, select, update
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from core.audit import SERVER
from core.database import Database, unix_now
from core.errors import BadRequest, Unavailable
from core.projects import KEY, archive_project, create_key, create_project, ensure_first_key, find_key, key_id_of, replace_lost_key, revoke_key, valid_keys
from core.tables.projects import SCOPES, ApiKey, Project
from tests.rows import add_project


def make_key(database: Database, **options: Any) -> str:
    project_id = add_project(database, f"project{unix_now():.0f}")
    with database.transaction() as session:
        return create_key(session, project_id, "laptop", **options)


def project_of(database: Database, plain_key: str) -> str | None:
    with database.reading() as session:
        key = find_key(session, plain_key)
        return None if key is None else key.project_id


def scopes_of(database: Database, plain_key: str) -> list[str]:
    with database.reading() as session:
        return session.get_one(ApiKey, key_id_of(plain_key)).scopes


@pytest.mark.parametrize("name", ["default", "Team-1", "a_b", "x" * 64])
def test_project_names(database: Database, name: str) -> None:
    with database.transaction() as session:
        project = create_project(session, name)
    assert project.id.startswith("proj-")
    assert project.name == name


@pytest.mark.parametrize("name", ["", "a:b", "a/b", "-a", "a b", "x" * 65, "a\n"])
def test_names_that_would_break_model_names_are_refused(sqlite_database: Database, name: str) -> None:
    with pytest.raises(BadRequest) as caught, sqlite_database.transaction() as session:
        create_project(session, name)
    assert (caught.value.param, caught.value.code) == ("name", "invalid_project_name")


def test_project_names_are_unique(database: Database) -> None:
    add_project(database)
    with pytest.raises(IntegrityError):
        add_project(database)


def test_key_opens_its_project_and_only_its_hash_is_kept(database: Database) -> None:
    mine, other = add_project(database, "mine"), add_project(database, "other")
    with database.transaction() as session:
        keys = {project_id: create_key(session, project_id, "laptop") for project_id in (mine, other)}
    for project_id, plain_key in keys.items():
        assert KEY.fullmatch(plain_key)
        assert project_of(database, plain_key) == project_id
    with database.reading() as session:
        row = session.get_one(ApiKey, keys[mine][5:13])
    assert row.key_sha256 == hashlib.sha256(keys[mine].encode()).hexdigest()
    assert keys[mine][14:] not in repr(vars(row))


def test_a_key_opens_its_project_and_not_the_server_unless_it_is_said(database: Database) -> None:
    assert scopes_of(database, make_key(database)) == ["read", "write", "infer"]
    with database.transaction() as session:
        project_id = session.scalars(select(Project.id)).one()
        operator = create_key(session, project_id, "operator", scopes=["admin", "read"])
    assert scopes_of(database, operator) == ["read", "admin"]


def test_keys_of_an_archived_project_open_nothing(database: Database) -> None:
    plain_key = make_key(database)
    with database.transaction() as session:
        archive_project(session, session.scalars(select(Project)).one(), SERVER)
    assert project_of(database, plain_key) is None


def test_keys_are_all_different(sqlite_database: Database) -> None:
    project_id = add_project(sqlite_database)
    with sqlite_database.transaction() as session:
        keys = [create_key(session, project_id, "laptop") for _ in range(200)]
    assert len({key[5:13] for key in keys}) == len({key[14:57] for key in keys}) == 200


def test_mistyped_key_is_refused_without_asking_the_database(sqlite_database: Database) -> None:
    plain_key = make_key(sqlite_database)
    session = Mock(spec=Session)
    session.execute.side_effect = AssertionError("the database was asked")
    for position in range(len(plain_key)):
        typo = plain_key[:position] + ("a" if plain_key[position] != "a" else "b") + plain_key[position + 1 :]
        assert find_key(session, typo) is None
    for malformed in ("", "sdft_", plain_key[:-1], plain_key + "a", plain_key + "\n", " " + plain_key, plain_key.upper(), "sk-" + "a" * 48, "ä" * 63, "\x00"):
        assert find_key(session, malformed) is None
    with pytest.raises(AssertionError):
        find_key(session, plain_key)


def test_secret_is_compared_not_only_the_id_and_checksum(database: Database) -> None:
    plain_key = make_key(database)
    with database.transaction() as session:
        other = create_key(session, session.scalars(select(Project.id)).one(), "other")
        session.execute(update(ApiKey).where(ApiKey.id == plain_key[5:13]).values(key_sha256=hashlib.sha256(other.encode()).hexdigest()))
    assert project_of(database, plain_key) is None
    assert project_of(database, other) is not None


def test_expired_revoked_and_deleted_keys_open_nothing(database: Database) -> None:
    plain_key = make_key(database, expires_at=unix_now() + 60)
    key_id = plain_key[5:13]
    assert project_of(database, plain_key) is not None
    for column, value in (("expires_at", unix_now() - 1), ("expires_at", None), ("revoked_at", unix_now())):
        with database.transaction() as session:
            session.execute(update(ApiKey).where(ApiKey.id == key_id).values({column: value}))
        assert (project_of(database, plain_key) is not None) == (column == "expires_at" and value is None)
    with database.transaction() as session:
        session.delete(session.get_one(ApiKey, key_id))
    assert project_of(database, plain_key) is None


def test_first_key_is_written_privately_and_only_once(database: Database, tmp_path: Path) -> None:
    path = tmp_path / "new" / "admin.key"
    plain_key = ensure_first_key(database, path)
    assert plain_key is not None
    assert path.read_text() == f"{plain_key}\n"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert project_of(database, plain_key) is not None
    assert scopes_of(database, plain_key) == list(SCOPES)
    assert ensure_first_key(database, path) is None
    assert path.read_text() == f"{plain_key}\n"
    assert os.listdir(path.parent) == ["admin.key"]


def test_database_with_a_project_gets_no_first_key(database: Database, tmp_path: Path) -> None:
    add_project(database, "somebody")
    assert ensure_first_key(database, tmp_path / "admin.key") is None
    assert not (tmp_path / "admin.key").exists()


def test_key_that_can_not_be_written_is_not_created(database: Database, tmp_path: Path) -> None:
    """A project whose only key nobody has seen could never be entered, nor made again."""
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        ensure_first_key(database, tmp_path / "file" / "admin.key")
    assert ensure_first_key(database, tmp_path / "admin.key") is not None


def test_of_several_that_start_at_once_one_makes_the_key(database: Database, tmp_path: Path) -> None:
    path, results = tmp_path / "admin.key", []
    barrier = threading.Barrier(8)

    def start() -> None:
        barrier.wait(30)
        results.append(ensure_first_key(database, path))

    threads = [threading.Thread(target=start) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    made = [key for key in results if key is not None]
    assert (len(results), len(made)) == (8, 1)
    assert path.read_text() == f"{made[0]}\n"
    with database.reading() as session:
        assert session.scalar(select(func.count()).select_from(ApiKey)) == 1


def test_lost_key_is_replaced_and_both_open_the_first_project(database: Database, tmp_path: Path) -> None:
    path = tmp_path / "admin.key"
    first = ensure_first_key(database, path)
    assert first is not None
    assert replace_lost_key(database, path) is None
    path.unlink()
    second = replace_lost_key(database, path)
    assert second not in (None, first)
    assert path.read_text() == f"{second}\n"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert project_of(database, str(second)) == project_of(database, first) is not None
    assert scopes_of(database, str(second)) == list(SCOPES)


def test_a_key_that_was_written_and_never_committed_is_replaced(database: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "admin.key"
    ensure_first_key(database, path)
    path.unlink()
    transaction = Database.transaction

    @contextmanager
    def fails_at_the_commit(self: Database) -> Iterator[Session]:
        with transaction(self) as session:
            yield session
            raise Unavailable("the connection was lost")

    monkeypatch.setattr(Database, "transaction", fails_at_the_commit)
    with pytest.raises(Unavailable):
        replace_lost_key(database, path)
    monkeypatch.undo()
    assert project_of(database, path.read_text().strip()) is None
    made = replace_lost_key(database, path)
    assert made is not None
    assert path.read_text() == f"{made}\n"
    assert project_of(database, made) is not None


@pytest.mark.parametrize("content", ["", "not a key", "revoked"])
def test_a_key_file_that_is_something_else_or_was_revoked_stays(database: Database, tmp_path: Path, content: str) -> None:
    path = tmp_path / "admin.key"
    first = ensure_first_key(database, path)
    assert first is not None
    if content == "revoked":
        with database.transaction() as session:
            revoke_key(session, session.get_one(ApiKey, key_id_of(first)), SERVER)
    else:
        path.write_text(content)
    before = path.read_text()
    assert replace_lost_key(database, path) is None
    assert path.read_text() == before


def test_lost_key_is_replaced_only_for_the_first_project(database: Database, tmp_path: Path) -> None:
    add_project(database, "somebody")
    assert replace_lost_key(database, tmp_path / "admin.key") is None
    assert not (tmp_path / "admin.key").exists()


def test_of_several_that_miss_the_key_at_once_one_replaces_it(database: Database, tmp_path: Path) -> None:
    path, results = tmp_path / "admin.key", []
    ensure_first_key(database, path)
    path.unlink()
    barrier = threading.Barrier(8)

    def start() -> None:
        barrier.wait(30)
        results.append(replace_lost_key(database, path))

    threads = [threading.Thread(target=start) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    made = [key for key in results if key is not None]
    assert (len(results), len(made)) == (8, 1)
    assert path.read_text() == f"{made[0]}\n"


def bootstrap(data_dir: Path, database_url: str, *words: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"SDFT_DATA_DIR": str(data_dir), "SDFT_DATABASE_URL": database_url}
    return subprocess.run([sys.executable, "-m", "core.bootstrap", *words], env=environment, cwd=data_dir, text=True, capture_output=True, timeout=60)


def test_bootstrap_prints_the_key_once(database_url: str, database: Database, tmp_path: Path) -> None:
    first, second = bootstrap(tmp_path, database_url), bootstrap(tmp_path, database_url)
    assert (first.returncode, second.returncode) == (0, 0)
    assert project_of(database, (tmp_path / "admin.key").read_text().strip()) is not None
    assert str(tmp_path / "admin.key") in first.stderr
    assert first.stdout == second.stdout == second.stderr == "", "what reads a pipe may be a log"


def test_bootstrap_shows_the_key_to_a_terminal(database_url: str, database: Database, tmp_path: Path) -> None:
    """As `sdft up` starts it: its output goes to where the messages go."""
    ours, theirs = pty.openpty()
    environment = os.environ | {"SDFT_DATA_DIR": str(tmp_path), "SDFT_DATABASE_URL": database_url}
    try:
        subprocess.run([sys.executable, "-m", "core.bootstrap"], env=environment, cwd=tmp_path, stdout=theirs, stderr=theirs, timeout=60, check=True)
        shown = os.read(ours, 10_000).decode()
    finally:
        os.close(ours)
        os.close(theirs)
    assert (tmp_path / "admin.key").read_text().strip() in shown.split()


def test_bootstrap_replaces_a_lost_key_and_says_so(database_url: str, database: Database, tmp_path: Path) -> None:
    bootstrap(tmp_path, database_url)
    first_key = (tmp_path / "admin.key").read_text()
    (tmp_path / "admin.key").unlink()
    second = bootstrap(tmp_path, database_url)
    assert second.returncode == 0
    second_key = (tmp_path / "admin.key").read_text()
    assert second_key != first_key
    assert project_of(database, second_key.strip()) is not None
    assert second.stdout == ""
    (line,) = second.stderr.splitlines()
    assert line.startswith(f"{tmp_path / 'admin.key'} was missing or unknown to the database, so a new API key was made")


@pytest.mark.parametrize(("word", "status"), [("--help", 0), ("--no-such-option", 2)])
def test_bootstrap_with_words_makes_nothing(tmp_path: Path, word: str, status: int) -> None:
    result = bootstrap(tmp_path / "..", f"sqlite:///{tmp_path}/data/database.sqlite3", word)
    assert (result.returncode, list(tmp_path.iterdir())) == (status, [])
    assert "usage: python -m core.bootstrap" in result.stdout + result.stderr


def test_bootstrap_on_an_empty_database_says_what_to_do(empty_database_url: str, tmp_path: Path) -> None:
    result = bootstrap(tmp_path, empty_database_url)
    assert result.returncode == 1
    assert "python -m migrations" in result.stderr
    assert "Traceback" not in result.stderr


def test_valid_keys_among_given_ones(database: Database) -> None:
    with database.transaction() as session:
        project_id = create_project(session, "p").id
        good, later, expired, revoked = (create_key(session, project_id, "k", expires) for expires in (None, unix_now() + 60, unix_now() - 1, None))
        session.get_one(ApiKey, revoked.split("_")[1]).revoked_at = unix_now()
    ids = [key.split("_")[1] for key in (good, later, expired, revoked)]
    with database.reading() as session:
        assert valid_keys(session, [*ids, "unknown0"]) == set(ids[:2])
        assert valid_keys(session, []) == set()
