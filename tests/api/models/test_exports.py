"""Other formats of a model's weights: asked for, waited for, downloaded; a worker's part is played by hand."""

import hashlib
import threading
import time

import pytest
from sqlalchemy import update

from core.model_exports import IMPOSSIBLE, MAX_ATTEMPTS, ExportClaim, claim_export, fail_export, finish_export
from core.storage import StoredObject
from core.tables.exports import ModelExport
from tests.api.model_rows import add_model
from tests.api.serving import Api
from tests.api.test_errors import assert_error

FIRST = "ft:tiny:default:lamps:1"
CONTENT = b"weights" * 1000


@pytest.fixture
def brief_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("api.models.exports.WAIT_SECONDS", 0.2)
    monkeypatch.setattr("api.models.exports.POLL_SECONDS", 0.05)


def export_of(api: Api, format: str) -> ModelExport | None:
    with api.database.reading() as session:
        return session.get(ModelExport, (FIRST, format))


def claimed(api: Api) -> ExportClaim:
    with api.database.transaction() as session:
        claim = claim_export(session, 60)
    assert claim is not None
    return claim


def store(api: Api, claim: ExportClaim) -> StoredObject:
    writer = api.state.storage.open_writer(f"models/made.{claim.format}.tar.gz")
    writer.write(CONTENT)
    stored = writer.commit()
    with api.database.transaction() as session:
        finish_export(session, claim, stored)
    return stored


def fail(api: Api, code: str, attempts: int = 1) -> None:
    for _ in range(attempts):
        with api.database.transaction() as session:
            session.execute(update(ModelExport).values(updated_at=ModelExport.updated_at - 60))  # no attempt follows another at once
        claim = claimed(api)
        with api.database.transaction() as session:
            fail_export(session, claim, code, "the reason")


@pytest.mark.usefixtures("brief_wait")
def test_the_first_request_has_it_made_and_is_told_to_come_again(api_on_both: Api) -> None:
    api = api_on_both
    add_model(api, FIRST)
    for _ in range(2):
        answer = api.client.get(f"/v1/models/{FIRST}/adapter?format=merged")
        assert_error(answer, 503, "export_in_progress", None)
        assert answer.headers["retry-after"] == "5"
    store(api, claimed(api))
    answer = api.client.get(f"/v1/models/{FIRST}/adapter?format=merged")
    assert (answer.status_code, answer.content) == (200, CONTENT)
    assert answer.headers["x-sha256"] == hashlib.sha256(CONTENT).hexdigest()
    assert answer.headers["content-disposition"] == "attachment; filename*=UTF-8''ft-tiny-default-lamps-1.merged.tar.gz"
    part = api.client.get(f"/v1/models/{FIRST}/adapter?format=merged", headers={"range": "bytes=7-13"})
    assert (part.status_code, part.content) == (206, b"weights")


def test_a_request_waits_for_what_is_made_soon(api: Api) -> None:
    add_model(api, FIRST)

    def work() -> None:
        while export_of(api, "gguf") is None:
            time.sleep(0.05)
        store(api, claimed(api))

    worker = threading.Thread(target=work)
    worker.start()
    answer = api.client.get(f"/v1/models/{FIRST}/adapter?format=gguf")
    worker.join()
    assert (answer.status_code, answer.content) == (200, CONTENT)


@pytest.mark.usefixtures("brief_wait")
@pytest.mark.parametrize(
    ("code", "attempts", "status", "param", "headers"),
    [(IMPOSSIBLE, 1, 400, "format", {}), ("out_of_memory", MAX_ATTEMPTS, 500, None, {"x-should-retry": "false"})],
)
def test_a_failure_is_told_with_its_reason(api: Api, code: str, attempts: int, status: int, param: str | None, headers: dict[str, str]) -> None:
    add_model(api, FIRST)
    api.client.get(f"/v1/models/{FIRST}/adapter?format=gguf")
    fail(api, code, attempts)
    answer = api.client.get(f"/v1/models/{FIRST}/adapter?format=gguf")
    assert_error(answer, status, code, param)
    assert "the reason" in answer.json()["error"]["message"]
    assert headers.items() <= dict(answer.headers).items()


@pytest.mark.usefixtures("brief_wait")
def test_another_project_s_model_has_no_formats_either(api: Api) -> None:
    add_model(api, FIRST, project_id=api.other_project_id)
    assert_error(api.client.get(f"/v1/models/{FIRST}/adapter?format=merged"), 404, "model_not_found", "model")
    assert export_of(api, "merged") is None


@pytest.mark.usefixtures("brief_wait")
def test_deleting_a_model_deletes_its_exports(api_on_both: Api) -> None:
    api = api_on_both
    add_model(api, FIRST)
    api.client.get(f"/v1/models/{FIRST}/adapter?format=merged")
    stored = store(api, claimed(api))
    api.client.get(f"/v1/models/{FIRST}/adapter?format=gguf")
    assert api.client.delete(f"/v1/models/{FIRST}").status_code == 200
    assert export_of(api, "merged") is export_of(api, "gguf") is None
    assert not api.state.storage.exists(stored.key)


def test_a_model_deleted_while_it_is_exported_is_no_longer_found(api: Api) -> None:
    add_model(api, FIRST)

    def delete() -> None:
        while export_of(api, "merged") is None:
            time.sleep(0.05)
        api.client.delete(f"/v1/models/{FIRST}")

    deleting = threading.Thread(target=delete)
    deleting.start()
    answer = api.client.get(f"/v1/models/{FIRST}/adapter?format=merged")
    deleting.join()
    assert_error(answer, 404, "model_not_found", "model")
