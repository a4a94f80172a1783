"""The API over a bucket, with a bad network between: what a client sees, and that nothing is left behind."""

import os
import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import httpx2
import openai
import pytest
from sqlalchemy import select

from core.s3_storage import S3Storage
from core.settings import Settings
from core.tables.files import File
from tests.api.conftest import SETTINGS
from tests.api.model_rows import add_model
from tests.api.serving import Api, on_a_port, serve, training_lines, wait_for
from tests.api.test_errors import assert_error
from tests.fixtures.faulty_proxy import EVERY, Fault, FaultyProxy, reads, uploads
from tests.fixtures.s3_server import SHORT, Bucket

LARGE = os.urandom(1 << 20) * 12


@dataclass(frozen=True)
class RemoteApi:
    api: Api
    bucket: Bucket
    proxy: FaultyProxy

    def file_ids(self) -> list[str]:
        with self.api.database.reading() as session:
            return list(session.scalars(select(File.id)))


@pytest.fixture
def remote(
    make_settings: Callable[..., Settings], sqlite_url: str, valkey: str, bucket: Bucket, proxy: FaultyProxy, monkeypatch: pytest.MonkeyPatch
) -> Iterator[RemoteApi]:
    monkeypatch.setattr("core.s3_storage.PART_BYTES", 5 << 20)
    monkeypatch.setattr("core.object_storage.S3Storage", partial(S3Storage, patience=SHORT))
    settings = make_settings(redis_url=valkey, inference_urls=["http://127.0.0.1:1"], **SETTINGS, **bucket.settings | {"s3_endpoint_url": proxy.url})
    with serve(settings) as opened, on_a_port(opened.app) as base_url:
        yield RemoteApi(replace(opened, base_url=base_url), bucket, proxy)


def upload(remote: RemoteApi, content: bytes = LARGE) -> Any:
    return remote.api.client.post("/v1/files", data={"purpose": "user_data"}, files={"file": ("large.bin", content)})


def test_the_stock_client_over_a_bucket(remote: RemoteApi) -> None:
    client = remote.api.openai
    small = client.files.create(file=("t.jsonl", training_lines()), purpose="fine-tune")
    large = client.files.create(file=("large.bin", LARGE), purpose="user_data")
    assert client.files.content(small.id).read() == training_lines()
    assert client.files.content(large.id).read() == LARGE
    part = httpx2.get(f"{remote.api.base_url}/v1/files/{large.id}/content", headers={**remote.api.headers, "range": "bytes=1000-9000000"})
    assert (part.status_code, part.content) == (206, LARGE[1000:9_000_001])
    assert remote.bucket.keys() == sorted([f"files/{small.id}", f"files/{large.id}"])
    assert client.fine_tuning.jobs.create(model="tiny", training_file=small.id).status == "validating_files"
    client.files.delete(large.id)
    assert remote.bucket.keys() == [f"files/{small.id}"]
    assert not remote.api.settings.storage_dir.exists()


def test_a_model_is_downloaded_from_a_bucket(remote: RemoteApi) -> None:
    model = add_model(remote.api, "ft:tiny:default::1")
    content = remote.api.client.get(f"/v1/models/{model.id}/adapter").content
    assert len(content) == model.archive_bytes
    assert remote.api.client.delete(f"/v1/models/{model.id}").status_code == 200
    assert remote.bucket.keys() == []


@pytest.mark.parametrize("content", [training_lines(), LARGE], ids=["one part", "several"])
def test_an_upload_that_storage_refuses_is_a_503_and_leaves_nothing(remote: RemoteApi, content: bytes) -> None:
    remote.proxy.faults = [Fault("status", EVERY, uploads)]
    answer = upload(remote, content)
    assert_error(answer, 503, "storage_unavailable")
    assert answer.headers["retry-after"] == "5"
    assert (remote.file_ids(), remote.bucket.keys(), remote.bucket.unfinished_uploads()) == ([], [], [])
    remote.proxy.faults = []
    assert upload(remote, content).status_code == 200


