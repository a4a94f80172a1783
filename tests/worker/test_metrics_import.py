"""Lines of a run's files into rows: whole lines only, once each, and none lost while the database is away."""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import select

from core.jobs.leases import LeaseLost
from core.jobs.transitions import claim_for_training, release_expired_leases
from core.tables.jobs import Job, JobEvent, JobMetrics
from sdft_engine.contract.run_directory import RunDirectory, append_line
from tests.fixtures.scripted_trainer import measure
from tests.rows import get_job, messages_of
from tests.worker.conftest import Workshop
from worker.held_lease import HeldLease
from worker.metrics_import import ProgressImport
from worker.run_preparation import PreparedRun


class Run:
    """A held job with an empty run directory."""

    def __init__(self, workshop: Workshop, lease: HeldLease, path: Path) -> None:
        self.workshop = workshop
        self.lease = lease
        self.directory = RunDirectory(path)
        self.job_id = lease.claim.job_id
        self.progress = self.importer()

    def importer(self, trained_tokens: int = 0, resume_step: int = 0) -> ProgressImport:
        prepared = PreparedRun(get_job(self.workshop.database, self.job_id), "default", resume_step, trained_tokens)
        return ProgressImport(self.directory, self.lease, prepared)

    def write_step(self, step: int, state: int = 1, total: int = 10, seconds: float = 2.0) -> None:
        append_line(self.directory.metrics_path, measure(step, total, state, seconds).model_dump_json())

    def rows(self) -> list[JobMetrics]:
        with self.workshop.database.reading() as session:
            return list(session.scalars(select(JobMetrics).where(JobMetrics.job_id == self.job_id).order_by(JobMetrics.step)))

    def job(self) -> Job:
        return get_job(self.workshop.database, self.job_id)


@pytest.fixture
def run(workshop: Workshop, tmp_path: Path) -> Iterator[Run]:
    workshop.add_job()
    path = tmp_path / "run"
    path.mkdir()
    with workshop.database.transaction() as session:
        claim = claim_for_training(session, 10)
    assert claim is not None
    with HeldLease(workshop.resources, claim, time.time()) as lease:
        yield Run(workshop, lease, path)


def test_nothing_written_yet_is_no_error(run: Run) -> None:
    assert run.progress.import_new() is True
    assert run.rows() == []


def test_steps_become_rows_events_and_progress(run: Run) -> None:
    for step in (1, 2, 3):
        run.write_step(step, state=1234)
    before = time.time()
    run.progress.import_new()
    job = run.job()
    assert [(row.step, row.attempt, row.metrics["train_loss"]) for row in run.rows()] == [(1, 1, 0.1234), (2, 1, 0.1234), (3, 1, 0.1234)]
    assert (job.step, job.total_steps, job.phase, job.trained_tokens) == (3, 10, "training", 300)
    assert job.estimated_finish_at is not None
    assert job.estimated_finish_at == pytest.approx(before + 14, abs=1)  # seven steps of two seconds
    with run.workshop.database.reading() as session:
        event = session.scalars(select(JobEvent).where(JobEvent.job_id == run.job_id).order_by(JobEvent.sequence.desc())).first()
    assert event is not None
    assert (event.type, event.message) == ("metrics", "Step 3/10: training loss=0.1234")
    assert event.data is not None
    assert (event.data["step"], event.data["total_steps"], event.data["train_loss"], event.data["step_seconds"]) == (3, 10, 0.1234, 2.0)
    assert "valid_loss" not in event.data, "what was not measured is left out"


def test_the_second_import_takes_only_what_is_new(run: Run) -> None:
    run.write_step(1)
    run.progress.import_new()
    run.progress.import_new()
    run.write_step(2)
    run.progress.import_new()
    assert [message for message in messages_of(run.workshop.database, run.job_id) if message.startswith("Step")] == [
        "Step 1/10: training loss=0.0001",
        "Step 2/10: training loss=0.0001",
    ]
    assert run.job().trained_tokens == 200


def test_an_unfinished_line_waits(run: Run) -> None:
    line = measure(1, 10, 1, 1).model_dump_json()
    run.directory.metrics_path.write_text(line[:40])
    run.progress.import_new()
    assert run.rows() == []
    run.directory.metrics_path.write_text(line + "\n" + line[:10])
    run.progress.import_new()
    assert [row.step for row in run.rows()] == [1]


