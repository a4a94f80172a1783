"""Jobs over a bucket on bad days (fault 16): nothing counts before it is stored, and an outage costs nothing but time."""

import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from sqlalchemy import select

from core.database import Database
from core.jobs.transitions import claim_for_validation, request_cancellation
from core.settings import Settings
from core.tables.exports import ModelExport
from core.tables.files import File
from core.tables.jobs import Checkpoint
from core.tables.models import Model
from sdft_engine.contract.machine_clock import machine_seconds
from tests.fixtures.faulty_proxy import EVERY, Fault, FaultyProxy, uploads
from tests.fixtures.s3_server import Bucket
from tests.fixtures.scripted_inference import ScriptedInference
from tests.fixtures.scripted_model import state_after
from tests.rows import assert_sound, get_job, messages_of
from tests.worker.conftest import ROWS, Workshop, workshop_of
from tests.worker.test_supervisor import final_state, train_in_background, train_next, wait_for
from worker.validation import validate

WAITS = "The object storage can't be reached or fails; the job waits for it"
DOWN = Fault("status", EVERY, status=503)


@pytest.fixture
def remote(
    worker_settings: Callable[..., Settings],
    sqlite_database: Database,
    tmp_path: Path,
    bucket: Bucket,
    proxy: FaultyProxy,
    monkeypatch: pytest.MonkeyPatch,
) -> Workshop:
    """A worker whose storage is a bucket behind the proxy, and which waits for it in short pauses."""
    for name in ("FIRST_PAUSE_SECONDS", "LONGEST_PAUSE_SECONDS"):
        monkeypatch.setattr(f"worker.storage_outages.{name}", 0.2)
    monkeypatch.setattr("worker.checkpoint_import.AFTER_OUTAGE_SECONDS", 0.2)
    workshop = workshop_of(worker_settings(lease_seconds=10, heartbeat_seconds=0.5, poll_seconds=0.2), sqlite_database, tmp_path)
    workshop.resources.storage = bucket.storage(proxy.url)
    return workshop


def keys_of_rows(workshop: Workshop) -> list[str]:
    columns = (File.storage_key, Model.storage_key, ModelExport.storage_key, Checkpoint.storage_key)
    with workshop.database.reading() as session:
        return sorted(key for column in columns for key in session.scalars(select(column)) if key is not None)


def assert_stored_and_nothing_else(workshop: Workshop, bucket: Bucket) -> None:
    assert bucket.keys() == keys_of_rows(workshop)
    assert bucket.unfinished_uploads() == []


def checkpoint_steps(workshop: Workshop, job_id: str) -> list[int]:
    with workshop.database.reading() as session:
        return list(session.scalars(select(Checkpoint.step).where(Checkpoint.job_id == job_id).order_by(Checkpoint.step)))


def test_a_job_runs_over_a_bucket_and_resumes_from_it(remote: Workshop, bucket: Bucket, inference: ScriptedInference) -> None:
    remote.script(at={"1": {"7": "kill"}})
    job_id = remote.add_job()
    train_next(remote)
    train_next(remote)
    assert get_job(remote.database, job_id).status == "succeeded"
    assert "resumed at step 4" in messages_of(remote.database, job_id)
    assert final_state(remote, job_id, inference) == state_after(12, ROWS)
    assert_stored_and_nothing_else(remote, bucket)


@pytest.mark.parametrize("kind", ["status", "cut_request", "cut_answer", "lost_answer"])
def test_failures_that_pass_are_not_noticed(remote: Workshop, bucket: Bucket, proxy: FaultyProxy, kind: str) -> None:
    """Every third request goes wrong."""
    job_id = remote.add_job()
    proxy.faults = [Fault(kind, EVERY, lambda method, path: len(proxy.seen) % 3 == 0, after_bytes=100)]  # type: ignore[arg-type]
    train_next(remote)
    assert get_job(remote.database, job_id).status == "succeeded"
    assert checkpoint_steps(remote, job_id) == [4, 8, 12]
    assert_sound(remote.database, job_id)
    assert_stored_and_nothing_else(remote, bucket)


