"""The demo's side of the service: starting it, waiting for it, following and cancelling jobs."""

import os
import sys
import threading
import time
from io import StringIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from openai import BadRequestError
from rich.console import Console

from tests.examples.scripted_client import Moment, ScriptedClient, silent_progress

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))

import demo_service
from demo_service import DemoFailed, cancel_unless_ended, follow_job, running_service, timed, wait_until_servable

RUNNING, SUCCEEDED = Moment("running"), Moment("succeeded")


@pytest.fixture(autouse=True)
def _no_pause_between_polls(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo_service, "POLL_SECONDS", 0)


def test_a_job_is_followed_to_its_end() -> None:
    client = ScriptedClient([Moment("queued"), RUNNING, RUNNING, SUCCEEDED])
    polled: list[str] = []
    followed = follow_job(client, "ftjob-1", "job", silent_progress(), lambda job: bool(polled.append(job.status)))
    assert followed.job.status == "succeeded"
    assert polled == ["queued", "running", "running"]
    assert client.cancellations == 0


def test_running_seconds_count_from_the_start_of_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter((100.0, 130.0))
    monkeypatch.setattr(demo_service, "time", SimpleNamespace(monotonic=lambda: next(clock), sleep=lambda seconds: None))
    client = ScriptedClient([Moment("queued"), RUNNING, RUNNING, SUCCEEDED])
    assert follow_job(client, "ftjob-1", "job", silent_progress()).running_seconds == 30.0


def test_a_job_is_cancelled_once() -> None:
    client = ScriptedClient([RUNNING, RUNNING])
    assert follow_job(client, "ftjob-1", "job", silent_progress(), lambda job: True).job.status == "cancelled"
    assert client.cancellations == 1


def test_a_job_that_ends_before_its_cancellation_is_retrieved_again() -> None:
    client = ScriptedClient([RUNNING, SUCCEEDED], ends_before_cancel=True)
    assert follow_job(client, "ftjob-1", "job", silent_progress(), lambda job: True).job.status == "succeeded"


def test_other_refusals_of_a_cancellation_are_errors() -> None:
    client = ScriptedClient([RUNNING], ends_before_cancel=True)
    with pytest.raises(BadRequestError) as caught:
        client.fine_tuning.jobs.cancel("ftjob-1")
    refusal = caught.value
    refusal.code = "invalid_value"

    def refuse(job_id: str) -> None:
        raise refusal

    client.fine_tuning.jobs.cancel = refuse
    with pytest.raises(BadRequestError):
        cancel_unless_ended(client, "ftjob-1")


def test_waiting_for_a_model_shows_what_is_expected_and_then_nothing() -> None:
    client, progress, shown = ScriptedClient([], unverified_looks=2), silent_progress(), []

    def look(model: str) -> Any:
        shown.append([task.description for task in progress.tasks])
        return retrieve(model)

    retrieve, client.models.retrieve = client.models.retrieve, look
    wait_until_servable(client, "tuned", progress)
    assert [len(tasks) for tasks in shown] == [0, 1, 1]
    assert "usually under 60 s" in shown[1][0]
    assert progress.tasks == []


def test_a_model_that_never_becomes_servable_fails_the_demo(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo_service, "SERVABLE_TIMEOUT_SECONDS", 0.05)
    with pytest.raises(DemoFailed, match="tuned did not become servable"):
        wait_until_servable(ScriptedClient([], unverified_looks=10**9), "tuned", silent_progress())


def test_parts_are_timed_and_added_up() -> None:
    seconds: dict[str, float] = {}
    for _ in range(2):
        with timed(seconds, "scoring"):
            time.sleep(0.02)
    assert 0.04 <= seconds["scoring"] < 2


def start_service(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, program: str) -> Any:
    """`running_service` with a Python program in the place of `sdft up`; it writes its process id to `pid`."""
    script = tmp_path / "interpreter"
    script.write_text(f"#!{sys.executable}\nimport os, signal, sys, time\nopen({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid()))\n{program}\n")
    script.chmod(0o700)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "admin.key").write_text("sk-test\n")
    monkeypatch.setattr(demo_service.sys, "executable", str(script))
    return running_service(tmp_path / "data", Console(file=StringIO()))


def is_alive(tmp_path: Path) -> bool:
    try:
        os.kill(int((tmp_path / "pid").read_text()), 0)
    except ProcessLookupError:
        return False
    return True


def test_the_service_runs_until_the_block_ends(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    program = "print('ready: http://127.0.0.1:1', flush=True)\nprint('x' * 200_000, flush=True)\nopen('{}', 'w').close()\ntime.sleep(60)"
    written = tmp_path / "written"
    with start_service(monkeypatch, tmp_path, program.format(written)) as client:
        assert client.api_key == "sk-test"
        deadline = time.monotonic() + 10
        while not written.exists():  # more than a pipe holds: it is read after the ready line too
            assert time.monotonic() < deadline
            time.sleep(0.01)
        assert is_alive(tmp_path)
    assert not is_alive(tmp_path)
    assert "ready" in (tmp_path / "data" / "demo-sdft-up.log").read_text()


def test_a_service_that_hangs_without_a_word_is_given_up(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(demo_service, "READY_TIMEOUT_SECONDS", 1)
    monkeypatch.setattr(demo_service, "STOP_TIMEOUT_SECONDS", 0.2)
    outcome: list[BaseException] = []

    def start() -> None:
        try:
            with start_service(monkeypatch, tmp_path, "signal.signal(signal.SIGTERM, signal.SIG_IGN)\ntime.sleep(60)"):
                pass
        except DemoFailed as error:
            outcome.append(error)

    thread = threading.Thread(target=start, daemon=True)
    thread.start()
    thread.join(20)
    assert not thread.is_alive(), "still waiting for the service"
    assert "not ready after 1 s" in str(outcome[0])
    assert "demo-sdft-up.log" in str(outcome[0])
    assert not is_alive(tmp_path)


def test_a_service_that_ends_before_it_is_ready_fails_the_demo(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(DemoFailed, match=r"did not start; see .*demo-sdft-up\.log"), start_service(monkeypatch, tmp_path, "print('no port left')"):
        pass
    assert (tmp_path / "data" / "demo-sdft-up.log").read_text() == "no port left\n"
