import gzip
import json
import shutil
import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from sqlalchemy import select
from sqlalchemy.orm import Session

from api.files import contents, upload
from core.database import Database, unix_now
from core.errors import StorageFull, Unavailable
from core.settings import Settings
from core.storage import LocalWriter
from core.tables.files import File
from core.tables.projects import ApiKey, Project
from tests.api.conftest import SETTINGS
from tests.api.serving import EXAMPLE, Api, serve, training_lines, wait_for
from tests.api.test_errors import assert_error

GOOD = json.dumps(EXAMPLE).encode()


def bad_line(**changes: Any) -> bytes:
    return json.dumps({**EXAMPLE, **changes}).encode()


def file_with_line_13(line: bytes) -> bytes:
    return training_lines(12) + line + b"\n" + training_lines(2)


def stored_files(api: Api) -> list[Path]:
    return [path for path in api.settings.storage_dir.rglob("*") if path.is_file()]


def assert_nothing_left(api: Api) -> None:
    assert stored_files(api) == []
    assert api.client.get("/v1/files").json()["data"] == []


def post(api: Api, content: bytes, purpose: str = "fine-tune", filename: str = "train.jsonl", **fields: str) -> Any:
    return api.client.post("/v1/files", data={"purpose": purpose, **fields}, files={"file": (filename, content)})


def form(*parts: tuple[str, bytes]) -> dict[str, Any]:
    """The arguments of a request whose parts come in this order."""
    body = b"".join(b"--edge\r\nContent-Disposition: form-data; " + head.encode() + b"\r\n\r\n" + content + b"\r\n" for head, content in parts)
    return {"content": body + b"--edge--\r\n", "headers": {"content-type": "multipart/form-data; boundary=edge"}}


FILE, PURPOSE = 'name="file"; filename="train.jsonl"', 'name="purpose"'


def test_file_is_stored_as_it_came(api: Api) -> None:
    content = b"\xef\xbb\xbf" + training_lines(11).replace(b"\n", b"\r\n") + GOOD
    answer = post(api, content)
    assert answer.status_code == 200
    file = answer.json()
    assert file["id"].startswith("file-")
    assert (file["object"], file["bytes"], file["purpose"], file["status"], file["filename"]) == ("file", len(content), "fine-tune", "processed", "train.jsonl")
    assert file["expires_at"] is None
    assert api.client.get(f"/v1/files/{file['id']}/content").content == content
    assert api.create_job(training_file=file["id"])["training_file"] == file["id"]


@pytest.mark.parametrize("order", [(PURPOSE, FILE), (FILE, PURPOSE)])
def test_parts_may_come_in_any_order(api: Api, order: tuple[str, str]) -> None:
    contents = {PURPOSE: b"fine-tune", FILE: training_lines(15)}
    answer = api.client.post("/v1/files", **form(*((head, contents[head]) for head in order), ('name="other"', b"ignored")))
    assert answer.status_code == 200, answer.text
    assert len(stored_files(api)) == 1
    contents[FILE] = file_with_line_13(b"nonsense")
    answer = api.client.post("/v1/files", **form(*((head, contents[head]) for head in order)))
    assert "line 13" in assert_error(answer, 400, "invalid_json", "file")
    assert len(stored_files(api)) == 1


