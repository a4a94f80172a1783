"""The rows of the load table: each has a service of its own and returns what it measured."""

import asyncio
import functools
import hashlib
import http.client
import itertools
import json
import secrets
import time
from collections import Counter
from collections.abc import Iterator

import psutil
from sqlalchemy import func, select

from benchmarks import gateway
from benchmarks.load_parts.client import Request, closed_loop, wire_of
from benchmarks.load_parts.jobs import cancel, client_of, create_job, job_body, job_of, upload, wait_for
from benchmarks.load_parts.results import Measured, counted, in_milliseconds
from benchmarks.load_parts.sampling import peak_of
from benchmarks.load_parts.service import MIB, MODEL, SCRIPTED_WORKER, Service, service_on
from core.tables.jobs import Job, JobEvent, JobMetrics

CONNECTIONS = 16
SLOTS = 4
FLOOR_SECONDS = 5.0
MB = 1e6
REACTION_SECONDS = 5.0
"""The worker looks at a job's row every second, a trainer at its orders after every step; then its process ends."""
LEAST_OF_HEALTHZ = 0.1
"""A poll is a key, a limit, a thread and a read row beside what every request is; two more queries would be too much."""
LEAST_AMONG_MANY = 0.5
"""Nothing that a poll does grows with the number of jobs, but the queue's order, which is read once a second."""
LEAST_OF_HASHING = 0.05
"""Every byte is also sent, received, searched for a boundary and written, by two processes."""
NO_RATE_LIMIT = {"rate_limit_requests_per_minute": 100_000_000, "project_max_unfinished_jobs": 0}
"""One that nobody reaches: its work is done for every request."""


def polls(database: str, seconds: float) -> Measured:
    """GET of jobs, some of which train and write measurements, some of which wait."""
    with service_on(database, training_slots=SLOTS, **NO_RATE_LIMIT) as service:
        service.start("valkey", "api", "worker", worker=SCRIPTED_WORKER)
        with client_of(service) as client:
            file_id = upload(client)
            jobs = [create_job(client, file_id) for _ in range(4 * SLOTS)]
            running = jobs[:SLOTS]
            wait_for(lambda: all((job_of(client, job_id)["progress"] or {}).get("step") for job_id in running), "the first jobs train")
        floor = asyncio.run(closed_loop(service.address, CONNECTIONS, min(FLOOR_SECONDS, seconds), lambda _: asked("/healthz", service.key)))
        before = service.cpu_seconds("api")
        tally = asyncio.run(closed_loop(service.address, CONNECTIONS, seconds, lambda number: polling(jobs, service.key, number)))
        each = (service.cpu_seconds("api") - before) / max(1, len(tally.seconds))
    times = in_milliseconds(tally.seconds)
    return Measured(
        "polls",
        database,
        f"{tally.per_second:.0f}/s",
        times,
        counted(floor.errors, tally.errors),
        aims=[("at least 400/s", tally.per_second >= 400), ("p99 below 75 ms", times.get("p99", 1e9) < 75)],
        gates=[
            at_least(
                "polls a second over requests a second of /healthz, which needs no key and no database", tally.per_second, floor.per_second, LEAST_OF_HEALTHZ
            )
        ],
        notes=[f"{CONNECTIONS} connections, {len(jobs)} jobs of which {SLOTS} run; {1000 * each:.2f} ms of the API's CPU time each"],
    )


def asked(path: str, key: str) -> Iterator[Request]:
    return itertools.repeat(Request(wire_of("GET", path, key)))


def polling(jobs: list[str], key: str, number: int) -> Iterator[Request]:
    """All of the jobs in turn, each connection beginning with another."""
    requests = [Request(wire_of("GET", f"/v1/fine_tuning/jobs/{job_id}", key), job_id.encode()) for job_id in jobs]
    return itertools.islice(itertools.cycle(requests), number, None)


def at_least(what: str, value: float, compared: float, least: float) -> tuple[str, bool]:
    ratio = value / compared if compared else 0.0
    return f"{what}: {ratio:.2f} (at least {least:g})", ratio >= least


