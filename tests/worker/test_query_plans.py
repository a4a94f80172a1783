"""What is asked every second, or of every object, is answered from indexes: tables grow for years."""

import threading
from collections.abc import Callable

import pytest
from sqlalchemy import event, select
from sqlalchemy.orm import Session

from api.files.service import _unfinished_jobs_with
from api.fine_tuning.jobs.queue_view import _usual_seconds
from api.measurements import _deliveries
from core.database import Database, unix_now
from core.jobs.leases import lease_has_expired
from core.jobs.queue import work_waits
from core.model_exports import export_is_waiting
from core.tables.files import File
from core.webhooks.deliveries import claim_delivery, delete_old_deliveries, delivery_is_due
from tests.worker.conftest import Workshop
from worker.checkpoint_retention import discard_states_of_ended_jobs, discard_superseded_states
from worker.stored_objects import referenced
from worker.verification import Verifier

GROWING = ("fine_tuning_jobs", "models", "files", "checkpoints", "webhook_deliveries", "model_exports", "job_events", "job_metrics")

IN_A_SESSION: dict[str, Callable[[Session], object]] = {
    "expired leases": lease_has_expired,
    "waiting work": lambda session: work_waits(session, 2),
    "due deliveries": delivery_is_due,
    "a claimed delivery": lambda session: claim_delivery(session, 60),
    "old deliveries": lambda session: delete_old_deliveries(session, 100),
    "measured deliveries": _deliveries,
    "waiting exports": export_is_waiting,
    "latest durations": _usual_seconds,
    "expired files": lambda session: session.scalars(select(File).where(File.expires_at <= unix_now())).all(),
    "jobs that need a file": lambda session: session.scalar(_unfinished_jobs_with("file-1")),
}
BY_A_WORKER: dict[str, Callable[[Workshop], object]] = {
    "referenced objects": lambda workshop: referenced(workshop.database, ["a", "b"]),
    "models to verify": lambda workshop: Verifier(workshop.resources).verify_waiting(),
    "a claimed model": lambda workshop: Verifier(workshop.resources)._claim(),
    "superseded states": lambda workshop: discard_superseded_states(workshop.resources),
    "states of ended jobs": lambda workshop: discard_states_of_ended_jobs(workshop.resources),
}


def scans(database: Database, ask: Callable[[], object]) -> list[str]:
    """The tables that SQLite reads row by row to answer."""
    asked: list[tuple[str, object]] = []
    me = threading.get_ident()

    def note(connection: object, cursor: object, statement: str, parameters: object, *rest: object) -> None:
        if threading.get_ident() == me and statement.startswith(("SELECT", "UPDATE", "DELETE")):
            asked.append((statement, parameters))

    event.listen(database.engine, "before_cursor_execute", note)
    ask()
    event.remove(database.engine, "before_cursor_execute", note)
    assert asked
    with database.engine.connect() as connection:
        plans = [row[3] for statement, parameters in asked for row in connection.exec_driver_sql(f"EXPLAIN QUERY PLAN {statement}", parameters)]
    return [plan for plan in plans if plan.startswith("SCAN") and any(table in plan for table in GROWING) and "INDEX" not in plan]


@pytest.mark.parametrize("question", IN_A_SESSION)
def test_questions_that_are_asked_often_scan_no_table(sqlite_database: Database, question: str) -> None:
    def ask() -> None:
        with sqlite_database.transaction() as session:
            IN_A_SESSION[question](session)

    assert scans(sqlite_database, ask) == []


@pytest.mark.parametrize("question", BY_A_WORKER)
def test_what_every_worker_asks_scans_no_table(workshop: Workshop, question: str) -> None:
    assert scans(workshop.database, lambda: BY_A_WORKER[question](workshop)) == []
