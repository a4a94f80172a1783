"""Work that may hang, let go of when its holder has to: a call to a silent store can't be interrupted, and takes a minute."""

import contextvars
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import Future
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
    outcome: Future[Result] = Future()
    left = threading.Event()
    ended = threading.Event()

    def run() -> None:
        try:
            outcome.set_result(work())
        except BaseException as error:
            outcome.set_exception(error)
            if left.is_set():
                log.info("abandoned_work_ended", error=f"{type(error).__name__}: {error}")
        finally:
            ended.set()

    threading.Thread(target=contextvars.copy_context().run, args=(run,), name="interruptible", daemon=True).start()
    try:
        while not ended.wait(CHECK_SECONDS):
            check()
    except BaseException:
        left.set()
        raise
    return outcome.result()


def side_by_side(work: Callable[[Item], Result], items: Iterable[Item]) -> list[Result]:
    """The results of `work`, in order, or what the first raises that raised. As above, no thread of it keeps the process, which those
    of an executor do."""

    def run(item: Item, outcome: "Future[Result]") -> None:
        try:
            outcome.set_result(work(item))
        except BaseException as error:
            outcome.set_exception(error)

    outcomes: list[Future[Result]] = []
    for item in items:
        outcomes.append(Future())
        threading.Thread(target=contextvars.copy_context().run, args=(run, item, outcomes[-1]), name="side-by-side", daemon=True).start()
    return [outcome.result() for outcome in outcomes]
