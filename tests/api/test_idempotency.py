"""A request that is sent again, on both databases: as the stock client does it, and under a name of the client's own."""

import time
from types import SimpleNamespace
from typing import Any

import pytest
from openai import OpenAI
from sqlalchemy import func, select, update
from starlette.testclient import TestClient
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from api.app import create_app
from api.idempotency import NAMED_SECONDS, RETRY_KEPT_SECONDS, RETRY_SECONDS, delete_expired_records
from core.errors import Unavailable
from core.projects import create_key
from core.tables.files import File
from core.tables.idempotency import IdempotencyRecord
from core.tables.jobs import Job
from tests.api.serving import Api, bearer, on_a_port, training_lines, wait_for
from tests.api.test_errors import assert_error

JOBS = "/v1/fine_tuning/jobs"
FILES = "/v1/files"
RETRY = {"x-stainless-retry-count": "1"}


def named(name: str) -> dict[str, str]:
    return {"idempotency-key": name}


def post_job(api: Api, headers: dict[str, str] | None = None, **fields: Any) -> Any:
    return api.client.post(JOBS, json={"model": "tiny", **fields}, headers=headers)


def post_file(api: Api, headers: dict[str, str] | None = None, content: bytes | None = None, name: str = "train.jsonl", **fields: str) -> Any:
    files = {"file": (name, training_lines() if content is None else content)}
    return api.client.post(FILES, data={"purpose": "fine-tune", **fields}, files=files, headers=headers)


def id_of(answer: Any) -> str:
    assert answer.status_code == 200, answer.text
    object_id: str = answer.json()["id"]
    return object_id


def count(api: Api, table: type[Any]) -> int:
    with api.database.reading() as session:
        return session.scalar(select(func.count()).select_from(table)) or 0


def make_older(api: Api, seconds: float) -> None:
    with api.database.transaction() as session:
        values = {"created_at": IdempotencyRecord.created_at - seconds, "expires_at": IdempotencyRecord.expires_at - seconds}
        session.execute(update(IdempotencyRecord).values(**values))


def test_a_later_try_of_a_job_is_the_job_as_it_is_now(api_on_both: Api) -> None:
    api = api_on_both
    file_id = api.upload()
    first = id_of(post_job(api, training_file=file_id))
    assert post_job(api, RETRY, training_file=file_id).json() == api.client.get(f"{JOBS}/{first}").json()
    api.client.post(f"{JOBS}/{first}/cancel")
    for tries in ("1", "2", "02"):
        again = post_job(api, {"x-stainless-retry-count": tries}, training_file=file_id).json()
        assert (again["id"], again["status"]) == (first, "cancelled")
    assert count(api, Job) == 1


def test_first_tries_are_requests_of_their_own(api_on_both: Api) -> None:
    """Two jobs from the same body are wanted: each has another seed. A later try stands for the last."""
    api = api_on_both
    file_id = api.upload()
    headers: list[dict[str, str] | None] = [None, {"x-stainless-retry-count": "0"}, {"x-stainless-retry-count": "nonsense"}, {"x-stainless-retry-count": "-1"}]
    jobs = [id_of(post_job(api, header, training_file=file_id)) for header in headers]
    assert len(set(jobs)) == 4
    assert id_of(post_job(api, RETRY, training_file=file_id)) == jobs[-1]
    assert count(api, IdempotencyRecord) == 2, "one for the file and one for the jobs"


def test_a_later_try_of_an_upload_is_the_file(api_on_both: Api) -> None:
    api = api_on_both
    first = post_file(api)
    again = post_file(api, RETRY)
    assert first.request.headers["content-type"] != again.request.headers["content-type"], "each has a boundary of its own"
    assert again.json() == first.json()
    assert len(list((api.settings.storage_dir / "files").iterdir())) == count(api, File) == 1
    assert api.client.get(f"{FILES}/{id_of(first)}/content").content == training_lines()
    others = [post_file(api, RETRY, name="other.jsonl"), post_file(api, RETRY, content=training_lines(13)), post_file(api, RETRY, purpose="evals")]
    others.append(post_file(api, RETRY, **{"expires_after[anchor]": "created_at", "expires_after[seconds]": "3600"}))
    assert len({id_of(answer) for answer in (first, *others)}) == count(api, File) == 5


