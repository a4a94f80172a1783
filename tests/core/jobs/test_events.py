import threading
from pathlib import Path

from sqlalchemy import select

from core.database import Database
from core.jobs.events import append_event, upsert_metrics
from core.tables.jobs import JobEvent, JobMetrics
from tests.rows import add_job, add_project, messages_of


def test_replayed_step_replaces_its_metrics(database: Database) -> None:
    job_id = add_job(database, add_project(database))
    other = add_job(database, add_project(database, "other"))
    with database.transaction() as session:
        for step in (1, 2, 3):
            upsert_metrics(session, job_id, step, 1, {"train_loss": step / 10})
        upsert_metrics(session, other, 2, 1, {"train_loss": 9.0})
    with database.transaction() as session:
        upsert_metrics(session, job_id, 2, 2, {"train_loss": 0.5, "valid_loss": None})
    with database.reading() as session:
        rows = session.scalars(select(JobMetrics).where(JobMetrics.job_id == job_id).order_by(JobMetrics.step)).all()
        assert [(row.step, row.attempt, row.metrics) for row in rows] == [
            (1, 1, {"train_loss": 0.1}),
            (2, 2, {"train_loss": 0.5, "valid_loss": None}),
            (3, 1, {"train_loss": 0.3}),
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
    writers = [path for room in ("api", "core", "worker") for path in (root / room).rglob("*.py") if "JobEvent(" in path.read_text()]
    assert [str(path.relative_to(root)) for path in writers] == ["core/jobs/events.py", "core/tables/jobs.py"]
