"""Attempts in this process, with a scripted trainer: what every ending of a trainer makes of its job."""

import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
from sqlalchemy import delete, select, update

from core.errors import StorageFull
from core.jobs.transitions import claim_for_training, release_expired_leases, request_cancellation
from core.storage import Check, LocalStorage, StoredObject
from core.tables.jobs import Checkpoint, Job, JobEvent, JobMetrics
from core.tables.models import Model
from sdft_engine.contract.machine_clock import machine_seconds
from sdft_engine.contract.run_directory import Attestation
from sdft_engine.contract.sealed_directory import ATTESTATION_NAME
from tests.fixtures.scripted_inference import ScriptedInference
from tests.fixtures.scripted_model import state_after
from tests.rows import assert_sound, get_job, messages_of
from tests.worker.conftest import ROWS, Workshop, demonstration_file, demonstration_line
from worker import run_preparation
from worker.devices import DeviceGroup
from worker.supervisor import train


def train_next(workshop: Workshop) -> None:
    claimed_at = machine_seconds()
    with workshop.database.transaction() as session:
        claim = claim_for_training(session, workshop.resources.settings.lease_seconds)
    assert claim is not None
    train(workshop.resources, claim, claimed_at, DeviceGroup())


def train_in_background(workshop: Workshop) -> threading.Thread:
    thread = threading.Thread(target=train_next, args=(workshop,))
    thread.start()
    return thread


def wait_for(condition: Callable[[], bool], seconds: float = 60) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "the condition did not come true in time"
        time.sleep(0.05)


def wait_for_step(workshop: Workshop, job_id: str, step: int) -> None:
    wait_for(lambda: (get_job(workshop.database, job_id).step or 0) >= step)


def trainers() -> list[psutil.Process]:
    return [child for child in psutil.Process().children(recursive=True) if "scripted_trainer.py" in " ".join(child.cmdline())]


def metric_steps(workshop: Workshop, job_id: str) -> list[tuple[int, int]]:
    """(step, attempt that measured it), in order."""
    with workshop.database.reading() as session:
        return [(row.step, row.attempt) for row in session.scalars(select(JobMetrics).where(JobMetrics.job_id == job_id).order_by(JobMetrics.step))]


def final_state(workshop: Workshop, job_id: str, inference: ScriptedInference) -> int:
    with workshop.database.reading() as session:
        model = session.scalars(select(Model).where(Model.job_id == job_id, Model.step.is_(None))).one()
    return inference.adapters[model.serving_name]


def test_a_finished_run_becomes_a_servable_model(workshop: Workshop, inference: ScriptedInference) -> None:
    job_id = workshop.add_job(suffix="lamps")
    train_next(workshop)
    job = get_job(workshop.database, job_id)
    assert (job.status, job.step, job.total_steps, job.trained_tokens, job.error) == ("succeeded", 12, 12, 1200, None)
    assert_sound(workshop.database, job_id)
    with workshop.database.reading() as session:
        model = session.get_one(Model, job.fine_tuned_model)
        checkpoints = session.scalars(select(Checkpoint).where(Checkpoint.job_id == job_id).order_by(Checkpoint.step)).all()
        metrics_events = session.scalars(select(JobEvent).where(JobEvent.job_id == job_id, JobEvent.type == "metrics").order_by(JobEvent.sequence)).all()
    assert model.id == f"ft:tiny:default:lamps:{job_id[-12:]}"
    assert model.status == "servable"
    assert model.attestation is not None
    assert model.attestation["matched"] is True
    assert final_state(workshop, job_id, inference) == state_after(12, ROWS)
    assert [checkpoint.step for checkpoint in checkpoints] == [4, 8, 12]
    assert checkpoints[0].metrics["step"] == 4
    assert checkpoints[0].model_id == f"{model.id}:ckpt-step-4"
    assert [event.data["step"] for event in metrics_events if event.data] == list(range(1, 13))
    assert metrics_events[2].message.startswith("Step 3/12: training loss=")
    assert job.resolved_hyperparameters is not None
    assert job.resolved_hyperparameters["temperature"] == 0.5
    assert trainers() == []


