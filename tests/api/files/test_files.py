import hashlib

import httpx2
import openai
import pytest
from sqlalchemy import select, update

from api.files.service import delete_expired_files
from core.database import unix_now
from core.errors import StorageUnavailable
from core.tables.files import File
from core.tables.jobs import Job
from tests.api.serving import Api, training_lines
from tests.api.test_errors import assert_error


def ids_of(api: Api, **parameters: object) -> list[str]:
    return [file["id"] for file in api.client.get("/v1/files", params=parameters).json()["data"]]


def test_list_is_paged_in_both_orders(api_on_both: Api) -> None:
    api = api_on_both
    ids = [api.upload(b"x", purpose="user_data") for _ in range(5)]
    assert ids_of(api) == ids[::-1]
    assert ids_of(api, order="asc") == ids
    page = api.client.get("/v1/files", params={"limit": 2}).json()
    assert page == {"object": "list", "data": page["data"], "first_id": ids[4], "last_id": ids[3], "has_more": True}
    assert ids_of(api, limit=2, after=ids[3]) == [ids[2], ids[1]]
    last = api.client.get("/v1/files", params={"limit": 2, "after": ids[1]}).json()
    assert ([file["id"] for file in last["data"]], last["has_more"]) == ([ids[0]], False)
    assert ids_of(api, order="asc", after=ids[3]) == [ids[4]]
    assert api.client.get("/v1/files", params={"after": ids[0]}).json() == {"object": "list", "data": [], "first_id": None, "last_id": None, "has_more": False}
    assert_error(api.client.get("/v1/files", params={"after": "file-unknown"}), 400, "invalid_cursor", "after")


def test_list_by_purpose(api_on_both: Api) -> None:
    evals, training = api_on_both.upload(b"x", purpose="evals"), api_on_both.upload()
    assert ids_of(api_on_both, purpose="evals") == [evals]
    assert ids_of(api_on_both, purpose="fine-tune") == [training]
    assert ids_of(api_on_both, purpose="nothing") == []


def test_stock_client(live_api: Api) -> None:
    client = live_api.openai
    for number in range(3):
        client.files.create(file=(f"{number}.jsonl", training_lines()), purpose="fine-tune")
    names = [file.filename for file in client.files.list(limit=1)]
    assert names == ["2.jsonl", "1.jsonl", "0.jsonl"]
    file = client.files.wait_for_processing(client.files.list().data[0].id, max_wait_seconds=5)
    assert client.files.retrieve(file.id) == file
    assert client.files.content(file.id).read() == training_lines()
    deleted = client.files.delete(file.id)
    assert (deleted.id, deleted.object, deleted.deleted) == (file.id, "file", True)
    assert [file.filename for file in client.files.list()] == ["1.jsonl", "0.jsonl"]
    expiring = client.files.create(file=("e.jsonl", training_lines()), purpose="fine-tune", expires_after={"anchor": "created_at", "seconds": 4000})
    assert expiring.expires_at == pytest.approx(expiring.created_at + 4000, abs=1)


def test_content_in_whole_and_in_part(api: Api) -> None:
    content = bytes(range(256)) * 20_000
    path = f"/v1/files/{api.upload(content, purpose='user_data', filename='Grüße.bin')}/content"
    whole = api.client.get(path)
    digest = hashlib.sha256(content).hexdigest()
    assert whole.content == content
    assert whole.headers["content-length"] == str(len(content))
    assert whole.headers["x-sha256"] == digest
    assert whole.headers["accept-ranges"] == "bytes"
    assert whole.headers["content-disposition"] == "attachment; filename*=UTF-8''Gr%C3%BC%C3%9Fe.bin"
    part = api.client.get(path, headers={"range": "bytes=1000-3000099"})
    assert part.status_code == 206
    assert part.content == content[1000:3_000_100]
    assert part.headers["content-range"] == f"bytes 1000-3000099/{len(content)}"
    assert part.headers["content-length"] == "2999100"
    assert api.client.get(path, headers={"range": "bytes=-5"}).content == content[-5:]
    assert api.client.get(path, headers={"range": "bytes=0-1", "if-range": f'"{digest}"'}).status_code == 206
    assert api.client.get(path, headers={"range": "bytes=0-1", "if-range": '"another"'}).content == content
    beyond = api.client.get(path, headers={"range": f"bytes={len(content)}-"})
    assert_error(beyond, 416, "range_not_satisfiable")
    assert beyond.headers["content-range"] == f"bytes */{len(content)}"


def test_empty_file_has_content(api: Api) -> None:
    answer = api.client.get(f"/v1/files/{api.upload(b'', purpose='user_data')}/content")
    assert (answer.status_code, answer.content, answer.headers["content-length"]) == (200, b"", "0")


def test_content_whose_bytes_are_gone(api: Api) -> None:
    file_id = api.upload()
    api.state.storage.delete(f"files/{file_id}")
    assert_error(api.client.get(f"/v1/files/{file_id}/content"), 404, "not_found")


