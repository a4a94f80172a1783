"""core.model_exports: one export for each model and format, made by one worker at a time, tried three times."""

import pytest
from sqlalchemy import update

from core.database import Database, unix_now
from core.errors import ExportInProgress
from core.ids import new_token
from core.model_exports import (
    IMPOSSIBLE,
    ExportClaim,
    ExportLost,
    assert_export_held,
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


def ask(database: Database, model: Model, format: str = "merged") -> ModelExport:
    with database.transaction() as session:
        return request_export(session, model, format)


def claim(database: Database, lease_seconds: float = 30) -> ExportClaim | None:
    with database.transaction() as session:
        return claim_export(session, lease_seconds)


def export_of(database: Database, model: Model, format: str = "merged") -> ModelExport:
    with database.reading() as session:
        return session.get_one(ModelExport, (model.id, format))


def let_pass(database: Database, seconds: float) -> None:
    with database.transaction() as session:
        session.execute(update(ModelExport).values(created_at=ModelExport.created_at - seconds, updated_at=ModelExport.updated_at - seconds))


def fail(database: Database, held: ExportClaim, code: str = "out_of_memory") -> None:
    with database.transaction() as session:
        fail_export(session, held, code, "the reason")


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
        fail(database, held)
        let_pass(database, 31)
    assert export_of(database, model).status == "failed"
    ask(database, model, "gguf")
    with database.transaction() as session:
        fail_export(session, claimed_of(session, "gguf"), IMPOSSIBLE, "no such format")
    assert export_of(database, model, "gguf").status == "failed"


def test_what_went_wrong_is_left_alone_for_a_while_longer_each_time(database: Database, model: Model) -> None:
    ask(database, model, "merged")
    for seconds in (10, 20):
        fail(database, claimed(database))
        with database.reading() as session:
            assert not export_is_waiting(session)
        let_pass(database, seconds - 1)
        assert claim(database) is None
        let_pass(database, 2)
        with database.reading() as session:
            assert export_is_waiting(session)


def test_a_retried_export_goes_behind_those_asked_for_meanwhile(database: Database, model: Model) -> None:
    ask(database, model, "merged")
    held = claimed(database)
    ask(database, model, "gguf")
    fail(database, held)
    let_pass(database, 15)
    assert (claimed(database).format, claimed(database).format) == ("gguf", "merged")


def test_so_does_one_whose_worker_was_killed(database: Database, model: Model) -> None:
    ask(database, model, "merged")
    killed = claimed(database, lease_seconds=1)
    ask(database, model, "gguf")
    with database.transaction() as session:
        renew_export(session, killed, -1)
    assert (claimed(database).format, claimed(database).format) == ("gguf", "merged")


def test_one_that_was_handed_back_keeps_its_place_and_one_asked_for_again_does_not(database: Database, model: Model) -> None:
    ask(database, model, "merged")
    ask(database, model, "gguf")
    held = claimed(database)
    with database.transaction() as session:
        release_export(session, held)
    again = claimed(database)
    assert again.format == "merged"
    with database.transaction() as session:
        fail_export(session, ExportClaim(again.model_id, again.format, again.lease_token, attempt=3), "out_of_memory", "too large")
    let_pass(database, 61)
    ask(database, model, "merged")
    assert (claimed(database).format, claimed(database).format) == ("gguf", "merged")


def test_whether_it_is_still_held_can_be_asked_without_writing(database: Database, model: Model) -> None:
    ask(database, model)
    stale = claimed(database, lease_seconds=-1)
    with database.reading() as session:
        assert_export_held(session, stale)
    claimed(database)
    with pytest.raises(ExportLost), database.reading() as session:
        assert_export_held(session, stale)


def claimed_of(session, format: str) -> ExportClaim:
    held = claim_export(session, 30)
    assert held is not None
    assert held.format == format
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