@pytest.mark.parametrize("fault", [DOWN, Fault("cut_request", EVERY, uploads, after_bytes=100), Fault("lie", EVERY, uploads)], ids=lambda fault: fault.kind)
def test_a_trainer_goes_on_while_storage_is_away_and_its_model_waits_for_it(
    remote: Workshop, bucket: Bucket, proxy: FaultyProxy, inference: ScriptedInference, fault: Fault
) -> None:
    job_id = remote.add_job()
    proxy.faults = [replace(fault, meant=lambda method, path: fault.meant(method, path) and get_job(remote.database, job_id).step is not None)]
    thread = train_in_background(remote)
    wait_for(lambda: WAITS in messages_of(remote.database, job_id))
    assert get_job(remote.database, job_id).step == 12, "trained to its end"
    time.sleep(1)
    job = get_job(remote.database, job_id)
    assert (job.status, job.fine_tuned_model) == ("running", None)
    assert checkpoint_steps(remote, job_id) == []
    proxy.faults = []
    thread.join(30)
    job = get_job(remote.database, job_id)
    assert (job.status, job.attempt) == ("succeeded", 1)
    assert checkpoint_steps(remote, job_id) == [4, 8, 12]
    assert final_state(remote, job_id, inference) == state_after(12, ROWS)
    assert_sound(remote.database, job_id)
    assert set(keys_of_rows(remote)) <= set(bucket.keys())
    if fault is not DOWN:  # else what was stored just before could not be deleted, and is left to the garbage collection
        assert_stored_and_nothing_else(remote, bucket)


def test_an_outage_while_the_model_is_published_is_waited_for(remote: Workshop, bucket: Bucket, proxy: FaultyProxy, inference: ScriptedInference) -> None:
    job_id = remote.add_job()
    proxy.faults = [Fault("status", EVERY, lambda method, path: method == "PUT" and "/models/" in path and is_after_checkpoints())]

    def is_after_checkpoints() -> bool:
        return checkpoint_steps(remote, job_id) == [4, 8, 12]

    thread = train_in_background(remote)
    wait_for(lambda: WAITS in messages_of(remote.database, job_id))
    assert get_job(remote.database, job_id).phase == "publishing"
    proxy.faults = []
    thread.join(30)
    assert get_job(remote.database, job_id).status == "succeeded"
    assert messages_of(remote.database, job_id).count(WAITS) == 1
    assert_stored_and_nothing_else(remote, bucket)


def test_a_job_that_waits_can_be_cancelled(remote: Workshop, bucket: Bucket, proxy: FaultyProxy) -> None:
    job_id = remote.add_job()
    proxy.faults = [Fault("status", EVERY, uploads)]
    thread = train_in_background(remote)
    wait_for(lambda: WAITS in messages_of(remote.database, job_id))
    with remote.database.transaction() as session:
        assert request_cancellation(session, job_id)
    thread.join(20)
    assert not thread.is_alive()
    assert get_job(remote.database, job_id).status == "cancelled"
    assert_sound(remote.database, job_id)
    assert_stored_and_nothing_else(remote, bucket)


def test_a_worker_that_ends_does_not_wait(remote: Workshop, proxy: FaultyProxy) -> None:
    job_id = remote.add_job()
    proxy.faults = [DOWN]
    thread = train_in_background(remote)
    wait_for(lambda: WAITS in messages_of(remote.database, job_id))
    remote.resources.stopping.set()
    thread.join(10)
    assert not thread.is_alive()
    job = get_job(remote.database, job_id)
    assert (job.status, job.lost_leases) == ("queued", 0)


