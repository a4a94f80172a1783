import asyncio
import json
import re
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
from fastapi import FastAPI
from fastapi.routing import iter_route_contexts
from sqlalchemy import update
from starlette.types import Message
from starlette.websockets import WebSocketDisconnect

from api import authentication
from core.audit import SERVER
from core.database import Database, unix_now
from core.errors import ServiceError, StorageFull, Unavailable
from core.ids import new_id
from core.projects import archive_project, create_key
from core.tables.projects import ApiKey, Project
from tests.api.model_rows import add_model
from tests.api.serving import Api, bearer, training_lines
from tests.rows import add_endpoint, add_job

OPEN = {"/healthz", "/readyz", "/metrics"}


def every_route(app: FastAPI) -> list[tuple[str, str]]:
    return [(method, str(route.path)) for route in iter_route_contexts(app.routes) for method in sorted(route.methods or ())]


def filled(path: str, names: dict[str, str]) -> str:
    """A route's path with ids in place of its parameters."""
    return re.sub(r"\{(\w+)(:path)?\}", lambda match: names[match[1]], path)


def key_row(api: Api) -> ApiKey:
    with api.database.reading() as session:
        return session.get_one(ApiKey, api.key.split("_")[1])


def change_key(api: Api, **columns: Any) -> None:
    with api.database.transaction() as session:
        session.execute(update(ApiKey).where(ApiKey.id == api.key.split("_")[1]).values(**columns))


def status_before_the_body(app: FastAPI, method: str, path: str, headers: dict[str, str]) -> int:
    return refusal_before_the_body(app, method, path, headers)[0]


def refusal_before_the_body(app: FastAPI, method: str, path: str, headers: dict[str, str]) -> tuple[int, dict[str, Any]]:
    """What the application answers although not a byte of the announced body ever comes: reading it fails the test. Gives the
    status and the error, empty where it is none."""
    sent: list[Message] = []

    async def receive() -> Message:
        raise AssertionError("the body was read")

    async def send(message: Message) -> None:
        sent.append(message)

    raw_headers = [(b"content-length", b"1000000000"), (b"content-type", b"multipart/form-data; boundary=x")]
    raw_headers += [(name.encode(), value.encode()) for name, value in headers.items()]
    scope = {"type": "http", "method": method, "path": path, "raw_path": path.encode(), "query_string": b"", "headers": raw_headers}
    asyncio.run(app({**scope, "http_version": "1.1", "scheme": "http", "root_path": "", "server": ("test", 80), "client": ("test", 1)}, receive, send))
    body = b"".join(message.get("body", b"") for message in sent[1:])
    return sent[0]["status"], json.loads(body)["error"] if sent[0]["status"] >= 400 else {}


def test_every_route_needs_a_key_before_the_body_is_read(api: Api) -> None:
    routes = every_route(api.app)
    assert ("POST", "/v1/files") in routes
    assert ("POST", "/v1/chat/completions") in routes
    assert len([path for _, path in routes if path.startswith("/v1/")]) >= 19
    unlocked = {path for method, path in routes if status_before_the_body(api.app, method, path, {}) != 401}
    assert unlocked <= OPEN
    for wrong in ("Bearer wrong", f"Basic {api.key}", f"Bearer {api.key[:-1]}", "Bearer ", api.key):
        unlocked = {path for method, path in routes if status_before_the_body(api.app, method, path, {"authorization": wrong}) != 401}
        assert unlocked <= OPEN, wrong


def unlocked(api: Api) -> set[str]:
    """Every route that does not answer 401 to the test's key."""
    return {path for method, path in every_route(api.app) if status_before_the_body(api.app, method, path, api.headers) != 401}


def test_revoked_key_opens_nothing(api: Api) -> None:
    change_key(api, revoked_at=unix_now())
    assert unlocked(api) == OPEN


def test_expired_key_opens_nothing(api: Api) -> None:
    change_key(api, expires_at=unix_now() - 1)
    assert unlocked(api) == OPEN
    change_key(api, expires_at=unix_now() + 60)
    assert api.client.get("/v1/models").status_code == 200


def test_key_of_an_archived_project_opens_nothing(api: Api) -> None:
    with api.database.transaction() as session:
        archive_project(session, session.get_one(Project, api.project_id), SERVER)
    assert unlocked(api) == OPEN
    assert api.client.get("/v1/models", headers=api.other_headers).status_code == 200


