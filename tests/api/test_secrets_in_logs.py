"""What must never be in a log: planted in every place of a request where it could come from, looked for in a real process' output."""

import json
import os
import secrets
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx2
from sqlalchemy import text

from core.audit import SERVER
from core.database import Database
from core.projects import create_key, key_id_of, revoke_key
from core.settings import Settings
from core.tables.projects import ApiKey
from tests.api.serving import bearer, training_lines, wait_for
from tests.rows import add_project

SAID = "canary" + secrets.token_hex(16)
"""What a user wrote into a request."""


@contextmanager
def api_process(settings: Settings, log: Path) -> Iterator[str]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = os.environ | {"SDFT_DATA_DIR": str(settings.data_dir), "SDFT_REDIS_URL": "redis://127.0.0.1:1/0", "SDFT_LOG_LEVEL": "debug"}
    environment["SDFT_BASE_MODELS"] = json.dumps([{"id": "tiny", "source": "/models/tiny"}])
    command = [sys.executable, "-m", "uvicorn", "api.app:app", "--port", str(port), "--log-level", "debug"]
    with log.open("wb") as output:
        process = subprocess.Popen(command, env=environment, stdout=output, stderr=subprocess.STDOUT)
    try:
        wait_for(lambda: process.poll() is not None or b"Uvicorn running on" in log.read_bytes(), 60)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(30)


def test_no_key_and_nothing_that_a_user_wrote_is_in_a_log(make_settings: Callable[..., Settings], sqlite_url: str, tmp_path: Path) -> None:
    settings, log = make_settings(), tmp_path / "api.log"
    database = Database(sqlite_url)
    project_id = add_project(database)
    with database.transaction() as session:
        good, revoked, scoped = (create_key(session, project_id, name) for name in ("good", "revoked", "scoped"))
        revoke_key(session, session.get_one(ApiKey, key_id_of(revoked)), actor=SERVER)
        session.get_one(ApiKey, key_id_of(scoped)).scopes = ["infer"]
    keys = [good, revoked, scoped]
    with api_process(settings, log) as base_url, httpx2.Client(base_url=base_url, trust_env=False) as client:
        statuses = [client.get("/v1/files", headers=bearer(key)).status_code for key in (good, revoked, scoped, good[:-1])]
        assert statuses == [200, 401, 403, 401]
        for path in (f"/v1/files/{good}", f"/v1/models/{good}", f"/v1/files?after={good}", f"/{good}"):
            assert client.get(path, headers=bearer(good)).status_code in (400, 404)
        file = client.post("/v1/files", headers=bearer(good), data={"purpose": "fine-tune"}, files={"file": ("a.jsonl", training_lines())}).json()
        with database.transaction() as session:
            session.execute(text("alter table fine_tuning_jobs drop column suffix"))
        job = {"model": "tiny", "training_file": file["id"], "metadata": {"said": SAID}, "suffix": SAID}
        assert client.post("/v1/fine_tuning/jobs", headers=bearer(good), json=job).status_code == 500
    database.close()
    written = log.read_text()
    assert "unexpected_error" in written
    assert "INSERT INTO fine_tuning_jobs" in written
    assert f"/v1/files/sdft_{key_id_of(good)}_..." in written
    assert [key for key in keys if key.split("_")[2][:40] in written] == []
    assert SAID not in written