def test_a_line_longer_than_a_block_is_read(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("worker.metrics_import.MAX_BYTES", 16)
    run.write_step(1)
    run.write_step(2)
    run.progress.import_rest()
    assert [row.step for row in run.rows()] == [1, 2]


def test_a_replayed_step_replaces_its_metrics(run: Run) -> None:
    run.write_step(5, state=1)
    run.progress.import_new()
    run.directory.metrics_path.unlink()
    run.write_step(5, state=2)
    resumed = run.importer(trained_tokens=400, resume_step=4)
    resumed.import_new()
    assert [(row.step, row.metrics["train_loss"]) for row in run.rows()] == [(5, 0.0002)]
    assert run.job().trained_tokens == 500


def test_events_keep_level_and_data_and_settle_hyperparameters(run: Run) -> None:
    run.directory.append_event("Careful", level="warn", data={"why": "test"})
    run.directory.append_event("Settled", data={"resolved": {"temperature": 0.5}})
    run.progress.import_new()
    with run.workshop.database.reading() as session:
        rows = session.scalars(select(JobEvent).where(JobEvent.job_id == run.job_id).order_by(JobEvent.sequence)).all()
    assert (rows[0].level, rows[0].type, rows[0].message, rows[0].data) == ("warn", "message", "Careful", {"why": "test"})
    resolved = run.job().resolved_hyperparameters
    assert resolved is not None
    assert (resolved["temperature"], resolved["batch_size"]) == (0.5, 4)


def test_events_never_hold_a_nul(run: Run) -> None:
    """Postgres stores none."""
    run.directory.append_event("a\0b", data={"k\0": ["x\0", {"y": "\0"}]})
    run.progress.import_new()
    with run.workshop.database.reading() as session:
        (row,) = session.scalars(select(JobEvent).where(JobEvent.job_id == run.job_id)).all()
    assert (row.message, row.data) == ("a\ufffdb", {"k\ufffd": ["x\ufffd", {"y": "\ufffd"}]})


@pytest.mark.parametrize("line", ["nonsense", "[]", '{"level": "info"}', "null"])
def test_a_line_that_is_no_record_is_passed_over(run: Run, line: str) -> None:
    append_line(run.directory.events_path, line)
    append_line(run.directory.metrics_path, line)
    run.directory.append_event("after it")
    run.write_step(1)
    run.progress.import_new()
    assert messages_of(run.workshop.database, run.job_id) == ["after it", "Step 1/10: training loss=0.0001"]


def test_how_much_could_not_be_read_is_said_once(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    message = "The trainer wrote measurements that can't be read and are left out: 3"
    for line in ("nonsense", '{"step": 1}'):
        append_line(run.directory.metrics_path, line)
    with monkeypatch.context() as patch:
        patch.setattr(run.lease, "try_write", lambda change: False)
        run.write_step(1)
        assert run.progress.import_new() is False
    run.progress.import_new()
    append_line(run.directory.metrics_path, "null")
    run.progress.import_rest()
    with run.workshop.database.reading() as session:
        (event,) = session.scalars(select(JobEvent).where(JobEvent.job_id == run.job_id, JobEvent.level == "warn")).all()
    assert (event.message, event.data) == (message, {"unreadable_lines": 3})
    assert [row.step for row in run.rows()] == [1]


def test_lines_are_kept_while_the_database_is_away(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    run.write_step(1)
    run.directory.append_event("hello")
    with monkeypatch.context() as patch:
        patch.setattr(run.lease, "try_write", lambda change: False)
        assert run.progress.import_new() is False
    run.write_step(2)
    run.progress.import_rest()
    assert [row.step for row in run.rows()] == [1, 2]
    assert messages_of(run.workshop.database, run.job_id)[0] == "hello"
    assert run.job().trained_tokens == 200


def test_a_commit_whose_answer_got_lost_writes_nothing_twice(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    run.write_step(1)
    run.directory.append_event("hello")
    write = run.lease.try_write

    def lost(change: Any) -> bool:
        assert write(change)
        return False

    with monkeypatch.context() as patch:
        patch.setattr(run.lease, "try_write", lost)
        assert run.progress.import_new() is False
        run.write_step(2)
        assert run.progress.import_new() is False
    run.directory.append_event("bye")
    run.progress.import_rest()
    told = messages_of(run.workshop.database, run.job_id)
    assert sorted(message.partition(":")[0] for message in told) == ["Step 1/10", "Step 2/10", "bye", "hello"]
    assert [row.step for row in run.rows()] == [1, 2]
    assert run.job().trained_tokens == 200


def test_a_lost_lease_writes_nothing(run: Run) -> None:
    run.write_step(1)
    with run.workshop.database.transaction() as session:
        session.get_one(Job, run.job_id).lease_until = 0
        session.flush()
        release_expired_leases(session, 3)
    events = messages_of(run.workshop.database, run.job_id)
    with pytest.raises(LeaseLost):
        run.progress.import_new()
    assert run.rows() == []
    assert messages_of(run.workshop.database, run.job_id) == events