def test_refusal_is_openai_shaped(api: Api) -> None:
    answer = api.client.get("/v1/models", headers={"authorization": ""})
    assert answer.status_code == 401
    assert answer.json()["error"].keys() == {"message", "type", "param", "code"}
    assert answer.json()["error"]["code"] == "invalid_api_key"
    assert answer.headers["www-authenticate"] == "Bearer"
    assert answer.headers["x-request-id"].startswith("req-")


def test_unknown_routes_are_locked_too(api: Api) -> None:
    for path in ("/", "/v1", "/v1/nothing", "/openapi.json", "/docs", "/healthz/", "//healthz", "/metrics/../v1/files", "/v1/files/../../healthz"):
        assert status_before_the_body(api.app, "GET", path, {}) == 401, path


def test_open_routes_need_no_key(api: Api) -> None:
    for path in OPEN:
        assert api.client.get(path, headers={"authorization": ""}).status_code == 200


def test_websocket_is_closed(api: Api) -> None:
    with pytest.raises(WebSocketDisconnect), api.client.websocket_connect("/v1/models"):
        pass


def test_upload_is_refused_while_its_body_has_not_come(live_api: Api) -> None:
    host, port = live_api.base_url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=5) as connection:
        connection.sendall(
            b"POST /v1/files HTTP/1.1\r\nHost: test\r\nContent-Length: 1000000000\r\n"
            b"Content-Type: multipart/form-data; boundary=x\r\nExpect: 100-continue\r\n\r\n"
        )
        assert connection.recv(4096).startswith(b"HTTP/1.1 401 ")


def test_other_projects_objects_do_not_exist(api: Api) -> None:
    """Every route that names an object, asked with the other project's key: answered as for an id that nobody has, and the object
    stays as it is."""
    add_model(api, "ft:tiny:default:x:1")
    job = api.create_job()
    names = {"file_id": job["training_file"], "job_id": job["id"], "model_id": "ft:tiny:default:x:1"}
    nobodys = {"file_id": new_id("file"), "job_id": new_id("ftjob"), "model_id": "ft:tiny:default:x:2", "webhook_endpoint_id": "whe_unknown"}
    routes = [(method, path) for method, path in every_route(api.app) if "{" in path and not path.startswith("/v1/organization/")]
    names["webhook_endpoint_id"] = add_endpoint(api.database, api.project_id)
    assert len(routes) >= 11
    for method, path in routes:
        answer, without = (api.client.request(method, filled(path, ids), headers=api.other_headers) for ids in (names, nobodys))
        assert answer.status_code == 404, (method, path)
        if method == "HEAD":  # which has no body
            continue
        assert answer.json()["error"]["code"] in ("not_found", "fine_tune_not_found", "model_not_found"), (method, path)
        assert "project" not in answer.text
        expected = without.text
        for mine, unknown in zip(names.values(), nobodys.values(), strict=True):
            expected = expected.replace(unknown, mine)
        assert answer.text == expected, (method, path)
    assert api.client.get(f"/v1/fine_tuning/jobs/{job['id']}").json()["status"] == "validating_files"
    assert api.client.get("/v1/models/ft:tiny:default:x:1").json()["status"] == "servable"
    assert api.client.get(f"/v1/files/{job['training_file']}/content").status_code == 200


