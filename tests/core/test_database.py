import socket
import subprocess
import sys
import threading
import time
from contextlib import ExitStack
from typing import Any

import pytest
from sqlalchemy import event, func, select, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.pool import QueuePool
from structlog.testing import capture_logs

from core.database import POSTGRES_LINK, Database, database_now
from core.errors import StorageFull, Unavailable
from core.tables.projects import Project
from tests.rows import add_project, get_job


def count_projects(database: Database) -> int:
    with database.reading() as session:
        return session.scalar(select(func.count()).select_from(Project)) or 0


def test_transaction_commits_at_the_end_of_its_block(database: Database) -> None:
    with database.transaction() as session:
        session.add(Project(id="proj-1", name="first", created_at=0))
        assert count_projects(database) == 0
    assert count_projects(database) == 1


def test_transaction_rolls_back_on_an_exception(database: Database) -> None:
    def fail_halfway() -> None:
        with database.transaction() as session:
            session.add(Project(id="proj-1", name="first", created_at=0))
            session.flush()
            raise RuntimeError("in the middle")

    with pytest.raises(RuntimeError):
        fail_halfway()
    assert count_projects(database) == 0


def test_rows_stay_readable_after_the_commit(database: Database) -> None:
    with database.transaction() as session:
        project = Project(id="proj-1", name="first", created_at=0)
        session.add(project)
    assert project.name == "first"


def test_database_clock_is_in_unix_seconds_and_advances_within_a_transaction(database: Database) -> None:
    with database.reading() as session:
        first = session.scalar(select(database_now()))
        time.sleep(0.05)
        second = session.scalar(select(database_now()))
    assert first == pytest.approx(time.time(), abs=2)
    assert 0.04 < second - first < 2


def test_exhausted_pool_is_a_503_and_recovers(database_url: str) -> None:
    database = Database(database_url, pool_timeout_seconds=0.1)
    with ExitStack() as held:
        for _ in range(40):
            held.enter_context(database.reading()).execute(text("select 1"))
        with pytest.raises(Unavailable) as caught, database.reading() as session:
            session.execute(text("select 1"))
    assert caught.value.status == 503
    assert int(caught.value.headers["retry-after"]) > 0
    assert count_projects(database) == 0
    database.close()


def test_a_process_has_no_more_connections_than_it_was_given(database_url: str) -> None:
    database = Database(database_url, connections=4, pool_timeout_seconds=0.1)
    with ExitStack() as held:
        for _ in range(4):
            held.enter_context(database.reading()).execute(text("select 1"))
        with pytest.raises(Unavailable), database.reading() as session:
            session.execute(text("select 1"))
    database.close()


def test_unreachable_postgres_is_a_503() -> None:
    database = Database("postgresql://nobody@/nothing?host=/nonexistent")
    with pytest.raises(Unavailable), database.reading() as session:
        session.execute(text("select 1"))


def test_a_postgres_machine_that_vanishes_is_waited_for_seconds(postgres_url: str) -> None:
    """Nobody breaks such a connection off; the kernel does, as the connection's own options say."""
    database, own_words = Database(postgres_url), Database(f"{postgres_url}{'&' if '?' in postgres_url else '?'}connect_timeout=7&keepalives_idle=77")

    def link(database: Database) -> dict[str, str]:
        with database.engine.connect() as connection:
            driver: Any = connection.connection.driver_connection
            return {name: value for name, value in driver.info.get_parameters().items() if name in POSTGRES_LINK}

    assert link(database) == {name: str(value) for name, value in POSTGRES_LINK.items()}
    assert link(own_words) == {name: str(value) for name, value in POSTGRES_LINK.items()} | {"connect_timeout": "7", "keepalives_idle": "77"}
    database.close()
    own_words.close()


