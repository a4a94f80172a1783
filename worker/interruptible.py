"""Work that may hang, let go of when its holder has to: a call to a silent store can't be interrupted, and takes a minute."""

import contextvars
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import Future, wait
from functools import partial
from typing import TypeVar

from core.logging import get_logger

CHECK_SECONDS = 0.2

Item = TypeVar("Item")
Result = TypeVar("Result")

log = get_logger(__name__)


def interruptible(work: Callable[[], Result], check: Callable[[], None]) -> Result:
    """The result of `work`, or what it raises; `check` is called all the while and may raise too.

    Then `work` is left to itself, in a thread that does not keep the process: whatever it writes afterwards has to be fenced, by a
    lease that is no longer held for example. It ends soon where it calls `check` itself.
    """
    outcome = _in_daemon_thread(work, "interruptible")
    try:
        while not wait([outcome], CHECK_SECONDS).done:
            check()
    except BaseException:
        outcome.add_done_callback(_log_abandoned)
        raise
    return outcome.result()


def side_by_side(work: Callable[[Item], Result], items: Iterable[Item]) -> list[Result]:
    """The results of `work`, in order, or what the first raises that raised, once all have ended. No thread of it keeps the process, which
    those of an executor do."""
    outcomes = [_in_daemon_thread(partial(work, item), "side-by-side") for item in items]
    wait(outcomes)
    return [outcome.result() for outcome in outcomes]


def _in_daemon_thread(work: Callable[[], Result], name: str) -> "Future[Result]":
    outcome: Future[Result] = Future()

    def run() -> None:
        try:
            outcome.set_result(work())
        except BaseException as error:
            outcome.set_exception(error)

    threading.Thread(target=contextvars.copy_context().run, args=(run,), name=name, daemon=True).start()
    return outcome


def _log_abandoned(outcome: "Future[Result]") -> None:
    if (error := outcome.exception()) is not None:
        log.info("abandoned_work_ended", error=f"{type(error).__name__}: {error}")
