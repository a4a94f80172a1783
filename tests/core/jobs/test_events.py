import re
import threading
from pathlib import Path

from sqlalchemy import event, select

from core.database import Database
from core.jobs.events import NewEvent, append_event, append_events, upsert_metrics
from core.tables.jobs import JobEvent, JobMetrics
from tests.rows import add_job, add_project, messages_of


def test_replayed_step_replaces_its_metrics(database: Database) -> None:
    job_id = add_job(database, add_project(database))
    other = add_job(database, add_project(database, "other"))
    with database.transaction() as session:
        for step in (1, 2, 3):
            upsert_metrics(session, job_id, 1, {step: {"train_loss": step / 10}})
        upsert_metrics(session, other, 1, {2: {"train_loss": 9.0}})
    with database.transaction() as session:
        upsert_metrics(session, job_id, 2, {2: {"train_loss": 0.5, "valid_loss": None}, 4: {"train_loss": 0.7}})
    with database.reading() as session:
        rows = session.scalars(select(JobMetrics).where(JobMetrics.job_id == job_id).order_by(JobMetrics.step)).all()
        assert [(row.step, row.attempt, row.metrics) for row in rows] == [
            (1, 1, {"train_loss": 0.1}),
            (2, 2, {"train_loss": 0.5, "valid_loss": None}),
            (3, 1, {"train_loss": 0.3}),
            (4, 2, {"train_loss": 0.7}),
        ]
        assert session.get_one(JobMetrics, (other, 2)).metrics == {"train_loss": 9.0}


def test_events_keep_their_order_and_their_data(database: Database) -> None:
    job_id = add_job(database, add_project(database))
    with database.transaction() as session:
        append_event(session, job_id, "first")
        append_event(session, job_id, "second", level="warn", type="metrics", data={"step": 1, "text": "ü\u2028"})
    with database.transaction() as session:
        append_event(session, job_id, "third", level="error")
    assert messages_of(database, job_id) == ["first", "second", "third"]
    with database.reading() as session:
        second = session.scalars(select(JobEvent).where(JobEvent.message == "second")).one()
    assert second.id.startswith("ftevent-")
    assert (second.level, second.type, second.data) == ("warn", "metrics", {"step": 1, "text": "ü\u2028"})


def test_many_events_at_once_keep_their_order_and_lock_the_job_once(database: Database) -> None:
    job_id = add_job(database, add_project(database))
    statements: list[str] = []
    event.listen(database.engine, "before_cursor_execute", lambda connection, cursor, statement, *rest: statements.append(statement))
    with database.transaction() as session:
        append_events(session, job_id, [NewEvent(str(number)) for number in range(2500)])
    assert messages_of(database, job_id) == [str(number) for number in range(2500)]
    assert len([statement for statement in statements if "FROM fine_tuning_jobs" in statement]) == 1
    if database.engine.dialect.name == "postgresql":  # to SQLite, which is not far away, each insert goes by itself
        assert len(statements) < 50


def test_events_of_one_job_become_visible_in_their_order(database: Database) -> None:
    """Whoever has read an event has read all before it: a second writer waits until the first one has committed."""
    project_id = add_project(database)
    job_id, other = add_job(database, project_id), add_job(database, project_id)

    def append_second() -> None:
        with database.transaction() as session:
            append_event(session, job_id, "second")

    second = threading.Thread(target=append_second)
    with database.transaction() as session:
        append_event(session, job_id, "first")
        session.flush()
        second.start()
        if database.engine.dialect.name == "postgresql":  # SQLite has one writer at a time anyway
            with database.transaction() as others:
                append_event(others, other, "of another job, which waits for nobody")
        second.join(0.5)
        assert second.is_alive()
        assert messages_of(database, job_id) == []
    second.join(10)
    assert messages_of(database, job_id) == ["first", "second"]


def test_only_append_event_writes_events() -> None:
    """It is what keeps their order."""
    root = Path(__file__).parents[3]
    writers = [
        path
        for room in ("api", "core", "worker")
        for path in (root / room).rglob("*.py")
        if re.search(r"JobEvent\(|insert(_for)?\(.*JobEvent\b", path.read_text())
    ]
    assert [str(path.relative_to(root)) for path in writers] == ["core/jobs/events.py", "core/tables/jobs.py"]


def test_an_event_that_is_written_again_is_one(database: Database) -> None:
    """As after a commit whose answer got lost."""
    job_id = add_job(database, add_project(database))
    events = [NewEvent("first"), NewEvent("second")]
    for written in (events[:1], events, [*events, NewEvent("third")]):
        with database.transaction() as session:
            append_events(session, job_id, written)
    assert messages_of(database, job_id) == ["first", "second", "third"]


def test_what_no_database_stores_keeps_no_event_from_being_told(database: Database) -> None:
    job_id = add_job(database, add_project(database))
    with database.transaction() as session:
        append_event(session, job_id, "a\x00b", data={"k\x00": ["\x00", {"x": "\x00"}, 1, None]})
    assert messages_of(database, job_id) == ["a\ufffdb"]
    with database.reading() as session:
        assert session.scalars(select(JobEvent.data)).one() == {"k\ufffd": ["\ufffd", {"x": "\ufffd"}, 1, None]}
