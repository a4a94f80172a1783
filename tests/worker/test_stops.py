"""Attempts that are stopped: by a cancellation, a pause or a deploy."""

import time
from types import SimpleNamespace
from typing import Any

import pytest
from sqlalchemy import func, select

from core.jobs.transitions import claim_for_training, request_cancellation, request_pause, resume
from core.tables.jobs import Checkpoint
from sdft_engine.contract.run_directory import StopReason
from tests.fixtures.scripted_inference import ScriptedInference
from tests.fixtures.scripted_model import state_after
from tests.rows import assert_sound, get_job, messages_of
from tests.worker.conftest import ROWS, Workshop
from tests.worker.test_supervisor import final_state, train_in_background, train_next, trainers, wait_for, wait_for_step
from worker import supervisor
from worker.held_lease import StopRequested


def test_cancel_stops_at_a_step_boundary(workshop: Workshop) -> None:
    workshop.script(steps=1000, step_seconds=0.05)
    job_id = workshop.add_job()
    thread = train_in_background(workshop)
    wait_for_step(workshop, job_id, 3)
    asked_at = time.monotonic()
    with workshop.database.transaction() as session:
        assert request_cancellation(session, job_id)
    thread.join(20)
    assert time.monotonic() - asked_at < 5
    assert get_job(workshop.database, job_id).status == "cancelled"
    assert_sound(workshop.database, job_id)
    assert trainers() == []


def newest_checkpoint(workshop: Workshop, job_id: str) -> int | None:
    with workshop.database.reading() as session:
        return session.scalar(select(func.max(Checkpoint.step)).where(Checkpoint.job_id == job_id))


@pytest.mark.parametrize("step_seconds", [0.1, 2.0])
def test_a_paused_job_keeps_its_step_and_goes_on_when_resumed(
    workshop: Workshop, inference: ScriptedInference, monkeypatch: pytest.MonkeyPatch, step_seconds: float
) -> None:
    """However long its steps take: nobody is in a hurry, so no trainer is killed for it."""
    monkeypatch.setattr("worker.supervisor.GRACE_SECONDS", supervisor.GRACE_SECONDS | {"cancel": 0.2, "requeue": 0.2})
    workshop.script(steps=60, step_seconds=step_seconds)
    job_id = workshop.add_job()
    thread = train_in_background(workshop)
    wait_for_step(workshop, job_id, 1)
    with workshop.database.transaction() as session:
        assert request_pause(session, job_id)
    thread.join(20)
    job = get_job(workshop.database, job_id)
    assert (job.status, job.lost_leases, job.lease_token) == ("paused", 0, None)
    assert newest_checkpoint(workshop, job_id) == job.step, "the trainer wrote a checkpoint of the step it stopped at"
    assert trainers() == []
    assert_sound(workshop.database, job_id)
    workshop.script(steps=60)
    with workshop.database.transaction() as session:
        assert claim_for_training(session, 60) is None, "nobody takes it up by itself"
    with workshop.database.transaction() as session:
        assert resume(session, job_id)
    train_next(workshop)
    assert (get_job(workshop.database, job_id).status, get_job(workshop.database, job_id).attempt) == ("succeeded", 2)
    assert final_state(workshop, job_id, inference) == state_after(60, ROWS)


