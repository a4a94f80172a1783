"""Exports made by the engine's own process on a tiny model, and what is left where that goes wrong."""

import io
import tarfile
import threading
import time
from pathlib import Path

import pytest

from core.archives import store_directory
from core.database import unix_now
from core.errors import ModelNotFound
from core.ids import new_token
from core.model_exports import claim_export, request_export
from core.storage import ObjectDamaged
from core.tables.exports import ModelExport
from core.tables.models import Model
from tests.rows import add_job
from tests.sdft_engine.plain import add_adapter
from tests.worker.conftest import Workshop
from worker.model_exports import Exporter


@pytest.fixture
def tuned(workshop: Workshop, tiny_model_dir: Path, tmp_path: Path) -> Model:
    """A model whose adapter fits the tiny base."""
    from sdft_engine.lora import STUDENT, LoraShape
    from sdft_engine.model import load_base_model

    model = load_base_model(tiny_model_dir, device="cpu", dtype="float32")
    add_adapter(model, STUDENT, seed=1, shape=LoraShape(2, 4), trainable=True)
    adapter_dir = tmp_path / "adapter"
    adapter_dir.mkdir()
    model.adapters.save(STUDENT, adapter_dir, "tiny")
    return add_model(workshop, adapter_dir)


def add_model(workshop: Workshop, adapter_dir: Path) -> Model:
    serving_name = new_token()
    stored = store_directory(workshop.resources.storage, f"models/{serving_name}.tar.gz", adapter_dir, adapter_dir.parent)
    model = Model(
        id="ft:tiny:default:lamps:1",
        project_id=workshop.project_id,
        job_id=add_job(workshop.database, workshop.project_id, "cancelled"),
        base_model="tiny",
        status="servable",
        serving_name=serving_name,
        storage_key=stored.key,
        archive_bytes=stored.size_bytes,
        archive_sha256=stored.sha256,
        created_at=unix_now(),
    )
    with workshop.database.transaction() as session:
        session.add(model)
    return model


def ask(workshop: Workshop, model: Model, form: str) -> None:
    with workshop.database.transaction() as session:
        request_export(session, model, form)


def export_of(workshop: Workshop, model: Model, form: str) -> ModelExport:
    with workshop.database.reading() as session:
        return session.get_one(ModelExport, (model.id, form))


def stored_names(workshop: Workshop, key: str) -> list[str]:
    with tarfile.open(fileobj=io.BytesIO(b"".join(workshop.resources.storage.read(key))), mode="r:gz") as archive:
        return archive.getnames()


def left_behind(workshop: Workshop) -> list[Path]:
    settings = workshop.resources.settings
    return [*settings.exports_dir.glob("*"), *(settings.storage_dir / ".tmp").glob("*")]


def test_both_forms_are_made_and_stored(workshop: Workshop, tuned: Model) -> None:
    exporter = Exporter(workshop.resources)
    assert not exporter.make_one()
    for form in ("merged", "gguf"):
        ask(workshop, tuned, form)
        assert exporter.make_one()
    merged, gguf = (export_of(workshop, tuned, form) for form in ("merged", "gguf"))
    assert (merged.status, gguf.status, merged.lease_token) == ("ready", "ready", None)
    assert merged.storage_key is not None
    assert gguf.storage_key is not None
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= set(stored_names(workshop, merged.storage_key))
    assert stored_names(workshop, gguf.storage_key) == ["ft-tiny-default-lamps-1.gguf"]
    assert sum(map(len, workshop.resources.storage.read(merged.storage_key))) == merged.archive_bytes
    assert not left_behind(workshop)


def test_what_can_t_be_made_says_why_and_is_not_tried_again(workshop: Workshop, tmp_path: Path) -> None:
    adapter_dir = tmp_path / "adapter"
    adapter_dir.mkdir()
    (adapter_dir / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 2, "lora_alpha": 4}')
    (adapter_dir / "adapter_model.safetensors").write_bytes(b"no tensors")
    model = add_model(workshop, adapter_dir)
    ask(workshop, model, "merged")
    exporter = Exporter(workshop.resources)
    assert exporter.make_one()
    export = export_of(workshop, model, "merged")
    assert export.status == "failed"
    assert export.error is not None
    assert export.error["code"] == "export_not_possible"
    assert "no readable adapter" in export.error["message"]
    assert not exporter.make_one()
    assert not left_behind(workshop)