BAD_TRAINING_FILES = [
    (b"", "invalid_n_examples", "empty"),
    (b"\n\n  \n", "invalid_n_examples", "empty"),
    (file_with_line_13(b"this is not JSON"), "invalid_json", "line 13"),
    (file_with_line_13(bytes(range(256)) * 3), "invalid_encoding", "line 13"),
    (file_with_line_13(GOOD.replace(b"blue", "bläu".encode("latin-1"))), "invalid_encoding", "line 13"),
    (file_with_line_13(GOOD.replace(b"blue", b"bl\x00e")), "invalid_encoding", "line 13"),
    (file_with_line_13(GOOD.replace(b"blue", b"\\ud800")), "invalid_encoding", "line 13"),
    (training_lines(12).decode().encode("utf-16"), "invalid_encoding", "line 1 (also 2"),
    (file_with_line_13(b"[1, 2]"), "data_type", "line 13"),
    (file_with_line_13(b"{}"), "missing_messages_list", "line 13"),
    (file_with_line_13(bad_line(messages=[])), "missing_messages_list", "line 13"),
    (file_with_line_13(bad_line(messages=[{"content": "x"}])), "message_missing_key", "line 13"),
    (file_with_line_13(bad_line(messages=[{"role": "user", "content": "x", "colour": 1}])), "message_unrecognized_key", "line 13"),
    (file_with_line_13(bad_line(messages=[{"role": "wizard", "content": "x"}])), "unrecognized_role", "line 13"),
    (file_with_line_13(bad_line(messages=[{"role": "user", "content": "x"}])), "example_missing_assistant_message", "line 13"),
    (file_with_line_13(bad_line(messages=[{"role": "user", "content": None}])), "missing_content", "line 13"),
    (file_with_line_13(bad_line(surplus=1)), "unrecognized_key", "line 13"),
    (file_with_line_13(b"x" * 200_000), "line_too_long", "line 13"),
    (file_with_line_13(b"[" * 3000), "json_too_deep", "line 13"),
    (training_lines(60), "too_many_lines", "line 51"),
]


@pytest.mark.parametrize("purpose_first", [True, False])
def test_bad_training_file(make_settings: Callable[..., Settings], sqlite_url: str, valkey: str, purpose_first: bool) -> None:
    settings = make_settings(redis_url=valkey, inference_urls=["http://127.0.0.1:1"], max_line_bytes=100_000, max_lines=50, **SETTINGS)
    with serve(settings) as api:
        for content, code, words in BAD_TRAINING_FILES:
            parts = [(PURPOSE, b"fine-tune"), (FILE, content)]
            message = assert_error(api.client.post("/v1/files", **form(*(parts if purpose_first else parts[::-1]))), 400, code, "file")
            assert words in message
        assert_nothing_left(api)


def test_all_problems_are_listed(api: Api) -> None:
    content = b"\n".join(b"nonsense" if number % 2 else GOOD for number in range(1, 401))
    error = post(api, content).json()["error"]
    assert [problem["line"] for problem in error["problems"]] == list(range(1, 200, 2))
    assert error["problems"][0].keys() == {"line", "code", "message"}
    assert "line 1 (also 3, 5, " in error["message"]
    assert "; and 100 more" in error["message"]


def test_problem_in_a_last_line_without_newline(api: Api) -> None:
    assert "line 13" in assert_error(post(api, training_lines(12) + b"{"), 400, "invalid_json", "file")


@pytest.mark.parametrize("purpose_first", [True, False])
def test_gzipped_training_file_is_stored_as_text(api: Api, purpose_first: bool) -> None:
    parts = [(PURPOSE, b"fine-tune"), ('name="file"; filename="train.jsonl.GZ"', gzip.compress(training_lines()))]
    answer = api.client.post("/v1/files", **form(*(parts if purpose_first else parts[::-1])))
    assert answer.status_code == 200, answer.text
    assert answer.json()["filename"] == "train.jsonl"
    assert answer.json()["bytes"] == len(training_lines())
    assert api.client.get(f"/v1/files/{answer.json()['id']}/content").content == training_lines()


def test_bad_gzip(api: Api) -> None:
    assert_error(post(api, training_lines(), filename="train.jsonl.gz"), 400, "invalid_gzip", "file")
    assert_error(post(api, gzip.compress(training_lines())[:-4], filename="train.jsonl.gz"), 400, "invalid_gzip", "file")
    assert_error(post(api, gzip.compress(b" " * (32 << 20)), filename="train.jsonl.gz"), 400, "compression_ratio", "file")
    assert "line 13" in assert_error(post(api, gzip.compress(file_with_line_13(b"{")), filename="train.jsonl.gz"), 400, "invalid_json", "file")
    assert_nothing_left(api)


def test_gzip_of_other_purposes_stays_as_it_is(api: Api) -> None:
    content = gzip.compress(b"anything")
    file_id = api.upload(content, purpose="user_data", filename="x.gz")
    assert api.client.get(f"/v1/files/{file_id}/content").content == content


@pytest.mark.parametrize("purpose", ["evals", "user_data", "batch", "assistants", "vision"])
def test_other_purposes_are_not_checked(api: Api, purpose: str) -> None:
    content = bytes(range(256))
    file_id = api.upload(content, purpose=purpose, filename="x.bin")
    assert api.client.get(f"/v1/files/{file_id}/content").content == content


