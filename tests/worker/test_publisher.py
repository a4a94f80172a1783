"""Publishing against an inference server that works, lies, fails or is away; and verification later on."""

import csv
import io
import tarfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from sqlalchemy import select, update

from core.database import Database, unix_now
from core.errors import InferenceFailed, InferenceUnavailable
from core.inference_client import AdapterRefused
from core.settings import Settings
from core.tables.files import File
from core.tables.jobs import Checkpoint, Job
from core.tables.models import Model
from sdft_engine.contract.served_attestation import Verdict
from tests.fixtures.scripted_inference import ScriptedInference
from tests.rows import assert_sound, get_job, messages_of
from tests.worker.conftest import Workshop, workshop_of
from tests.worker.test_supervisor import train_next, wait_for
from worker import publisher, verification
from worker.resources import Resources
from worker.verification import Verifier


def models_of(workshop: Workshop, job_id: str) -> dict[int | None, Model]:
    """By step; None is the final one."""
    with workshop.database.reading() as session:
        return {model.step: model for model in session.scalars(select(Model).where(Model.job_id == job_id))}


def stored_keys(workshop: Workshop) -> set[str]:
    root = workshop.resources.settings.storage_dir
    return {str(path.relative_to(root)) for path in root.rglob("*") if path.is_file()}


def referenced_keys(workshop: Workshop) -> set[str]:
    with workshop.database.reading() as session:
        return {key for column in (Model.storage_key, File.storage_key, Checkpoint.storage_key) for key in session.scalars(select(column))}


@pytest.fixture
def quick_retries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("worker.publisher.VERIFICATION_ATTEMPTS", 2)


def test_the_archive_is_what_peft_reads(workshop: Workshop) -> None:
    job_id = workshop.add_job()
    train_next(workshop)
    model = models_of(workshop, job_id)[None]
    with tarfile.open(fileobj=io.BytesIO(b"".join(workshop.resources.storage.read(model.storage_key)))) as archive:
        assert archive.getnames() == ["adapter_config.json", "adapter_model.safetensors", "attestation.json"]
    assert sum(len(chunk) for chunk in workshop.resources.storage.read(model.storage_key)) == model.archive_bytes


def test_the_result_file_is_a_csv_of_every_step(workshop: Workshop) -> None:
    job_id = workshop.add_job()
    train_next(workshop)
    with workshop.database.reading() as session:
        file = session.get_one(File, session.get_one(Job, job_id).result_file_id)
    content = b"".join(workshop.resources.storage.read(file.storage_key))
    assert (file.purpose, file.size_bytes, file.storage_key) == ("fine-tune-results", len(content), f"files/{file.id}")
    assert content.startswith(b"step,train_loss,train_accuracy,valid_loss,valid_mean_token_accuracy,")
    rows = list(csv.DictReader(io.StringIO(content.decode())))
    assert [row["step"] for row in rows] == [str(step) for step in range(1, 13)]
    assert (rows[0]["train_accuracy"], rows[0]["valid_loss"], rows[0]["trained_tokens"]) == ("0.5", "", "100")


def test_no_object_is_without_a_row_and_no_row_without_its_object(workshop: Workshop) -> None:
    workshop.add_job()
    train_next(workshop)
    assert stored_keys(workshop) == referenced_keys(workshop)


def test_a_server_that_ignores_adapters_gets_no_servable_model(workshop: Workshop, inference: ScriptedInference) -> None:
    inference.ignores_adapters = True
    job_id = workshop.add_job()
    train_next(workshop)
    model = models_of(workshop, job_id)[None]
    assert get_job(workshop.database, job_id).status == "succeeded"
    assert model.status == "unverified"
    assert model.attestation is not None
    assert model.attestation["matched"] is False
    warning = next(message for message in messages_of(workshop.database, job_id) if "can't be used for inference" in message)
    assert "answers as if the adapter were not applied" in warning
    assert inference.adapters == {}, "nobody may use it, so it takes no memory"
    verifier = Verifier(workshop.resources)
    assert verifier.verify_waiting() == 4
    assert sum("can't be used for inference" in message for message in messages_of(workshop.database, job_id)) == 4, "each is told of once"
    inference.ignores_adapters = False
    assert verifier.verify_waiting() == 0, "what differed is not tried again so soon"
    assert Verifier(workshop.resources).verify_waiting() == 4, "but by a worker that has just started"
    assert {model.status for model in models_of(workshop, job_id).values()} == {"servable"}
    assert models_of(workshop, job_id)[None].attestation["matched"] is True  # type: ignore[index]
    assert set(inference.adapters) == {model.serving_name}


def test_a_server_that_drifts_gets_no_servable_model(workshop: Workshop, inference: ScriptedInference) -> None:
    inference.drift = 0.2
    job_id = workshop.add_job()
    train_next(workshop)
    assert models_of(workshop, job_id)[None].status == "unverified"


