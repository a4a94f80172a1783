import signal
from collections.abc import Callable
from pathlib import Path

import psutil

from local_stack.processes import Child, ProcessSpec, describe_exit, rotate_log, tail
from tests.local_stack.conftest import wait_for


def test_a_child_that_obeys_sigterm_ends_by_itself(scripted: Callable[..., ProcessSpec], notes: Callable[[], list[str]]) -> None:
    child = Child(scripted("polite", "on_term(lambda: (note('bye'), sys.exit(0))); ready(); time.sleep(60)"))
    child.start()
    wait_for(child.spec.is_ready)
    assert child.alive
    assert child.stop() is True
    assert (child.exit_code, notes()) == (0, ["bye"])
    assert child.stop() is True


def test_a_child_that_ignores_sigterm_is_killed_with_its_group(scripted: Callable[..., ProcessSpec]) -> None:
    program = """
import subprocess
grandchild = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
note(str(grandchild.pid)); on_term(lambda: None); ready(); time.sleep(60)
time.sleep(60)
"""
    child = Child(scripted("stubborn", program, grace=0.3))
    child.start()
    wait_for(child.spec.is_ready)
    grandchild = psutil.Process(int((child.spec.working_dir / "notes").read_text()))
    assert child.stop() is False
    assert child.exit_code == -signal.SIGKILL
    wait_for(lambda: not grandchild.is_running() or grandchild.status() == psutil.STATUS_ZOMBIE, 5)


def test_a_child_leads_its_own_session(scripted: Callable[..., ProcessSpec]) -> None:
    """So that a Ctrl-C in the terminal does not reach it."""
    child = Child(scripted("session", "note(str(os.getsid(0))); ready(); time.sleep(60)"))
    child.start()
    wait_for(child.spec.is_ready)
    assert child.process is not None
    assert int((child.spec.working_dir / "notes").read_text()) == child.process.pid
    child.stop()


def test_output_of_every_start_is_appended_to_the_log(scripted: Callable[..., ProcessSpec]) -> None:
    child = Child(scripted("talker", "print('out', flush=True); print('err', file=sys.stderr)"))
    for _ in range(2):
        child.start()
        wait_for(lambda: not child.alive)
    assert child.spec.log_path.read_text().split() == ["out", "err", "out", "err"]


def test_logs_rotate_at_a_start_and_the_oldest_goes(tmp_path: Path) -> None:
    log = tmp_path / "api.log"
    for number in range(7):
        log.write_text(str(number))
        rotate_log(log)
        assert not log.exists()
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"api.log.1": "6", "api.log.2": "5", "api.log.3": "4", "api.log.4": "3"}


def test_an_empty_log_is_not_kept(tmp_path: Path) -> None:
    (tmp_path / "api.log").touch()
    rotate_log(tmp_path / "api.log")
    rotate_log(tmp_path / "missing.log")
    assert [path.name for path in tmp_path.iterdir()] == ["api.log"]


def test_the_tail_of_a_long_log_is_its_last_lines(tmp_path: Path) -> None:
    log = tmp_path / "api.log"
    log.write_bytes(b"".join(b"line %d \xff\n" % number for number in range(20_000)))
    assert [line.split()[1] for line in tail(log).splitlines()] == [str(number) for number in range(19_980, 20_000)]
    assert tail(tmp_path / "missing.log") == ""


def test_exits_are_described() -> None:
    assert describe_exit(3) == "exit code 3"
    assert describe_exit(-9) == "killed by SIGKILL"