@pytest.fixture
def small_api(make_settings: Callable[..., Settings], sqlite_url: str, valkey: str) -> Iterator[Api]:
    with serve(make_settings(redis_url=valkey, inference_urls=["http://127.0.0.1:1"], max_file_bytes=10_000, **SETTINGS)) as opened:
        yield opened


@pytest.mark.parametrize("purpose", ["fine-tune", "user_data"])
@pytest.mark.parametrize("purpose_first", [True, False])
def test_file_that_is_too_large(small_api: Api, purpose: str, purpose_first: bool) -> None:
    line = GOOD.ljust(1000) + b"\n"
    assert post(small_api, line[:-1] * 9, purpose="user_data").status_code == 200
    small_api.client.delete(f"/v1/files/{small_api.client.get('/v1/files').json()['data'][0]['id']}")
    parts = [(PURPOSE, purpose.encode()), (FILE, line * 10)]
    answer = small_api.client.post("/v1/files", **form(*(parts if purpose_first else parts[::-1])))
    assert "10,000 bytes" in assert_error(answer, 413, "file_too_large", "file")
    assert_nothing_left(small_api)


def test_decompressed_size_counts(small_api: Api) -> None:
    assert_error(post(small_api, gzip.compress(training_lines(200)), filename="train.jsonl.gz"), 413, "file_too_large", "file")
    assert_nothing_left(small_api)


@pytest.mark.parametrize(
    ("parts", "code", "param"),
    [
        ([(PURPOSE, b"fine-tune")], "missing", "file"),
        ([(FILE, GOOD)], "missing", "purpose"),
        ([(PURPOSE, b"fun"), (FILE, GOOD)], "invalid_purpose", "purpose"),
        ([(FILE, GOOD), (PURPOSE, b"")], "invalid_purpose", "purpose"),
        ([(PURPOSE, b"fine-tune-results"), (FILE, GOOD)], "invalid_purpose", "purpose"),
        ([(PURPOSE, b"\xff\x00"), (FILE, GOOD)], "invalid_purpose", "purpose"),
        ([(PURPOSE, b"x" * 9000), (FILE, GOOD)], "invalid_multipart", "purpose"),
        ([(PURPOSE, b"evals"), (FILE, GOOD), (FILE, GOOD)], "invalid_multipart", "file"),
        ([(PURPOSE, b"evals"), (PURPOSE, b"evals"), (FILE, GOOD)], "invalid_multipart", "purpose"),
    ],
)
def test_bad_form(api: Api, parts: list[tuple[str, bytes]], code: str, param: str) -> None:
    assert_error(api.client.post("/v1/files", **form(*parts)), 400, code, param)
    assert_nothing_left(api)


def test_body_that_is_no_form(api: Api) -> None:
    assert_error(api.client.post("/v1/files", json={"purpose": "fine-tune"}), 400, "invalid_content_type")
    assert_error(api.client.post("/v1/files"), 400, "invalid_content_type")
    assert_error(api.client.post("/v1/files", content=b"--edge", headers={"content-type": "multipart/form-data; boundary=edge"}), 400, "invalid_multipart")


def test_filename_is_only_shown(api: Api) -> None:
    names = {"../../etc/passwd": "../../etc/passwd", "a\\b.jsonl": "a\\b.jsonl", "Grüße ✓.jsonl": "Grüße ✓.jsonl", "x" * 300: "x" * 255}
    for given, shown in names.items():
        file_id = api.upload(filename=given)
        assert api.client.get(f"/v1/files/{file_id}").json()["filename"] == shown
        assert api.client.get(f"/v1/files/{file_id}/content").headers["content-disposition"].isascii()
    assert all(path.parent == api.settings.storage_dir / "files" for path in stored_files(api))
    hostile = api.client.post("/v1/files", **form((PURPOSE, b"evals"), ('name="file"; filename="a\x00\x07b"', b"x")))
    assert hostile.json()["filename"] == "ab"


