"""New events of jobs, read once for all the streams of this process that follow them.

A thread asks the database a few times a second which of the followed jobs have events that some stream lacks, reads those,
and hands them to the streams' event loops. Each subscription has a place of its own: the sequence of the last event that it
was given. No event is left out by that, because those of one job become visible in the order of their sequence
(core.jobs.events.append_event).
"""

import asyncio
import threading
import time
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from prometheus_client import Gauge
from sqlalchemy import func, select, union_all
from sqlalchemy.orm import Session

from api.fine_tuning.jobs.event_frames import event_frame
from core.database import Database
from core.errors import AuthenticationFailed, ServiceError, Unavailable
from core.logging import get_logger
from core.projects import valid_keys
from core.tables.jobs import TERMINAL_STATUSES, Job, JobEvent

POLL_SECONDS = 0.25
KEY_CHECK_SECONDS = 30.0
MAX_WAITING_BYTES = 512 * 1024
"""What one stream's reader may leave unread beside what the sockets hold."""
JOIN_SECONDS = 5.0
JOBS_AT_A_TIME = 50
"""That many jobs' new events are read by one query."""
MOST_EVENTS = 500
"""Of one job in such a query; the next one goes on."""

log = get_logger(__name__)
open_streams = Gauge("sdft_event_streams", "Event streams of jobs that are being followed.")


@dataclass(frozen=True)
class End:
    """Nothing follows: because the job has ended (no error), or for a reason that the reader is told."""

    error: ServiceError | None = None


class Subscription:
    """One stream of a job's events. `position` belongs to the feed's thread, the rest to the stream's event loop."""

    def __init__(self, job_id: str, position: int, key_id: str) -> None:
        self.job_id = job_id
        self.position = position
        self.key_id = key_id
        self.loop = asyncio.get_running_loop()
        self.ended = False
        self._waiting: asyncio.Queue[bytes | End] = asyncio.Queue()
        self._waiting_bytes = 0

    async def next(self) -> bytes | End:
        """The next events as they go over the wire."""
        item = await self._waiting.get()
        self._waiting_bytes -= len(item) if isinstance(item, bytes) else 0
        return item

    def give(self, frames: bytes, end: End | None) -> None:
        """In the stream's event loop. A reader that is too slow loses the stream, not an event: it comes back for the rest."""
        if self.ended:
            return
        if frames and self._waiting_bytes and self._waiting_bytes + len(frames) > MAX_WAITING_BYTES:
            while not self._waiting.empty():
                self._waiting.get_nowait()
            self._waiting_bytes = 0
            end = End(Unavailable("this reader is too slow; go on with Last-Event-ID"))
        elif frames:
            self._waiting_bytes += len(frames)
            self._waiting.put_nowait(frames)
        if end is not None:
            self.ended = True
            self._waiting.put_nowait(end)