@pytest.mark.parametrize("size", [1000, 3_000_000])
@pytest.mark.parametrize("damage", ["one bit", "shorter", "longer"])
def test_content_that_is_damaged_does_not_end_as_if_it_were_whole(live_api: Api, size: int, damage: str) -> None:
    content = bytes(range(250)) * (size // 250)
    file_id = live_api.upload(content, purpose="user_data")
    path = live_api.settings.storage_dir / "files" / file_id
    path.write_bytes({"one bit": content[:500] + b"?" + content[501:], "shorter": content[:-1], "longer": content + b"?"}[damage])
    if damage == "longer":  # what was appended is no part of the file
        assert live_api.openai.files.content(file_id).read() == content
        return
    with pytest.raises(openai.APIConnectionError):
        live_api.openai.files.content(file_id)
    with httpx2.stream("GET", f"{live_api.base_url}/v1/files/{file_id}/content", headers=live_api.headers) as answer, pytest.raises(httpx2.HTTPError):
        answer.read()


def test_deleted_file_is_gone_with_its_bytes(api_on_both: Api) -> None:
    api = api_on_both
    file_id = api.upload()
    assert api.client.delete(f"/v1/files/{file_id}").json() == {"id": file_id, "object": "file", "deleted": True}
    assert not api.state.storage.exists(f"files/{file_id}")
    for method, path in (("GET", ""), ("GET", "/content"), ("DELETE", "")):
        assert_error(api.client.request(method, f"/v1/files/{file_id}{path}"), 404, "not_found", "file_id")


@pytest.mark.parametrize("field", ["training_file", "validation_file"])
def test_file_of_an_unfinished_job_stays(api_on_both: Api, field: str) -> None:
    api = api_on_both
    files = {"training_file": api.upload(), "validation_file": api.upload()}
    job = api.create_job(**files)
    answer = api.client.delete(f"/v1/files/{files[field]}")
    assert job["id"] in assert_error(answer, 409, "file_in_use")
    assert answer.headers["x-should-retry"] == "false"
    assert api.client.get(f"/v1/files/{files[field]}/content").status_code == 200
    api.client.post(f"/v1/fine_tuning/jobs/{job['id']}/cancel")
    assert api.client.delete(f"/v1/files/{files[field]}").status_code == 200


def test_retention_file_of_an_unfinished_job_stays(api_on_both: Api) -> None:
    api = api_on_both
    questions = api.upload(b'{"probe": "sums", "question": "1+1?", "answers": ["2"]}', purpose="evals")
    job = api.create_job(method={"type": "sdft", "sdft": {"retention_file": questions}})
    assert job["id"] in assert_error(api.client.delete(f"/v1/files/{questions}"), 409, "file_in_use")
    api.client.post(f"/v1/fine_tuning/jobs/{job['id']}/cancel")
    assert api.client.delete(f"/v1/files/{questions}").status_code == 200


def expire(api: Api, file_id: str) -> None:
    with api.database.transaction() as session:
        session.execute(update(File).where(File.id == file_id).values(expires_at=unix_now() - 1))


def test_expired_file_is_gone(api_on_both: Api) -> None:
    api = api_on_both
    expired, kept = api.upload(), api.upload()
    expire(api, expired)
    assert ids_of(api) == [kept]
    assert_error(api.client.get(f"/v1/files/{expired}"), 404, "not_found", "file_id")
    body = {"model": "tiny", "training_file": expired}
    assert_error(api.client.post("/v1/fine_tuning/jobs", json=body), 400, "file_not_found", "training_file")
    assert delete_expired_files(api.state) == 1
    assert not api.state.storage.exists(f"files/{expired}")
    assert api.state.storage.exists(f"files/{kept}")
    with api.database.reading() as session:
        assert session.scalars(select(File.id)).all() == [kept]


def test_expired_files_wait_while_storage_can_t_be_reached(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every try takes long: after the first the others are left for the next time."""
    ids = [api.upload() for _ in range(3)]
    for file_id in ids:
        expire(api, file_id)
    tried: list[str] = []

    def away(storage: object, key: str) -> None:
        tried.append(key)
        raise StorageUnavailable("away")

    with monkeypatch.context() as patch:
        patch.setattr(type(api.state.storage), "delete", away)
        assert delete_expired_files(api.state) == 1
    assert len(tried) == 1
    assert delete_expired_files(api.state) == 2


def test_expired_file_of_an_unfinished_job_waits(api_on_both: Api) -> None:
    api = api_on_both
    file_id = api.upload()
    job = api.create_job(training_file=file_id)
    expire(api, file_id)
    assert delete_expired_files(api.state) == 0
    assert api.state.storage.exists(f"files/{file_id}")
    with api.database.transaction() as session:
        session.execute(update(Job).where(Job.id == job["id"]).values(status="cancelled", finished_at=unix_now()))
    assert delete_expired_files(api.state) == 1
