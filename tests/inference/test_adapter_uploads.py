"""Adapters that are sent to a server: as the embedded one takes them, and as vLLM's does behind its key, without vLLM."""

import errno
import importlib
import shutil
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
import pytest
import torch
from starlette.responses import PlainTextResponse

from core.inference_client import InferenceClient
from core.settings import Settings
from inference import adapter_uploads
from tests.fixtures.raw_uploads import CONFIG, WEIGHTS, digest_of, head, send, status_of
from tests.inference.serving import BASE, answering, serving, wait_until

PLUGIN_DIR = Path(__file__).parents[2] / "vllm_plugin"
sys.path.insert(0, str(PLUGIN_DIR))
KEY = "geheim"
MIB = 1024**2


@dataclass
class Receiver:
    url: str
    directory: Path
    client: httpx2.Client
    module: Any
    """That the server has `adapter_uploads` from."""

    def put(self, path: str, content: bytes, digest: str | None = None) -> httpx2.Response:
        return self.client.put(f"/adapter_files/{path}", content=content, headers={"content-digest": digest or digest_of(content)})

    def names(self) -> list[str]:
        names: list[str] = self.client.get("/adapter_files").json()["names"]
        return names

    def files(self) -> list[str]:
        """Everything that the server keeps, what is not finished included."""
        return sorted(str(path.relative_to(self.directory)) for path in self.directory.rglob("*") if path.is_file() and path.name != ".lock")


@pytest.fixture(params=["vllm", "embedded"])
def server(request: pytest.FixtureRequest, tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Receiver]:
    directory = tmp_path / "uploads"
    with open_client() as client:
        if request.param == "embedded":
            with serving(tiny_model_dir, directory, takes_uploads=True, api_key=KEY) as running:
                client.base_url = running.url
                yield Receiver(running.url, directory, client, adapter_uploads)
        else:
            monkeypatch.setenv("VLLM_API_KEY", KEY)
            monkeypatch.setenv("ADAPTER_UPLOADS_DIR", str(directory))
            door = importlib.import_module("sdft_vllm_key")
            with answering(door.RequireKey(PlainTextResponse("vLLM's own"))) as url:
                client.base_url = url
                yield Receiver(url, directory, client, importlib.import_module("sdft_adapter_uploads"))


def open_client() -> httpx2.Client:
    return httpx2.Client(headers={"authorization": f"Bearer {KEY}"}, timeout=30, trust_env=False)


def test_both_servers_run_the_same_code() -> None:
    assert Path(adapter_uploads.__file__).resolve() == PLUGIN_DIR / "sdft_adapter_uploads.py"


def test_files_come_and_go(server: Receiver) -> None:
    weights = bytes(range(256)) * 70_000  # more than other bodies may have
    assert server.names() == []
    for file, content in ((CONFIG, b"{}"), (WEIGHTS, weights), (WEIGHTS, weights)):
        answer = server.put(f"rollout-job-1-7/{file}", content)
        assert (answer.status_code, answer.json()) == (200, {"lora_path": str(server.directory / "rollout-job-1-7")})
    assert (server.directory / "rollout-job-1-7" / WEIGHTS).read_bytes() == weights
    assert server.files() == [f"rollout-job-1-7/{CONFIG}", f"rollout-job-1-7/{WEIGHTS}"]
    server.put(f"other/{CONFIG}", b"{}")
    assert server.names() == ["other", "rollout-job-1-7"]
    for _ in range(2):
        assert server.client.delete("/adapter_files/rollout-job-1-7").status_code == 200
        assert server.names() == ["other"]


@pytest.mark.parametrize(
    ("path", "status"),
    [
        (f"../{CONFIG}", 400),
        (f"./{CONFIG}", 400),
        (f".unfinished/{CONFIG}", 400),
        (f"/{CONFIG}", 400),
        (f"%2e%2e/{CONFIG}", 400),
        (f"a%2fb/{CONFIG}", 404),
        (f"a%00/{CONFIG}", 400),
        (f"a%0a/{CONFIG}", 400),
        (f"{'x' * 201}/{CONFIG}", 400),
        (f"a/../../{CONFIG}", 404),
        ("a/adapter_model.bin", 400),
        ("a/..", 400),
        ("a/", 400),
        ("a", 404),
        ("", 404),
    ],
)
def test_names_that_lead_elsewhere_are_refused(server: Receiver, path: str, status: int) -> None:
    """As they are written, which a client's library would tidy."""
    sent = head(f"/adapter_files/{path}", KEY, "content-length: 2", f"content-digest: {digest_of(b'{}')}", "connection: close") + b"{}"
    assert status_of(send(server.url, sent)) == status
    assert server.files() == []
    assert [found.name for found in server.directory.parent.iterdir()] == [server.directory.name]


@pytest.mark.parametrize("digest", [digest_of(b"others"), "sha-256=:short=:", "md5=:rL0Y20zC+Fzt72VPzMSk2A==:", "", digest_of(b"{}")[:-1]])
def test_bytes_that_are_not_the_announced_ones_are_not_kept(server: Receiver, digest: str) -> None:
    answer = server.client.put(f"/adapter_files/a/{CONFIG}", content=b"{}", headers={"content-digest": digest})
    assert (answer.status_code, "Content-Digest" in answer.json()["error"]["message"]) == (400, True)
    assert (server.files(), server.names()) == ([], [])


def test_what_is_too_large_is_refused_before_it_is_read_or_in_the_middle(server: Receiver) -> None:
    announced = head(f"/adapter_files/a/{WEIGHTS}", KEY, f"content-length: {9 * 1024 * MIB}", f"content-digest: {digest_of(b'')}")
    assert status_of(send(server.url, announced)) == 413
    content = b"x" * (MIB + 1)
    answer = server.client.put(f"/adapter_files/a/{CONFIG}", content=iter([content]), headers={"content-digest": digest_of(content)})
    assert (answer.status_code, answer.json()["error"]["message"]) == (413, "adapter_config.json may have 1,048,576 bytes")
    assert (server.files(), server.names()) == ([], [])


