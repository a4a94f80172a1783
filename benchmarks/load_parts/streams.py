"""Many event streams of a few jobs at once: when each event came, and whether every reader got every event."""

import asyncio
import time
from collections import Counter
from dataclasses import dataclass, field

import httpx2
from sqlalchemy import select

from benchmarks.load_parts.client import read_head, wire_of
from benchmarks.load_parts.jobs import cancel, client_of, create_job, job_of, upload, wait_for
from benchmarks.load_parts.results import Measured, in_milliseconds
from benchmarks.load_parts.service import SCRIPTED_WORKER, Service, service_on
from core.tables.jobs import JobEvent

JOBS = 4
OPENED_AT_A_TIME = 20
END_SECONDS = 60
STEP_SECONDS = 1.0


@dataclass
class Reading:
    """What one reader got: event ids with this machine's clock, and how it ended."""

    job_id: str
    received: list[tuple[str, float]] = field(default_factory=list)
    opened_at: float = 0.0
    end: str = "nothing"


def event_streams(database: str, seconds: float, streams: int) -> Measured:
    """Readers follow jobs that run from before they came until after the jobs were cancelled."""
    with service_on(database, training_slots=JOBS, rate_limit_requests_per_minute=100_000_000, key_max_event_streams=0) as service:
        service.start("valkey", "api", "worker", worker=SCRIPTED_WORKER, LOAD_STEP_SECONDS=str(STEP_SECONDS))
        with client_of(service) as client:
            file_id = upload(client)
            jobs = [create_job(client, file_id) for _ in range(JOBS)]
            wait_for(lambda: all((job_of(client, job_id)["progress"] or {}).get("step") for job_id in jobs), "the jobs train")
            readings = asyncio.run(follow(service, client, jobs, seconds, streams))
        with service.reading() as rows, rows.reading() as session:
            events = session.execute(select(JobEvent.id, JobEvent.job_id, JobEvent.created_at, JobEvent.data).order_by(JobEvent.sequence)).all()
    opened = max(reading.opened_at for reading in readings)
    recorded = {event.id: event.created_at for event in events}
    written = {event.id: event.data["written_at"] for event in events if event.data and "written_at" in event.data}
    delays = [came - recorded[event_id] for reading in readings for event_id, came in reading.received if recorded.get(event_id, 0) > opened]
    since_written = [came - written[event_id] for reading in readings for event_id, came in reading.received if written.get(event_id, 0) > opened]
    times = in_milliseconds(delays)
    return Measured(
        "event streams",
        database,
        f"{streams} streams, {len(delays) / seconds:.0f} events/s",
        times,
        dict(errors_of(readings, {job_id: [event.id for event in events if event.job_id == job_id] for job_id in jobs})),
        aims=[("p99 below 1 s", times.get("p99", 1e9) < 1000)],
        notes=[
            f"from an event's row to its reader; {JOBS} jobs write two events every {STEP_SECONDS:g} s",
            f"from the trainer's line to the reader, which waits for the worker's next look: {told(in_milliseconds(since_written))}",
        ],
    )


def told(milliseconds: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.0f} ms" for name, value in milliseconds.items())


def errors_of(readings: list[Reading], events: dict[str, list[str]]) -> Counter[str]:
    """Streams that ended otherwise than with [DONE], and events that are missing, come twice or in another order."""
    errors: Counter[str] = Counter()
    for reading in readings:
        if reading.end != "[DONE]":
            errors[f"a stream ended with {reading.end}"] += 1
        elif [event_id for event_id, _ in reading.received] != events[reading.job_id]:
            errors["a stream has other events than its job"] += 1
    return errors


async def follow(service: Service, client: httpx2.Client, jobs: list[str], seconds: float, streams: int) -> list[Reading]:
    """Open all, read for `seconds`, cancel the jobs and read to the end."""
    readings = [Reading(jobs[number % len(jobs)]) for number in range(streams)]
    opening = asyncio.Semaphore(OPENED_AT_A_TIME)
    tasks = [asyncio.create_task(read(service, reading, opening)) for reading in readings]
    while not all(reading.opened_at or task.done() for reading, task in zip(readings, tasks, strict=True)):
        await asyncio.sleep(0.05)
    await asyncio.sleep(seconds)
    for job_id in jobs:
        await asyncio.to_thread(cancel, client, job_id)
    await asyncio.wait(tasks, timeout=END_SECONDS)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    return readings


async def read(service: Service, reading: Reading, opening: asyncio.Semaphore) -> None:
    """One stream to its end, or until this task is cancelled."""
    async with opening:
        try:
            reader, writer = await asyncio.open_connection(*service.address, limit=1 << 20)
            writer.write(wire_of("GET", f"/v1/fine_tuning/jobs/{reading.job_id}/events?stream=true", service.key))
            status, _ = read_head(await reader.readuntil(b"\r\n\r\n"))
        except (OSError, EOFError) as error:
            reading.end = type(error).__name__
            return
        if status != 200:
            reading.end = f"status {status}"
            return
        reading.opened_at = time.time()
    reading.end = "no end"
    try:
        while size := int(await reader.readuntil(b"\r\n"), 16):
            take(reading, (await reader.readexactly(size + 2))[:-2], time.time())
    except (OSError, EOFError) as error:
        reading.end = type(error).__name__
    finally:
        writer.close()


def take(reading: Reading, chunk: bytes, now: float) -> None:
    """Whole frames, as the server sends them."""
    for line in chunk.split(b"\n"):
        if line.startswith(b"id: "):
            reading.received.append((line[4:].strip().decode(), now))
        elif line.startswith(b"data: [DONE]"):
            reading.end = "[DONE]"
        elif line.startswith(b'data: {"error"'):
            reading.end = line[6:200].decode(errors="replace")
