"""Exports made by the engine's own process on a tiny model, and what is left where that goes wrong."""

import io
import shutil
import tarfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import update
from sqlalchemy.orm import Session
from structlog.testing import CapturingLogger

from core.archives import store_directory
from core.database import unix_now
from core.errors import ModelNotFound, StorageFull, Unavailable
from core.ids import new_token
from core.model_exports import claim_export, finish_export, request_export, tokens_of_running_exports
from core.storage import LocalStorage, LocalWriter, ObjectDamaged
from core.tables.exports import ModelExport
from core.tables.models import Model
from sdft_engine.contract.run_directory import Attestation
from sdft_engine.contract.sealed_directory import ATTESTATION_NAME
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


def ask(workshop: Workshop, model: Model, format: str) -> None:
    with workshop.database.transaction() as session:
        request_export(session, model, format)


def export_of(workshop: Workshop, model: Model, format: str) -> ModelExport:
    with workshop.database.reading() as session:
        return session.get_one(ModelExport, (model.id, format))


def stored_names(workshop: Workshop, key: str) -> list[str]:
    with tarfile.open(fileobj=io.BytesIO(b"".join(workshop.resources.storage.read(key))), mode="r:gz") as archive:
        return archive.getnames()


def make_all(workshop: Workshop) -> int:
    """Make exports until none waits, as if time passed between the attempts. Returns how many attempts that were."""
    attempts = 0
    while Exporter(workshop.resources).make_one():
        attempts += 1
        with workshop.database.transaction() as session:
            session.execute(update(ModelExport).values(updated_at=ModelExport.updated_at - 60))
    return attempts


def take_over(workshop: Workshop, model: Model) -> None:
    """As another worker does, after this one's lease ran out."""
    with workshop.database.transaction() as session:
        session.get_one(ModelExport, (model.id, "merged")).lease_until = 0
    with workshop.database.transaction() as session:
        assert claim_export(session, 60) is not None


def left_behind(workshop: Workshop) -> list[Path]:
    settings = workshop.resources.settings
    return [*settings.exports_dir.glob("*"), *(settings.storage_dir / ".tmp").glob("*")]


def test_both_formats_are_made_and_stored(workshop: Workshop, tuned: Model) -> None:
    exporter = Exporter(workshop.resources)
    assert not exporter.make_one()
    for format in ("merged", "gguf"):
        ask(workshop, tuned, format)
        assert exporter.make_one()
    merged, gguf = (export_of(workshop, tuned, format) for format in ("merged", "gguf"))
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
    assert make_all(workshop) == 3
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


@pytest.mark.parametrize("busy_with", ["fetching", "storing", "reading back"])
def test_a_worker_that_ends_waits_for_no_large_object(workshop: Workshop, tuned: Model, monkeypatch: pytest.MonkeyPatch, busy_with: str) -> None:
    """Which is copied in many chunks, and the first of them is when the worker is told to end."""
    stop, chunks = workshop.resources.stopping, list[str]()
    read, write = LocalStorage.read, LocalWriter.write

    def note(found: str) -> None:
        if found == busy_with:
            stop.set()
            chunks.append(found)

    def slow_read(storage: LocalStorage, key: str, start: int = 0, end: int | None = None) -> Iterator[bytes]:
        content = b"".join(read(storage, key, start, end))
        for begin in range(0, len(content), 100):
            note("fetching" if key == tuned.storage_key else "reading back")
            yield content[begin : begin + 100]

    def slow_write(writer: LocalWriter, chunk: bytes) -> None:
        note("storing")
        write(writer, chunk)

    monkeypatch.setattr("core.archives.CHUNK_BYTES", 100)
    monkeypatch.setattr(LocalStorage, "read", slow_read)
    monkeypatch.setattr(LocalWriter, "write", slow_write)
    ask(workshop, tuned, "merged")
    assert Exporter(workshop.resources).make_one()
    export = export_of(workshop, tuned, "merged")
    assert (export.status, export.attempts, export.storage_key) == ("pending", 0, None)
    assert 1 <= len(chunks) < 20, "of thousands"
    assert not left_behind(workshop)
    assert list((workshop.resources.settings.storage_dir / "models").rglob("*.merged.tar.gz")) == []


