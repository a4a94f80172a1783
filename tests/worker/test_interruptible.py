"""Work that hangs is let go of, and what it becomes is still told."""

import threading
import time
from types import SimpleNamespace

import pytest

from tests.worker.test_supervisor import wait_for
from worker import interruptible as interruptible_module
from worker.interruptible import interruptible, side_by_side


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


def test_side_by_side_results_come_in_order_and_the_first_error_is_passed_on() -> None:
    meeting = threading.Barrier(3)

    def work(number: int) -> int:
        meeting.wait(20)  # all three are at work at once
        return number * number

    assert side_by_side(work, [3, 1, 2]) == [9, 1, 4]
    ended: list[int] = []

    def slower_after_the_failure(number: int) -> int:
        time.sleep(number / 5)
        ended.append(number)
        return 1 // number

    with pytest.raises(ZeroDivisionError):
        side_by_side(slower_after_the_failure, [0, 2])
    assert ended == [0, 2], "whoever tidies up afterwards meets nobody at work"


def test_no_thread_of_it_keeps_the_process() -> None:
    go_on = threading.Event()
    threading.Thread(target=side_by_side, args=(lambda _: go_on.wait(60), [1, 2]), daemon=True).start()
    wait_for(lambda: len([thread for thread in threading.enumerate() if thread.name == "side-by-side"]) == 2)
    assert all(thread.daemon for thread in threading.enumerate() if thread.name == "side-by-side")
    go_on.set()
