"""What one key may hold at a time in this process: event streams that last as long as their job, answers that are being written."""

import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from core.errors import RateLimited


class HeldByKeys:
    """`most`: of one key; 0: any number. `what` they are, for the message."""

    def __init__(self, most: int, what: str) -> None:
        self._most = most
        self._what = what
        self._held: Counter[str] = Counter()
        self._lock = threading.Lock()

    @contextmanager
    def held(self, key_id: str, count: int = 1) -> Iterator[None]:
        """While the block runs. Raises RateLimited where the key would hold too many; by itself each request may hold as many as it asks
        for, so that none is refused for ever."""
        with self._lock:
            already = self._held[key_id]
            if self._most and already and already + count > self._most:
                message = f"this API key has {already:,} {self._what} open, and may have {self._most:,} at a time; try again when one has ended"
                raise RateLimited(message, code="too_many_open", headers={"retry-after": "2"})
            self._held[key_id] += count
        try:
            yield
        finally:
            with self._lock:
                self._held[key_id] -= count
                if not self._held[key_id]:
                    del self._held[key_id]