@pytest.mark.usefixtures("quick_retries")
def test_a_server_that_is_away_delays_the_model_not_the_job(
    worker_settings: Callable[..., Settings], sqlite_database: Database, inference: ScriptedInference, tmp_path: Path
) -> None:
    settings = worker_settings(lease_seconds=10, heartbeat_seconds=0.5, inference_urls=["http://127.0.0.1:9"])
    away = workshop_of(settings, sqlite_database, tmp_path)
    job_id = away.add_job()
    train_next(away)
    job, model = get_job(away.database, job_id), models_of(away, job_id)[None]
    assert (job.status, model.status, model.attestation) == ("succeeded", "unverified", None)
    assert any("could not be verified yet" in message for message in messages_of(away.database, job_id))
    assert Verifier(away.resources).verify_waiting() == 0

    away.resources.inference = type(away.resources.inference)(settings.model_copy(update={"inference_urls": [inference.url]}))
    assert Verifier(away.resources).verify_waiting() == 4
    assert {model.status for model in models_of(away, job_id).values()} == {"servable"}
    assert f"{job.fine_tuned_model} is verified and can be used now" in messages_of(away.database, job_id)
    assert_sound(away.database, job_id)


def test_a_hiccup_of_the_server_is_survived(workshop: Workshop, inference: ScriptedInference, monkeypatch: pytest.MonkeyPatch) -> None:
    """The lease holds meanwhile."""
    calls: list[float] = []
    prove = publisher.prove_on_servers

    def counted(*arguments: object) -> Verdict:
        calls.append(time.monotonic())
        if len(calls) == 1:
            raise InferenceUnavailable("as the test says")
        return prove(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(publisher, "prove_on_servers", counted)
    job_id = workshop.add_job()
    train_next(workshop)
    assert len(calls) == 2
    assert models_of(workshop, job_id)[None].status == "servable"


def test_checkpoints_become_servable_and_leave_the_servers_memory(workshop: Workshop, inference: ScriptedInference) -> None:
    job_id = workshop.add_job()
    train_next(workshop)
    assert {step: model.status for step, model in models_of(workshop, job_id).items()} == {None: "servable", 4: "unverified", 8: "unverified", 12: "unverified"}
    verifier = Verifier(workshop.resources)
    assert verifier.verify_waiting() == 3
    assert verifier.verify_waiting() == 0
    models = models_of(workshop, job_id)
    assert {model.status for model in models.values()} == {"servable"}
    assert set(inference.adapters) == {models[None].serving_name}
    assert {path.name for path in workshop.resources.settings.served_adapters_dir.iterdir()} == {models[None].serving_name}


def make_due(workshop: Workshop) -> None:
    with workshop.database.transaction() as session:
        session.execute(update(Model).values(verify_after=None))


def test_a_refused_adapter_is_tried_again_with_patience(workshop: Workshop, inference: ScriptedInference) -> None:
    job_id = workshop.add_job()
    train_next(workshop)
    verifier = Verifier(workshop.resources)
    inference.fails_times = 6  # three loads, and what would unload what may have been loaded
    assert verifier.verify_waiting() == 0
    assert verifier.verify_waiting() == 0, "not before its time"
    make_due(workshop)
    assert verifier.verify_waiting() == 3
    assert models_of(workshop, job_id)[4].status == "servable"


@pytest.mark.parametrize(("error", "longest"), [(AdapterRefused("rank 64"), 3600), (InferenceUnavailable("away"), 60), (InferenceFailed("broken"), 60)])
def test_what_a_server_refuses_is_tried_ever_more_rarely(workshop: Workshop, monkeypatch: pytest.MonkeyPatch, error: Exception, longest: float) -> None:
    """A server that is away is asked every minute, and one that refuses the adapter itself every hour."""
    job_id = workshop.add_job()
    train_next(workshop)

    def refuse(*arguments: object) -> Verdict:
        raise error

    monkeypatch.setattr(verification, "prove_on_servers", refuse)
    verifier = Verifier(workshop.resources)
    delays = []
    for _ in range(13):
        make_due(workshop)
        tried_at = unix_now()
        assert verifier.verify_waiting() == 0
        took = unix_now() - tried_at
        delay = models_of(workshop, job_id)[4].verify_after - tried_at
        delays.append((delay - took - 1, delay + 1))  # the database's clock may have others' seconds
    assert all(least < min(longest, 3.0 * 2**number) < most for number, (least, most) in enumerate(delays))


def test_two_workers_verify_no_model_twice(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each would load it into every server, and the first to end would remove the files that the others serve."""
    job_id = workshop.add_job()
    train_next(workshop)
    prove, proved, lock = verification.prove_on_servers, list[str](), threading.Lock()

    def note(resources: Resources, model: Model) -> Verdict:
        with lock:
            proved.append(model.id)
        time.sleep(0.3)
        return prove(resources, model)

    monkeypatch.setattr(verification, "prove_on_servers", note)
    with ThreadPoolExecutor(3) as threads:
        verdicts = [future.result() for future in [threads.submit(Verifier(workshop.resources).verify_waiting) for _ in range(3)]]
    assert sum(verdicts) == 3
    assert sorted(proved) == sorted(model.id for step, model in models_of(workshop, job_id).items() if step is not None)


def test_an_error_that_nobody_foresaw_keeps_no_other_model_waiting(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    job_id = workshop.add_job()
    train_next(workshop)
    prove = verification.prove_on_servers

    def break_down(resources: Resources, model: Model) -> Verdict:
        if model.step == 4:
            raise RuntimeError("nobody foresaw this")
        return prove(resources, model)

    monkeypatch.setattr(verification, "prove_on_servers", break_down)
    verifier = Verifier(workshop.resources)
    with pytest.raises(RuntimeError):
        verifier.verify_waiting()
    assert verifier.verify_waiting() == 2
    assert {step: model.status for step, model in models_of(workshop, job_id).items() if step} == {4: "unverified", 8: "servable", 12: "servable"}


def test_a_model_of_a_base_that_left_the_catalogue_waits_and_is_not_asked_for(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    workshop.add_job()
    train_next(workshop)
    with workshop.database.transaction() as session:
        session.execute(update(Model).values(base_model="gone"))
    monkeypatch.setattr(verification, "prove_on_servers", None)
    assert Verifier(workshop.resources).verify_waiting() == 0


def test_a_model_deleted_meanwhile_stays_deleted_and_leaves_the_servers_memory(
    workshop: Workshop, inference: ScriptedInference, monkeypatch: pytest.MonkeyPatch
) -> None:
    job_id = workshop.add_job()
    train_next(workshop)
    prove = verification.prove_on_servers

    def delete_first(*arguments: object) -> Verdict:
        with workshop.database.transaction() as session:
            session.execute(update(Model).where(Model.step == 4).values(status="deleted"))
        return prove(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(verification, "prove_on_servers", delete_first)
    Verifier(workshop.resources).verify_waiting()
    deleted = models_of(workshop, job_id)[4]
    assert deleted.status == "deleted"
    assert deleted.serving_name not in inference.adapters
    assert not (workshop.resources.settings.served_adapters_dir / deleted.serving_name).exists()


def test_the_adapter_stays_loaded_where_another_workers_verdict_counts(
    workshop: Workshop, inference: ScriptedInference, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Somebody may be chatting with it by then."""
    job_id = workshop.add_job()
    train_next(workshop)
    prove = verification.prove_on_servers

    def be_slower(*arguments: object) -> Verdict:
        verdict = prove(*arguments)  # type: ignore[arg-type]
        with workshop.database.transaction() as session:
            session.execute(update(Model).where(Model.step == 4).values(status="servable", attestation={"matched": True}))
        return verdict

    monkeypatch.setattr(verification, "prove_on_servers", be_slower)
    Verifier(workshop.resources).verify_waiting()
    verified = models_of(workshop, job_id)[4]
    assert verified.attestation == {"matched": True}
    assert verified.serving_name in inference.adapters
    assert (workshop.resources.settings.served_adapters_dir / verified.serving_name).exists()


def test_a_lease_lost_while_publishing_leaves_nothing(workshop: Workshop, inference: ScriptedInference, monkeypatch: pytest.MonkeyPatch) -> None:
    prove = publisher.prove_on_servers

    def lose_the_lease(*arguments: object) -> Verdict:
        with workshop.database.transaction() as session:
            session.execute(update(Job).values(lease_token="another"))
        return prove(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(publisher, "prove_on_servers", lose_the_lease)
    job_id = workshop.add_job()
    train_next(workshop)
    job = get_job(workshop.database, job_id)
    assert (job.status, job.lease_token, job.fine_tuned_model) == ("running", "another", None)
    assert None not in models_of(workshop, job_id)
    assert stored_keys(workshop) == referenced_keys(workshop)
    assert inference.adapters == {}
    assert len(inference.ever_loaded) == 2, "on trial, and under its serving name"


def test_the_verifiers_thread_ends_with_the_worker(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("worker.verification.LOOK_SECONDS", 0.05)
    job_id = workshop.add_job()
    train_next(workshop)
    thread = threading.Thread(target=Verifier(workshop.resources).run)
    thread.start()
    wait_for(lambda: models_of(workshop, job_id)[4].status == "servable")
    workshop.resources.stopping.set()
    thread.join(20)
    assert not thread.is_alive()
