"""The supervisor over small scripted processes."""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator

import psutil
import pytest

from local_stack import supervisor as supervising
from local_stack.errors import StackError, StopRequested
from local_stack.processes import ProcessSpec
from local_stack.supervisor import BackOff, Supervisor
from tests.local_stack.conftest import wait_for

WAITS = "ready(); time.sleep(60)"


class Running:
    """A supervisor whose `run` goes on in a thread."""

    def __init__(self) -> None:
        self.stop_requested = threading.Event()
        self.said: list[str] = []
        self.supervisor = Supervisor(self.stop_requested, self.said.append)
        self._thread: threading.Thread | None = None

    def run_in_thread(self) -> None:
        self._thread = threading.Thread(target=self.supervisor.run)
        self._thread.start()

    def end(self) -> None:
        self.stop_requested.set()
        if self._thread is not None:
            self._thread.join()
        self.supervisor.stop()


@pytest.fixture
def running() -> Iterator[Running]:
    held = Running()
    yield held
    held.end()


def test_delays_double_up_to_30_seconds_and_start_over_after_a_minute_of_life() -> None:
    back_off = BackOff()
    assert [back_off.next_delay(1) for _ in range(7)] == [1, 2, 4, 8, 16, 30, 30]
    assert back_off.next_delay(59.9) == 30
    assert [back_off.next_delay(60), back_off.next_delay(0)] == [1, 2]


def test_many_failures_do_not_overflow() -> None:
    assert BackOff(failures=5000).next_delay(1) == 30


def test_ready_means_that_every_process_said_so(running: Running, scripted: Callable[..., ProcessSpec]) -> None:
    slow = scripted("slow", "time.sleep(0.6); " + WAITS)
    for spec in (scripted("quick", WAITS), slow):
        running.supervisor.launch(spec)
    started = time.monotonic()
    running.supervisor.wait_until_ready()
    assert time.monotonic() - started > 0.5
    assert slow.is_ready()
    assert running.said == ["quick is up", "slow is up"]


def test_a_process_that_dies_while_starting_is_an_error_with_its_log(running: Running, scripted: Callable[..., ProcessSpec]) -> None:
    running.supervisor.launch(scripted("fine", WAITS))
    running.supervisor.launch(scripted("broken", "print('the reason', flush=True); sys.exit(3)"))
    with pytest.raises(StackError, match=r"(?s)broken ended while starting \(exit code 3\).*broken\.log.*the reason"):
        running.supervisor.wait_until_ready()


def test_a_process_that_is_never_ready_is_an_error(running: Running, scripted: Callable[..., ProcessSpec]) -> None:
    running.supervisor.launch(scripted("mute", "time.sleep(60)", start_limit=0.3))
    with pytest.raises(StackError, match="mute wasn't ready after"):
        running.supervisor.wait_until_ready()


def test_a_program_that_does_not_exist_is_an_error(running: Running, scripted: Callable[..., ProcessSpec]) -> None:
    spec = scripted("absent", "")
    spec.argv[0] = "/nowhere/program"
    with pytest.raises(StackError, match="absent can't be started"):
        running.supervisor.launch(spec)


def test_a_stop_while_starting_is_heard(running: Running, scripted: Callable[..., ProcessSpec]) -> None:
    running.supervisor.launch(scripted("mute", "time.sleep(60)"))
    threading.Timer(0.3, running.stop_requested.set).start()
    with pytest.raises(StopRequested):
        running.supervisor.wait_until_ready()


def test_what_dies_is_restarted_with_growing_delays(running: Running, scripted: Callable[..., ProcessSpec], notes: Callable[[], list[str]]) -> None:
    running.supervisor.launch(scripted("crashing", "note(str(time.monotonic())); ready(); sys.exit(1)"))
    running.supervisor.launch(scripted("steady", "note('steady'); " + WAITS))
    running.run_in_thread()
    wait_for(lambda: len(notes()) >= 4)
    times = [float(word) for word in notes() if word != "steady"]
    assert times[1] - times[0] > 0.9
    assert times[2] - times[1] > 1.9
    assert notes().count("steady") == 1
    assert running.said[0].startswith("crashing ended (exit code 1); starting it again in 1 s; its log: ")
    assert any("starting it again in 2 s" in line for line in running.said)


def test_a_killed_process_comes_back_as_another(running: Running, scripted: Callable[..., ProcessSpec], notes: Callable[[], list[str]]) -> None:
    running.supervisor.launch(scripted("victim", "note(str(os.getpid())); " + WAITS))
    running.supervisor.wait_until_ready()
    running.run_in_thread()
    os.kill(int(notes()[0]), signal.SIGKILL)
    wait_for(lambda: len(notes()) == 2)
    assert notes()[0] != notes()[1]
    assert any("killed by SIGKILL" in line for line in running.said)