def test_expiry(api: Api) -> None:
    good = {"expires_after[anchor]": "created_at", "expires_after[seconds]": "3600"}
    file = post(api, training_lines(), **good).json()
    assert file["expires_at"] == pytest.approx(file["created_at"] + 3600, abs=1)
    for wrong, param in (
        ({"expires_after[seconds]": "3599"}, "expires_after.seconds"),
        ({"expires_after[seconds]": "2592001"}, "expires_after.seconds"),
        ({"expires_after[seconds]": "soon"}, "expires_after.seconds"),
        ({"expires_after[seconds]": "9" * 5000}, "expires_after.seconds"),
        ({"expires_after[seconds]": "0002592000" + "9" * 30}, "expires_after.seconds"),
        ({"expires_after[seconds]": "0002592000" + "9" * 300}, "expires_after.seconds"),
        ({"expires_after[anchor]": "last_active_at"}, "expires_after.anchor"),
    ):
        assert_error(post(api, training_lines(), **{**good, **wrong}), 400, "invalid_value", param)
    assert_error(post(api, training_lines(), **{"expires_after[seconds]": "3600"}), 400, "invalid_value", "expires_after.anchor")
    assert len(stored_files(api)) == 1


def test_client_that_leaves_in_the_middle_leaves_nothing(live_api: Api) -> None:
    host, port = live_api.base_url.removeprefix("http://").split(":")
    head = f"POST /v1/files HTTP/1.1\r\nHost: test\r\nAuthorization: Bearer {live_api.key}\r\nContent-Length: 100000000\r\n"
    with socket.create_connection((host, int(port)), timeout=5) as connection:
        connection.sendall(head.encode() + b"Content-Type: multipart/form-data; boundary=edge\r\n\r\n")
        connection.sendall(b"--edge\r\nContent-Disposition: form-data; " + PURPOSE.encode() + b"\r\n\r\nfine-tune\r\n")
        connection.sendall(b"--edge\r\nContent-Disposition: form-data; " + FILE.encode() + b"\r\n\r\n" + training_lines(1000))
        wait_for(lambda: len(stored_files(live_api)) == 1)
    wait_for(lambda: stored_files(live_api) == [])
    assert_nothing_left(live_api)
    assert live_api.openai.files.create(file=("t.jsonl", training_lines()), purpose="fine-tune").status == "processed"


@pytest.mark.parametrize(
    ("error", "status", "code"),
    [(Unavailable("the database can't be reached or is busy"), 503, "service_unavailable"), (OverflowError("a number too large"), 500, "server_error")],
)
def test_row_that_cannot_be_written_leaves_no_object(api: Api, monkeypatch: pytest.MonkeyPatch, error: Exception, status: int, code: str) -> None:
    def down(self: Database) -> None:
        raise error

    api.client.get("/v1/files")  # so that the key is known
    monkeypatch.setattr(Database, "transaction", down)
    assert_error(post(api, training_lines()), status, code)
    monkeypatch.undo()
    assert_nothing_left(api)


