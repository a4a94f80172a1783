"""A server that is told to stop while event streams are open: real processes, as an operator stops them."""

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx2
import pytest

from core.database import Database
from core.jobs.events import append_event
from core.projects import create_key
from core.settings import Settings
from tests.api.fine_tuning.event_reader import parsed
from tests.api.serving import bearer, wait_for
from tests.rows import add_job, add_project

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
STREAMS = 20
STOPPED_WITHIN_SECONDS = 20


@contextmanager
def server(settings: Settings, *arguments: str) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """uvicorn on a free port of this machine: its URL and its process."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    environment = os.environ | {
        "SDFT_DATA_DIR": str(settings.data_dir),
        "SDFT_DATABASE_URL": settings.resolved_database_url,
        "SDFT_REDIS_URL": settings.resolved_redis_url,
    }
    command = [sys.executable, "-m", "uvicorn", "api.app:app", "--host", "127.0.0.1", "--port", str(port), *arguments]
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True, start_new_session=True)
    url = f"http://127.0.0.1:{port}"
    try:
        wait_for(lambda: answers(url), 60)
        yield url, process
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def answers(url: str) -> bool:
    try:
        return httpx2.get(f"{url}/healthz", trust_env=False).status_code == 200
    except httpx2.HTTPError:
        return False


@pytest.mark.parametrize("arguments", [(), ("--workers", "2")], ids=["one process", "two processes"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_open_streams_end_and_the_server_stops(
    make_settings: Callable[..., Settings], sqlite_url: str, valkey: str, number: signal.Signals, arguments: tuple[str, ...]
) -> None:
    database = Database(sqlite_url)
    project_id = add_project(database)
    job_id = add_job(database, project_id, "running", lease_token="t", lease_until=9e9)
    with database.transaction() as session:
        key = create_key(session, project_id, "test")
        append_event(session, job_id, "started")
    database.close()
    with (
        server(make_settings(redis_url=valkey), *arguments) as (url, process),
        httpx2.Client(base_url=url, headers=bearer(key), timeout=20, trust_env=False, limits=httpx2.Limits(max_connections=STREAMS)) as client,
    ):
        request = client.build_request("GET", f"/v1/fine_tuning/jobs/{job_id}/events", params={"stream": "true"})
        streams = [parsed(client.send(request, stream=True).iter_bytes()) for _ in range(STREAMS)]
        assert {next(stream).json["message"] for stream in streams} == {"started"}
        process.send_signal(number)
        for stream in streams:
            (last,) = stream  # the response ends as it should: a connection that breaks off would raise
            assert last.id is None
            assert last.json["error"]["code"] == "service_unavailable"
        _, errors = process.communicate(timeout=STOPPED_WITHIN_SECONDS)
    assert process.returncode in (0, -number)
    assert "Traceback" not in errors
    assert "without completing" not in errors