def test_without_the_key_nothing_is_read(server: Receiver) -> None:
    sent = head(f"/adapter_files/a/{CONFIG}", "wrong", "content-length: 2", f"content-digest: {digest_of(b'{}')}")
    assert status_of(send(server.url, sent)) == 401, "the body was never sent"
    with httpx2.Client(base_url=server.url, trust_env=False) as anybody:
        assert [anybody.request(method, "/adapter_files/a").status_code for method in ("GET", "PUT", "DELETE", "POST")] == [401] * 4
    assert server.files() == []


def test_of_half_an_upload_nothing_is_left(server: Receiver) -> None:
    content = b"w" * (6 * MIB)
    connection = send(server.url, head(f"/adapter_files/a/{WEIGHTS}", KEY, f"content-length: {len(content)}", f"content-digest: {digest_of(content)}"))
    connection.sendall(content[: 5 * MIB])
    wait_until(lambda: any(path.stat().st_size for path in (server.directory / ".unfinished").iterdir()))
    connection.close()
    wait_until(lambda: server.files() == [])
    assert server.names() == []
    assert server.put(f"a/{WEIGHTS}", content).status_code == 200


def test_a_file_never_changes_under_its_name(server: Receiver) -> None:
    server.put(f"a/{CONFIG}", b"{}")
    answer = server.put(f"a/{CONFIG}", b"[]")
    assert (answer.status_code, "a has another adapter_config.json already" in answer.json()["error"]["message"]) == (409, True)
    assert (server.directory / "a" / CONFIG).read_bytes() == b"{}"
    server.client.delete("/adapter_files/a")
    assert server.put(f"a/{CONFIG}", b"[]").status_code == 200


def test_of_several_at_a_time_one_is_kept_whole(server: Receiver) -> None:
    contents = [bytes([number]) * 3 * MIB for number in range(4)]
    statuses: list[int] = []
    threads = [threading.Thread(target=lambda content=content: statuses.append(server.put(f"a/{WEIGHTS}", content).status_code)) for content in contents]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(statuses) == [200, 409, 409, 409]
    assert (server.directory / "a" / WEIGHTS).read_bytes() in contents
    assert server.files() == [f"a/{WEIGHTS}"]


def test_a_full_disk_is_said(server: Receiver, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_room(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(server.module.UploadedFiles, "_place", no_room)
    answer = server.put(f"a/{CONFIG}", b"{}")
    assert (answer.status_code, answer.json()["error"]["message"]) == (507, "the server's disk is full")
    assert server.files() == []


def test_other_methods_and_paths(server: Receiver) -> None:
    assert server.client.post(f"/adapter_files/a/{CONFIG}", content=b"{}").status_code == 404
    assert server.client.delete("/adapter_files").status_code == 404
    assert server.client.delete("/adapter_files/..%2f..").status_code == 404
    assert server.client.delete("/adapter_files/.lock").status_code == 400
    assert "names" not in server.client.get("/adapter_files_of_others").text, "the application's own"


def test_a_server_starts_with_an_empty_directory_that_is_its_own(tmp_path: Path) -> None:
    directory = tmp_path / "uploads"
    first = adapter_uploads.UploadedFiles(directory)
    with pytest.raises(RuntimeError, match="in use by another server"):
        adapter_uploads.UploadedFiles(directory)
    (directory / "a").mkdir()
    (directory / "a" / CONFIG).write_text("{}")
    (directory / ".unfinished" / "0123").write_text("half")
    del first  # as the process's end lets go of it
    second = adapter_uploads.UploadedFiles(directory)
    assert second.names() == list((directory / ".unfinished").iterdir()) == []


@pytest.mark.parametrize("stranger", ["notes.txt", "served/attestation.json", "served/deeper/adapter_config.json"])
def test_a_directory_with_anything_else_in_it_is_refused_and_left_as_it_is(tmp_path: Path, stranger: str) -> None:
    """The directory that API and workers unpack adapters in, say."""
    there = tmp_path / stranger
    there.parent.mkdir(parents=True, exist_ok=True)
    there.write_text("{}")
    with pytest.raises(RuntimeError, match="is nothing that a server was sent"):
        adapter_uploads.UploadedFiles(tmp_path)
    assert there.exists()


def test_an_adapter_that_was_sent_answers(
    tiny_model_dir: Path, peft_adapters_dir: Path, tmp_path: Path, make_settings: Callable[..., Settings], reference_logprobs: Callable[..., torch.Tensor]
) -> None:
    """Through the service's own client, whose directory the server can't see."""
    here = Path(shutil.copytree(peft_adapters_dir, tmp_path / "here"))
    with serving(tiny_model_dir, tmp_path / "there", takes_uploads=True, api_key=KEY) as server:
        client = InferenceClient(server.url, make_settings(inference_api_key=KEY, inference_adapters="upload"))
        path = client.place_adapter(here / "first")
        shutil.rmtree(here)
        client.load_adapter("first", path)
        ids = [70, 81, 92, 103]
        expected = reference_logprobs(ids, "first").gather(1, torch.tensor(ids[1:])[:, None])[:, 0].tolist()
        assert client.prompt_logprobs("first", ids) == pytest.approx(expected, abs=1e-4)
        assert (client.sent_names(), client.served_names()) == ({"first"}, {BASE, "first"})
        for _ in range(2):
            client.remove_adapter("first")
        assert (client.sent_names(), client.served_names()) == (set(), {BASE})
