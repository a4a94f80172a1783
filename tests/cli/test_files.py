import hashlib
import json
from collections.abc import Callable
from pathlib import Path

from click.testing import Result

from tests.cli.stub_server import StubServer, json_answer, refusal

FILE = {"id": "file-1", "object": "file", "bytes": 1536, "created_at": 1_700_000_000, "filename": "rows.jsonl", "purpose": "fine-tune", "status": "processed"}
CONTENT = bytes(range(256)) * 4096


def content_answer(sha256: str) -> tuple[int, dict[str, str], bytes]:
    return 200, {"content-type": "application/octet-stream", "x-sha256": sha256}, CONTENT


def test_upload_sends_the_bytes_and_prints_the_id(sdft: Callable[..., Result], stub: StubServer, tmp_path: Path) -> None:
    stub.routes["POST /files"] = lambda _: json_answer(FILE)
    (tmp_path / "rows.jsonl").write_bytes(b'{"prompt": "a", "completion": "b"}\n')
    result = sdft("files", "upload", "rows.jsonl", "--purpose", "evals")
    assert (result.exit_code, result.stdout) == (0, "file-1\n")
    body = stub.received[-1].body
    assert b'{"prompt": "a", "completion": "b"}\n' in body
    assert b'filename="rows.jsonl"' in body
    assert b'name="purpose"\r\n\r\nevals' in body


def test_a_refused_upload_is_one_line_and_status_1(sdft: Callable[..., Result], stub: StubServer, tmp_path: Path) -> None:
    stub.routes["POST /files"] = lambda _: refusal(400, "line 13: missing_messages_list\n(line 14: too)")
    (tmp_path / "rows.jsonl").write_bytes(b"x")
    result = sdft("files", "upload", "rows.jsonl")
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr == "error: line 13: missing_messages_list (line 14: too)\n"


def test_upload_of_a_missing_file_says_so(sdft: Callable[..., Result], stub: StubServer) -> None:
    result = sdft("files", "upload", "nothing.jsonl")
    assert result.exit_code == 2
    assert "nothing.jsonl" in result.stderr
    assert stub.received == []


def test_list_shows_one_row_a_file_in_a_pipe(sdft: Callable[..., Result], stub: StubServer) -> None:
    long = FILE | {"id": "file-" + "9" * 60, "filename": "n" * 80}
    stub.routes["GET /files"] = lambda _: json_answer({"data": [FILE, long], "has_more": False})
    lines = sdft("files", "list", "--purpose", "fine-tune").stdout.splitlines()
    assert len(lines) == 3
    assert "file-1" in lines[1]
    assert "1.5 KiB" in lines[1]
    assert long["id"] in lines[2]
    assert stub.received[-1].query == {"limit": "20", "purpose": "fine-tune"}


def test_list_as_json_is_the_servers(sdft: Callable[..., Result], stub: StubServer) -> None:
    stub.routes["GET /files"] = lambda _: json_answer({"data": [FILE], "has_more": False})
    assert json.loads(sdft("files", "list", "--json").stdout) == [FILE]


def test_names_from_the_server_cannot_drive_the_terminal(sdft: Callable[..., Result], stub: StubServer) -> None:
    stub.routes["GET /files/file-1"] = lambda _: json_answer(FILE | {"filename": "\x1b[2J[red]evil[/red]\x07.jsonl"})
    result = sdft("files", "get", "file-1")
    assert "\x1b" not in result.stdout
    assert "\x07" not in result.stdout
    assert "filename: [2J[red]evil[/red].jsonl" in result.stdout


def test_delete(sdft: Callable[..., Result], stub: StubServer) -> None:
    stub.routes["DELETE /files/file-1"] = lambda _: json_answer({"id": "file-1", "object": "file", "deleted": True})
    assert sdft("files", "delete", "file-1").stdout == "deleted file-1\n"
    assert sdft("files", "delete", "file-2").exit_code == 1


def test_download_takes_the_files_name_and_checks_the_hash(sdft: Callable[..., Result], stub: StubServer, tmp_path: Path) -> None:
    stub.routes["GET /files/file-1"] = lambda _: json_answer(FILE | {"filename": "../../rows.jsonl"})
    stub.routes["GET /files/file-1/content"] = lambda _: content_answer(hashlib.sha256(CONTENT).hexdigest())
    result = sdft("files", "download", "file-1")
    assert result.exit_code == 0, result.stderr
    assert (tmp_path / "rows.jsonl").read_bytes() == CONTENT


def test_a_damaged_download_leaves_nothing(sdft: Callable[..., Result], stub: StubServer, tmp_path: Path) -> None:
    stub.routes["GET /files/file-1/content"] = lambda _: content_answer("0" * 64)
    result = sdft("files", "download", "file-1", "-o", "out.bin")
    assert result.exit_code == 1
    assert "damaged" in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_download_that_breaks_off_leaves_nothing(sdft: Callable[..., Result], stub: StubServer, tmp_path: Path) -> None:
    def short(_: object) -> tuple[int, dict[str, str], bytes]:
        return 200, {"transfer-encoding": "chunked"}, b"3\r\nabc\r\n"  # no last chunk

    stub.routes["GET /files/file-1/content"] = short
    result = sdft("files", "download", "file-1", "-o", "out.bin")
    assert result.exit_code == 1
    assert "the connection broke" in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_download_overwrites_only_when_told(sdft: Callable[..., Result], stub: StubServer, tmp_path: Path) -> None:
    stub.routes["GET /files/file-1/content"] = lambda _: content_answer(hashlib.sha256(CONTENT).hexdigest())
    (tmp_path / "out.bin").write_text("mine")
    refused = sdft("files", "download", "file-1", "-o", "out.bin")
    assert (refused.exit_code, (tmp_path / "out.bin").read_text()) == (1, "mine")
    assert sdft("files", "download", "file-1", "-o", "out.bin", "--force").exit_code == 0
    assert (tmp_path / "out.bin").read_bytes() == CONTENT


def test_a_download_that_cannot_be_written_is_one_line(sdft: Callable[..., Result], stub: StubServer) -> None:
    stub.routes["GET /files/file-1/content"] = lambda _: content_answer(hashlib.sha256(CONTENT).hexdigest())
    result = sdft("files", "download", "file-1", "-o", "missing-dir/out.bin")
    assert result.exit_code == 1
    assert result.stderr.count("\n") == 1
    assert "missing-dir" in result.stderr
