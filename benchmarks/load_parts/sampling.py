"""A process's numbers while something else goes on."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass
class Peak:
    value: int = 0


@contextmanager
def peak_of(read: Callable[[], int], every_seconds: float = 0.05) -> Iterator[Peak]:
    """The largest that was read until the block's end."""
    peak, ended = Peak(read()), threading.Event()

    def watch() -> None:
        while not ended.wait(every_seconds):
            peak.value = max(peak.value, read())

    watching = threading.Thread(target=watch)
    watching.start()
    try:
        yield peak
    finally:
        ended.set()
        watching.join()
        peak.value = max(peak.value, read())
