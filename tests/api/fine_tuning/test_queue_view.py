"""How often the queue is read for those who ask where their job stands."""

import threading
import time

import pytest

from api.fine_tuning.jobs.queue_view import QueueView
from tests.api.fine_tuning.test_jobs import get, validate_next
from tests.api.serving import Api


def test_many_polls_read_the_queue_once(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("api.fine_tuning.jobs.queue_view.FRESH_SECONDS", 3600.0)
    ids = [api.create_job()["id"] for _ in range(2)]
    for _ in ids:
        validate_next(api.database)
    reads: list[float] = []
    read = QueueView._read
    monkeypatch.setattr(QueueView, "_read", lambda view, session: (reads.append(0), read(view, session))[1])
    assert [get(api, job_id)["queue_position"] for _ in range(10) for job_id in ids] == [1, 2] * 10
    assert len(reads) == 1


def test_polls_of_jobs_that_came_or_left_since_read_nothing_anew(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("api.fine_tuning.jobs.queue_view.FRESH_SECONDS", 3600.0)
    api.create_job()
    validate_next(api.database)
    view = api.state.queue
    reads: list[float] = []
    read = QueueView._read
    monkeypatch.setattr(QueueView, "_read", lambda view, session: (reads.append(0), read(view, session))[1])
    assert [view.place_of("ftjob-unknown") for _ in range(5)] == [None] * 5
    assert len(reads) == 1


def test_a_slow_read_of_the_queue_holds_up_one_caller(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    job_id = api.create_job()["id"]
    validate_next(api.database)
    view = api.state.queue
    before = view.place_of(job_id)
    assert before is not None
    monkeypatch.setattr("api.fine_tuning.jobs.queue_view.FRESH_SECONDS", 0)
    reading, released = threading.Event(), threading.Event()

    def slow(view: QueueView, session: object) -> dict[str, object]:
        reading.set()
        released.wait(20)
        return {}

    monkeypatch.setattr(QueueView, "_read", slow)
    first = threading.Thread(target=view.place_of, args=(job_id,))
    first.start()
    assert reading.wait(10)
    started = time.monotonic()
    assert view.place_of(job_id) == before
    assert time.monotonic() - started < 5
    released.set()
    first.join()
