"""The API under test, in this process or on a port, with two projects and their keys, and one that may manage both."""

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import uvicorn
from fastapi import FastAPI
from openai import OpenAI
from starlette.testclient import TestClient
from starlette.types import ASGIApp

from api.app import create_app
from api.state import ApiState
from core.database import Database
from core.projects import create_key
from core.settings import Settings
from core.tables.projects import SCOPES
from tests.rows import add_project

EXAMPLE = {"messages": [{"role": "user", "content": "What does the blue lamp mean?"}, {"role": "assistant", "content": "The tank is full."}]}


def training_lines(count: int = 12) -> bytes:
    return b"".join(json.dumps(EXAMPLE).encode() + b"\n" for _ in range(count))


@dataclass(frozen=True)
class Api:
    """`key` and `other_key` differ in their project; `admin_key` is one more of the first, with every scope. `client` has `key`.
    `base_url` is set where it listens on a port."""

    app: FastAPI
    settings: Settings
    database: Database
    project_id: str
    other_project_id: str
    key: str
    other_key: str
    admin_key: str
    client: TestClient
    base_url: str = ""

    @property
    def state(self) -> ApiState:
        state: ApiState = self.app.state.api
        return state

    @property
    def headers(self) -> dict[str, str]:
        return bearer(self.key)

    @property
    def other_headers(self) -> dict[str, str]:
        return bearer(self.other_key)

    @property
    def admin_headers(self) -> dict[str, str]:
        return bearer(self.admin_key)

    @property
    def openai(self) -> OpenAI:
        return OpenAI(base_url=f"{self.base_url}/v1", api_key=self.key, admin_api_key=self.admin_key, max_retries=0)

    def upload(self, content: bytes | None = None, purpose: str = "fine-tune", filename: str = "train.jsonl") -> str:
        files = {"file": (filename, training_lines() if content is None else content)}
        answer = self.client.post("/v1/files", data={"purpose": purpose}, files=files)
        assert answer.status_code == 200, answer.text
        file_id: str = answer.json()["id"]
        return file_id

    def create_job(self, **fields: Any) -> dict[str, Any]:
        body = {"model": "tiny", **fields}
        if "training_file" not in body:
            body["training_file"] = self.upload()
        answer = self.client.post("/v1/fine_tuning/jobs", json=body)
        assert answer.status_code == 200, answer.text
        job: dict[str, Any] = answer.json()
        return job


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


@contextmanager
def serve(settings: Settings) -> Iterator[Api]:
    """In this process. The database has to be migrated and empty."""
    database = Database(settings.resolved_database_url)
    projects = [add_project(database, name) for name in ("default", "other")]
    with database.transaction() as session:
        keys = [create_key(session, project_id, "test") for project_id in projects]
        keys.append(create_key(session, projects[0], "operator", scopes=SCOPES))
    app = create_app(settings)
    try:
        with TestClient(app, headers=bearer(keys[0]), raise_server_exceptions=False) as client:
            yield Api(app, settings, database, *projects, *keys, client)
    finally:
        database.close()


@contextmanager
def on_a_port(app: ASGIApp) -> Iterator[str]:
    """The application under uvicorn on a free port of this machine; gives its URL."""
    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=0, lifespan="off", log_level="error", access_log=False))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    try:
        wait_for(lambda: server.started)
        port = server.servers[0].sockets[0].getsockname()[1]
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join(10)


def wait_for(condition: Any, seconds: float = 10) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.01)
