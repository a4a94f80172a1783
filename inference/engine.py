"""The thread that owns the model: continuous batching of everything that is asked.

Between two steps, in this order: one task that needs the model alone (loading an adapter, scoring a prompt), the
adapters that are to leave, the requests whose clients left, and newcomers up to `max_batch`, one sequence a request in
turn so that a request for many answers can't starve the others. A step that fails fails the requests that were in it;
the thread goes on.
"""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, TypeVar

from inference.errors import AdapterGone, Overloaded, RequestFailed
from inference.submission import Submission
from sdft_engine.generation import DecodingBatch
from sdft_engine.model import LanguageModel

T = TypeVar("T")

PREFILL_TOKENS = 2048
"""Prompt tokens (padding included) that join between two steps: bounds how long a prefill holds the running answers up."""
UNLOAD_WAIT_SECONDS = 60
"""How long an adapter that is to leave waits for the answers it is giving before they are ended with an error."""
FAILURES_BEFORE_UNHEALTHY = 3
ADAPTER_GONE = "the model was unloaded before its answer was complete"

logger = logging.getLogger(__name__)


@dataclass
class Departure:
    """An adapter that is to leave once no answer needs it."""

    adapter: str
    remove: Callable[[], None]
    deadline: float
    done: "Future[None]" = field(default_factory=Future)

    def __post_init__(self) -> None:
        self.done.set_running_or_notify_cancel()  # from here on it can't be cancelled: the adapter leaves in any case


