"""Work that may hang, let go of when its holder has to: a call to a silent store can't be interrupted, and takes a minute."""

import contextvars
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

from core.logging import get_logger

CHECK_SECONDS = 0.2

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