def test_a_pause_taken_back_after_the_trainer_stopped_puts_the_job_in_the_queue(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    workshop.script(steps=60, step_seconds=0.1)
    job_id = workshop.add_job()
    conclude = supervisor._conclude

    def late(*arguments: Any) -> None:
        with workshop.database.transaction() as session:
            assert resume(session, job_id)
        conclude(*arguments)

    monkeypatch.setattr(supervisor, "_conclude", late)
    thread = train_in_background(workshop)
    wait_for_step(workshop, job_id, 5)
    with workshop.database.transaction() as session:
        assert request_pause(session, job_id)
    thread.join(20)
    assert get_job(workshop.database, job_id).status == "queued"
    assert any("The pause was taken back" in message for message in messages_of(workshop.database, job_id))


def test_a_trainer_that_does_not_stop_is_killed(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("worker.supervisor.GRACE_SECONDS", {"cancel": 0.5, "requeue": 0.5})
    workshop.script(at={"1": {"3": "hang"}})
    job_id = workshop.add_job()
    thread = train_in_background(workshop)
    wait_for_step(workshop, job_id, 2)
    with workshop.database.transaction() as session:
        request_cancellation(session, job_id)
    thread.join(20)
    assert get_job(workshop.database, job_id).status == "cancelled"
    assert trainers() == []


def test_a_deploy_hands_the_job_back_uncharged_with_its_last_step(workshop: Workshop, inference: ScriptedInference) -> None:
    workshop.script(steps=60, step_seconds=0.1)
    job_id = workshop.add_job()
    thread = train_in_background(workshop)
    wait_for_step(workshop, job_id, 5)
    workshop.resources.stopping.set()
    thread.join(20)
    job = get_job(workshop.database, job_id)
    assert (job.status, job.lost_leases, job.lease_token) == ("queued", 0, None)
    assert any("deploy" in message for message in messages_of(workshop.database, job_id))
    assert newest_checkpoint(workshop, job_id) == job.step, "the trainer wrote a checkpoint of the step it stopped at"
    workshop.resources.stopping.clear()
    workshop.script(steps=60)
    train_next(workshop)
    assert get_job(workshop.database, job_id).status == "succeeded"
    assert final_state(workshop, job_id, inference) == state_after(60, ROWS)


def test_a_pause_taken_back_between_two_looks_fails_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """The lease's thread changes `stop` at any moment."""

    class Lease:
        reads = 0
        stop_asked_at = 0.0

        def check(self) -> None:
            pass

        @property
        def stop(self) -> str | None:
            self.reads += 1
            return "pause" if self.reads == 1 else None

    looks = iter([False, False, True])
    trainer = SimpleNamespace(exited=lambda: next(looks))
    progress = SimpleNamespace(import_new=lambda: False)
    nothing: Any = None
    monkeypatch.setattr(supervisor, "WATCH_SECONDS", 0)
    assert supervisor._watch(trainer, Lease(), progress, nothing) is None  # type: ignore[arg-type]


def test_a_pause_taken_back_after_the_trainer_ended_without_a_result_charges_nothing(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervisor, "GRACE_SECONDS", {"pause": 0.5})  # which kills it
    workshop.script(at={"1": {"3": "hang"}})
    job_id = workshop.add_job()
    conclude = supervisor._conclude

    def late(resources: Any, lease: Any, *arguments: Any) -> None:
        with workshop.database.transaction() as session:
            assert resume(session, job_id)
        wait_for(lambda: lease.stop is None)
        conclude(resources, lease, *arguments)

    monkeypatch.setattr(supervisor, "_conclude", late)
    thread = train_in_background(workshop)
    wait_for_step(workshop, job_id, 2)
    with workshop.database.transaction() as session:
        assert request_pause(session, job_id)
    thread.join(20)
    job = get_job(workshop.database, job_id)
    assert (job.status, job.lost_leases) == ("queued", 0)


def test_a_deploy_while_a_pause_is_awaited_gives_the_trainer_its_time(
    workshop: Workshop, inference: ScriptedInference, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("worker.supervisor.GRACE_SECONDS", supervisor.GRACE_SECONDS | {"requeue": 4})
    workshop.script(steps=60, step_seconds=6.0)
    job_id = workshop.add_job()
    thread = train_in_background(workshop)
    wait_for_step(workshop, job_id, 1)
    with workshop.database.transaction() as session:
        assert request_pause(session, job_id)
    time.sleep(4.5)  # longer than a deploy may take, and the step ends within the time that one may
    workshop.resources.stopping.set()
    thread.join(30)
    job = get_job(workshop.database, job_id)
    assert (job.status, job.step) == ("paused", 2)
    assert newest_checkpoint(workshop, job_id) == 2


@pytest.mark.parametrize(("reason", "said"), [("requeue", "deploy"), ("pause", "The pause was taken back")])
def test_a_job_handed_back_before_it_trained_is_told_why(workshop: Workshop, monkeypatch: pytest.MonkeyPatch, reason: StopReason, said: str) -> None:
    def stop(*arguments: Any) -> None:
        raise StopRequested(reason)

    monkeypatch.setattr(supervisor, "prepare_run", stop)
    job_id = workshop.add_job()
    train_next(workshop)
    assert get_job(workshop.database, job_id).status == "queued"
    (told,) = messages_of(workshop.database, job_id)
    assert said in told