def test_a_job_that_waited_for_long_goes_back_to_the_queue_uncharged(remote: Workshop, proxy: FaultyProxy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("worker.storage_outages.PATIENCE_SECONDS", 0.5)
    job_id = remote.add_job()
    proxy.faults = [DOWN]
    train_next(remote)
    job = get_job(remote.database, job_id)
    assert (job.status, job.lost_leases) == ("queued", 0)
    assert any(message.startswith("The object storage could not be reached for long") for message in messages_of(remote.database, job_id))
    proxy.faults = []
    train_next(remote)
    assert get_job(remote.database, job_id).status == "succeeded"


def test_a_checkpoint_that_can_not_be_fetched_is_not_taken_for_damaged(remote: Workshop, proxy: FaultyProxy, inference: ScriptedInference) -> None:
    remote.script(at={"1": {"11": "kill"}})
    job_id = remote.add_job()
    train_next(remote)
    proxy.faults = [Fault("status", EVERY, lambda method, path: "/checkpoints/" in path)]
    thread = train_in_background(remote)
    wait_for(lambda: WAITS in messages_of(remote.database, job_id))
    proxy.faults = []
    thread.join(30)
    messages = messages_of(remote.database, job_id)
    assert "resumed at step 8" in messages
    assert not any("damaged" in message for message in messages)
    assert final_state(remote, job_id, inference) == state_after(12, ROWS)


def test_validation_waits_too(remote: Workshop, proxy: FaultyProxy) -> None:
    job_id = remote.add_job("validating_files")
    proxy.faults = [DOWN]
    claimed_at = machine_seconds()
    with remote.database.transaction() as session:
        claim = claim_for_validation(session, remote.resources.settings.lease_seconds)
    assert claim is not None
    thread = threading.Thread(target=validate, args=(remote.resources, claim, claimed_at))
    thread.start()
    wait_for(lambda: WAITS in messages_of(remote.database, job_id))
    proxy.faults = []
    thread.join(30)
    assert get_job(remote.database, job_id).status == "queued"


def test_a_training_file_that_storage_damaged_fails_the_job(remote: Workshop, bucket: Bucket) -> None:
    job_id = remote.add_job()
    (key,) = bucket.keys()
    content = b"".join(remote.resources.storage.read(key))
    bucket.replace(key, content.replace(b"lamp 7", b"lamp 8"))
    train_next(remote)
    job = get_job(remote.database, job_id)
    assert job.error is not None
    assert (job.status, job.error["code"]) == ("failed", "storage_damaged")


HANGS = 25.0
"""More than a worker that ends may wait for."""


@pytest.fixture
def in_a_hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("worker.held_lease.FINISH_SECONDS", 1.0)


def silent(meant: Callable[[str, str], bool]) -> Fault:
    return Fault("hang", EVERY, meant, seconds=HANGS)


@pytest.mark.usefixtures("in_a_hurry")
@pytest.mark.parametrize("phase", ["reading its files", "fetching its checkpoint", "storing a checkpoint", "publishing"])
def test_a_worker_that_ends_lets_go_of_a_store_that_hangs(remote: Workshop, proxy: FaultyProxy, phase: str) -> None:
    """Killed in the midst of it, it would leave the job to its lease, and charged."""
    remote.script(step_seconds=0.1, at={"1": {"6": "kill"}} if phase == "fetching its checkpoint" else {})
    job_id = remote.add_job()
    if phase == "fetching its checkpoint":
        train_next(remote)
    charged = get_job(remote.database, job_id).lost_leases
    meant = {
        "reading its files": lambda method, path: "/files/" in path,
        "fetching its checkpoint": lambda method, path: "/checkpoints/" in path,
        "storing a checkpoint": lambda method, path: "/checkpoints/" in path,
        "publishing": lambda method, path: method == "PUT" and "/models/" in path and checkpoint_steps(remote, job_id) == [4, 8, 12],
    }[phase]
    proxy.faults = [silent(meant)]
    thread = train_in_background(remote)
    wait_for(lambda: proxy.faults[0].times < EVERY)
    remote.resources.stopping.set()
    thread.join(8)
    assert not thread.is_alive()
    job = get_job(remote.database, job_id)
    assert (job.status, job.lost_leases, job.lease_token) == ("queued", charged, None)


@pytest.mark.usefixtures("in_a_hurry")
def test_a_cancelled_job_does_not_wait_for_its_upload(remote: Workshop, proxy: FaultyProxy) -> None:
    remote.script(step_seconds=0.1)
    job_id = remote.add_job()
    proxy.faults = [silent(uploads)]
    thread = train_in_background(remote)
    wait_for(lambda: proxy.faults[0].times < EVERY)
    with remote.database.transaction() as session:
        assert request_cancellation(session, job_id)
    thread.join(10)
    assert not thread.is_alive()
    assert get_job(remote.database, job_id).status == "cancelled"


def test_a_worker_that_ends_lets_go_of_a_validation_that_hangs(remote: Workshop, proxy: FaultyProxy) -> None:
    job_id = remote.add_job("validating_files")
    proxy.faults = [silent(lambda method, path: True)]
    claimed_at = machine_seconds()
    with remote.database.transaction() as session:
        claim = claim_for_validation(session, remote.resources.settings.lease_seconds)
    assert claim is not None
    thread = threading.Thread(target=validate, args=(remote.resources, claim, claimed_at))
    thread.start()
    wait_for(lambda: proxy.faults[0].times < EVERY)
    remote.resources.stopping.set()
    thread.join(8)
    assert not thread.is_alive()
    job = get_job(remote.database, job_id)
    assert (job.status, job.lost_leases, job.lease_token) == ("validating_files", 0, None)
