"""Which training states and checkpoint models are kept, and which go."""

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import select

from core.database import Database, unix_now
from core.inference_servers import InferenceServers
from core.settings import Settings
from core.storage import StoredObject
from core.tables.jobs import JOB_STATUSES, TERMINAL_STATUSES, Checkpoint
from core.tables.models import Model
from tests.fixtures.scripted_inference import ScriptedInference
from tests.fixtures.scripted_model import state_after
from tests.rows import add_job, get_job, messages_of
from tests.worker.conftest import ROWS, Workshop, workshop_of
from tests.worker.test_garbage_collection import add_checkpoint, add_export, add_model, keys_in
from tests.worker.test_supervisor import final_state, train_in_background, train_next, wait_for_step
from worker.checkpoint_retention import delete_surplus_models, discard_states_of_ended_jobs, discard_superseded_states

KEEP = 3


@pytest.fixture
def workshop(worker_settings: Callable[..., Settings], database: Database, database_url: str, tmp_path: Path) -> Workshop:
    """A worker on SQLite and on Postgres."""
    settings = worker_settings(lease_seconds=10, heartbeat_seconds=0.5, poll_seconds=0.2, database_url=database_url)
    return workshop_of(settings, database, tmp_path)


def steps_with_state(workshop: Workshop, job_id: str) -> list[int]:
    """Their objects are there, and no others."""
    with workshop.database.reading() as session:
        rows = session.execute(select(Checkpoint.step, Checkpoint.storage_key).where(Checkpoint.job_id == job_id).order_by(Checkpoint.step)).all()
        others = set(session.scalars(select(Checkpoint.storage_key).where(Checkpoint.job_id != job_id)))
    there = {key for key in keys_in(workshop) if key.startswith("checkpoints/")}
    assert {row.storage_key for row in rows if row.storage_key is not None} == there - others
    return [row.step for row in rows if row.storage_key is not None]


def steps_of_rows(workshop: Workshop, job_id: str) -> list[int]:
    with workshop.database.reading() as session:
        return list(session.scalars(select(Checkpoint.step).where(Checkpoint.job_id == job_id).order_by(Checkpoint.step)))


@pytest.mark.parametrize("status", [status for status in JOB_STATUSES if status not in TERMINAL_STATUSES])
def test_an_unfinished_job_keeps_its_newest_states(workshop: Workshop, status: str) -> None:
    job_id, other = (add_job(workshop.database, workshop.project_id, status) for _ in range(2))
    for step in (50, 10, 30, 20, 40):
        add_checkpoint(workshop, job_id, step)
    add_checkpoint(workshop, other, 1)
    assert discard_states_of_ended_jobs(workshop.resources) == 0
    assert discard_superseded_states(workshop.resources) == 2
    assert steps_with_state(workshop, job_id) == [30, 40, 50]
    assert steps_of_rows(workshop, job_id) == [10, 20, 30, 40, 50], "the rows stay, for their metrics and models"
    assert steps_with_state(workshop, other) == [1]
    assert discard_superseded_states(workshop.resources) == 0


@pytest.mark.parametrize("status", TERMINAL_STATUSES)
def test_a_job_that_has_ended_keeps_no_state(workshop: Workshop, monkeypatch: pytest.MonkeyPatch, status: str) -> None:
    monkeypatch.setattr("worker.checkpoint_retention.STATES_AT_A_TIME", 1)
    ended = add_job(workshop.database, workshop.project_id, status, finished_at=unix_now())
    running = add_job(workshop.database, workshop.project_id, "running", lease_token="t", lease_until=1e12)
    for job_id in (ended, running):
        for step in (10, 20):
            add_checkpoint(workshop, job_id, step)
    assert discard_superseded_states(workshop.resources) == 0
    assert discard_states_of_ended_jobs(workshop.resources) == 2
    assert (steps_with_state(workshop, ended), steps_with_state(workshop, running)) == ([], [10, 20])


