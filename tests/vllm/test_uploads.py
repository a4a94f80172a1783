"""Adapters that both servers are sent, since they see no disk of the service's. All that may be wrong with a file is tried on the same code
in tests/inference/test_adapter_uploads.py."""

import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from core.errors import InferenceFailed
from core.inference_client import AdapterRefused, InferenceClient
from core.settings import Settings
from local_stack.ports import free_local_port
from sdft_engine.generation import score
from sdft_engine.model import LanguageModel
from tests.fixtures.raw_uploads import CONFIG, WEIGHTS, digest_of, head, send, status_of
from tests.vllm.conftest import BASE, KEY, Server, running

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(600)]

QUESTION = "What is the capital of France?"
TOLERANCE = 2e-3
"""Nats between two programs in float32."""
SENT = "/adapter_files"


@pytest.fixture(scope="module")
def embedded_receiver(vllm_settings: Settings, real_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    port = free_local_port()
    words = ["--base-model", BASE, "--model-dir", str(real_model_dir), "--port", str(port), "--uploads-dir", str(tmp_path_factory.mktemp("uploads"))]
    command = [sys.executable, "-m", "inference", *words, "--device", "cpu", "--dtype", "float32"]
    with running("embedded", command, {"SDFT_INFERENCE_API_KEY": KEY}, port, vllm_settings, tmp_path_factory) as server:
        yield server


@pytest.fixture(params=["vllm_server", "embedded_receiver"])
def server(request: pytest.FixtureRequest) -> Server:
    found: Server = request.getfixturevalue(request.param)
    return found


@pytest.fixture
def client(server: Server, vllm_settings: Settings) -> InferenceClient:
    return InferenceClient(server.url, vllm_settings.model_copy(update={"inference_adapters": "upload"}))


@pytest.fixture
def elsewhere(adapters: dict[str, Path], tmp_path: Path) -> dict[str, Path]:
    """The adapters in a directory that goes away as soon as they are sent."""
    return {name: Path(shutil.copytree(directory, tmp_path / "elsewhere" / f"sent-{name}")) for name, directory in adapters.items()}


@pytest.fixture
def ids(model: LanguageModel) -> list[int]:
    return model.chat_format.prompt_ids([{"role": "user", "content": QUESTION}])


def names_on(server: Server) -> list[str]:
    names: list[str] = server.client.get(SENT).json()["names"]
    return names


def test_a_server_answers_as_the_adapters_that_it_was_sent(
    server: Server, client: InferenceClient, elsewhere: dict[str, Path], model: LanguageModel, ids: list[int], tmp_path: Path
) -> None:
    """Under more names than vLLM keeps in memory: it reads them again from what it was sent."""
    paths = {name: client.place_adapter(directory) for name, directory in elsewhere.items()}
    shutil.rmtree(tmp_path / "elsewhere")
    names = {f"{name}-{number}": name for name in paths for number in range(3)}
    for served, name in names.items():
        client.load_adapter(served, paths[name])
    for _ in range(2):
        for served, name in names.items():
            assert client.prompt_logprobs(served, ids) == pytest.approx(score(model, ids, name)[0], abs=TOLERANCE), served
    for served in names:
        client.unload_adapter(served)
    assert client.sent_names() == {"sent-first", "sent-second", "sent-third"}
    for name in sorted(client.sent_names()):
        client.remove_adapter(name)
    assert (names_on(server), server.model_ids()) == ([], [BASE])
    with pytest.raises((AdapterRefused, InferenceFailed)):
        client.load_adapter("first", paths["first"])


def test_names_hashes_and_sizes_that_are_wrong(server: Server) -> None:
    for path, length, digest, status in (
        (f"..%2f{CONFIG}", 2, digest_of(b"{}"), 400),
        (f"../{CONFIG}", 2, digest_of(b"{}"), 400),
        ("a/adapter_model.bin", 2, digest_of(b"{}"), 400),
        (f"a/{CONFIG}", 2, digest_of(b"[]"), 400),
        (f"a/{CONFIG}", 2, "", 400),
        (f"a/{WEIGHTS}", 9 * 1024**3, digest_of(b"{}"), 413),
    ):
        request = head(f"{SENT}/{path}", KEY, f"content-length: {length}", f"content-digest: {digest}") + b"{}"
        assert status_of(send(server.url, request)) == status, (path, digest)
    assert names_on(server) == []


def test_without_the_key_the_body_is_not_waited_for(server: Server) -> None:
    request = head(f"{SENT}/a/{CONFIG}", "wrong", "content-length: 2", f"content-digest: {digest_of(b'{}')}")
    assert status_of(send(server.url, request)) == 401
    assert names_on(server) == []


def test_of_half_an_upload_nothing_is_left(server: Server) -> None:
    content = bytes(6 * 1024**2)
    with send(server.url, head(f"{SENT}/a/{WEIGHTS}", KEY, f"content-length: {len(content)}", f"content-digest: {digest_of(content)}")) as connection:
        connection.sendall(content[: 5 * 1024**2])
        time.sleep(0.5)
    assert names_on(server) == []
    answer = server.client.put(f"{SENT}/a/{WEIGHTS}", content=content, headers={"content-digest": digest_of(content)})
    assert answer.status_code == 200, answer.text
    directory = Path(answer.json()["lora_path"])
    until = time.monotonic() + 30
    while unfinished := list((directory.parent / ".unfinished").iterdir()):
        assert time.monotonic() < until, unfinished
        time.sleep(0.1)
    assert server.client.delete(f"{SENT}/a").status_code == 200
    assert not directory.exists()
