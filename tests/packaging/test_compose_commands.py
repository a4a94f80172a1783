"""Every command of docker-compose.yml, run as a real process in its order, against a real Postgres and Valkey.

Only what a container changes is replaced: the interpreter, the volumes, host names and ports.
"""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx2
import psycopg
import pytest
from sqlalchemy import make_url

from core.ids import new_token
from tests.packaging.containers import command_of, environment_of, our_services, process_environment, read_dockerfile

SERVICES = our_services()
STARTED_WITHIN_SECONDS = 120
STOPPED_WITHIN_SECONDS = 35

CHECKS = ("database", "schema", "broker", "inference", "workers", "storage")

pytestmark = pytest.mark.slow


class Container:
    """Runs a service's words on this machine; `replacements` are applied to all of them and to its environment."""

    def __init__(self, name: str, directory: Path, replacements: dict[str, str]) -> None:
        self.service, self.directory, self.replacements = SERVICES[name], directory, replacements
        self.words = [self.here(word) for word in command_of(self.service)]
        self.health_words = [self.here(word) for word in read_dockerfile()[self.service["build"]["target"]].health_command]
        variables = {key: self.here(value) for key, value in environment_of(self.service).items()}
        self.environment = process_environment(variables | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"})

    def here(self, text: str) -> str:
        """In one pass, so that nothing inside a replacement is replaced again."""
        return re.sub("|".join(map(re.escape, self.replacements)), lambda found: self.replacements[found[0]], text)

    def run_to_end(self) -> str:
        run = subprocess.run(self.words, cwd=self.directory, env=self.environment, capture_output=True, text=True, check=False, timeout=STARTED_WITHIN_SECONDS)
        assert run.returncode == 0, run.stderr
        return run.stdout

    @contextmanager
    def running(self) -> Iterator[None]:
        """Until the image's own health check passes; leaving the block, SIGTERM has to end it in time."""
        log_path = self.directory / f"{new_token()}.log"
        with log_path.open("wb") as log:
            process = subprocess.Popen(self.words, cwd=self.directory, env=self.environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            deadline = time.monotonic() + STARTED_WITHIN_SECONDS
            while not self.healthy():
                assert process.poll() is None, log_path.read_text()
                assert time.monotonic() < deadline, log_path.read_text()
                time.sleep(0.5)
            yield
            process.terminate()
            assert process.wait(STOPPED_WITHIN_SECONDS) in (0, -signal.SIGTERM), log_path.read_text()
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()

    def healthy(self) -> bool:
        return subprocess.run(self.health_words, cwd=self.directory, env=self.environment, capture_output=True, check=False, timeout=60).returncode == 0


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


@pytest.fixture
def empty_postgres_url(postgres_server_url: str) -> Iterator[str]:
    name = f"compose_{new_token()}"
    with psycopg.connect(postgres_server_url, autocommit=True) as connection:
        connection.execute(f'CREATE DATABASE "{name}"')
    yield make_url(postgres_server_url).set(drivername="postgresql+psycopg", database=name).render_as_string(hide_password=False)
    with psycopg.connect(postgres_server_url, autocommit=True) as connection:
        connection.execute(f'DROP DATABASE "{name}" WITH (FORCE)')


def test_the_services_start_answer_and_stop(tmp_path: Path, empty_postgres_url: str, valkey: str, real_model_dir: Path) -> None:
    data_dir, cache_dir = tmp_path / "data", tmp_path / "cache"
    data_dir.mkdir()
    (cache_dir / "base_models").mkdir(parents=True)
    (cache_dir / "base_models" / real_model_dir.name).symlink_to(real_model_dir)
    api_port, inference_port = free_port(), free_port()
    replacements = {
        "postgresql+psycopg://sdft:secret@postgres:5432/sdft": empty_postgres_url,
        "redis://redis:6379/0": valkey,
        "http://inference:8809": f"http://127.0.0.1:{inference_port}",
        "8809": str(inference_port),
        "9808": str(free_port()),
        "8000": str(api_port),
        "0.0.0.0": "127.0.0.1",
        "/cache": str(cache_dir),
        "/data": str(data_dir),
    }
    containers = {name: Container(name, data_dir, replacements) for name, service in SERVICES.items() if "gpu" not in service.get("profiles", [])}
    containers["prepare-base-model"] = Container("prepare-base-model", data_dir, replacements)

    assert containers["migrate"].run_to_end() == "", "a log is no place for a key"
    key = (data_dir / "admin.key").read_text().strip()
    assert key.startswith("sdft_")
    assert containers["migrate"].run_to_end() == ""
    containers["prepare-base-model"].run_to_end()

    with containers["inference"].running(), containers["api"].running(), containers["worker"].running():
        with httpx2.Client(base_url=f"http://127.0.0.1:{api_port}", headers={"authorization": f"Bearer {key}"}, timeout=60, trust_env=False) as client:
            deadline = time.monotonic() + 20  # a worker tells the database a moment after it is healthy
            while client.get("/readyz").json()["degraded"] and time.monotonic() < deadline:
                time.sleep(0.2)
            assert client.get("/readyz").json() == {"status": "ok", "degraded": [], "checks": dict.fromkeys(CHECKS, "ok")}
            question = {"model": "smollm2-135m-instruct", "messages": [{"role": "user", "content": "Say hello."}], "max_tokens": 4}
            answer = client.post("/v1/chat/completions", json=question)
        assert answer.status_code == 200, answer.text
        assert answer.json()["choices"][0]["message"]["content"]