def test_a_step_that_is_written_anew_meanwhile_keeps_its_new_state(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    job_id = add_job(workshop.database, workshop.project_id, "running", lease_token="t", lease_until=1e12)
    checkpoints = {step: add_checkpoint(workshop, job_id, step) for step in (10, 20, 30, 40)}
    transaction = Database.transaction

    def write_anew_first(database: Database) -> Any:
        monkeypatch.undo()
        with database.transaction() as session:
            session.get_one(Checkpoint, checkpoints[10].id).storage_key = f"checkpoints/{job_id}/2-10.tar"
        return transaction(database)

    writer = workshop.resources.storage.open_writer(f"checkpoints/{job_id}/2-10.tar")
    stored: StoredObject = writer.commit()
    monkeypatch.setattr(Database, "transaction", write_anew_first)
    assert discard_superseded_states(workshop.resources) == 0
    assert workshop.resources.storage.exists(stored.key)


def test_a_run_whose_states_are_collected_resumes_from_the_newest(workshop: Workshop, inference: ScriptedInference) -> None:
    workshop.script(checkpoint_every=1, at={"1": {"11": "kill"}})
    job_id = workshop.add_job()
    train_next(workshop)
    assert discard_superseded_states(workshop.resources) >= 6
    assert steps_with_state(workshop, job_id) == [8, 9, 10]
    train_next(workshop)
    assert "resumed at step 10" in messages_of(workshop.database, job_id)
    assert not any("damaged" in message for message in messages_of(workshop.database, job_id))
    assert get_job(workshop.database, job_id).status == "succeeded"
    assert final_state(workshop, job_id, inference) == state_after(12, ROWS)


def test_where_all_kept_states_are_damaged_training_starts_from_the_beginning(workshop: Workshop, inference: ScriptedInference) -> None:
    workshop.script(checkpoint_every=2, at={"1": {"12": "kill"}})
    job_id = workshop.add_job()
    train_next(workshop)
    discard_superseded_states(workshop.resources)
    for key in keys_in(workshop):
        if key.startswith("checkpoints/"):
            workshop.resources.storage.path_of(key).write_bytes(b"damaged")  # type: ignore[attr-defined]
    train_next(workshop)
    said = [message for message in messages_of(workshop.database, job_id) if "is damaged or gone" in message]
    assert said[-1] == "The checkpoint of step 6 is damaged or gone; there is none before it, so training starts from the beginning"
    assert final_state(workshop, job_id, inference) == state_after(12, ROWS)


def test_a_checkpoint_that_the_trainer_refuses_is_followed_by_one_that_has_a_state(workshop: Workshop) -> None:
    workshop.script(checkpoint_every=1, at={"1": {"6": "kill"}, "2": {"6": "fail:checkpoint_damaged"}})
    job_id = workshop.add_job()
    train_next(workshop)
    workshop.resources.settings = workshop.resources.settings.model_copy(update={"keep_checkpoints": 1})
    discard_superseded_states(workshop.resources)
    assert steps_with_state(workshop, job_id) == [5]
    train_next(workshop)
    expected = "The checkpoint of step 5 can't be used (as the script says); any further attempt starts from the beginning, as there is none before it"
    assert expected in messages_of(workshop.database, job_id)


def test_states_are_collected_beside_a_running_trainer(workshop: Workshop, inference: ScriptedInference) -> None:
    workshop.script(steps=300, step_seconds=0.05, checkpoint_every=1)
    job_id = workshop.add_job()
    done = threading.Event()

    def collect_all_the_time() -> None:
        while not done.wait(0.05):
            discard_superseded_states(workshop.resources)

    collecting = threading.Thread(target=collect_all_the_time)
    collecting.start()
    try:
        thread = train_in_background(workshop)
        wait_for_step(workshop, job_id, 10)
        workshop.resources.stopping.set()
        thread.join(30)
    finally:
        done.set()
        collecting.join()
    discard_superseded_states(workshop.resources)
    assert get_job(workshop.database, job_id).status == "queued"
    assert len(steps_with_state(workshop, job_id)) == KEEP
    workshop.resources.stopping.clear()
    workshop.script(steps=300, checkpoint_every=50)
    train_next(workshop)
    assert get_job(workshop.database, job_id).status == "succeeded"
    assert final_state(workshop, job_id, inference) == state_after(300, ROWS)


def add_ended_job(workshop: Workshop, losses: dict[int, dict[str, Any]], status: str = "succeeded", **columns: Any) -> str:
    """Ended long enough ago, with a checkpoint and its model at every step of `losses`, and its final model."""
    finished_at = unix_now() - workshop.resources.settings.keep_runs_seconds - 1
    job_id = add_job(workshop.database, workshop.project_id, status, **({"finished_at": finished_at} | columns))
    for step, metrics in losses.items():
        model = add_model(workshop, f"models/{job_id}-{step}.tar.gz", job_id=job_id, step=step)
        add_checkpoint(workshop, job_id, step, storage_key=None, metrics=metrics, model_id=model.id)
    add_model(workshop, f"models/{job_id}.tar.gz", job_id=job_id)
    return job_id


def kept_steps(workshop: Workshop, job_id: str) -> list[int | None]:
    """Of the job's models; None is the final one. What is kept has its object, what is not has none."""
    with workshop.database.reading() as session:
        models = session.scalars(select(Model).where(Model.job_id == job_id).order_by(Model.step.is_(None), Model.step)).all()
    for model in models:
        assert workshop.resources.storage.exists(model.storage_key) == (model.status != "deleted")
    return [model.step for model in models if model.status != "deleted"]


def model_of(workshop: Workshop, job_id: str, step: int) -> Model:
    with workshop.database.reading() as session:
        return session.scalars(select(Model).where(Model.job_id == job_id, Model.step == step)).one()


NOTHING: dict[int, dict[str, Any]] = {step: {} for step in (10, 20, 30, 40, 50, 60)}


@pytest.mark.parametrize("status", TERMINAL_STATUSES)
def test_the_last_models_and_the_final_one_are_kept(workshop: Workshop, status: str) -> None:
    job_id = add_ended_job(workshop, NOTHING, status)
    assert delete_surplus_models(workshop.resources) == 3
    assert kept_steps(workshop, job_id) == [40, 50, 60, None]
    said = "The checkpoint models of steps 10, 20, 30 were deleted; the best, the last 3 and those in use are kept"
    assert messages_of(workshop.database, job_id) == [said]
    assert delete_surplus_models(workshop.resources) == 0


@pytest.mark.parametrize(
    ("losses", "best"),
    [
        ({10: {"valid_loss": 2.0}, 20: {"valid_loss": 1.0}, 30: {"valid_loss": 1.5}}, 20),
        ({10: {"valid_loss": 1.0, "full_valid_loss": 3.0}, 20: {"valid_loss": 2.0, "full_valid_loss": 2.0}}, 20),
        ({10: {"valid_loss": None}, 30: {"valid_loss": 4.0}}, 30),
    ],
)
def test_the_best_model_is_kept(workshop: Workshop, losses: dict[int, dict[str, Any]], best: int) -> None:
    job_id = add_ended_job(workshop, NOTHING | {step: {"valid_loss": 5.0} for step in (40, 50, 60)} | losses)
    delete_surplus_models(workshop.resources)
    assert kept_steps(workshop, job_id) == [best, 40, 50, 60, None]


def test_a_best_model_among_the_last_needs_no_place_of_its_own(workshop: Workshop) -> None:
    job_id = add_ended_job(workshop, {step: {"valid_loss": 100.0 / step} for step in NOTHING})
    delete_surplus_models(workshop.resources)
    assert kept_steps(workshop, job_id) == [40, 50, 60, None]


def test_few_models_all_stay(workshop: Workshop) -> None:
    job_id = add_ended_job(workshop, {10: {}, 20: {}, 30: {}})
    assert delete_surplus_models(workshop.resources) == 0
    assert kept_steps(workshop, job_id) == [10, 20, 30, None]


@pytest.mark.parametrize(
    "columns",
    [{"status": "running", "finished_at": None, "lease_token": "t", "lease_until": 1e12}, {"status": "paused", "finished_at": None}, {"finished_at": 0}],
)
def test_models_of_unfinished_and_of_lately_ended_jobs_stay(workshop: Workshop, columns: dict[str, Any]) -> None:
    """Whoever compares checkpoints has some days for it."""
    if columns["finished_at"] == 0:
        columns = {"finished_at": unix_now() - workshop.resources.settings.keep_runs_seconds + 60}
    job_id = add_ended_job(workshop, NOTHING, **columns)
    assert delete_surplus_models(workshop.resources) == 0
    assert len(kept_steps(workshop, job_id)) == len(NOTHING) + 1


def test_models_that_somebody_uses_stay(workshop: Workshop, inference: ScriptedInference) -> None:
    """A job continues from one, one was exported, and one is loaded in the inference server."""
    job_id = add_ended_job(workshop, NOTHING | {5: {}})
    continued, exported, served = (model_of(workshop, job_id, step) for step in (10, 20, 30))
    add_job(workshop.database, workshop.project_id, "failed", parent_model=continued.id)
    add_export(workshop, exported, "gguf", storage_key="models/exports/e.gguf.tar.gz")
    inference.adapters[served.serving_name] = 1
    assert delete_surplus_models(workshop.resources) == 1
    assert kept_steps(workshop, job_id) == [10, 20, 30, 40, 50, 60, None]
    inference.adapters.clear()
    assert delete_surplus_models(workshop.resources) == 1
    assert kept_steps(workshop, job_id) == [10, 20, 40, 50, 60, None]
    assert messages_of(workshop.database, job_id)[-1].startswith("The checkpoint models of step 30 was deleted")


def test_while_an_inference_server_can_not_be_asked_all_stay(workshop: Workshop) -> None:
    job_id = add_ended_job(workshop, NOTHING)
    urls = [*workshop.resources.settings.inference_urls, "http://127.0.0.1:1"]
    workshop.resources.inference = InferenceServers(workshop.resources.settings.model_copy(update={"inference_urls": urls}))
    assert delete_surplus_models(workshop.resources) == 0
    assert len(kept_steps(workshop, job_id)) == len(NOTHING) + 1


def test_unpacked_files_of_a_deleted_model_go_too(workshop: Workshop) -> None:
    job_id = add_ended_job(workshop, NOTHING)
    directories = {step: workshop.resources.settings.served_adapters_dir / model_of(workshop, job_id, step).serving_name for step in (10, 60)}
    for directory in directories.values():
        directory.mkdir(parents=True)
    delete_surplus_models(workshop.resources)
    assert [step for step, directory in directories.items() if directory.exists()] == [60]


def test_a_job_that_is_created_meanwhile_keeps_its_parent(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    """The row is locked before it is asked who continues from it."""
    job_id = add_ended_job(workshop, NOTHING)
    parent = model_of(workshop, job_id, 10)
    transaction = Database.transaction

    def create_first(database: Database) -> Any:
        monkeypatch.undo()
        add_job(database, workshop.project_id, "queued", parent_model=parent.id)
        return transaction(database)

    monkeypatch.setattr(Database, "transaction", create_first)
    assert delete_surplus_models(workshop.resources) == 2
    assert kept_steps(workshop, job_id) == [10, 40, 50, 60, None]


def test_another_job_s_models_do_not_count(workshop: Workshop) -> None:
    first, second = add_ended_job(workshop, {10: {}, 20: {}}), add_ended_job(workshop, {10: {}, 20: {}})
    assert delete_surplus_models(workshop.resources) == 0
    assert kept_steps(workshop, first) == kept_steps(workshop, second) == [10, 20, None]
