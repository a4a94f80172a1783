"""GET /fine_tuning/jobs/{id}/events?stream=true: the events so far, then each new one, until the job has ended.

What is there already is read page by page, as fast as the reader takes it; what comes later is given by the process's
EventFeed. No database session is open while the stream waits. The stream ends with [DONE] once the job has ended and all its
events were sent, and with an error where it has to be taken up again: by its ids, a reader goes on exactly where it was.
"""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import AbstractContextManager
from dataclasses import dataclass

import anyio.to_thread
from fastapi import Response
from fastapi.sse import KEEPALIVE_COMMENT, EventSourceResponse
from sqlalchemy import select
from starlette.types import Receive, Scope, Send

from api.error_handlers import render
from api.fine_tuning.jobs.event_feed import End
from api.fine_tuning.jobs.event_frames import DONE, error_frame, event_frame
from api.state import ApiState
from core.database import Database
from core.errors import BadRequest, RateLimited, ServiceError
from core.tables.jobs import TERMINAL_STATUSES, Job, JobEvent
from sdft_engine.contract.quoting import quoted

KEEPALIVE_SECONDS = 15.0
PAGE = 500


def stream_events(state: ApiState, job: Job, *, after: str | None, last_event_id: str | None, key_id: str) -> Response:
    """The response, with its first page read. Raises BadRequest on an event that this job does not have."""
    if after is not None:
        raise BadRequest("after: a stream goes on after the event that the header Last-Event-ID names", code="invalid_value", param="after")
    position = 0 if last_event_id is None else _position_of(state.database, job.id, last_event_id)
    page = _read_page(state.database, job.id, position)
    if last_event_id is not None and page.ended and not page.frames:
        return Response(status_code=204)  # what a browser's EventSource takes for "don't come back"
    return EventStream(_frames(state, job.id, page, key_id), state.streams_of_keys.held(key_id))


class EventStream(EventSourceResponse):
    """Lets go of the feed however the response ends. Answers 429 instead where its key has too many of them open."""

    def __init__(self, frames: AsyncGenerator[bytes, None], held: AbstractContextManager[None]) -> None:
        super().__init__(frames, headers={"cache-control": "no-cache", "x-accel-buffering": "no"})
        self._frames = frames
        self._held = held

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            with self._held:
                await super().__call__(scope, receive, send)
        except RateLimited as error:
            await render(error)(scope, receive, send)
        finally:
            await self._frames.aclose()


@dataclass(frozen=True)
class _Page:
    frames: bytes
    position: int
    """Sequence of its last event."""
    is_last: bool
    """It holds all that there was when it was read."""
    ended: bool
    """And the job has ended."""


async def _frames(state: ApiState, job_id: str, page: _Page, key_id: str) -> AsyncGenerator[bytes, None]:
    try:
        yield page.frames
        while not page.is_last:
            page = await anyio.to_thread.run_sync(_read_page, state.database, job_id, page.position)
            yield page.frames
    except ServiceError as error:
        yield error_frame(error)
        return
    if page.ended:
        yield DONE
        return
    with state.event_feed.subscribed(job_id, page.position, key_id) as subscription:
        while True:
            try:
                async with asyncio.timeout(KEEPALIVE_SECONDS):
                    item = await subscription.next()
            except TimeoutError:
                yield KEEPALIVE_COMMENT
                continue
            if isinstance(item, End):
                yield error_frame(item.error) if item.error else DONE
                return
            yield item


def _position_of(database: Database, job_id: str, event_id: str) -> int:
    with database.reading() as session:
        position = session.scalar(select(JobEvent.sequence).where(JobEvent.job_id == job_id, JobEvent.id == event_id))
    if position is None:
        message = f"Last-Event-ID: this job has no event with the id {quoted(event_id)}"
        raise BadRequest(message, code="invalid_cursor", param="Last-Event-ID")
    return position


def _read_page(database: Database, job_id: str, position: int) -> _Page:
    """The status first: where the job has ended by then, the events that are read afterwards hold the last one."""
    following = select(JobEvent).where(JobEvent.job_id == job_id, JobEvent.sequence > position).order_by(JobEvent.sequence).limit(PAGE)
    with database.reading() as session:
        ended = session.scalar(select(Job.status).where(Job.id == job_id)) in TERMINAL_STATUSES
        events = session.scalars(following).all()
    is_last = len(events) < PAGE
    frames = b"".join(event_frame(event) for event in events)
    return _Page(frames, events[-1].sequence if events else position, is_last, ended and is_last)