class EventFeed:
    """Opened and closed with the application. Its thread sleeps while nobody follows anything."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._lock = threading.Lock()
        self._subscriptions: set[Subscription] = set()
        self._followed = threading.Event()
        self._closed = threading.Event()
        self._keys_checked_at = time.monotonic()
        self._thread: threading.Thread | None = None

    @contextmanager
    def subscribed(self, job_id: str, position: int, key_id: str) -> Iterator[Subscription]:
        """In an event loop: the events after `position`. `key_id`: the key whose revocation ends the stream."""
        subscription = Subscription(job_id, position, key_id)
        with self._lock:
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="event-feed", daemon=True)
                self._thread.start()
            self._subscriptions.add(subscription)
            self._followed.set()
        if self._closed.is_set():
            subscription.give(b"", End(_stopping()))
        open_streams.inc()
        try:
            yield subscription
        finally:
            open_streams.dec()
            self._forget([subscription])

    def close(self) -> None:
        """End all streams, and every later one at once. Returns without waiting for anything."""
        self._closed.set()
        self._followed.set()
        with self._lock:
            open_ones = list(self._subscriptions)
        self._give([(subscription, b"", End(_stopping())) for subscription in open_ones])

    def join(self) -> None:
        """Wait for the thread, which may be asking the database."""
        if self._thread is not None:
            self._thread.join(JOIN_SECONDS)

    def _run(self) -> None:
        """The thread's loop, until the feed is closed."""
        while not self._closed.is_set():
            more = False
            try:
                more = self._read()
                self._end_streams_of_invalid_keys()
            except ServiceError as error:
                log.warning("database_unreachable", error=error.message)
            except Exception:
                log.exception("event_feed_failed_unexpectedly")
            if not more:
                self._closed.wait(POLL_SECONDS)
            self._followed.wait()

    def _read(self) -> bool:
        """Give every stream what is new. Returns whether there is more to read at once."""
        with self._lock:
            followed = [subscription for subscription in self._subscriptions if not subscription.ended]
        places: dict[str, int] = {}
        for subscription in followed:
            places[subscription.job_id] = min(subscription.position, places.get(subscription.job_id, subscription.position))
        with self._database.reading() as session:
            states = _states_of(session, places)
            behind = {job_id: place for job_id, place in places.items() if states[job_id].newest > place}
            events = _events_after(session, behind)
        frames: dict[str, list[tuple[int, bytes]]] = defaultdict(list)
        for event in events:
            frames[event.job_id].append((event.sequence, event_frame(event)))
        given = []
        for subscription in followed:
            state = states[subscription.job_id]
            new = _next_frames(frames[subscription.job_id], subscription)
            end = End() if state.ended and subscription.position >= state.newest else None
            if new or end:
                given.append((subscription, new, end))
        self._give(given)
        return any(frames[job_id][-1][0] < states[job_id].newest for job_id in behind if frames[job_id])

    def _end_streams_of_invalid_keys(self) -> None:
        if time.monotonic() < self._keys_checked_at + KEY_CHECK_SECONDS:
            return
        self._keys_checked_at = time.monotonic()
        with self._lock:
            followed = list(self._subscriptions)
        with self._database.reading() as session:
            valid = valid_keys(session, {subscription.key_id for subscription in followed})
        end = End(AuthenticationFailed("the key of this stream has expired or was revoked"))
        self._give([(subscription, b"", end) for subscription in followed if subscription.key_id not in valid])

    def _give(self, given: list[tuple[Subscription, bytes, End | None]]) -> None:
        """Hand over in the streams' own event loops, all of one loop at once."""
        self._forget(subscription for subscription, _, end in given if end)
        loops: dict[asyncio.AbstractEventLoop, list[tuple[Subscription, bytes, End | None]]] = defaultdict(list)
        for each in given:
            loops[each[0].loop].append(each)
        for loop, its_own in loops.items():
            try:
                loop.call_soon_threadsafe(_give_all, its_own)
            except RuntimeError:  # the loop is closed, and its streams with it
                self._forget(subscription for subscription, _, _ in its_own)

    def _forget(self, subscriptions: Iterable[Subscription]) -> None:
        with self._lock:
            self._subscriptions.difference_update(subscriptions)
            if not self._subscriptions and not self._closed.is_set():
                self._followed.clear()


@dataclass(frozen=True)
class _JobState:
    ended: bool
    newest: int
    """Sequence of its last event."""


def _states_of(session: Session, job_ids: Collection[str]) -> dict[str, _JobState]:
    """A status and the event of its transition are committed together, so `newest` is at least the terminal event's."""
    newest = select(func.max(JobEvent.sequence)).where(JobEvent.job_id == Job.id).scalar_subquery()
    rows = session.execute(select(Job.id, Job.status, func.coalesce(newest, 0).label("newest")).where(Job.id.in_(list(job_ids))))
    gone = {job_id: _JobState(ended=True, newest=0) for job_id in job_ids}
    return gone | {row.id: _JobState(row.status in TERMINAL_STATUSES, row.newest) for row in rows}


def _events_after(session: Session, places: dict[str, int]) -> list[JobEvent]:
    """The next events of each job after its place, in the order of their sequence within the job. A subquery for each job:
    the planner of Postgres reads whole tables for one condition on all of them."""
    found: list[JobEvent] = []
    pairs = list(places.items())
    for start in range(0, len(pairs), JOBS_AT_A_TIME):
        each = [
            select(JobEvent).where(JobEvent.job_id == job_id, JobEvent.sequence > place).order_by(JobEvent.sequence).limit(MOST_EVENTS).subquery()
            for job_id, place in pairs[start : start + JOBS_AT_A_TIME]
        ]
        found += session.scalars(select(JobEvent).from_statement(union_all(*(select(events) for events in each))))
    return sorted(found, key=lambda event: event.sequence)


def _next_frames(frames: list[tuple[int, bytes]], subscription: Subscription) -> bytes:
    """What the stream lacks of these, as much as may wait for its reader, and one event at least; moves its place."""
    new = bytearray()
    for sequence, frame in frames:
        if sequence <= subscription.position:
            continue
        if new and len(new) + len(frame) > MAX_WAITING_BYTES:
            break
        new += frame
        subscription.position = sequence
    return bytes(new)


def _give_all(given: list[tuple[Subscription, bytes, End | None]]) -> None:
    for subscription, frames, end in given:
        subscription.give(frames, end)


def _stopping() -> ServiceError:
    return Unavailable("the server is stopping; go on with Last-Event-ID")
