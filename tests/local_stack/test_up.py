"""`sdft up` as a user starts it: a process, its standard output and its exit status."""

import os
import re
import signal
import socket
import stat
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import httpx2
import psutil
import pytest

from local_stack import up as stack_up
from local_stack.errors import StopRequested
from local_stack.leftovers import find_leftovers
from local_stack.ports import free_local_port
from tests.local_stack.conftest import processes_naming, wait_for

START_LIMIT_SECONDS = 240
STOP_LIMIT_SECONDS = 45


@dataclass
class Up:
    """A running `sdft up`, its output read as it comes."""

    process: "subprocess.Popen[str]"
    out: list[str] = field(default_factory=list)
    err: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        for stream, lines in ((self.process.stdout, self.out), (self.process.stderr, self.err)):
            assert stream is not None
            threading.Thread(target=lambda stream=stream, lines=lines: lines.extend(iter(stream.readline, "")), daemon=True).start()

    def wait_until_ready(self) -> str:
        """The URL of the ready line."""
        wait_for(lambda: self.out or self.process.poll() is not None, START_LIMIT_SECONDS)
        assert self.out, "".join(self.err)
        found = re.fullmatch(r"ready: (http://\S+)\n", self.out[0])
        assert found is not None, self.out
        return found[1]

    def said(self, text: str) -> bool:
        return any(text in line for line in self.err)


StartUp = Callable[..., Up]


@pytest.fixture
def port() -> int:
    return free_local_port()


@pytest.fixture
def start_up(data_dir: Path, port: int) -> Iterator[StartUp]:
    started: list[Up] = []

    def start(**environment: str) -> Up:
        command = [sys.executable, "-m", "cli.main", "up", "--data-dir", str(data_dir), "--port", str(port)]
        process = subprocess.Popen(command, env=os.environ | environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        started.append(Up(process))
        return started[-1]

    yield start
    for up in started:
        if up.process.poll() is None:
            up.process.terminate()
            try:
                up.process.wait(STOP_LIMIT_SECONDS)
            except subprocess.TimeoutExpired:
                up.process.kill()
        up.process.wait()


def run_up(data_dir: Path, *words: str, **environment: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "cli.main", "up", "--data-dir", str(data_dir), *words]
    return subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, timeout=180, check=False)


