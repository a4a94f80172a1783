"""Work that hangs is let go of, and what it becomes is still told."""

import threading
import time
from types import SimpleNamespace

import pytest

from tests.worker.test_supervisor import wait_for
from worker import interruptible as interruptible_module
from worker.interruptible import interruptible


class Stop(Exception):
    pass


def nothing() -> None:
    pass


def test_the_result_and_the_error_of_the_work_are_passed_on() -> None:
    def fail() -> None:
        raise TimeoutError("its own")

    assert interruptible(lambda: 7, nothing) == 7
    with pytest.raises(TimeoutError, match="its own"):
        interruptible(fail, nothing)


def test_work_that_hangs_is_left_soon_and_its_end_is_logged(monkeypatch: pytest.MonkeyPatch) -> None:
    logged: list[tuple[str, str]] = []
    monkeypatch.setattr(interruptible_module, "log", SimpleNamespace(info=lambda event, error: logged.append((event, error))))
    go_on, began = threading.Event(), time.monotonic()

    def hang() -> None:
        go_on.wait(60)
        raise OSError("the store gave up")

    def check() -> None:
        if time.monotonic() - began > 0.3:
            raise Stop

    with pytest.raises(Stop):
        interruptible(hang, check)
    assert time.monotonic() - began < 20
    go_on.set()
    wait_for(lambda: logged == [("abandoned_work_ended", "OSError: the store gave up")], 10)