def test_a_commit_whose_answer_got_lost_keeps_the_object_for_its_row(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    api.client.get("/v1/files")  # so that the key is known
    transaction = Database.transaction

    @contextmanager
    def committed_but_not_told(self: Database) -> Iterator[Session]:
        with transaction(self) as session:
            yield session
        raise Unavailable("the database can't be reached or is busy")

    monkeypatch.setattr(Database, "transaction", committed_but_not_told)
    assert_error(post(api, training_lines()), 503, "service_unavailable")
    monkeypatch.undo()
    again = api.client.post(
        "/v1/files", data={"purpose": "fine-tune"}, files={"file": ("train.jsonl", training_lines())}, headers={"x-stainless-retry-count": "1"}
    )
    assert [file["id"] for file in api.client.get("/v1/files").json()["data"]] == [again.json()["id"]]
    assert api.client.get(f"/v1/files/{again.json()['id']}/content").content == training_lines()
    assert len(stored_files(api)) == 1


@pytest.mark.parametrize("step", ["write", "commit"])
def test_full_disk(api: Api, monkeypatch: pytest.MonkeyPatch, step: str) -> None:
    def full(*arguments: object) -> None:
        raise StorageFull("the server's storage is full; nothing was stored")

    monkeypatch.setattr(LocalWriter, step, full)
    assert_error(post(api, training_lines()), 507, "storage_full")
    assert_nothing_left(api)


def test_uploads_at_the_same_time(live_api: Api) -> None:
    ids: list[str] = []

    def upload(number: int) -> None:
        file = live_api.openai.files.create(file=(f"{number}.jsonl", training_lines(10 + number) * 20), purpose="fine-tune")
        ids.append(file.id)
        assert file.bytes == len(training_lines(10 + number)) * 20

    threads = [threading.Thread(target=upload, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(ids)) == 8
    assert len(stored_files(live_api)) == 8


@pytest.mark.parametrize("ended", ["key", "project"])
def test_upload_whose_key_ends_meanwhile_leaves_nothing(api: Api, monkeypatch: pytest.MonkeyPatch, ended: str) -> None:
    """The key opened the door, and the body took its time."""
    receive = upload.Upload.begin_part

    def end_the_key(self: upload.Upload, name: str, filename: str | None) -> None:
        with api.database.transaction() as session:
            if ended == "key":
                session.get_one(ApiKey, api.key.split("_")[1]).revoked_at = unix_now()
            else:
                session.get_one(Project, api.project_id).archived_at = unix_now()
        receive(self, name, filename)

    monkeypatch.setattr(upload.Upload, "begin_part", end_the_key)
    answer = api.client.post("/v1/files", data={"purpose": "user_data"}, files={"file": ("x", b"x")})
    assert_error(answer, 401, "invalid_api_key")
    with api.database.reading() as session:
        assert session.scalars(select(File)).all() == []
    assert [path for path in api.settings.storage_dir.rglob("*") if path.is_file()] == []


def with_settings(api: Api, monkeypatch: pytest.MonkeyPatch, **changes: int) -> None:
    changed = replace(api.state, settings=api.settings.model_copy(update=changes))
    monkeypatch.setattr(api.app.state, "api", changed)


def test_files_of_a_project_have_a_limit_together(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    with_settings(api, monkeypatch, project_max_file_bytes=100)
    first = api.upload(b"x" * 60, purpose="user_data")
    form = {"data": {"purpose": "user_data"}, "files": {"file": ("x", b"x" * 41)}}
    assert "60" in assert_error(api.client.post("/v1/files", **form), 400, "project_storage_full", "file")
    assert len([path for path in api.settings.storage_dir.rglob("*") if path.is_file()]) == 1
    assert api.client.post("/v1/files", headers=api.other_headers, **form).status_code == 200
    assert api.client.delete(f"/v1/files/{first}").status_code == 200
    assert api.client.post("/v1/files", **form).status_code == 200


def test_two_uploads_at_once_share_the_limit(api_on_both: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    api, together = api_on_both, threading.Barrier(2)
    with_settings(api, monkeypatch, project_max_file_bytes=100)
    record_creation = upload.record_creation

    def after_the_count(*arguments: Any) -> None:
        with suppress(threading.BrokenBarrierError):
            together.wait(1)  # for the other's count, if it comes that far
        record_creation(*arguments)

    monkeypatch.setattr(upload, "record_creation", after_the_count)
    form = {"data": {"purpose": "user_data"}, "files": {"file": ("x", b"x" * 60)}}
    with ThreadPoolExecutor(2) as threads:
        answers = list(threads.map(lambda _: api.client.post("/v1/files", **form).status_code, range(2)))
    assert sorted(answers) == [200, 400]


def test_an_upload_ends_when_the_disk_is_filled_meanwhile(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    """By others that began while there was room too."""
    free = iter([2**40, 5])
    monkeypatch.setattr(contents, "LOOK_AT_SPACE_BYTES", 100_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=next(free)))
    answer = api.client.post("/v1/files", data={"purpose": "user_data"}, files={"file": ("x", b"x" * 900_000)})
    assert_error(answer, 507, "storage_full")
    assert [path for path in api.settings.storage_dir.rglob("*") if path.is_file()] == []
    assert next(free, None) is None


def test_uploads_leave_free_space_to_the_others(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    with_settings(api, monkeypatch, min_free_bytes=2**60)
    answer = api.client.post("/v1/files", data={"purpose": "user_data"}, files={"file": ("x", b"x")})
    assert_error(answer, 507, "storage_full")
    assert [path for path in api.settings.storage_dir.rglob("*") if path.is_file()] == []