def test_a_postgres_that_takes_connections_and_is_silent_is_a_503(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(POSTGRES_LINK, "connect_timeout", 2)  # the least that the driver knows
    with socket.create_server(("127.0.0.1", 0)) as silent:
        database = Database(f"postgresql://nobody@127.0.0.1:{silent.getsockname()[1]}/nothing")
        started = time.monotonic()
        with pytest.raises(Unavailable), database.reading() as session:
            session.execute(text("select 1"))
        assert time.monotonic() - started < 10


def test_the_log_has_the_words_of_the_database_and_not_the_answer() -> None:
    database = Database("postgresql://somebody:hidden-word@127.0.0.1:1/nothing")
    with capture_logs() as lines, pytest.raises(Unavailable) as caught, database.reading() as session:
        session.execute(text("select 1"))
    assert [line["event"] for line in lines] == ["database_failed"]
    assert "connection refused" in lines[0]["error"].lower()
    assert "hidden-word" not in str(lines)
    assert "refused" not in caught.value.message


@pytest.mark.parametrize(
    ("code", "error"),
    [("53100", StorageFull), ("25006", Unavailable), ("25P03", Unavailable), ("40P01", Unavailable), ("25P02", DBAPIError), ("XX000", DBAPIError)],
    ids=["disk full", "read only after a failover", "idle transaction ended", "deadlock", "transaction failed before", "internal error"],
)
def test_what_postgres_says_is_told_apart(postgres_url: str, code: str, error: type[Exception]) -> None:
    database = Database(postgres_url)
    with pytest.raises(error), database.transaction() as session:
        session.execute(text(f"DO $$ BEGIN RAISE EXCEPTION 'so it is' USING ERRCODE = '{code}'; END $$"))
    database.close()


def test_wrong_statement_is_not_taken_for_a_busy_database(database: Database) -> None:
    with pytest.raises(DBAPIError), database.reading() as session:
        session.execute(text("select * from no_such_table"))


def test_foreign_keys_find_their_tables_whichever_a_caller_imports(sqlite_database: Database) -> None:
    project_id = add_project(sqlite_database)
    program = f"""
from core.database import Database
from core.tables.jobs import Job
with Database({str(sqlite_database.engine.url)!r}).transaction() as session:
    session.add(Job(id="ftjob-1", project_id={project_id!r}, status="queued", model="m", base_model="m",
                    training_file_id="file-1", method={{}}, seed=0, created_at=0))
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)
    assert get_job(sqlite_database, "ftjob-1").status == "queued"


def test_sqlite_is_durable_and_checks_foreign_keys(sqlite_database: Database) -> None:
    with sqlite_database.transaction() as session:
        settings = {name: session.scalar(text(f"PRAGMA {name}")) for name in ("journal_mode", "synchronous", "foreign_keys")}
    assert settings == {"journal_mode": "wal", "synchronous": 2, "foreign_keys": 1}


def test_sqlite_writers_wait_for_each_other_and_lose_no_update(sqlite_database: Database) -> None:
    """Reading and then writing in one transaction: without the lock at its start, this fails or loses updates."""
    with sqlite_database.transaction() as session:
        session.add(Project(id="proj-1", name="counter", created_at=0))

    def add_25() -> None:
        for _ in range(25):
            with sqlite_database.transaction() as session:
                project = session.get_one(Project, "proj-1")
                project.created_at += 1

    threads = [threading.Thread(target=add_25) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    with sqlite_database.reading() as session:
        assert session.get_one(Project, "proj-1").created_at == 200


def test_sqlite_writers_of_one_process_wait_in_turn(sqlite_database: Database) -> None:
    """Without asking SQLite again and again: they wait before they take a connection."""

    def write() -> None:
        with sqlite_database.transaction() as session:
            session.execute(text("UPDATE projects SET created_at = created_at"))

    threads = [threading.Thread(target=write) for _ in range(8)]
    with sqlite_database.transaction() as session:
        session.execute(select(1))
        for thread in threads:
            thread.start()
        time.sleep(0.2)
        assert isinstance(sqlite_database.engine.pool, QueuePool)
        assert sqlite_database.engine.pool.checkedout() == 1
        assert all(thread.is_alive() for thread in threads)
    for thread in threads:
        thread.join(30)
    assert not any(thread.is_alive() for thread in threads)


def test_a_writer_whose_turn_does_not_come_gets_a_503(sqlite_database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("core.database.SQLITE_BUSY_SECONDS", 0.1)
    refused: list[Exception] = []

    def write() -> None:
        try:
            with sqlite_database.transaction():
                pass
        except Unavailable as error:
            refused.append(error)

    with sqlite_database.transaction():
        thread = threading.Thread(target=write)
        thread.start()
        thread.join()
    assert len(refused) == 1
    write()
    assert len(refused) == 1


def test_sqlite_readers_do_not_wait_for_a_writer(sqlite_database: Database) -> None:
    with sqlite_database.transaction() as session:
        session.add(Project(id="proj-1", name="first", created_at=0))
        session.flush()
        started = time.monotonic()
        assert count_projects(sqlite_database) == 0
        assert time.monotonic() - started < 1


def test_sqlite_that_stays_locked_is_a_503(sqlite_url: str, sqlite_database: Database) -> None:
    impatient = Database(sqlite_url)
    event.listen(impatient.engine, "connect", lambda connection, record: connection.execute("PRAGMA busy_timeout = 50"))
    with sqlite_database.transaction() as holder:
        holder.execute(select(1))
        with pytest.raises(Unavailable), impatient.transaction() as session:
            session.execute(select(1))
    with impatient.transaction() as session:
        session.add(Project(id="proj-1", name="first", created_at=0))
    impatient.close()


def test_full_disk_is_a_507(sqlite_database: Database) -> None:
    event.listen(sqlite_database.engine, "connect", lambda connection, record: connection.execute("PRAGMA max_page_count = 40"))
    with pytest.raises(StorageFull), sqlite_database.transaction() as session:
        session.add(Project(id="proj-1", name="x" * 1_000_000, created_at=0))
    assert count_projects(sqlite_database) == 0


def test_a_frozen_transaction_loses_its_row_locks(postgres_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that freezes inside a transaction must not keep a job from everybody else."""
    monkeypatch.setattr("core.database.IDLE_IN_TRANSACTION_SECONDS", 1)
    frozen, other = Database(postgres_url), Database(postgres_url)

    def freeze_while_another_writes() -> None:
        with frozen.transaction() as held:
            held.execute(text("LOCK TABLE projects"))
            with other.transaction() as waiting:
                waiting.execute(text("SET LOCAL lock_timeout = '20s'"))
                waiting.add(Project(id="proj-2", name="free", created_at=0.0))
            held.execute(text("SELECT 1"))

    with pytest.raises(Unavailable):
        freeze_while_another_writes()
    assert count_projects(other) == 1
    frozen.close()
    other.close()
