"""Keeps the children running: starts them in order, restarts what dies, stops them in reverse order."""

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from local_stack.errors import StackError, StopRequested
from local_stack.processes import Child, ProcessSpec, describe_exit, tail

POLL_SECONDS = 0.2
LONGEST_DELAY_SECONDS = 30.0
STABLE_AFTER_SECONDS = 60.0
ASK_EVERY_SECONDS = 1.0
"""How often a process that was started again is asked whether it answers; the others wait for its answer."""


@dataclass
class BackOff:
    """Seconds to wait before a restart: 1, 2, 4, … 30, and 1 again after a minute of life."""

    failures: int = 0

    def next_delay(self, lived_seconds: float) -> float:
        self.failures = 1 if lived_seconds >= STABLE_AFTER_SECONDS else self.failures + 1
        return min(LONGEST_DELAY_SECONDS, 2.0 ** min(self.failures - 1, 5))


class _Supervised:
    def __init__(self, spec: ProcessSpec) -> None:
        self.child = Child(spec)
        self.back_off = BackOff()
        self.restart_at: float | None = None
        self.ready = False
        self.away_since: float | None = None
        """Since when it does not answer, because it ended."""
        self.ask_at = 0.0


class Supervisor:
    """`say` takes one line for the user; `stop_requested` is set by the signal handlers."""

    def __init__(self, stop_requested: threading.Event, say: Callable[[str], None]) -> None:
        self._stop_requested = stop_requested
        self._say = say
        self._supervised: list[_Supervised] = []

    def launch(self, spec: ProcessSpec) -> None:
        """Start one more process. Raises StackError where its program can't be run."""
        supervised = _Supervised(spec)
        try:
            supervised.child.start()
        except OSError as error:
            raise StackError(f"{spec.name} can't be started: {error}") from error
        self._supervised.append(supervised)

    def wait_until_ready(self) -> None:
        """Wait for every launched process. Raises StackError with the log's end where one dies or takes too long."""
        for supervised in self._supervised:
            while not supervised.ready:
                self._raise_if_any_died()
                self._check_ready(supervised)
                if not supervised.ready and self._stop_requested.wait(POLL_SECONDS):
                    raise StopRequested
        self._raise_if_any_died()

    def run(self) -> None:
        """Restart what dies, each only when nothing is left of the one before, until a stop is requested."""
        while not self._stop_requested.wait(POLL_SECONDS):
            for supervised in self._supervised:
                self._look_after(supervised)

    def stop(self) -> None:
        """Stop all, the last launched first; each ends before the next is told."""
        for supervised in reversed(self._supervised):
            name = supervised.child.spec.name
            was_alive = supervised.child.alive
            if not supervised.child.stop():
                self._say(f"{name} didn't stop within {supervised.child.spec.stop_grace_seconds:.0f} s and was killed")
            elif was_alive:
                self._say(f"{name} stopped")
        self._supervised.clear()

    def _check_ready(self, supervised: _Supervised) -> None:
        spec, lived_seconds = supervised.child.spec, time.monotonic() - supervised.child.started_at
        if spec.is_ready():
            supervised.ready = True
            self._say(f"{spec.name} is up")
        elif lived_seconds > spec.start_limit_seconds:
            raise StackError(f"{spec.name} wasn't ready after {spec.start_limit_seconds:.0f} s; the end of {spec.log_path}:\n{tail(spec.log_path)}")

    def _raise_if_any_died(self) -> None:
        for supervised in self._supervised:
            child, spec = supervised.child, supervised.child.spec
            if not child.alive:
                end = f"the end of {spec.log_path}:\n{tail(spec.log_path)}"
                raise StackError(f"{spec.name} ended while starting ({describe_exit(child.exit_code)}); {end}")

    def _look_after(self, supervised: _Supervised) -> None:
        child, now = supervised.child, time.monotonic()
        if child.alive:
            self._say_when_it_answers_again(supervised, now)
        elif supervised.restart_at is None:
            self._plan_restart(supervised, now)
        elif now >= supervised.restart_at and not child.kill_orphans():
            supervised.restart_at = None
            try:
                child.start()
            except OSError as error:
                self._say(f"{child.spec.name} can't be started: {error}")
                child.started_at = now

    def _plan_restart(self, supervised: _Supervised, now: float) -> None:
        child, spec = supervised.child, supervised.child.spec
        delay = supervised.back_off.next_delay(now - child.started_at)
        supervised.restart_at = now + delay
        if supervised.away_since is None:
            supervised.away_since = now
        self._say(f"{spec.name} ended ({describe_exit(child.exit_code)}); starting it again in {delay:.0f} s; its log: {spec.log_path}")
        if orphans := child.kill_orphans():
            self._say(f"{spec.name} left {orphans} of its own processes behind, which are killed")

    def _say_when_it_answers_again(self, supervised: _Supervised, now: float) -> None:
        if supervised.away_since is None or now < supervised.ask_at:
            return
        if supervised.child.spec.is_ready():
            self._say(f"{supervised.child.spec.name} answers again after {time.monotonic() - supervised.away_since:.0f} s")
            supervised.away_since = None
        else:
            supervised.ask_at = time.monotonic() + ASK_EVERY_SECONDS