def test_the_trainer_sees_no_secret_of_the_service(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its environment holds what it needs; the service's settings, which may hold passwords, stay outside."""
    monkeypatch.setenv("SDFT_DATABASE_URL", "postgresql://canary")
    monkeypatch.setenv("OMP_WAIT_POLICY", "active")
    workshop.script(steps=4, at={"1": {"2": "hang"}})
    job_id = workshop.add_job()
    thread = train_in_background(workshop)
    wait_for(lambda: bool(trainers()))
    environment = trainers()[0].environ()
    with workshop.database.transaction() as session:
        request_cancellation(session, job_id)
    os.killpg(trainers()[0].pid, 9)
    thread.join()
    assert "canary" not in str(environment)
    assert environment["OMP_WAIT_POLICY"] == "passive"
    assert environment["HF_HUB_OFFLINE"] == "1"
    assert [name for name in environment if name.startswith("SDFT_")] == []


@pytest.mark.parametrize("how", ["kill", "crash"])
def test_after_a_crash_the_next_attempt_resumes_and_ends_where_an_undisturbed_run_ends(workshop: Workshop, inference: ScriptedInference, how: str) -> None:
    workshop.script(at={"1": {"7": how}})
    job_id = workshop.add_job()
    train_next(workshop)
    job = get_job(workshop.database, job_id)
    assert (job.status, job.attempt, job.lost_leases, job.step) == ("queued", 1, 1, 6)
    train_next(workshop)
    job = get_job(workshop.database, job_id)
    assert (job.status, job.attempt, job.trained_tokens) == ("succeeded", 2, 1200)
    assert "resumed at step 4" in messages_of(workshop.database, job_id)
    assert metric_steps(workshop, job_id) == [(step, 1 if step <= 4 else 2) for step in range(1, 13)]
    assert final_state(workshop, job_id, inference) == state_after(12, ROWS)
    assert_sound(workshop.database, job_id)


def test_the_result_says_how_much_was_trained(workshop: Workshop) -> None:
    """The measurements of some steps may be lost with a worker that was killed before they became rows."""
    workshop.script(at={"1": {"7": "kill"}})
    job_id = workshop.add_job()
    train_next(workshop)
    with workshop.database.transaction() as session:
        session.execute(delete(JobMetrics).where(JobMetrics.job_id == job_id))
    train_next(workshop)
    job = get_job(workshop.database, job_id)
    assert (job.status, job.step, job.total_steps, job.trained_tokens) == ("succeeded", 12, 12, 1200)


def test_the_report_of_a_crash_holds_exit_status_and_log(workshop: Workshop) -> None:
    workshop.script(at={"1": {"2": "crash"}})
    job_id = workshop.add_job()
    train_next(workshop)
    with workshop.database.reading() as session:
        event = session.scalars(select(JobEvent).where(JobEvent.job_id == job_id, JobEvent.level == "warn")).one()
    assert event.message.startswith("The trainer ended without a result (exit status 3); attempt 2 follows. The last lines of its log:\n")
    assert "RuntimeError: as the script says" in event.message


def test_three_crashes_fail_the_job(workshop: Workshop) -> None:
    workshop.script(at={str(attempt): {"2": "crash"} for attempt in (1, 2, 3)})
    job_id = workshop.add_job()
    for _ in range(3):
        train_next(workshop)
    job = get_job(workshop.database, job_id)
    assert job.status == "failed"
    assert job.error is not None
    assert job.error["code"] == "trainer_crashed"
    assert "follows" not in job.error["message"]
    follows = [message.partition("; ")[2].partition(" follows")[0] for message in messages_of(workshop.database, job_id) if " follows" in message]
    assert follows == ["attempt 2", "attempt 3"]
    assert_sound(workshop.database, job_id)


def test_a_typed_failure_reaches_the_job_unchanged(workshop: Workshop) -> None:
    workshop.script(at={"1": {"6": "fail:out_of_memory"}})
    job_id = workshop.add_job()
    train_next(workshop)
    job = get_job(workshop.database, job_id)
    assert (job.status, job.error) == ("failed", {"code": "out_of_memory", "message": "as the script says", "param": "method"})
    assert job.step == 5, "what was measured before the failure is kept"
    assert_sound(workshop.database, job_id)


def test_a_lost_lease_kills_the_group_and_writes_nothing_more(workshop: Workshop) -> None:
    workshop.script(steps=1000, step_seconds=0.05, at={"1": {"2": "child"}})
    job_id = workshop.add_job()
    thread = train_in_background(workshop)
    wait_for_step(workshop, job_id, 3)
    child = next(int(message.removeprefix("child ")) for message in messages_of(workshop.database, job_id) if message.startswith("child "))
    with workshop.database.transaction() as session:
        session.execute(update(Job).where(Job.id == job_id).values(lease_until=0))
        assert release_expired_leases(session, 3) == [job_id]
    steps, events = metric_steps(workshop, job_id), messages_of(workshop.database, job_id)
    thread.join(20)
    assert not thread.is_alive()
    assert get_job(workshop.database, job_id).status == "queued"
    assert metric_steps(workshop, job_id) == steps
    assert messages_of(workshop.database, job_id) == events
    assert trainers() == []
    assert not psutil.pid_exists(child) or psutil.Process(child).status() == psutil.STATUS_ZOMBIE


@pytest.mark.parametrize("damage", ["flip", "gone"])
def test_a_damaged_checkpoint_is_passed_over(workshop: Workshop, inference: ScriptedInference, damage: str) -> None:
    workshop.script(at={"1": {"11": "kill"}})
    job_id = workshop.add_job()
    train_next(workshop)
    with workshop.database.reading() as session:
        newest = session.scalars(select(Checkpoint).where(Checkpoint.job_id == job_id).order_by(Checkpoint.step.desc())).first()
    assert newest is not None
    assert newest.step == 8
    path: Path = workshop.resources.storage.path_of(newest.storage_key)  # type: ignore[attr-defined]
    if damage == "gone":
        path.unlink()
    else:
        content = bytearray(path.read_bytes())
        content[600] ^= 1
        path.write_bytes(content)
    train_next(workshop)
    messages = messages_of(workshop.database, job_id)
    assert "The checkpoint of step 8 is damaged or gone; the one of step 4 is tried" in messages
    assert "resumed at step 4" in messages
    assert get_job(workshop.database, job_id).status == "succeeded"
    assert final_state(workshop, job_id, inference) == state_after(12, ROWS)
    with workshop.database.reading() as session:
        replaced = session.scalars(select(Checkpoint).where(Checkpoint.job_id == job_id, Checkpoint.step == 8)).one()
    assert replaced.storage_key != newest.storage_key, "no key is written twice"
    assert workshop.resources.storage.exists(replaced.storage_key)
    assert not path.exists()


def test_a_checkpoint_that_the_trainer_refuses_is_not_tried_again(workshop: Workshop) -> None:
    workshop.script(at={"1": {"11": "kill"}, "2": {"9": "fail:checkpoint_damaged"}})
    job_id = workshop.add_job()
    train_next(workshop)
    train_next(workshop)
    assert get_job(workshop.database, job_id).status == "queued"
    train_next(workshop)
    assert get_job(workshop.database, job_id).status == "succeeded"
    messages = messages_of(workshop.database, job_id)
    assert "The checkpoint of step 8 can't be used (as the script says); any further attempt tries the one of step 4" in messages
    assert [message for message in messages if message.startswith("resumed")] == ["resumed at step 8", "resumed at step 4"]


def test_after_the_only_checkpoint_was_refused_the_next_attempt_starts_from_the_beginning(workshop: Workshop, inference: ScriptedInference) -> None:
    workshop.script(at={"1": {"6": "kill"}, "2": {"5": "fail:checkpoint_damaged"}})
    job_id = workshop.add_job()
    for _ in range(3):
        train_next(workshop)
    messages = messages_of(workshop.database, job_id)
    said = "The checkpoint of step 4 can't be used (as the script says); any further attempt starts from the beginning, as there is none before it"
    assert said in messages
    assert [message for message in messages if message.startswith("resumed")] == ["resumed at step 4"]
    assert final_state(workshop, job_id, inference) == state_after(12, ROWS)


def test_a_checkpoint_damaged_on_disk_is_not_stored(workshop: Workshop) -> None:
    """Written right, damaged before it is carried to storage."""
    workshop.script(step_seconds=0, checkpoint_every=1, at={"1": {"6": "damage"}})
    job_id = workshop.add_job()
    train_next(workshop)
    with workshop.database.reading() as session:
        steps = session.scalars(select(Checkpoint.step).where(Checkpoint.job_id == job_id).order_by(Checkpoint.step)).all()
    assert 5 not in steps
    assert {4, 6} <= set(steps)
    assert "The checkpoint of step 5 was damaged and is not kept" in messages_of(workshop.database, job_id)


def test_half_a_metrics_line_waits_for_its_end(workshop: Workshop) -> None:
    workshop.script(at={"1": {"5": "half_a_line"}})
    job_id = workshop.add_job()
    train_next(workshop)
    assert [step for step, _ in metric_steps(workshop, job_id)] == list(range(1, 13))


def test_continuing_from_a_model_starts_from_its_adapter(workshop: Workshop, inference: ScriptedInference) -> None:
    first = workshop.add_job()
    train_next(workshop)
    parent = get_job(workshop.database, first).fine_tuned_model
    workshop.script(steps=0)
    second = workshop.add_job(parent_model=parent)
    train_next(workshop)
    assert get_job(workshop.database, second).status == "succeeded"
    assert final_state(workshop, second, inference) == state_after(12, ROWS)
    with workshop.database.reading() as session:
        assert session.scalars(select(Model.parent_model).where(Model.job_id == second)).one() == parent


def test_a_deleted_parent_fails_the_job(workshop: Workshop) -> None:
    first = workshop.add_job()
    train_next(workshop)
    parent = get_job(workshop.database, first).fine_tuned_model
    with workshop.database.transaction() as session:
        session.execute(update(Model).where(Model.id == parent).values(status="deleted"))
    second = workshop.add_job(parent_model=parent)
    train_next(workshop)
    job = get_job(workshop.database, second)
    assert job.error is not None
    assert (job.status, job.error["code"], job.error["param"]) == ("failed", "model_not_found", "model")


def test_a_parent_of_another_revision_of_the_base_model_fails_the_job(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    first = workshop.add_job()
    train_next(workshop)
    parent = get_job(workshop.database, first).fine_tuned_model
    second = workshop.add_job(parent_model=parent)
    fetch = run_preparation.fetch_directory

    def fetch_parent(*arguments: Any) -> Path:
        directory = fetch(*arguments)
        attestation = Attestation.model_validate_json((directory / ATTESTATION_NAME).read_bytes())
        (directory / ATTESTATION_NAME).write_text(attestation.model_copy(update={"base": "hub:somebody/tiny@1"}).model_dump_json())
        return directory

    monkeypatch.setattr(run_preparation, "fetch_directory", fetch_parent)
    (entry,) = workshop.resources.settings.base_models
    changed = entry.model_copy(update={"source": "hub:somebody/tiny", "revision": "2"})
    cache_dir = workshop.resources.settings.cache_dir
    changed.directory(cache_dir).symlink_to(entry.directory(cache_dir))
    workshop.resources.settings = workshop.resources.settings.model_copy(update={"base_models": [changed]})
    train_next(workshop)
    job = get_job(workshop.database, second)
    assert job.error is not None
    assert (job.status, job.error["code"]) == ("failed", "base_model_unusable")


def test_a_bug_in_the_supervisor_fails_the_job_and_names_no_internals(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*arguments: object) -> None:
        raise RuntimeError("secret detail")

    monkeypatch.setattr("worker.supervisor.publish", broken)
    job_id = workshop.add_job()
    train_next(workshop)
    job = get_job(workshop.database, job_id)
    assert job.error is not None
    assert (job.status, job.error["code"]) == ("failed", "server_error")
    assert "secret detail" not in job.error["message"]
    assert_sound(workshop.database, job_id)


def test_a_full_disk_fails_the_job_and_says_so(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    write_file = LocalStorage.write_file

    states: list[str] = []

    def full(storage: LocalStorage, key: str, path: Path, check: Check) -> StoredObject:
        if key.startswith("checkpoints/"):
            states.append(key)
        if len(states) == 2:
            raise StorageFull("as the test says")
        return write_file(storage, key, path, check)

    monkeypatch.setattr(LocalStorage, "write_file", full)
    job_id = workshop.add_job()
    train_next(workshop)
    job = get_job(workshop.database, job_id)
    assert job.error is not None
    assert (job.status, job.error["code"]) == ("failed", "disk_full")
    with workshop.database.reading() as session:
        (intact,) = session.scalars(select(Checkpoint).where(Checkpoint.job_id == job_id)).all()
    assert intact.step == 4
    assert workshop.resources.storage.exists(intact.storage_key)
    assert_sound(workshop.database, job_id)


def test_bulky_files_of_a_run_are_removed_and_its_records_stay(workshop: Workshop) -> None:
    questions = workshop.add_file(b'{"probe": "sums", "question": "1+1?", "answers": ["2"]}')
    job_id = workshop.add_job(validation_file_id=workshop.add_file(), method={"type": "sdft", "sdft": {"hyperparameters": {}, "retention_file": questions}})
    train_next(workshop)
    assert get_job(workshop.database, job_id).status == "succeeded"
    left = {path.name for path in (workshop.resources.settings.runs_dir / job_id / "attempt-1").iterdir()}
    assert left == {"config.json", "control.json", "metrics.jsonl", "events.jsonl", "result.json", "trainer.log"}


def test_rows_that_validation_dropped_are_not_trained(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("worker.supervisor.discard_bulk", lambda run: None)
    content = demonstration_line("What? " * 400, "Too long.") + b"\n\n" + demonstration_file()
    workshop.add_job(content=content, method={"type": "sdft", "sdft": {"hyperparameters": {"over_length": "drop"}}})
    workshop.script(steps=1)
    train_next(workshop)
    (run_dir,) = (workshop.resources.settings.runs_dir).glob("*/attempt-1")
    assert (run_dir / "train.jsonl").read_bytes() == b"\n\n" + demonstration_file()  # each line keeps its number


def test_adapter_states_differ_by_step() -> None:
    """The scripted model would notice a step left out or done twice."""
    assert len({state_after(steps, ROWS) for steps in range(20)}) == 20