def test_a_database_that_is_away_for_a_moment_costs_no_finished_export(workshop: Workshop, tuned: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Session] = []

    def finish(session: Session, *arguments: object) -> None:
        calls.append(session)
        if len(calls) < 3:
            raise Unavailable("as the test says")
        finish_export(session, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr("worker.model_exports.finish_export", finish)
    ask(workshop, tuned, "merged")
    assert Exporter(workshop.resources).make_one()
    assert (export_of(workshop, tuned, "merged").status, export_of(workshop, tuned, "merged").attempts, len(calls)) == ("ready", 1, 3)


def test_a_database_that_is_away_before_is_no_fault_of_the_export(workshop: Workshop, tuned: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Session] = []

    def tokens(session: Session) -> set[str]:
        calls.append(session)
        if len(calls) == 1:
            raise Unavailable("as the test says")
        return tokens_of_running_exports(session)

    monkeypatch.setattr("worker.model_exports.tokens_of_running_exports", tokens)
    ask(workshop, tuned, "merged")
    exporter = Exporter(workshop.resources)
    assert exporter.make_one()
    assert (export_of(workshop, tuned, "merged").status, export_of(workshop, tuned, "merged").attempts) == ("pending", 0)
    assert exporter.make_one()
    assert (export_of(workshop, tuned, "merged").status, export_of(workshop, tuned, "merged").attempts) == ("ready", 1)


@pytest.mark.parametrize("outcome", ["made", "not made"])
def test_what_another_took_over_is_lost_and_neither_ready_nor_failed(workshop: Workshop, tuned: Model, monkeypatch: pytest.MonkeyPatch, outcome: str) -> None:
    def lose(*arguments: object) -> None:
        take_over(workshop, tuned)
        if outcome == "not made":
            raise ObjectDamaged("other bytes")

    logger = CapturingLogger()
    monkeypatch.setattr("worker.model_exports.check_stored", lose)
    monkeypatch.setattr("worker.model_exports.log", logger)
    ask(workshop, tuned, "merged")
    assert Exporter(workshop.resources).make_one()
    events = [call.args[0] for call in logger.calls]
    assert events[-1] == "export_lost"
    assert events.count("export_lost") == 1
    assert "export_ready" not in events
    assert (export_of(workshop, tuned, "merged").status, export_of(workshop, tuned, "merged").attempts) == ("running", 2)
    assert list((workshop.resources.settings.storage_dir / "models").rglob("*.merged.tar.gz")) == []


def test_a_base_model_that_is_prepared_is_not_read_by_the_worker(workshop: Workshop, tuned: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    def read(directory: Path) -> None:
        raise AssertionError(f"the tokenizer in {directory} is of no use here")

    monkeypatch.setattr("worker.base_models.ChatFormat.from_directory", read)
    ask(workshop, tuned, "merged")
    assert Exporter(workshop.resources).make_one()
    assert export_of(workshop, tuned, "merged").status == "ready"


def test_a_base_model_that_left_the_catalogue_is_named(workshop: Workshop, tuned: Model) -> None:
    with workshop.database.transaction() as session:
        session.get_one(Model, tuned.id).base_model = "gone"
    ask(workshop, tuned, "merged")
    assert Exporter(workshop.resources).make_one()
    error = export_of(workshop, tuned, "merged").error or {}
    assert error["code"] == "base_model_unusable"
    assert "gone" in error["message"]


def test_another_revision_of_the_base_model_gets_no_export(workshop: Workshop, tmp_path: Path) -> None:
    """Its weights have the same shapes, and the file would look like a good one."""
    adapter_dir = tmp_path / "adapter"
    adapter_dir.mkdir()
    (adapter_dir / ATTESTATION_NAME).write_text(Attestation(dtype="float32", probes=[], base="hub:somebody/tiny@1").model_dump_json())
    tuned = add_model(workshop, adapter_dir)
    (entry,) = workshop.resources.settings.base_models
    changed = entry.model_copy(update={"source": "hub:somebody/tiny", "revision": "2"})
    directory = changed.directory(workshop.resources.settings.cache_dir)
    shutil.copytree(entry.directory(workshop.resources.settings.cache_dir), directory)
    workshop.resources.settings = workshop.resources.settings.model_copy(update={"base_models": [changed]})
    ask(workshop, tuned, "merged")
    assert Exporter(workshop.resources).make_one()
    error = export_of(workshop, tuned, "merged").error or {}
    assert error["code"] == "base_model_unusable"
    assert "was trained from another tiny" in error["message"]


def test_an_attempt_that_lost_its_lease_leaves_nothing(workshop: Workshop, tuned: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another worker takes over while this one's process runs; or the model is deleted, and the row with it."""
    monkeypatch.setattr("worker.model_exports.EXPORT_COMMAND", ("/bin/sh", "-c", "sleep 60"))
    ask(workshop, tuned, "merged")
    threading.Timer(1, take_over, [workshop, tuned]).start()
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


@pytest.mark.parametrize("step", ["fetch_directory", "stream_directory"])
@pytest.mark.parametrize(
    ("error", "code"), [(OSError(28, "No space left on device"), "disk_full"), (StorageFull("full"), "disk_full"), (RuntimeError("odd"), "export_failed")]
)
def test_whatever_goes_wrong_is_told(workshop: Workshop, tuned: Model, monkeypatch: pytest.MonkeyPatch, error: Exception, code: str, step: str) -> None:
    def fail(*arguments: object, **options: object) -> None:
        raise error

    monkeypatch.setattr(f"worker.model_exports.{step}", fail)
    ask(workshop, tuned, "merged")
    assert make_all(workshop) == 3
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


def test_a_deleted_model_gets_no_export(workshop: Workshop, tuned: Model) -> None:
    ask(workshop, tuned, "merged")
    with workshop.database.transaction() as session:
        session.get_one(Model, tuned.id).status = "deleted"
    assert Exporter(workshop.resources).make_one()
    assert export_of(workshop, tuned, "merged").storage_key is None
    with pytest.raises(ModelNotFound):
        ask(workshop, tuned, "gguf")