def creates(database: str, seconds: float) -> Measured:
    """POST of jobs, which a worker validates and queues meanwhile, then polls of the queue's last one."""
    with service_on(database, training_slots=1, **NO_RATE_LIMIT) as service:
        service.start("valkey", "api", "worker", worker=SCRIPTED_WORKER)
        with client_of(service) as client:
            file_id = upload(client)
            first = create_job(client, file_id)
            wait_for(lambda: job_of(client, first)["status"] == "running", "the first job runs")
            second = create_job(client, file_id)
            wait_for(lambda: job_of(client, second)["status"] == "queued", "the second job is queued")
        poll_both = functools.partial(polling, [first, second], service.key)
        alone = asyncio.run(closed_loop(service.address, CONNECTIONS, min(FLOOR_SECONDS, seconds), poll_both))
        create = Request(wire_of("POST", "/v1/fine_tuning/jobs", service.key, job_body(file_id)), b'"ftjob-')
        before = service.cpu_seconds("api")
        tally = asyncio.run(closed_loop(service.address, CONNECTIONS, seconds, lambda _: itertools.repeat(create)))
        each = (service.cpu_seconds("api") - before) / max(1, len(tally.seconds))
        with service.reading() as rows, rows.reading() as session:
            number = session.scalar(select(func.count()).select_from(Job)) or 0
        service.stop("worker")
        crowded = asyncio.run(closed_loop(service.address, CONNECTIONS, min(FLOOR_SECONDS, seconds), poll_both))
    surplus = number - len(tally.seconds) - 2
    lost = Counter({"jobs that nobody was told of": surplus} if surplus > 0 else {"jobs without a row": -surplus} if surplus < 0 else {})
    return Measured(
        "creates",
        database,
        f"{tally.per_second:.0f}/s",
        in_milliseconds(tally.seconds),
        counted(alone.errors, tally.errors, crowded.errors, lost),
        aims=[("at least 100/s", tally.per_second >= 100)],
        gates=[at_least(f"polls a second among {number} jobs over polls a second before", crowded.per_second, alone.per_second, LEAST_AMONG_MANY)],
        notes=[f"{CONNECTIONS} connections; a worker validates the jobs meanwhile; {1000 * each:.1f} ms of the API's CPU time each"],
    )