def test_what_a_killed_process_leaves_in_its_group_is_gone_before_it_starts_again(
    running: Running, scripted: Callable[..., ProcessSpec], notes: Callable[[], list[str]]
) -> None:
    """As vLLM's API server leaves its engine."""
    program = """
import subprocess
others = [int(word) for word in open("notes").read().split()] if os.path.exists("notes") else []
def lives(pid):
    try: return open(f"/proc/{pid}/stat").read().rsplit(")")[-1].split()[0] != "Z"
    except OSError: return False
if any(lives(pid) for pid in others): open("overlap", "w").close()
grandchild = subprocess.Popen([sys.executable, "-c", "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(60)"])
note(f"{os.getpid()} {grandchild.pid}"); ready(); time.sleep(60)
"""
    spec = scripted("server", program)
    running.supervisor.launch(spec)
    running.supervisor.wait_until_ready()
    running.run_in_thread()
    server, grandchild = (int(word) for word in notes())
    orphan = psutil.Process(grandchild)
    os.kill(server, signal.SIGKILL)
    wait_for(lambda: len(notes()) == 4)
    assert not orphan.is_running() or orphan.status() == psutil.STATUS_ZOMBIE
    assert not (spec.working_dir / "overlap").exists()
    assert "server left 1 of its own processes behind, which are killed" in running.said
    running.end()
    last = int(notes()[3])
    wait_for(lambda: not psutil.pid_exists(last) or psutil.Process(last).status() == psutil.STATUS_ZOMBIE, 5)


def test_it_is_said_when_a_process_answers_again_and_after_how_long(
    running: Running, scripted: Callable[..., ProcessSpec], notes: Callable[[], list[str]]
) -> None:
    """Not when it was merely started, and once."""
    program = "note(str(os.getpid()))\nif len(open('notes').read().split()) > 1: time.sleep(1.5)\nready(); time.sleep(60)"
    spec = scripted("loading", program)
    running.supervisor.launch(spec)
    running.supervisor.wait_until_ready()
    running.run_in_thread()
    (spec.working_dir / "loading.ready").unlink()
    os.kill(int(notes()[0]), signal.SIGKILL)
    wait_for(lambda: len(notes()) == 2)
    assert not any("again after" in line for line in running.said)
    wait_for(lambda: any("again after" in line for line in running.said))
    time.sleep(1.2)
    (line,) = [line for line in running.said if "again after" in line]
    assert 3 <= int(line.removeprefix("loading answers again after ").removesuffix(" s")) < 30


def test_a_restart_that_fails_is_tried_again(
    running: Running, scripted: Callable[..., ProcessSpec], notes: Callable[[], list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervising, "LONGEST_DELAY_SECONDS", 0.3)
    spec = scripted("moved", "note('run'); sys.exit(0)")
    running.supervisor.launch(spec)
    interpreter, spec.argv[0] = spec.argv[0], "/nowhere/program"
    running.run_in_thread()
    wait_for(lambda: any("can't be started" in line for line in running.said))
    spec.argv[0] = interpreter
    wait_for(lambda: len(notes()) >= 2)


def test_the_last_launched_stops_first_and_each_before_the_next(running: Running, scripted: Callable[..., ProcessSpec], notes: Callable[[], list[str]]) -> None:
    for name in ("valkey", "inference", "api", "worker"):
        running.supervisor.launch(scripted(name, f"on_term(lambda: (time.sleep(0.1), note('{name}'), sys.exit(0))); {WAITS}"))
    running.supervisor.wait_until_ready()
    running.said.clear()
    running.supervisor.stop()
    assert notes() == ["worker", "api", "inference", "valkey"]
    assert running.said == ["worker stopped", "api stopped", "inference stopped", "valkey stopped"]


def test_what_will_not_stop_is_killed_and_said(running: Running, scripted: Callable[..., ProcessSpec]) -> None:
    running.supervisor.launch(scripted("stubborn", "on_term(lambda: None); ready()\nwhile True: time.sleep(1)", grace=0.3))
    running.supervisor.wait_until_ready()
    running.supervisor.stop()
    assert running.said[-1] == "stubborn didn't stop within 0 s and was killed"


def test_nothing_is_restarted_once_a_stop_is_requested(running: Running, scripted: Callable[..., ProcessSpec], notes: Callable[[], list[str]]) -> None:
    running.supervisor.launch(scripted("crashing", "note('run'); ready(); sys.exit(1)"))
    running.run_in_thread()
    wait_for(lambda: running.said)
    running.end()
    time.sleep(1.3)
    assert notes() == ["run"]
