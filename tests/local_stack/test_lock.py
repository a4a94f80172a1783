import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from local_stack.errors import StackError
from local_stack.lock import data_directory_lock, is_held
from tests.local_stack.conftest import wait_for

HOLD = "import sys, time, pathlib\nfrom local_stack.lock import data_directory_lock\nwith data_directory_lock(pathlib.Path(sys.argv[1])): time.sleep(60)"


def test_a_held_directory_is_refused_with_the_holders_pid(start_process: Callable[..., "subprocess.Popen[bytes]"], data_dir: Path) -> None:
    holder = start_process(sys.executable, "-c", HOLD, data_dir)
    wait_for(lambda: is_held(data_dir))
    wait_for(lambda: (data_dir / "up.lock").read_text())
    with pytest.raises(StackError, match=rf"pid {holder.pid}\) already runs on {data_dir}"), data_directory_lock(data_dir):
        pass


def test_a_killed_holder_lets_go(start_process: Callable[..., "subprocess.Popen[bytes]"], data_dir: Path) -> None:
    holder = start_process(sys.executable, "-c", HOLD, data_dir)
    wait_for(lambda: is_held(data_dir))
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    with data_directory_lock(data_dir):
        assert is_held(data_dir)
        assert (data_dir / "up.lock").read_text() == f"{os.getpid()}\n"
    assert not is_held(data_dir)


def test_children_do_not_inherit_the_lock(start_process: Callable[..., "subprocess.Popen[bytes]"], data_dir: Path) -> None:
    """Or a leftover process would keep the directory held."""
    with data_directory_lock(data_dir):
        child = start_process(sys.executable, "-c", "import time; time.sleep(60)")
    assert child.poll() is None
    assert not is_held(data_dir)


def test_a_directory_that_was_never_used_is_not_held(tmp_path: Path) -> None:
    assert not is_held(tmp_path)
    assert not is_held(tmp_path / "missing")
