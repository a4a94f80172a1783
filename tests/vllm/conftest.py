"""Two real inference servers with the real 135M model and the same adapters: vLLM in its own environment, and inference/."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2
import pytest
from pydantic import SecretStr

from core.settings import Settings
from local_stack import vllm
from local_stack.errors import StackError
from local_stack.ports import free_local_port
from sdft_engine.lora import LoraShape
from sdft_engine.model import LanguageModel, load_base_model
from tests.conftest import CACHE_DIR
from tests.sdft_engine.plain import add_adapter

BASE = "smollm2-135m-instruct"
START_SECONDS = 300
KEY = "the-tests-own-key"
MISLEADING_DEFAULTS = {"temperature": 0.1, "top_k": 2, "top_p": 0.3, "repetition_penalty": 1.8, "max_new_tokens": 3}
"""Some models bring such a generation_config.json. Nothing of it may reach an answer."""
ADAPTERS = ("first", "second", "third")


@dataclass
class Server:
    kind: str
    url: str
    adapters_dir: Path
    process: "subprocess.Popen[bytes]" = field(repr=False)
    client: httpx2.Client = field(repr=False)

    def post(self, path: str, **body: Any) -> httpx2.Response:
        return self.client.post(path, json=body)

    def chat(self, text: str, model: str = BASE, **options: Any) -> dict[str, Any]:
        return self._body(self.post("/v1/chat/completions", model=model, messages=[{"role": "user", "content": text}], **options))

    def complete(self, prompt: Any, model: str = BASE, **options: Any) -> dict[str, Any]:
        return self._body(self.post("/v1/completions", model=model, prompt=prompt, **options))

    def load(self, name: str, directory: Path) -> httpx2.Response:
        return self.post("/v1/load_lora_adapter", lora_name=name, lora_path=str(directory))

    def unload(self, name: str) -> httpx2.Response:
        return self.post("/v1/unload_lora_adapter", lora_name=name)

    def model_ids(self) -> list[str]:
        return [card["id"] for card in self.client.get("/v1/models").json()["data"]]

    @staticmethod
    def _body(answer: httpx2.Response) -> dict[str, Any]:
        assert answer.status_code == 200, answer.text
        body: dict[str, Any] = answer.json()
        return body


@pytest.fixture(scope="session")
def vllm_settings(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    settings = Settings(
        data_dir=tmp_path_factory.mktemp("vllm") / "data",
        cache_dir=CACHE_DIR,
        inference="vllm",
        inference_api_key=SecretStr(KEY),
        device="cpu",
        vllm_max_loras=2,
        vllm_max_cpu_loras=4,
    )
    try:
        vllm.python_of(settings)
    except StackError as error:
        if os.environ.get("TEST_REQUIRES_VLLM"):  # `make test-vllm`, which is not green without having tested anything
            pytest.fail(str(error))
        pytest.skip(str(error))
    settings.served_adapters_dir.mkdir(parents=True)
    return settings


@pytest.fixture(scope="session")
def model(real_model_dir: Path) -> LanguageModel:
    """The trainer's: what the servers must agree with."""
    return load_base_model(real_model_dir, device="cpu", dtype="float32")


@pytest.fixture(scope="session")
def adapters(model: LanguageModel, vllm_settings: Settings) -> dict[str, Path]:
    """Random ones, strong enough to change every answer, where both servers read adapters; `model` has them too."""
    directories = {}
    for seed, name in enumerate(ADAPTERS):
        add_adapter(model, name, seed=seed, shape=LoraShape(8, 16), strength=0.12)
        directories[name] = vllm_settings.served_adapters_dir / name
        directories[name].mkdir()
        model.adapters.save(name, directories[name], BASE)
    return directories


@pytest.fixture(scope="session")
def vllm_server(vllm_settings: Settings, real_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    port = free_local_port()
    entry = vllm_settings.base_models[0]
    settings = vllm_settings.model_copy(update={"cache_dir": tmp_path_factory.mktemp("cache")})
    shutil.copytree(entry.directory(vllm_settings.cache_dir), entry.directory(settings.cache_dir), copy_function=os.symlink)
    (entry.directory(settings.cache_dir) / "generation_config.json").unlink(missing_ok=True)
    (entry.directory(settings.cache_dir) / "generation_config.json").write_text(json.dumps(MISLEADING_DEFAULTS))
    command = vllm.server_command(settings, entry, "127.0.0.1", port)
    environment = vllm.server_environment(vllm_settings.model_copy(update={"inference_adapters": "upload"}))
    with running("vllm", command, environment, port, vllm_settings, tmp_path_factory) as server:
        server.complete([1, 2, 3], max_tokens=1, echo=True, logprobs=1)  # the first of its kind takes half a minute
        yield server


@pytest.fixture(scope="session")
def embedded_server(vllm_settings: Settings, real_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    port = free_local_port()
    words = ["--base-model", BASE, "--model-dir", str(real_model_dir), "--port", str(port), "--adapters-dir", str(vllm_settings.served_adapters_dir)]
    command = [sys.executable, "-m", "inference", *words, "--device", "cpu", "--dtype", "float32"]
    with running("embedded", command, {"SDFT_INFERENCE_API_KEY": KEY}, port, vllm_settings, tmp_path_factory) as server:
        yield server


@pytest.fixture(params=["vllm", "embedded"])
def server(request: pytest.FixtureRequest) -> Server:
    """Both, one after the other."""
    found: Server = request.getfixturevalue(f"{request.param}_server")
    return found


@contextmanager
def running(
    kind: str, command: list[str], environment: dict[str, str], port: int, settings: Settings, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    log_path = tmp_path_factory.mktemp(kind) / "server.log"
    with log_path.open("wb") as log:
        whole = {**os.environ, **environment, "OMP_WAIT_POLICY": "passive"}
        process = subprocess.Popen(command, env=whole, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
    url = f"http://127.0.0.1:{port}"
    try:
        with httpx2.Client(base_url=url, headers={"authorization": f"Bearer {KEY}"}, timeout=120, trust_env=False) as client:
            wait_until_healthy(client, process, log_path)
            yield Server(kind, url, settings.served_adapters_dir, process, client)
    finally:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def wait_until_healthy(client: httpx2.Client, process: "subprocess.Popen[bytes]", log_path: Path) -> None:
    until = time.monotonic() + START_SECONDS
    while True:
        assert process.poll() is None, log_path.read_text()[-3000:]
        assert time.monotonic() < until, log_path.read_text()[-3000:]
        try:
            if client.get("/health", timeout=2).status_code == 200:
                return
        except httpx2.HTTPError:
            pass
        time.sleep(0.5)