def uploads(database: str, size_bytes: int) -> Measured:
    """One file in one request, whose hash is compared; then a tenth of it as training lines, every one of which is checked."""
    with service_on(database, max_file_bytes=size_bytes, **NO_RATE_LIMIT) as service:
        service.start("valkey", "api")
        api = psutil.Process(service.pid_of("api"))
        block = secrets.token_bytes(MIB)
        blocks = size_bytes // MIB
        before = api.memory_info().rss
        with peak_of(lambda: api.memory_info().rss) as peak:
            plain, errors = upload_of(service, "user_data", itertools.repeat(block, blocks), blocks * MIB, hash_of(block, blocks))
        grown = peak.value - before
        line = json.dumps({"prompt": "Which lamp is it?", "completion": "the red lamp " * 75}).encode() + b"\n"
        lines = line * (MIB // len(line))
        count = max(1, blocks // 10 * MIB // len(lines))
        checked, more = upload_of(service, "fine-tune", itertools.repeat(lines, count), count * len(lines), hash_of(lines, count))
    bare = hashing_speed(block)
    return Measured(
        "upload",
        database,
        f"{plain:.0f} MB/s, grows by {grown / MIB:.0f} MiB",
        errors=counted(errors, more),
        aims=[("at least 80 MB/s", plain >= 80)],
        gates=[
            (f"the API grows by {grown / MIB:.0f} MiB (less than 64)", grown < 64 * MIB),
            at_least("the upload's speed over that of hashing alone", plain, bare, LEAST_OF_HASHING),
        ],
        notes=[f"{blocks * MIB / 1e9:.1f} GB in one request; hashing alone: {bare:.0f} MB/s; training lines, each checked: {checked:.0f} MB/s"],
    )


def hash_of(block: bytes, count: int) -> str:
    digest = hashlib.sha256()
    for _ in range(count):
        digest.update(block)
    return digest.hexdigest()


def hashing_speed(block: bytes) -> float:
    """MB a second of one core."""
    began = time.perf_counter()
    hash_of(block, 256)
    return 256 * len(block) / MB / (time.perf_counter() - began)


def upload_of(service: Service, purpose: str, blocks: Iterator[bytes], size_bytes: int, sha256: str) -> tuple[float, Counter[str]]:
    """MB a second until the answer is there, and what was wrong with it."""
    boundary = secrets.token_hex(16)
    head = f'--{boundary}\r\ncontent-disposition: form-data; name="purpose"\r\n\r\n{purpose}\r\n--{boundary}\r\n'
    head += 'content-disposition: form-data; name="file"; filename="load.jsonl"\r\ncontent-type: application/octet-stream\r\n\r\n'
    tail = f"\r\n--{boundary}--\r\n"
    headers = {"authorization": f"Bearer {service.key}", "content-type": f"multipart/form-data; boundary={boundary}"}
    headers["content-length"] = str(len(head) + size_bytes + len(tail))
    connection = http.client.HTTPConnection(*service.address, timeout=600)
    errors: Counter[str] = Counter()
    began = time.perf_counter()
    try:
        connection.request("POST", "/v1/files", body=itertools.chain([head.encode()], blocks, [tail.encode()]), headers=headers)
        answer = connection.getresponse()
        body = answer.read()
        speed = size_bytes / MB / (time.perf_counter() - began)
        if answer.status != 200:
            return 0.0, Counter({f"status {answer.status}": 1})
        file = json.loads(body)
        connection.request("HEAD", f"/v1/files/{file['id']}/content", headers={"authorization": headers["authorization"]})
        stored = connection.getresponse()
        stored.read()
        if file["bytes"] != size_bytes or sha256 not in str(stored.headers):
            errors["another file was stored"] += 1
    except OSError as error:
        return 0.0, Counter({type(error).__name__: 1})
    finally:
        connection.close()
    return speed, errors


def starts(database: str, jobs: int) -> Measured:
    """From queued to running, of jobs that find a free slot, one after the other; the trainer is a scripted one."""
    with service_on(database, training_slots=SLOTS, **NO_RATE_LIMIT) as service:
        service.start("valkey", "api", "worker", worker=SCRIPTED_WORKER)
        with client_of(service) as client, service.reading() as rows:
            file_id = upload(client)
            ids = []
            for number in range(jobs + 1):
                ids.append(create_job(client, file_id))
                wait_for(lambda: job_of(client, ids[-1])["status"] == "running", "a job runs", every=0.02)
                cancel(client, ids[-1])
                if number >= SLOTS - 2:  # so that there is always a free slot
                    wait_for(lambda: job_of(client, ids[-SLOTS + 1])["status"] == "cancelled", "a job is cancelled", every=0.02)
            queued = select(JobEvent.job_id, JobEvent.created_at).where(JobEvent.message.like("Files validated%"))
            with rows.reading() as session:
                queued_at = {row.job_id: row.created_at for row in session.execute(queued)}
                started = session.execute(select(Job.id, Job.created_at, Job.started_at).where(Job.id.in_(ids[1:]))).all()
    waits = [row.started_at - queued_at[row.id] for row in started]
    whole = [row.started_at - row.created_at for row in started]
    times = in_milliseconds(waits)
    limit = 1000 * service.settings.poll_seconds / 4
    return Measured(
        "queued to running",
        database,
        f"{len(waits)} jobs",
        times,
        {} if len(waits) == jobs else {"jobs that did not start": jobs - len(waits)},
        aims=[("p99 below 2 s", times["p99"] < 2000)],
        gates=[(f"the median is {times['p50']:.0f} ms (below {limit:.0f}: the doorbell, and not the worker's next look)", times["p50"] < limit)],
        notes=[f"from creation to running: median {in_milliseconds(whole)['p50']:.0f} ms"],
    )


def cancels(database: str, jobs: int) -> Measured:
    """From the request until a job that really trains is cancelled and its trainer gone."""
    with service_on(database, **NO_RATE_LIMIT) as service:
        service.start("valkey", "api", "worker")
        taken: list[float] = []
        with client_of(service) as client, service.reading() as rows:
            file_id = upload(client)
            for number in range(jobs):
                job_id = create_job(client, file_id, n_epochs=50, batch_size=8)
                wait_for(lambda job_id=job_id: ((job_of(client, job_id)["progress"] or {}).get("step") or 0) >= 2, "a job trains", 300)  # type: ignore[misc]
                time.sleep(number / jobs)  # at another point of a step
                began = time.perf_counter()
                cancel(client, job_id)
                wait_for(lambda job_id=job_id: job_of(client, job_id)["status"] == "cancelled", "a job is cancelled", every=0.02)  # type: ignore[misc]
                taken.append(time.perf_counter() - began)
            with rows.reading() as session:
                steps = [row["step_seconds"] for row in session.scalars(select(JobMetrics.metrics))]
        left = [child for child in psutil.Process(service.pid_of("worker")).children(recursive=True) if "sdft_engine.train" in child.cmdline()]
    limit = max(10.0, max(steps) + REACTION_SECONDS)
    return Measured(
        "cancel",
        database,
        f"{max(taken):.1f} s at most, {jobs} jobs",
        in_milliseconds(taken),
        {"trainers that were left": len(left)} if left else {},
        gates=[(f"the slowest took {max(taken):.1f} s (at most {limit:.1f}: 10 s, or the longest step and {REACTION_SECONDS:g} s)", max(taken) <= limit)],
        notes=[f"{MODEL} trains for real; steps of up to {max(steps):.1f} s"],
    )


def first_tokens(database: str, pairs: int) -> Measured:
    """What the gateway adds, as benchmarks.gateway measures it."""
    with service_on(database, **NO_RATE_LIMIT) as service:
        service.start("valkey", "inference", "api")
        measured = gateway.measure(gateway.asking(service.settings.inference_urls[0], "none"), gateway.asking(service.url, service.key), pairs)
    added = in_milliseconds([(through - direct) / 1000 for direct, through in measured])
    return Measured(
        "first token",
        database,
        f"the gateway adds {added['p50']:.1f} ms",
        added,
        aims=[("at most 5 ms added", added["p50"] <= 5)],
        notes=[f"{pairs} pairs asked in turn, as benchmarks.gateway does, which gates it"],
    )
