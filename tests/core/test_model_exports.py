"""core.model_exports: one export for each model and form, made by one worker at a time, tried three times."""

import pytest

from core.database import Database, unix_now
from core.errors import ExportInProgress
from core.ids import new_token
from core.model_exports import (
    IMPOSSIBLE,
    ExportClaim,
    ExportLost,
    claim_export,
    export_is_waiting,
    fail_export,
    finish_export,
    release_export,
    renew_export,
    request_export,
)
from core.storage import StoredObject
from core.tables.exports import ModelExport
from core.tables.models import Model
from tests.rows import add_job, add_project

STORED = StoredObject("models/x.merged.tar.gz", 7, "ab")


@pytest.fixture
def model(database: Database) -> Model:
    project_id = add_project(database)
    model = Model(
        id="ft:tiny:default::1",
        project_id=project_id,
        job_id=add_job(database, project_id, "cancelled"),
        base_model="tiny",
        status="servable",
        serving_name=new_token(),
        storage_key="models/x.tar.gz",
        archive_bytes=1,
        archive_sha256="cd",
        created_at=unix_now(),
    )
    with database.transaction() as session:
        session.add(model)
    return model


def ask(database: Database, model: Model, form: str = "merged") -> ModelExport:
    with database.transaction() as session:
        return request_export(session, model, form)


def claim(database: Database, lease_seconds: float = 30) -> ExportClaim | None:
    with database.transaction() as session:
        return claim_export(session, lease_seconds)


def export_of(database: Database, model: Model, form: str = "merged") -> ModelExport:
    with database.reading() as session:
        return session.get_one(ModelExport, (model.id, form))


def claimed(database: Database, lease_seconds: float = 30) -> ExportClaim:
    held = claim(database, lease_seconds)
    assert held is not None
    return held


def test_an_export_is_made_once_however_often_it_is_asked_for(database: Database, model: Model) -> None:
    assert claim(database) is None
    assert (ask(database, model).status, ask(database, model).status, ask(database, model, "gguf").status) == ("pending",) * 3
    first, second = claimed(database), claimed(database)
    assert (first.format, second.format, first.attempt) == ("merged", "gguf", 1)
    assert claim(database) is None
    with database.transaction() as session:
        finish_export(session, first, STORED)
    export = ask(database, model)
    assert (export.status, export.storage_key, export.archive_bytes, export.archive_sha256) == ("ready", "models/x.merged.tar.gz", 7, "ab")
    with database.reading() as session:
        assert not export_is_waiting(session)


def test_a_lease_that_ran_out_passes_on_and_its_holder_writes_nothing(database: Database, model: Model) -> None:
    ask(database, model)
    stale = claimed(database, lease_seconds=-1)
    fresh = claimed(database)
    assert (fresh.attempt, fresh.lease_token != stale.lease_token) == (2, True)
    for change in (lambda session: finish_export(session, stale, STORED), lambda session: renew_export(session, stale, 30)):
        with pytest.raises(ExportLost), database.transaction() as session:
            change(session)
    assert export_of(database, model).status == "running"
    with database.transaction() as session:
        renew_export(session, fresh, 30)


def test_an_export_whose_makers_all_died_fails(database: Database, model: Model) -> None:
    ask(database, model)
    for attempt in (1, 2, 3):
        assert claimed(database, lease_seconds=-1).attempt == attempt
    assert claim(database) is None
    export = export_of(database, model)
    assert (export.status, (export.error or {})["code"]) == ("failed", "export_failed")


def test_failures_are_tried_again_but_not_those_that_stay(database: Database, model: Model) -> None:
    ask(database, model)
    for attempt in (1, 2, 3):
        held = claimed(database)
        assert held.attempt == attempt
        with database.transaction() as session:
            fail_export(session, held, "out_of_memory", "too large")
    assert export_of(database, model).status == "failed"
    ask(database, model, "gguf")
    with database.transaction() as session:
        fail_export(session, claimed_of(session, "gguf"), IMPOSSIBLE, "no such form")
    assert export_of(database, model, "gguf").status == "failed"


def claimed_of(session, form: str) -> ExportClaim:
    held = claim_export(session, 30)
    assert held is not None
    assert held.format == form
    return held


@pytest.mark.parametrize(("code", "status"), [("out_of_memory", "pending"), (IMPOSSIBLE, "failed")])
def test_asking_again_later_begins_anew_unless_it_can_never_be_made(database: Database, model: Model, code: str, status: str) -> None:
    ask(database, model)
    with database.transaction() as session:
        export = session.get_one(ModelExport, (model.id, "merged"))
        export.status, export.attempts, export.error = "failed", 3, {"code": code, "message": "m"}
    assert ask(database, model).status == "failed"
    with database.transaction() as session:
        session.get_one(ModelExport, (model.id, "merged")).updated_at -= 61
    assert ask(database, model).status == status
    assert export_of(database, model).attempts == (0 if status == "pending" else 3)


def test_a_worker_that_ends_hands_it_on_uncounted(database: Database, model: Model) -> None:
    ask(database, model)
    with database.transaction() as session:
        release_export(session, claimed_of(session, "merged"))
    assert claimed(database).attempt == 1


def test_a_project_has_few_exports_under_way(database: Database, model: Model) -> None:
    """The line is everybody's: one project's hundred would keep the others waiting for hours."""
    others = []
    with database.transaction() as session:
        for number in range(4):
            other = Model(**{column.name: getattr(model, column.name) for column in Model.__table__.columns})
            other.id, other.serving_name = f"ft:tiny:default::other-{number}", new_token()
            session.add(other)
            others.append(other)
    for other in others:
        ask(database, other)
    with pytest.raises(ExportInProgress, match="has 4 exports being made"):
        ask(database, model)
    assert ask(database, others[0]).status == "pending", "asking again for one of them is no other one"
    with database.transaction() as session:
        finish_export(session, claimed_of(session, "merged"), STORED)
    assert ask(database, model).status == "pending"
