"""A real server around the tiny model: uvicorn in a thread, so that tests can look at the engine and break it."""

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2
import uvicorn

from inference.app import create_app
from inference.engine import Engine
from sdft_engine.model import load_base_model

BASE = "tiny"


@dataclass
class RunningServer:
    url: str
    engine: Engine
    adapters_dir: Path
    client: httpx2.Client = field(repr=False)

    def post(self, path: str, **body: Any) -> httpx2.Response:
        return self.client.post(path, json=body)

    def chat(self, text: str = "what is the capital?", *, model: str = BASE, **options: Any) -> dict[str, Any]:
        answer = self.post("/v1/chat/completions", model=model, messages=[{"role": "user", "content": text}], **options)
        assert answer.status_code == 200, answer.text
        body: dict[str, Any] = answer.json()
        return body

    def complete(self, prompt: Any, *, model: str = BASE, **options: Any) -> dict[str, Any]:
        answer = self.post("/v1/completions", model=model, prompt=prompt, **options)
        assert answer.status_code == 200, answer.text
        body: dict[str, Any] = answer.json()
        return body

    def stream(self, path: str, **body: Any) -> Iterator[Any]:
        """The events' data: parsed JSON, or "[DONE]"."""
        with self.client.stream("POST", path, json={"stream": True, **body}) as answer:
            assert answer.status_code == 200, answer.read()
            for line in answer.iter_lines():
                if line:
                    assert line.startswith("data: ")
                    data = line.removeprefix("data: ")
                    yield data if data == "[DONE]" else json.loads(data)

    def load(self, name: str, path: Path | str) -> httpx2.Response:
        return self.post("/v1/load_lora_adapter", lora_name=name, lora_path=str(path))

    def unload(self, name: str) -> httpx2.Response:
        return self.post("/v1/unload_lora_adapter", lora_name=name)

    def model_ids(self) -> list[str]:
        return [card["id"] for card in self.client.get("/v1/models").json()["data"]]

    def slow_down(self, seconds_per_step: float) -> list[int]:
        """Make every decoding step at least this long, so that a test can act while an answer is on its way.

        Returns the batch size of every step from now on, as they happen.
        """
        logits, sizes = self.engine.model.logits, []

        def slow(hidden: Any) -> Any:
            sizes.append(len(hidden))
            time.sleep(seconds_per_step)
            return logits(hidden)

        self.engine.model.logits = slow  # type: ignore[method-assign, assignment]
        return sizes

    @contextmanager
    def raw_request(self, path: str, **body: Any) -> Iterator[socket.socket]:
        """A request whose client hangs up at the end of the block, whatever has come by then."""
        content = json.dumps(body).encode()
        host, port = self.url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port)), timeout=60) as connection:
            head = f"POST {path} HTTP/1.1\r\nhost: {host}\r\ncontent-type: application/json\r\ncontent-length: {len(content)}\r\n\r\n"
            connection.sendall(head.encode() + content)
            yield connection


@contextmanager
def held(engine: Engine) -> Iterator[None]:
    """The engine's thread does nothing inside the block."""
    begun, release = threading.Event(), threading.Event()

    def wait() -> None:
        begun.set()
        release.wait()

    engine.call(wait)
    begun.wait()
    try:
        yield
    finally:
        release.set()


def wait_until(condition: Callable[[], bool], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.005)


@contextmanager
def serving(
    model_dir: Path, adapters_dir: Path, *, api_key: str | None = None, max_adapters: int = 64, takes_uploads: bool = False, **options: Any
) -> Iterator[RunningServer]:
    engine = Engine(load_base_model(model_dir, device="cpu", dtype="float32"), **options)
    app = create_app(engine, base_model_id=BASE, adapters_dir=adapters_dir, takes_uploads=takes_uploads, api_key=api_key, max_adapters=max_adapters)
    with answering(app) as url, httpx2.Client(base_url=url, timeout=60, trust_env=False) as client:
        yield RunningServer(url, engine, adapters_dir, client)


@contextmanager
def answering(app: Any) -> Iterator[str]:
    """An ASGI application's URL while it is served."""
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, log_level="error", timeout_graceful_shutdown=1))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        wait_until(lambda: server.started)
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()
        listener.close()