class Engine:
    """`max_waiting` counts sequences that no place in the batch was found for yet."""

    def __init__(self, model: LanguageModel, *, max_batch: int = 16, max_waiting: int = 1024, unload_wait_seconds: float = UNLOAD_WAIT_SECONDS) -> None:
        self.model = model
        self.max_batch = max_batch
        self._max_waiting = max_waiting
        self._unload_wait_seconds = unload_wait_seconds
        self._wake = threading.Condition()
        self._tasks: deque[tuple[Callable[[], Any], Future[Any]]] = deque()
        self._departures: list[Departure] = []
        self._waiting: deque[tuple[Submission, deque[int]]] = deque()
        self._running: list[tuple[Submission, int]] = []
        self._batch = DecodingBatch(model)
        self._failures = 0
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self, timeout_seconds: float = 5) -> None:
        """End the thread after its current step; whatever has not been answered fails with Overloaded."""
        with self._wake:
            self._stopping = True
            self._wake.notify()
        self._thread.join(timeout_seconds)

    @property
    def healthy(self) -> bool:
        """False once the thread is gone, or when step after step fails (a lost device): only a restart helps then."""
        return self._thread.is_alive() and self._failures < FAILURES_BEFORE_UNHEALTHY

    @property
    def load(self) -> tuple[int, int]:
        """Sequences in the batch, and sequences waiting."""
        with self._wake:
            return len(self._running), self._count_waiting()

    def submit(self, submission: Submission) -> None:
        """Queue a request's sequences. Raises Overloaded where the queue is full or the server is stopping."""
        with self._wake:
            if self._stopping:
                raise Overloaded("the inference server is stopping")
            waiting = self._count_waiting()
            if waiting and waiting + len(submission.sequences) > self._max_waiting:
                raise Overloaded(f"{waiting} answers are waiting already; try again in a moment")
            self._waiting.append((submission, deque(range(len(submission.sequences)))))
            self._wake.notify()

    def call(self, task: Callable[[], T]) -> "Future[T]":
        """Run `task` on the engine's thread between two steps. Raises Overloaded where the server is stopping."""
        future: Future[T] = Future()
        with self._wake:
            if self._stopping:
                raise Overloaded("the inference server is stopping")
            self._tasks.append((task, future))
            self._wake.notify()
        return future

    def remove_adapter(self, adapter: str, remove: Callable[[], None]) -> "Future[None]":
        """Call `remove` on the engine's thread once no answer needs `adapter`; the future then has its result."""
        departure = Departure(adapter, remove, time.monotonic() + self._unload_wait_seconds)
        with self._wake:
            if self._stopping:
                raise Overloaded("the inference server is stopping")
            self._departures.append(departure)
            self._wake.notify()
        return departure.done

    def _run(self) -> None:
        try:
            while self._wait_for_work():
                self._run_one_task()
                self._let_adapters_leave()
                self._drop_cancelled()
                self._admit()
                self._step()
        finally:
            self._fail_everything(Overloaded("the inference server is stopping"))

    def _wait_for_work(self) -> bool:
        """Sleep while there is nothing to do. False when the thread has to end."""
        with self._wake:
            while not (self._stopping or self._tasks or self._waiting or self._running or self._departures):
                self._wake.wait()
            return not self._stopping

    def _run_one_task(self) -> None:
        with self._wake:
            if not self._tasks:
                return
            task, future = self._tasks.popleft()
        if future.set_running_or_notify_cancel():
            _settle(future, task)

    def _let_adapters_leave(self) -> None:
        with self._wake:
            departures = list(self._departures)
            submissions = {id(s): s for s, _ in [*self._waiting, *self._running]}.values()
        for departure in departures:
            users = [s for s in submissions if s.adapter == departure.adapter and not s.ended]
            if users and time.monotonic() >= departure.deadline:
                for submission in users:
                    submission.fail(AdapterGone(ADAPTER_GONE))
            elif not users:
                with self._wake:
                    self._departures.remove(departure)
                _settle(departure.done, departure.remove)

    def _drop_cancelled(self) -> None:
        given_up = [(s, index) for s, index in self._running if s.is_given_up(index)]
        for submission, index in given_up:
            self._batch.remove(submission.sequences[index])
        with self._wake:
            self._running = [each for each in self._running if each not in given_up]
            remaining = ((s, deque(index for index in indices if not s.is_given_up(index))) for s, indices in self._waiting)
            self._waiting = deque((s, indices) for s, indices in remaining if indices)

    def _forget_finished(self) -> None:
        """Those that the batch has let go. One whose client left while it was in a step is still there, and has to be taken out of it."""
        with self._wake:
            self._running = [(s, index) for s, index in self._running if s.sequences[index].finish_reason is None]

    def _admit(self) -> None:
        newcomers = self._take_newcomers()
        for submission in {id(s): s for s, _ in newcomers}.values():
            if submission.adapter is not None and submission.adapter not in self.model.adapters.shapes:
                submission.fail(AdapterGone(ADAPTER_GONE))  # unloaded between its request's arrival and this moment
        newcomers = [(s, index) for s, index in newcomers if not s.is_given_up(index)]
        if not newcomers:
            return
        try:
            self._batch.add([s.sequences[index] for s, index in newcomers])
        except Exception as error:
            self._fail(newcomers, error)
            return
        with self._wake:
            self._running += newcomers
        self._deliver(newcomers)

    def _take_newcomers(self) -> list[tuple[Submission, int]]:
        """Waiting sequences, one of each request in turn, as far as places and prompt tokens go."""
        newcomers: list[tuple[Submission, int]] = []
        longest = 0
        with self._wake:
            while self._waiting and len(self._running) + len(newcomers) < self.max_batch:
                submission, indices = self._waiting[0]
                longest = max(longest, len(submission.sequences[indices[0]].prompt_ids))
                if newcomers and longest * (len(newcomers) + 1) > PREFILL_TOKENS:
                    break
                self._waiting.popleft()
                newcomers.append((submission, indices.popleft()))
                if indices:
                    self._waiting.append((submission, indices))
        return newcomers

    def _step(self) -> None:
        if not self._running:
            return
        stepped = list(self._running)
        try:
            self._batch.step()
        except Exception as error:
            self._batch = DecodingBatch(self.model)
            self._fail(stepped, error)
            return
        self._failures = 0
        self._deliver(stepped)

    def _deliver(self, advanced: list[tuple[Submission, int]]) -> None:
        self._forget_finished()  # first: who sees the last token may count on the place being free
        for submission in {id(s): s for s, _ in advanced}.values():
            submission.deliver()

    def _fail(self, affected: list[tuple[Submission, int]], error: Exception) -> None:
        self._failures += 1
        logger.error("decoding failed; %d answers are lost", len(affected), exc_info=error)
        for submission in {id(s): s for s, _ in affected}.values():
            submission.fail(error if isinstance(error, RequestFailed) else RequestFailed("the inference server failed while answering"))
        self._drop_cancelled()

    def _fail_everything(self, error: RequestFailed) -> None:
        with self._wake:
            self._stopping = True
            submissions = {id(s): s for s, _ in [*self._waiting, *self._running]}.values()
            tasks, departures = list(self._tasks), list(self._departures)
            self._waiting.clear()
            self._running.clear()
            self._tasks.clear()
            self._departures.clear()
        for submission in submissions:
            submission.fail(error)
        for _, future in tasks:
            if future.set_running_or_notify_cancel():
                future.set_exception(error)
        for departure in departures:
            departure.done.set_exception(error)

    def _count_waiting(self) -> int:
        return sum(len(indices) for _, indices in self._waiting)


def _settle(future: "Future[T]", task: Callable[[], T]) -> None:
    try:
        result = task()
    except Exception as error:
        future.set_exception(error)
    else:
        future.set_result(result)
