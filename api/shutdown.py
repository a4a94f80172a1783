"""Knowing that this process is told to end, before the server waits for its open responses.

uvicorn tells the application so only after every response has ended, and an event stream does not end by itself.
"""

import asyncio
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGTERM, signal.SIGINT)


@contextmanager
def called_when_told_to_stop(stop: Callable[[], None]) -> Iterator[None]:
    """Call `stop` in the running event loop when one of SIGNALS arrives, and then what the server would have done. Outside the
    main thread, where nobody gets signals, this does nothing."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    loop = asyncio.get_running_loop()
    previous: dict[int, Any] = {}

    def handle(number: int, frame: FrameType | None) -> None:
        loop.call_soon_threadsafe(stop)
        if callable(previous[number]):
            previous[number](number, frame)

    previous.update({number: signal.getsignal(number) for number in SIGNALS})
    for number in SIGNALS:
        signal.signal(number, handle)
    try:
        yield
    finally:
        for number in SIGNALS:
            if signal.getsignal(number) is handle:
                signal.signal(number, previous[number])