def test_a_process_that_dies_is_tried_three_times(workshop: Workshop, tuned: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("worker.model_exports.EXPORT_COMMAND", ("/bin/false",))
    ask(workshop, tuned, "merged")
    exporter = Exporter(workshop.resources)
    assert [exporter.make_one() for _ in range(4)] == [True, True, True, False]
    export = export_of(workshop, tuned, "merged")
    assert (export.status, export.attempts) == ("failed", 3)
    assert "status 1" in (export.error or {})["message"]


def test_a_worker_that_ends_kills_the_process_and_hands_the_export_on(workshop: Workshop, tuned: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("worker.model_exports.EXPORT_COMMAND", ("/bin/sh", "-c", "sleep 60"))
    ask(workshop, tuned, "merged")
    threading.Timer(1, workshop.resources.stopping.set).start()
    started = time.monotonic()
    assert Exporter(workshop.resources).make_one()
    assert time.monotonic() - started < 20
    export = export_of(workshop, tuned, "merged")
    assert (export.status, export.attempts, export.lease_token) == ("pending", 0, None)
    assert not left_behind(workshop)


def test_an_attempt_that_lost_its_lease_leaves_nothing(workshop: Workshop, tuned: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another worker takes over while this one's process runs; or the model is deleted, and the row with it."""
    monkeypatch.setattr("worker.model_exports.EXPORT_COMMAND", ("/bin/sh", "-c", "sleep 60"))
    ask(workshop, tuned, "merged")

    def take_over() -> None:
        with workshop.database.transaction() as session:
            session.get_one(ModelExport, (tuned.id, "merged")).lease_until = 0
        with workshop.database.transaction() as session:
            assert claim_export(session, 60) is not None

    threading.Timer(1, take_over).start()
    assert Exporter(workshop.resources).make_one()
    assert (export_of(workshop, tuned, "merged").status, export_of(workshop, tuned, "merged").attempts) == ("running", 2)
    assert not left_behind(workshop)


def test_an_export_of_a_deleted_model_is_not_stored(workshop: Workshop, tuned: Model) -> None:
    ask(workshop, tuned, "merged")
    workshop.resources.storage.delete(tuned.storage_key)
    assert Exporter(workshop.resources).make_one()
    export = export_of(workshop, tuned, "merged")
    assert (export.storage_key, (export.error or {})["message"]) == (None, f"the adapter of {tuned.id} is no longer in storage")


def test_workers_on_one_data_directory_leave_each_other_alone(workshop: Workshop, tuned: Model) -> None:
    """And what a worker that was killed left behind goes."""
    root = workshop.resources.settings.exports_dir
    ask(workshop, tuned, "merged")
    with workshop.database.transaction() as session:
        held = claim_export(session, 60)
    assert held is not None
    for name in (held.lease_token, "of-a-killed-worker"):
        (root / name).mkdir(parents=True)
    ask(workshop, tuned, "gguf")
    assert Exporter(workshop.resources).make_one()
    assert export_of(workshop, tuned, "gguf").status == "ready"
    assert [path.name for path in root.iterdir()] == [held.lease_token]


@pytest.mark.parametrize(("error", "code"), [(OSError(28, "No space left on device"), "disk_full"), (RuntimeError("odd"), "export_failed")])
def test_whatever_goes_wrong_is_told(workshop: Workshop, tuned: Model, monkeypatch: pytest.MonkeyPatch, error: Exception, code: str) -> None:
    def fail(*arguments: object, **options: object) -> None:
        raise error

    monkeypatch.setattr("worker.model_exports.store_directory", fail)
    ask(workshop, tuned, "merged")
    exporter = Exporter(workshop.resources)
    assert [exporter.make_one() for _ in range(4)] == [True, True, True, False]
    export = export_of(workshop, tuned, "merged")
    assert (export.status, (export.error or {})["code"]) == ("failed", code)
    assert not left_behind(workshop)


def test_bytes_that_storage_does_not_keep_are_deleted(workshop: Workshop, tuned: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    def damaged(*arguments: object) -> None:
        raise ObjectDamaged("other bytes")

    monkeypatch.setattr("worker.model_exports.check_stored", damaged)
    ask(workshop, tuned, "merged")
    assert Exporter(workshop.resources).make_one()
    assert list((workshop.resources.settings.storage_dir / "models").rglob("*.merged.tar.gz")) == []


def test_a_deleted_model_gets_no_form(workshop: Workshop, tuned: Model) -> None:
    ask(workshop, tuned, "merged")
    with workshop.database.transaction() as session:
        session.get_one(Model, tuned.id).status = "deleted"
    assert Exporter(workshop.resources).make_one()
    assert export_of(workshop, tuned, "merged").storage_key is None
    with pytest.raises(ModelNotFound):
        ask(workshop, tuned, "gguf")