def test_parts_in_another_order_are_the_same_request(api: Api) -> None:
    def form(*parts: str) -> dict[str, Any]:
        return {"content": ("".join(f"--x\r\nContent-Disposition: form-data; {part}\r\n" for part in parts) + "--x--\r\n").encode()}

    file, purpose = 'name="file"; filename="a.txt"\r\n\r\nhello', 'name="purpose"\r\n\r\nuser_data'
    headers = {"content-type": "multipart/form-data; boundary=x"}
    first = id_of(api.client.post(FILES, **form(file, purpose), headers=headers))
    assert id_of(api.client.post(FILES, **form(purpose, file), headers={**headers, **RETRY})) == first


def test_other_bodies_keys_and_times_are_other_requests(api_on_both: Api) -> None:
    api = api_on_both
    file_id = api.upload()
    jobs = [id_of(post_job(api, RETRY, training_file=file_id)), id_of(post_job(api, RETRY, training_file=file_id, suffix="x"))]
    with api.database.transaction() as session:
        colleague = bearer(create_key(session, api.project_id, "colleague"))
    jobs.append(id_of(post_job(api, {**RETRY, **colleague}, training_file=file_id)))
    make_older(api, RETRY_SECONDS - 5)
    assert id_of(post_job(api, RETRY, training_file=file_id)) == jobs[0]
    make_older(api, 6)
    jobs.append(id_of(post_job(api, RETRY, training_file=file_id)))
    assert id_of(post_job(api, RETRY, training_file=file_id)) == jobs[-1]
    assert len(set(jobs)) == count(api, Job) == 4


@pytest.mark.parametrize("ahead_seconds", [2.5 * RETRY_SECONDS, -2.5 * RETRY_SECONDS])
def test_machines_whose_clocks_differ_know_the_same_request(api_on_both: Api, monkeypatch: pytest.MonkeyPatch, ahead_seconds: float) -> None:
    api = api_on_both
    file_id = api.upload()
    first = id_of(post_job(api, training_file=file_id))
    late_try = id_of(post_job(api, RETRY, training_file=file_id, suffix="late"))
    monkeypatch.setattr("core.database.time", SimpleNamespace(time=lambda: time.time() + ahead_seconds))
    assert id_of(post_job(api, RETRY, training_file=file_id)) == first
    assert id_of(post_job(api, training_file=file_id, suffix="late")) != late_try, "a first try that came after it is another request"


def test_another_project_never_gets_an_object(api: Api) -> None:
    file_id = api.upload()
    for headers in (RETRY, named("mine")):
        id_of(post_job(api, headers, training_file=file_id))
        assert_error(post_job(api, {**headers, **api.other_headers}, training_file=file_id), 400, "file_not_found", "training_file")


def test_a_later_try_finds_the_job_although_what_it_needed_is_gone(api: Api) -> None:
    file_id = api.upload()
    job_id = id_of(post_job(api, training_file=file_id))
    api.client.post(f"{JOBS}/{job_id}/cancel")
    assert api.client.delete(f"{FILES}/{file_id}").status_code == 200
    assert id_of(post_job(api, RETRY, training_file=file_id)) == job_id


def test_a_file_that_was_deleted_is_uploaded_again(api_on_both: Api) -> None:
    api = api_on_both
    first = id_of(post_file(api))
    assert api.client.delete(f"{FILES}/{first}").status_code == 200
    again = id_of(post_file(api, RETRY))
    assert again != first
    assert api.client.get(f"{FILES}/{again}").status_code == 200


def test_a_name_brings_the_first_answer_back_byte_by_byte(api_on_both: Api) -> None:
    api = api_on_both
    first_file = post_file(api, named("file"))
    first_job = post_job(api, named("job"), training_file=id_of(first_file))
    api.client.post(f"{JOBS}/{id_of(first_job)}/cancel")
    assert api.client.delete(f"{FILES}/{id_of(first_file)}").status_code == 200
    for first, again in (
        (first_job, post_job(api, named("job"), training_file=id_of(first_file))),
        (first_job, post_job(api, named("job") | RETRY, training_file=id_of(first_file))),
        (first_file, post_file(api, named("file"))),
    ):
        assert (again.status_code, again.content) == (200, first.content)
        assert (again.headers["content-type"], again.headers["idempotent-replayed"]) == (first.headers["content-type"], "true")
        assert again.headers["x-request-id"] != first.headers["x-request-id"]
        assert "idempotent-replayed" not in first.headers
    assert (count(api, Job), count(api, File)) == (1, 0)