def test_other_projects_ids_in_bodies_and_cursors_do_not_exist(api: Api) -> None:
    add_model(api, "ft:tiny:default:x:1")
    job = api.create_job()
    mine = {"training_file": job["training_file"], "model": "tiny"}
    for body, status in ((mine, 400), ({**mine, "model": "ft:tiny:default:x:1"}, 404)):
        assert api.client.post("/v1/fine_tuning/jobs", json=body, headers=api.other_headers).status_code == status
    chat = {"model": "ft:tiny:default:x:1", "messages": [{"role": "user", "content": "hi"}]}
    assert api.client.post("/v1/chat/completions", json=chat, headers=api.other_headers).status_code == 404
    theirs = api.client.post("/v1/files", data={"purpose": "fine-tune"}, files={"file": ("a.jsonl", training_lines())}, headers=api.other_headers).json()["id"]
    for field in ("training_file", "validation_file"):
        body = {"model": "tiny", "training_file": theirs, field: job["training_file"]}
        answer = api.client.post("/v1/fine_tuning/jobs", json=body, headers=api.other_headers)
        assert (answer.status_code, answer.json()["error"]["code"], answer.json()["error"]["param"]) == (400, "file_not_found", field)
    questions = api.upload(b'{"probe": "sums", "question": "1+1?", "answers": ["2"]}', purpose="evals")
    body = {"model": "tiny", "training_file": theirs, "method": {"type": "sdft", "sdft": {"retention_file": questions}}}
    answer = api.client.post("/v1/fine_tuning/jobs", json=body, headers=api.other_headers)
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "file_not_found")
    prompt = {"model": "ft:tiny:default:x:1", "prompt": "hi"}
    assert api.client.post("/v1/completions", json=prompt, headers=api.other_headers).status_code == 404
    assert api.client.delete(f"/v1/files/{theirs}", headers=api.other_headers).status_code == 200
    endpoint = add_endpoint(api.database, api.project_id)
    for path, after in (("/v1/files", job["training_file"]), ("/v1/fine_tuning/jobs", job["id"]), ("/v1/webhook_endpoints", endpoint)):
        answer = api.client.get(path, params={"after": after}, headers=api.other_headers)
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, "after")
        assert api.client.get(path, headers=api.other_headers).json()["data"] == []
    assert [model["id"] for model in api.client.get("/v1/models", headers=api.other_headers).json()["data"]] == ["tiny"]


def test_cursors_within_an_object_are_of_that_object(api: Api) -> None:
    """An event's or checkpoint's id of another project's job is unknown in a list of one's own."""
    job = api.create_job()
    mine = api.client.get(f"/v1/fine_tuning/jobs/{job['id']}/events").json()["last_id"]
    theirs = add_job(api.database, api.other_project_id)
    for kind in ("events", "checkpoints"):
        answer = api.client.get(f"/v1/fine_tuning/jobs/{theirs}/{kind}", params={"after": mine}, headers=api.other_headers)
        assert (answer.status_code, answer.json()["error"]["code"]) == (400, "invalid_cursor"), kind


def test_found_key_is_remembered_for_a_moment_only(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(authentication, "REMEMBERED_SECONDS", 60)
    now = time.monotonic
    lookups: list[str] = []
    look_up = authentication._look_up
    monkeypatch.setattr(authentication, "_look_up", lambda database, key: lookups.append(key) or look_up(database, key))
    for _ in range(5):
        assert api.client.get("/v1/models").status_code == 200
    assert len(lookups) == 1
    change_key(api, revoked_at=unix_now())
    monkeypatch.setattr(authentication, "time", SimpleNamespace(monotonic=lambda: now() + 60))
    assert api.client.get("/v1/models").status_code == 401


def test_unknown_key_is_never_remembered(api: Api) -> None:
    with api.database.transaction() as session:
        late = create_key(session, api.project_id, "late")
        session.rollback()
    assert api.client.get("/v1/models", headers=bearer(late)).status_code == 401
    with api.database.transaction() as session:
        good = create_key(session, api.project_id, "good")
    assert api.client.get("/v1/models", headers=bearer(good)).status_code == 200


def test_last_use_is_recorded_once_a_minute(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(authentication, "REMEMBERED_SECONDS", 0)
    assert key_row(api).last_used_at is None
    api.client.get("/v1/models")
    first = key_row(api).last_used_at
    assert first is not None
    assert abs(first - unix_now()) < 10
    api.client.get("/v1/models")
    assert key_row(api).last_used_at == first
    change_key(api, last_used_at=first - 61)
    api.client.get("/v1/models")
    assert (key_row(api).last_used_at or 0) >= first


@pytest.mark.parametrize("error", [Unavailable("busy"), StorageFull("full")])
def test_a_busy_database_or_a_full_disk_does_not_turn_away_a_good_key(api: Api, monkeypatch: pytest.MonkeyPatch, error: ServiceError) -> None:
    @contextmanager
    def failing(self: Database) -> Iterator[None]:
        raise error
        yield

    monkeypatch.setattr(Database, "transaction", failing)
    assert api.client.get("/v1/models").status_code == 200
