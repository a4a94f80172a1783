"""Rounds of the garbage collection: what goes, and above all what stays. On this machine's disk and in a bucket."""

import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import pytest
from sqlalchemy import select, update

from core.database import Database, unix_now
from core.errors import StorageUnavailable, Unavailable
from core.ids import new_id
from core.settings import Settings
from core.storage import LocalStorage
from core.tables.exports import ModelExport
from core.tables.files import File
from core.tables.jobs import Checkpoint, Job
from core.tables.models import Model
from core.tables.projects import Project
from core.tables.registry import metadata
from core.tables.webhooks import WebhookDelivery
from tests.fixtures.faulty_proxy import EVERY, Fault, FaultyProxy
from tests.fixtures.s3_server import Bucket
from tests.rows import add_endpoint, add_job, add_project, deliveries_of
from tests.worker.conftest import Workshop, workshop_of
from tests.worker.test_supervisor import train_next
from worker.garbage_collection import RULES, Collector, delete_objects_without_rows, delete_old_exports
from worker.old_directories import ABANDONED_SECONDS
from worker.storage_owner import OWNER_KEY, database_owns_storage
from worker.stored_objects import OBJECT_PREFIXES, REFERENCES

LONG_AGO = 2 * ABANDONED_SECONDS


@pytest.fixture(params=["local, sqlite", "s3, postgres"])
def on_either(request: pytest.FixtureRequest, worker_settings: Callable[..., Settings], tmp_path: Path) -> Iterator[Workshop]:
    storage, kind = request.param.split(", ")
    url = request.getfixturevalue(f"{kind}_url")
    database = Database(url)
    workshop = workshop_of(worker_settings(database_url=url), database, tmp_path)
    if storage == "s3":
        workshop.resources.storage = cast(Bucket, request.getfixturevalue("bucket")).storage()
    yield workshop
    database.close()