def test_an_upload_that_is_refused_as_wrong_leaves_nothing(remote: RemoteApi) -> None:
    files = {"file": ("train.jsonl", training_lines(100_000) + b"no json\n")}
    assert_error(remote.api.client.post("/v1/files", data={"purpose": "fine-tune"}, files=files), 400, "invalid_json", "file")
    assert (remote.file_ids(), remote.bucket.keys(), remote.bucket.unfinished_uploads()) == ([], [], [])


def test_a_purpose_that_comes_last_is_checked_from_the_bucket(remote: RemoteApi) -> None:
    body = b'--e\r\nContent-Disposition: form-data; name="file"; filename="t.jsonl"\r\n\r\n' + training_lines()
    body += b'\r\n--e\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nfine-tune\r\n--e--\r\n'
    answer = remote.api.client.post("/v1/files", content=body, headers={"content-type": "multipart/form-data; boundary=e"})
    assert answer.status_code == 200
    assert remote.api.client.get(f"/v1/files/{answer.json()['id']}/content").content == training_lines()
    assert remote.bucket.keys() == [f"files/{answer.json()['id']}"]


def test_a_client_that_leaves_in_the_middle_leaves_no_unfinished_upload(remote: RemoteApi) -> None:
    host, port = remote.api.base_url.removeprefix("http://").split(":")
    head = f"POST /v1/files HTTP/1.1\r\nHost: test\r\nAuthorization: Bearer {remote.api.key}\r\nContent-Length: 100000000\r\n"
    with socket.create_connection((host, int(port)), timeout=5) as connection:
        connection.sendall(head.encode() + b"Content-Type: multipart/form-data; boundary=edge\r\n\r\n")
        connection.sendall(b'--edge\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n' + LARGE)
        wait_for(lambda: len(remote.bucket.unfinished_uploads()) == 1, 30)
    wait_for(lambda: remote.bucket.unfinished_uploads() == [], 30)
    assert (remote.file_ids(), remote.bucket.keys()) == ([], [])


def test_a_download_before_whose_first_byte_storage_fails_is_a_503(remote: RemoteApi) -> None:
    file_id = upload(remote).json()["id"]
    remote.proxy.faults = [Fault("status", EVERY)]
    assert_error(remote.api.client.get(f"/v1/files/{file_id}/content"), 503, "storage_unavailable")


def test_a_download_in_whose_middle_storage_fails_breaks(remote: RemoteApi) -> None:
    file_id = upload(remote).json()["id"]
    remote.proxy.faults = [Fault("status", EVERY, lambda method, path: remote.proxy.seen.count(("GET", path)) > 1)]
    with pytest.raises(openai.APIConnectionError):
        remote.api.openai.files.content(file_id)


def test_a_download_whose_answers_are_cut_is_whole(remote: RemoteApi) -> None:
    file_id = upload(remote).json()["id"]
    remote.proxy.faults = [Fault("cut_answer", 2, reads, after_bytes=1_000_000)]
    assert remote.api.openai.files.content(file_id).read() == LARGE


def test_an_object_that_is_damaged_breaks_its_download(remote: RemoteApi) -> None:
    file_id = upload(remote).json()["id"]
    remote.bucket.replace(f"files/{file_id}", LARGE[:-1] + bytes([LARGE[-1] ^ 1]))
    with pytest.raises(openai.APIConnectionError):
        remote.api.openai.files.content(file_id)


def test_a_file_is_gone_although_its_bytes_could_not_be_deleted(remote: RemoteApi) -> None:
    file_id = upload(remote).json()["id"]
    remote.proxy.faults = [Fault("status", EVERY, lambda method, path: method == "DELETE")]
    assert remote.api.client.delete(f"/v1/files/{file_id}").status_code == 200
    assert remote.file_ids() == []
    assert remote.bucket.keys() == [f"files/{file_id}"], "the worker's garbage collection removes it"
