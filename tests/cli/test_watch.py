"""`jobs watch` against a server that plays a job's life, poll by poll."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from io import StringIO
from typing import Any

import pytest
from click.testing import Result
from rich.console import Console

from cli import watch as watching
from cli.client import Client
from cli.watch_screens import LiveScreen, progress_text, status_text
from tests.cli.stub_server import KEY, Received, StubServer, json_answer, refusal

Json = dict[str, Any]


def job(status: str, **fields: Any) -> Json:
    return {"id": "ftjob-1", "model": "base", "status": status, "created_at": 1, **fields}


def event(number: int, message: str, **fields: Any) -> Json:
    return {"id": f"ftevent-{number}", "created_at": 1_700_000_000 + number, "level": "info", "type": "message", "message": message, **fields}


def at_step(step: int, total: int = 4) -> Json:
    return {"step": step, "total_steps": total, "phase": "training"}


@dataclass
class PlayedJob:
    """Each poll of the job moves it to the next scene (job object, events that are new in it); the last one stays."""

    scenes: list[tuple[Json, list[Json]]]
    polls: int = 0
    events: list[Json] = field(default_factory=list)

    def get(self, _: Received) -> tuple[int, dict[str, str], bytes]:
        scene, new_events = self.scenes[min(self.polls, len(self.scenes) - 1)]
        if self.polls < len(self.scenes):
            self.events = [*reversed(new_events), *self.events]
        self.polls += 1
        return json_answer(scene)

    def list_events(self, request: Received) -> tuple[int, dict[str, str], bytes]:
        ids = [known["id"] for known in self.events]
        start = ids.index(request.query["after"]) + 1 if "after" in request.query else 0
        end = start + int(request.query["limit"])
        return json_answer({"data": self.events[start:end], "has_more": end < len(self.events)})

    def play_on(self, stub: StubServer) -> None:
        stub.routes["GET /fine_tuning/jobs/ftjob-1"] = self.get
        stub.routes["GET /fine_tuning/jobs/ftjob-1/events"] = self.list_events


LIFE: list[tuple[Json, list[Json]]] = [
    (job("validating_files"), [event(1, "Validating training file")]),
    (job("queued", queue_position=2), [event(2, "Files validated")]),
    (job("running", progress=at_step(1)), [event(3, "Step 1/4", type="metrics", data={"step": 1, "train_loss": 2.5})]),
    (job("running", progress=at_step(4)), [event(4, "Step 4/4", type="metrics", data={"step": 4, "train_loss": 0.125})]),
    (job("succeeded", progress=at_step(4), fine_tuned_model="ft:base:default::1"), [event(5, "The job has successfully completed")]),
]


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watching, "POLL_SECONDS", 0.01)


def test_a_success_is_told_step_by_step_with_status_0(sdft: Callable[..., Result], stub: StubServer) -> None:
    PlayedJob(LIFE).play_on(stub)
    result = sdft("jobs", "watch", "ftjob-1")
    assert result.exit_code == 0, result.stderr
    lines = [line.split("  ")[-1] for line in result.stdout.splitlines()]
    assert lines == [
        "Validating training file",
        "status: validating_files",
        "Files validated",
        "status: queued, place 2 in the queue",
        "status: running, training",
        "step 1/4, loss 2.5000",
        "step 4/4, loss 0.1250",
        "The job has successfully completed",
        "status: succeeded, training",
        "succeeded: ft:base:default::1",
    ]


def test_more_events_than_a_page_between_two_polls_all_appear_once(sdft: Callable[..., Result], stub: StubServer) -> None:
    many = [event(number, f"event {number}") for number in range(2, 252)]
    PlayedJob([(job("running"), [event(1, "event 1")]), (job("succeeded", fine_tuned_model="m"), many)]).play_on(stub)
    told = [line.split("  ")[-1] for line in sdft("jobs", "watch", "ftjob-1").stdout.splitlines() if "event " in line]
    assert told == [f"event {number}" for number in range(1, 252)]


@pytest.mark.parametrize(
    ("last", "told"),
    [
        (
            job("failed", error={"code": "out_of_memory", "message": "not enough memory; lower batch_size"}),
            "failed: not enough memory; lower batch_size (out_of_memory)",
        ),
        (job("cancelled"), "cancelled"),
    ],
)
def test_any_other_end_is_told_with_status_1(sdft: Callable[..., Result], stub: StubServer, last: Json, told: str) -> None:
    PlayedJob([(job("running"), []), (last, [])]).play_on(stub)
    result = sdft("jobs", "watch", "ftjob-1")
    assert (result.exit_code, result.stderr) == (1, told + "\n")


def test_create_and_watch(sdft: Callable[..., Result], stub: StubServer) -> None:
    PlayedJob([(job("failed", error={"message": "no", "code": "x"}), [])]).play_on(stub)
    stub.routes["POST /fine_tuning/jobs"] = lambda _: json_answer(job("queued"))
    result = sdft("jobs", "create", "base", "file-1", "--watch")
    assert result.exit_code == 1
    assert result.stdout.startswith("ftjob-1\n")


def test_a_restart_of_the_server_is_survived(stub: StubServer, capsys: pytest.CaptureFixture[str]) -> None:
    played = PlayedJob(LIFE)
    played.play_on(stub)
    pauses = 0

    def sleep(_: float) -> None:
        nonlocal pauses
        pauses += 1
        if pauses == 3:
            stub.stop()
        if pauses == 5:
            stub.start()

    assert watching.watch(Client(stub.base_url, KEY), "ftjob-1", sleep=sleep) == 0
    out = capsys.readouterr().out
    assert out.count("no answer, still trying") == 1
    assert out.count("the server answers again") == 1
    assert out.count("The job has successfully completed") == 1


@pytest.mark.parametrize("status", [429, 500, 503])
def test_refusals_that_pass_are_waited_out(sdft: Callable[..., Result], stub: StubServer, status: int) -> None:
    played = PlayedJob([(job("running"), []), (job("succeeded", fine_tuned_model="m"), [])])
    played.play_on(stub)
    refusals = iter([refusal(status, "busy"), refusal(status, "busy")])
    stub.routes["GET /fine_tuning/jobs/ftjob-1"] = lambda request: (next(refusals, None) if played.polls == 1 else None) or played.get(request)
    assert sdft("jobs", "watch", "ftjob-1").exit_code == 0
    assert next(refusals, None) is None


def test_a_job_that_vanishes_ends_the_watch(sdft: Callable[..., Result], stub: StubServer) -> None:
    played = PlayedJob([(job("running"), [])])
    played.play_on(stub)
    stub.routes["GET /fine_tuning/jobs/ftjob-1"] = lambda request: played.get(request) if played.polls == 0 else refusal(404, "No such job")
    result = sdft("jobs", "watch", "ftjob-1")
    assert (result.exit_code, result.stderr) == (1, "error: No such job\n")


def test_a_server_that_stays_away_is_given_up(stub: StubServer, sdft: Callable[..., Result], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watching, "UNREACHABLE_LIMIT_SECONDS", 0.2)
    played = PlayedJob([(job("running"), [])])
    played.play_on(stub)
    stub.routes["GET /fine_tuning/jobs/ftjob-1"] = lambda request: played.get(request) if played.polls == 0 else refusal(503, "down")
    result = sdft("jobs", "watch", "ftjob-1")
    assert (result.exit_code, result.stderr) == (1, "error: down\n")


def test_a_server_that_never_answered_is_not_waited_for(sdft: Callable[..., Result], stub: StubServer) -> None:
    stub.stop()
    started = time.monotonic()
    result = sdft("jobs", "watch", "ftjob-1")
    assert result.exit_code == 1
    assert "can't be reached" in result.stderr
    assert time.monotonic() - started < 30


@pytest.fixture
def watching_process(stub: StubServer) -> "Iterator[subprocess.Popen[str]]":
    environment = os.environ | {"SDFT_BASE_URL": stub.base_url, "SDFT_API_KEY": KEY}
    command = [sys.executable, "-m", "cli.main", "jobs", "watch", "ftjob-1"]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    yield process
    process.kill()
    process.communicate()


def test_ctrl_c_leaves_the_job_alone(stub: StubServer, request: pytest.FixtureRequest) -> None:
    PlayedJob([(job("running", progress=at_step(1)), [])]).play_on(stub)
    process: subprocess.Popen[str] = request.getfixturevalue("watching_process")
    assert process.stdout is not None
    assert process.stdout.readline() == "status: running, training\n"
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=20)
    assert process.returncode == 130
    assert "the job goes on" in err
    assert "Traceback" not in err
    assert {request.method for request in stub.received} == {"GET"}


def test_the_live_screen_shows_status_bar_loss_and_time_left() -> None:
    console = Console(file=StringIO(), force_terminal=True, width=120)
    with LiveScreen(console) as screen:
        running = job("running", progress=at_step(1), estimated_finish=time.time() + 125)
        screen.update(running, [event(1, "Started [bold]x[/bold]"), event(2, "Step", type="metrics", data={"train_loss": 1.5})])
    assert isinstance(console.file, StringIO)
    shown = console.file.getvalue()
    assert "running, training" in shown
    assert "step 1/4, loss 1.5000, about 2 min 0" in shown
    assert "Started [bold]x[/bold]" in shown
    assert "━" in shown


def test_texts_without_anything_to_tell() -> None:
    assert status_text(job("queued", queue_position=None)) == "queued"
    assert progress_text(job("queued"), None) is None
    assert progress_text(job("running", progress={"step": None, "total_steps": None, "phase": "preparing"}), None) is None
    assert progress_text(job("running", progress=at_step(0)), None) == "step 0/4"
    assert progress_text(job("running", progress=at_step(4), estimated_finish=time.time() - 5), 0.5) == "step 4/4, loss 0.5000"