@pytest.fixture
def without_grace(monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything that there is counts as old."""
    monkeypatch.setattr("worker.garbage_collection.GRACE_SECONDS", -60.0)


def put(workshop: Workshop, key: str) -> str:
    writer = workshop.resources.storage.open_writer(key)
    writer.write(key.encode())
    writer.commit()
    return key


def keys_in(workshop: Workshop) -> set[str]:
    return {listed.key for prefix in (*OBJECT_PREFIXES, "others") for page in workshop.resources.storage.list_objects(prefix) for listed in page}


def add_model(workshop: Workshop, key: str, status: str = "servable", **columns: Any) -> Model:
    model = Model(
        id=f"ft:{key}",
        project_id=workshop.project_id,
        job_id=columns.pop("job_id", None) or add_job(workshop.database, workshop.project_id, "cancelled"),
        base_model="tiny",
        status=status,
        serving_name=f"serving-{key.replace('/', '-')}",
        storage_key=put(workshop, key),
        archive_bytes=1,
        archive_sha256="0",
        created_at=unix_now(),
        **columns,
    )
    with workshop.database.transaction() as session:
        session.add(model)
    return model


def add_export(workshop: Workshop, model: Model, format: str, **columns: Any) -> ModelExport:
    now = unix_now()
    values = {"status": "ready", "attempts": 1, "created_at": now, "updated_at": now} | columns
    export = ModelExport(model_id=model.id, format=format, **values)
    with workshop.database.transaction() as session:
        session.add(export)
    return export


def add_checkpoint(workshop: Workshop, job_id: str, step: int, **columns: Any) -> Checkpoint:
    values = {"storage_key": f"checkpoints/{job_id}/1-{step}.tar", "metrics": {}, "model_id": None} | columns
    if values["storage_key"] is not None:
        put(workshop, values["storage_key"])
    checkpoint = Checkpoint(id=new_id("ftckpt"), job_id=job_id, step=step, created_at=unix_now(), sha256="0", **values)
    with workshop.database.transaction() as session:
        session.add(checkpoint)
    return checkpoint


def everything_with_a_row(workshop: Workshop) -> set[str]:
    """An object of every kind. Returns their keys."""
    workshop.add_file()
    model = add_model(workshop, "models/a.tar.gz")
    add_model(workshop, "models/unverified.tar.gz", "unverified")
    add_export(workshop, model, "gguf", storage_key=put(workshop, "models/exports/a.gguf.tar.gz"))
    add_checkpoint(workshop, add_job(workshop.database, workshop.project_id, "running", lease_token="t", lease_until=1e12), 4)
    return keys_in(workshop)


def test_objects_without_rows_go_and_those_with_rows_stay(on_either: Workshop, without_grace: None) -> None:
    kept = everything_with_a_row(on_either)
    assert len(kept) == 5
    orphans = [put(on_either, key) for key in ("files/orphan", "models/orphan.tar.gz", "models/exports/orphan.gguf.tar.gz", "checkpoints/j/1-4.tar")]
    add_model(on_either, "models/deleted.tar.gz", "deleted")
    other = put(on_either, "others/kind")
    assert delete_objects_without_rows(on_either.resources) == len(orphans) + 1
    assert keys_in(on_either) == kept | {other}
    assert delete_objects_without_rows(on_either.resources) == 0


def test_young_objects_stay(on_either: Workshop) -> None:
    """Their rows may be about to be committed."""
    orphan = put(on_either, "files/orphan")
    assert delete_objects_without_rows(on_either.resources) == 0
    assert keys_in(on_either) == {orphan}


def test_only_the_old_ones_of_a_page_go(workshop: Workshop) -> None:
    young, old = put(workshop, "files/young"), put(workshop, "files/old")
    path = cast(LocalStorage, workshop.resources.storage).path_of(old)
    os.utime(path, (time.time() - LONG_AGO, time.time() - LONG_AGO))
    assert delete_objects_without_rows(workshop.resources) == 1
    assert keys_in(workshop) == {young}


def test_many_objects_are_looked_through_in_pages(on_either: Workshop, without_grace: None, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("core.storage", "core.s3_storage"):
        monkeypatch.setattr(f"{module}.LISTED_AT_A_TIME", 3)
    kept = everything_with_a_row(on_either)
    for number in range(10):
        put(on_either, f"files/orphan-{number}")
    assert delete_objects_without_rows(on_either.resources) == 10
    assert keys_in(on_either) == kept


def test_every_column_that_names_an_object_is_known() -> None:
    """A table with objects of its own that is missing here would lose them."""
    columns = {column for table in metadata.tables.values() for column in table.columns if "storage_key" in column.name}
    assert {reference.property.columns[0] for reference, _ in REFERENCES} == columns


def test_a_row_that_comes_while_objects_are_listed_saves_its_object(workshop: Workshop, without_grace: None, monkeypatch: pytest.MonkeyPatch) -> None:
    put(workshop, "files/late")
    list_objects = LocalStorage.list_objects

    def list_and_commit(storage: LocalStorage, prefix: str) -> Any:
        pages = list(list_objects(storage, prefix))
        if prefix == "files":
            with workshop.database.transaction() as session:
                session.add(
                    File(
                        id=new_id("file"),
                        project_id=workshop.project_id,
                        filename="f",
                        purpose="evals",
                        size_bytes=1,
                        sha256="0",
                        storage_key="files/late",
                        created_at=unix_now(),
                    )
                )
        return iter(pages)

    monkeypatch.setattr(LocalStorage, "list_objects", list_and_commit)
    assert delete_objects_without_rows(workshop.resources) == 0
    assert "files/late" in keys_in(workshop)


def test_without_the_database_nothing_goes(workshop: Workshop, without_grace: None, monkeypatch: pytest.MonkeyPatch) -> None:
    put(workshop, "files/orphan")

    def down(database: Database) -> None:
        raise Unavailable("the database can't be reached or is busy")

    monkeypatch.setattr(Database, "reading", down)
    assert delete_objects_without_rows(workshop.resources) == 0
    assert keys_in(workshop) == {"files/orphan"}


def test_what_could_not_be_deleted_goes_later(workshop: Workshop, bucket: Bucket, proxy: FaultyProxy, without_grace: None) -> None:
    workshop.resources.storage = bucket.storage(proxy.url)
    orphan = put(workshop, "files/orphan")
    proxy.faults = [Fault("status", EVERY, lambda method, path: method == "DELETE")]
    delete_objects_without_rows(workshop.resources)
    assert keys_in(workshop) == {orphan}
    proxy.faults = []
    assert delete_objects_without_rows(workshop.resources) == 1
    assert keys_in(workshop) == set()


def test_old_exports_go_with_their_objects(on_either: Workshop) -> None:
    old_at = unix_now() - on_either.resources.settings.keep_exports_seconds - 1
    model, other = add_model(on_either, "models/a.tar.gz"), add_model(on_either, "models/b.tar.gz")
    add_export(on_either, model, "gguf", storage_key=put(on_either, "models/exports/old.gguf.tar.gz"), updated_at=old_at)
    add_export(on_either, model, "merged", storage_key=put(on_either, "models/exports/new.merged.tar.gz"), created_at=old_at)
    add_export(on_either, other, "gguf", status="running", lease_token="t", lease_until=1e12, updated_at=old_at)
    add_export(on_either, other, "merged", status="failed", error={"code": "export_not_possible"}, updated_at=old_at)
    assert delete_old_exports(on_either.resources) == 1
    with on_either.database.reading() as session:
        left = {(export.model_id, export.format, export.status) for export in session.scalars(select(ModelExport))}
    assert left == {(model.id, "merged", "ready"), (other.id, "gguf", "running"), (other.id, "merged", "failed")}
    assert keys_in(on_either) == {"models/a.tar.gz", "models/b.tar.gz", "models/exports/new.merged.tar.gz"}


def test_a_database_that_is_not_the_storage_s_own_removes_nothing(
    on_either: Workshop,
    without_grace: None,
    make_settings: Callable[..., Settings],
    _sqlite_template: Path,  # noqa: PT019 (its value is used)
    tmp_path: Path,
) -> None:
    kept = everything_with_a_row(on_either)
    assert Collector(on_either.resources).collect() == dict.fromkeys(RULES, 0)
    (tmp_path / "another.sqlite3").write_bytes(_sqlite_template.read_bytes())
    stranger = Database(f"sqlite:///{tmp_path / 'another.sqlite3'}")
    try:
        foreign = workshop_of(on_either.resources.settings, stranger, tmp_path)
        foreign.resources.storage = on_either.resources.storage
        run = foreign.resources.settings.runs_dir / "ftjob-1"
        run.mkdir(parents=True)
        os.utime(run, (1, 1))
        assert Collector(foreign.resources).collect() == {}
        assert run.exists()
        assert keys_in(on_either) == kept
    finally:
        stranger.close()


def test_a_database_without_rows_does_not_take_a_storage_with_objects_for_its_own(on_either: Workshop, without_grace: None) -> None:
    """As after a wrong SDFT_DATABASE_URL, in a service that was never collected before."""
    put(on_either, "files/of-somebody")
    assert Collector(on_either.resources).collect() == {}
    assert keys_in(on_either) == {"files/of-somebody"}
    assert not on_either.resources.storage.exists(OWNER_KEY)


def test_an_empty_storage_and_one_with_known_objects_are_taken(on_either: Workshop) -> None:
    assert database_owns_storage(on_either.resources)
    on_either.resources.storage.delete(OWNER_KEY)
    put(on_either, "files/orphan")
    on_either.add_file()
    assert database_owns_storage(on_either.resources)
    assert b"".join(on_either.resources.storage.read(OWNER_KEY)).decode() == on_either.project_id


def test_a_storage_stays_its_database_s_when_projects_come(workshop: Workshop) -> None:
    assert database_owns_storage(workshop.resources)
    older = add_project(workshop.database, "older")
    with workshop.database.transaction() as session:
        session.execute(update(Project).where(Project.id == older).values(created_at=0))
    assert database_owns_storage(workshop.resources)


def test_a_database_without_a_project_collects_nothing(settings: Settings, sqlite_database: Database, workshop: Workshop) -> None:
    with sqlite_database.transaction() as session:
        session.delete(session.get_one(Project, workshop.project_id))
    assert Collector(workshop.resources).collect() == {}


def test_a_rule_that_fails_does_not_keep_the_others_from_their_work(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(resources: object) -> int:
        raise RuntimeError("as the test says")

    def away(resources: object) -> int:
        raise StorageUnavailable("as the test says")

    monkeypatch.setattr("worker.garbage_collection.RULES", {"broken": broken, "away": away, "works": lambda resources: 7})
    assert Collector(workshop.resources).collect() == {"works": 7}


def test_two_workers_at_once_do_no_harm(on_either: Workshop, without_grace: None) -> None:
    kept = everything_with_a_row(on_either)
    for number in range(30):
        put(on_either, f"files/orphan-{number}")
    assert database_owns_storage(on_either.resources)
    rounds: list[dict[str, int]] = []
    threads = [threading.Thread(target=lambda: rounds.append(Collector(on_either.resources).collect())) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [list(removed) for removed in rounds] == [list(RULES)] * 3, "no rule failed"
    assert keys_in(on_either) == kept


def test_a_worker_collects_soon_after_its_start_and_ends_at_once(workshop: Workshop, without_grace: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("worker.garbage_collection.FIRST_ROUND_SECONDS", 0.1)
    workshop.add_file()
    put(workshop, "files/orphan")
    thread = threading.Thread(target=Collector(workshop.resources).run)
    thread.start()
    until = time.monotonic() + 20
    while "files/orphan" in keys_in(workshop):
        assert time.monotonic() < until
        time.sleep(0.05)
    workshop.resources.stopping.set()
    thread.join(5)
    assert not thread.is_alive()


def test_collection_can_be_switched_off(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    """As after a backup was restored, until it proves to be the right one."""
    workshop.resources.settings = workshop.resources.settings.model_copy(update={"collect_every_seconds": 0.0})
    monkeypatch.setattr(Collector, "collect", lambda collector: pytest.fail("it collects"))
    Collector(workshop.resources).run()


def test_a_finished_job_keeps_what_it_needs_to_be_used(workshop: Workshop, without_grace: None) -> None:
    """A whole round after a real run: its models are still downloaded and chatted with, its states are gone."""
    job_id = workshop.add_job()
    train_next(workshop)
    with workshop.database.reading() as session:
        models = session.scalars(select(Model.storage_key)).all()
        files = session.scalars(select(File.storage_key)).all()
        job = session.get_one(Job, job_id)
    Collector(workshop.resources).collect()
    assert keys_in(workshop) == {*models, *files}
    assert (workshop.resources.settings.runs_dir / job_id / "attempt-1").exists()
    assert job.fine_tuned_model is not None
    assert len(list(workshop.resources.settings.served_adapters_dir.iterdir())) == 1


def test_old_webhook_deliveries_go_in_batches(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("worker.garbage_collection.DELIVERIES_AT_A_TIME", 2)
    endpoint_id = add_endpoint(workshop.database, workshop.project_id)
    over = {"event_type": "x", "body": "{}", "created_at": 0.0, "next_attempt_at": None, "give_up_at": 0.0, "attempts": 1, "delivered_at": 1.0}
    with workshop.database.transaction() as session:
        session.add_all(WebhookDelivery(id=f"d{number}", endpoint_id=endpoint_id, **over) for number in range(5))
    assert Collector(workshop.resources).collect()["old_webhook_deliveries"] == 5
    assert deliveries_of(workshop.database, endpoint_id) == []