def test_a_name_belongs_to_one_request_of_one_key_for_a_day(api_on_both: Api) -> None:
    api = api_on_both
    file_id = api.upload()
    first = id_of(post_job(api, named("job"), training_file=file_id))
    for answer in (post_job(api, named("job"), training_file=file_id, suffix="x"), post_file(api, named("job"))):
        assert_error(answer, 409, "idempotency_key_reused")
        assert answer.headers["x-should-retry"] == "false"
    assert count(api, File) == len(list((api.settings.storage_dir / "files").iterdir())) == 1
    assert_error(post_job(api, {**named("job"), **api.other_headers}, training_file=file_id), 400, "file_not_found", "training_file")
    assert id_of(post_job(api, named("other"), training_file=file_id)) != first
    make_older(api, NAMED_SECONDS - 5)
    assert id_of(post_job(api, named("job"), training_file=file_id)) == first
    make_older(api, 6)
    later = id_of(post_job(api, named("job"), training_file=file_id, suffix="x"))
    assert later != first
    assert id_of(post_job(api, named("job"), training_file=file_id, suffix="x")) == later


def test_what_was_refused_can_be_sent_again_under_its_name(api: Api) -> None:
    assert_error(post_job(api, named("job"), training_file="file-unknown"), 400, "file_not_found", "training_file")
    assert count(api, IdempotencyRecord) == 0
    assert post_job(api, named("job"), training_file=api.upload()).status_code == 200


@pytest.mark.parametrize("name", ["", "x" * 256, "a\tb"])
def test_names_that_cannot_be(api: Api, name: str) -> None:
    for answer in (post_job(api, named(name), training_file="file-1"), post_file(api, named(name))):
        assert_error(answer, 400, "invalid_value", "Idempotency-Key")


def test_a_creation_that_fails_leaves_no_record(api_on_both: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    api = api_on_both
    file_id = api.upload()

    def fail_afterwards(*arguments: Any) -> None:
        record(*arguments)
        raise Unavailable("the database can't be reached or is busy")

    from api.fine_tuning.jobs import creation

    record = creation.record_creation
    monkeypatch.setattr(creation, "record_creation", fail_afterwards)
    for headers in (None, RETRY, named("job")):
        assert_error(post_job(api, headers, training_file=file_id), 503, "service_unavailable")
    assert (count(api, Job), count(api, IdempotencyRecord)) == (0, 1)
    monkeypatch.undo()
    assert len({id_of(post_job(api, headers, training_file=file_id)) for headers in (RETRY, named("job"))}) == count(api, Job) == 2


def test_another_process_knows_it_too(api_on_both: Api) -> None:
    api = api_on_both
    file_id = api.upload()
    body = {"model": "tiny", "training_file": file_id}
    first, under_a_name = post_job(api, training_file=file_id), post_job(api, named("job"), training_file=file_id)
    with TestClient(create_app(api.settings), headers=api.headers) as other:
        assert id_of(other.post(JOBS, json=body, headers=RETRY)) == id_of(first)
        assert other.post(JOBS, json=body, headers=named("job")).content == under_a_name.content


def test_records_that_stand_for_nothing_any_more_are_deleted(api_on_both: Api) -> None:
    api = api_on_both
    post_job(api, named("job"), training_file=api.upload())
    assert delete_expired_records(api.state) == 0
    make_older(api, RETRY_KEPT_SECONDS)
    assert (delete_expired_records(api.state), count(api, IdempotencyRecord)) == (1, 1)
    make_older(api, NAMED_SECONDS)
    assert (delete_expired_records(api.state), count(api, IdempotencyRecord)) == (1, 0)


def test_the_api_deletes_them_by_itself(api: Api) -> None:
    post_job(api, training_file=api.upload())
    make_older(api, RETRY_KEPT_SECONDS)
    with TestClient(create_app(api.settings)):
        wait_for(lambda: count(api, IdempotencyRecord) == 0)


class LosesFirstAnswers:
    """The application, but the first answer to each address gets lost after the work is done."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        self.lost: list[str] = []

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] in self.lost:
            await self._app(scope, receive, send)
            return
        self.lost.append(scope["path"])

        async def nowhere(message: Message) -> None:
            return None

        await self._app(scope, receive, nowhere)
        raise ConnectionResetError("the answer got lost")


def test_the_stock_client_loses_an_answer_and_creates_nothing_twice(api_on_both: Api) -> None:
    api = api_on_both
    lossy = LosesFirstAnswers(api.app)
    with on_a_port(lossy) as base_url, OpenAI(base_url=f"{base_url}/v1", api_key=api.key, max_retries=2) as client:
        file = client.files.create(file=("train.jsonl", training_lines()), purpose="fine-tune")
        job = client.fine_tuning.jobs.create(model="tiny", training_file=file.id)
    assert lossy.lost == [FILES, JOBS]
    assert (count(api, File), count(api, Job)) == (1, 1)
    assert api.client.get(f"{JOBS}/{job.id}").json()["training_file"] == file.id