def test_a_port_in_use_is_named_and_nothing_is_started(data_dir: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        result = run_up(data_dir, "--port", str(port))
    assert (result.returncode, result.stdout) == (1, "")
    assert f"port {port} on 127.0.0.1 is in use" in result.stderr
    assert "Traceback" not in result.stderr
    assert processes_naming(data_dir) == []


@pytest.mark.parametrize(("name", "value"), [("SDFT_LEASE_SECONDS", "soon"), ("SDFT_BASE_MODELS", "[")])
def test_a_wrong_setting_is_named(data_dir: Path, name: str, value: str) -> None:
    result = run_up(data_dir, **{name: value})
    assert (result.returncode, result.stdout) == (1, "")
    assert name.removeprefix("SDFT_").lower() in result.stderr.lower()
    assert "Traceback" not in result.stderr


def test_a_data_directory_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    result = run_up(tmp_path / "file" / "data")
    assert result.returncode == 1
    assert str(tmp_path / "file" / "data") in result.stderr
    assert "Traceback" not in result.stderr


def test_a_file_in_place_of_the_data_directory_is_said_in_words(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    result = run_up(tmp_path / "file")
    assert (result.returncode, result.stderr) == (
        1,
        f"sdft up: error: data directory {tmp_path / 'file'}: it is not a directory; choose another with --data-dir\n",
    )


def test_a_setting_that_does_not_exist_is_noted(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert "sdft up: note: SDFT_DEVIC is no setting; is SDFT_DEVICE meant?\n" in run_up(tmp_path / "file", SDFT_DEVIC="cpu").stderr


def test_what_stopping_does_to_a_job_is_said_with_care(data_dir: Path, port: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def stop_at_once(*_: object) -> None:
        raise StopRequested

    monkeypatch.setattr(stack_up, "_prepare", lambda *_: None)
    monkeypatch.setattr(stack_up, "_launch", stop_at_once)
    assert stack_up.run_up(data_dir, None, port) == 0
    assert "stopping, which can take a minute; a job that trains goes on from its last checkpoint at the next start\n" in capsys.readouterr().err


@pytest.mark.slow
def test_a_base_model_that_cannot_be_prepared_is_said_and_all_is_stopped(data_dir: Path, port: int, tmp_path: Path) -> None:
    catalogue = '[{"id": "mine", "source": "/nowhere/model"}]'
    result = run_up(data_dir, "--port", str(port), SDFT_BASE_MODELS=catalogue, SDFT_CACHE_DIR=str(tmp_path / "cache"))
    assert (result.returncode, result.stdout) == (1, "")
    assert "preparing mine failed" in result.stderr
    assert "/nowhere/model" in result.stderr
    assert processes_naming(data_dir) == []


@pytest.mark.slow
def test_start_refuse_a_second_and_stop(start_up: StartUp, data_dir: Path, port: int, real_model_dir: Path) -> None:
    up = start_up()
    url = up.wait_until_ready()
    assert url == f"http://127.0.0.1:{port}"
    assert httpx2.get(f"{url}/healthz").status_code == 200
    key = (data_dir / "admin.key").read_text().strip()
    assert not up.said(key), "this is no terminal, and may be a log"
    models = httpx2.get(f"{url}/v1/models", headers={"authorization": f"Bearer {key}"})
    assert "smollm2-135m-instruct" in models.text
    assert set(find_leftovers(data_dir)) == {"valkey", "inference", "api", "worker"}

    second = run_up(data_dir, "--port", str(free_local_port()))
    assert (second.returncode, second.stdout) == (1, "")
    assert f"pid {up.process.pid}) already runs" in second.stderr

    up.process.send_signal(signal.SIGTERM)
    assert up.process.wait(STOP_LIMIT_SECONDS) == 0
    assert processes_naming(data_dir) == []
    assert up.out == [f"ready: {url}\n"]


@pytest.mark.slow
def test_what_dies_is_restarted_and_a_killed_run_is_cleaned_up(start_up: StartUp, data_dir: Path, real_model_dir: Path) -> None:
    first = start_up()
    url = first.wait_until_ready()
    before = {role: processes[0].pid for role, processes in find_leftovers(data_dir).items()}
    for role in ("api", "valkey"):
        psutil.Process(before[role]).kill()
    wait_for(lambda: first.said("api answers again after") and first.said("valkey answers again after"), 120)
    wait_for(lambda: _answers(url), 60)
    key = (data_dir / "admin.key").read_text()

    first.process.send_signal(signal.SIGKILL)
    first.process.wait()
    assert set(find_leftovers(data_dir)) == {"valkey", "inference", "api", "worker"}

    second = start_up()
    second.wait_until_ready()
    assert all(second.said(f"stopping the {role} (pid") for role in ("valkey", "inference", "api", "worker"))
    assert {role: len(processes) for role, processes in find_leftovers(data_dir).items()} == {"valkey": 1, "inference": 1, "api": 1, "worker": 1}
    assert (data_dir / "admin.key").read_text() == key
    assert (data_dir / "logs" / "api.log.1").exists()
    second.process.send_signal(signal.SIGINT)
    assert second.process.wait(STOP_LIMIT_SECONDS) == 0
    assert processes_naming(data_dir) == []


@pytest.mark.slow
def test_a_stop_while_starting_leaves_nothing(start_up: StartUp, data_dir: Path, real_model_dir: Path) -> None:
    up = start_up()
    wait_for(lambda: find_leftovers(data_dir).get("inference"), 120)
    up.process.send_signal(signal.SIGTERM)
    assert up.process.wait(STOP_LIMIT_SECONDS) == 0
    assert up.out == []
    assert processes_naming(data_dir) == []


def _answers(url: str) -> bool:
    try:
        return httpx2.get(f"{url}/healthz").status_code == 200
    except httpx2.HTTPError:
        return False


def test_a_data_directory_that_was_open_is_closed_to_others(tmp_path: Path) -> None:
    data_dir = tmp_path / "data"
    data_dir.mkdir(mode=0o755)
    before = os.umask(0o022)
    try:
        with stack_up._closed_to_others(data_dir):
            (data_dir / "database.sqlite3").touch()
        assert os.umask(0o022) == 0o022, "as it was"
    finally:
        os.umask(before)
    assert [stat.S_IMODE(path.stat().st_mode) for path in (data_dir, data_dir / "database.sqlite3")] == [0o700, 0o600]
