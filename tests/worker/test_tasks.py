"""Looking for work: every job once, whatever the number of seekers, and neither kind of work behind the other."""

import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from sqlalchemy import select
from structlog.testing import capture_logs

from core.database import Database
from core.errors import Unavailable
from core.jobs.leases import Claim
from core.jobs.transitions import finish_cancellation, finish_validation
from core.settings import Settings
from core.tables.jobs import Job
from tests.rows import get_job
from tests.worker.conftest import RESOLVED, Workshop, workshop_of
from tests.worker.test_supervisor import wait_for
from worker import polling, tasks
from worker.devices import DeviceGroup
from worker.polling import Poll
from worker.resources import Resources
from worker.tasks import seek_work


class Work:
    """Stands in for training and validation: notes who was worked on and ends the job at once, or when it is let go."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.done: list[str] = []
        self.training = 0
        self.most_training = 0
        self.go_on = threading.Event()
        self.go_on.set()
        self._lock = threading.Lock()
        monkeypatch.setattr(tasks, "train", self.train)
        monkeypatch.setattr(tasks, "validate", self.validate)

    def train(self, resources: Resources, claim: Claim, claimed_at: float, group: DeviceGroup) -> None:
        with self._lock:
            self.done.append(claim.job_id)
            self.training += 1
            self.most_training = max(self.most_training, self.training)
        self.go_on.wait(20)
        with resources.database.transaction() as session:
            finish_cancellation(session, claim)
        with self._lock:
            self.training -= 1

    def validate(self, resources: Resources, claim: Claim, claimed_at: float, group: DeviceGroup) -> None:
        with self._lock:
            self.done.append(claim.job_id)
        with resources.database.transaction() as session:
            finish_validation(session, claim, RESOLVED, 12)


@pytest.fixture
def work(monkeypatch: pytest.MonkeyPatch) -> Work:
    return Work(monkeypatch)


@pytest.fixture
def shared_workshop(worker_settings: Callable[..., Settings], database: Database, tmp_path: Path) -> Workshop:
    """On SQLite and on Postgres."""
    return workshop_of(worker_settings(training_slots=2, poll_seconds=0.1), database, tmp_path)


def seek_in_background(resources: Resources, count: int) -> list[threading.Thread]:
    threads = [threading.Thread(target=seek_work, args=(resources,)) for _ in range(count)]
    for thread in threads:
        thread.start()
    return threads


def another_process(workshop: Workshop) -> Resources:
    found = workshop.resources
    return Resources(settings=found.settings, database=found.database, storage=found.storage, inference=found.inference, doorbell=found.doorbell)


def test_many_seekers_of_many_workers_take_every_job_once(shared_workshop: Workshop, work: Work) -> None:
    file_id = shared_workshop.add_file()
    jobs = [shared_workshop.add_job(training_file_id=file_id) for _ in range(60)]
    workers = [shared_workshop.resources, *(another_process(shared_workshop) for _ in range(5))]
    threads = [thread for resources in workers for thread in seek_in_background(resources, 4)]
    for thread in threads:
        thread.join(60)
    assert Counter(work.done) == Counter(jobs)
    with shared_workshop.database.reading() as session:
        assert set(session.scalars(select(Job.status))) == {"cancelled"}
        assert set(session.scalars(select(Job.attempt))) == {1}


def test_one_seeker_validates_and_then_trains(shared_workshop: Workshop, work: Work) -> None:
    job_id = shared_workshop.add_job("validating_files")
    seek_work(shared_workshop.resources)
    assert work.done == [job_id, job_id]


def test_no_more_jobs_train_than_there_are_slots_and_validation_does_not_wait(shared_workshop: Workshop, work: Work) -> None:
    work.go_on.clear()
    for _ in range(4):
        shared_workshop.add_job()
    threads = seek_in_background(shared_workshop.resources, 4)
    wait_for(lambda: work.training == 2 and sum(thread.is_alive() for thread in threads) == 2)
    validated = shared_workshop.add_job("validating_files")
    seek_work(shared_workshop.resources)
    assert get_job(shared_workshop.database, validated).status == "queued"
    work.go_on.set()
    for thread in threads:
        thread.join(20)
    assert work.most_training == 2
    assert len(work.done) == 6


def test_nothing_is_claimed_once_the_worker_is_to_end(shared_workshop: Workshop, work: Work) -> None:
    shared_workshop.add_job()
    shared_workshop.resources.stopping.set()
    seek_work(shared_workshop.resources)
    assert work.done == []


def test_an_error_that_nobody_foresaw_ends_the_search_with_a_line_in_the_log(shared_workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    """And its slot is free again: there are fewer than searches here."""

    def broken(*arguments: object) -> None:
        raise PermissionError("an unreadable directory")

    monkeypatch.setattr(tasks, "train", broken)
    with capture_logs() as logs:
        for _ in range(5):
            shared_workshop.add_job()
            seek_work(shared_workshop.resources)
    assert [entry["event"] for entry in logs if entry["log_level"] == "error"] == ["search_failed_unexpectedly"] * 5


def test_the_poll_finds_work_nobody_was_told_of_and_is_not_held_up_by_it(shared_workshop: Workshop, work: Work) -> None:
    work.go_on.clear()
    poll = Poll(shared_workshop.resources)
    thread = threading.Thread(target=poll.run)
    thread.start()
    first = shared_workshop.add_job()
    wait_for(lambda: work.done == [first])
    second = shared_workshop.add_job("validating_files")
    wait_for(lambda: work.done[:2] == [first, second])
    shared_workshop.resources.stopping.set()
    work.go_on.set()
    thread.join(10)
    poll.wait_for_searches()
    assert not thread.is_alive()


def test_the_poll_releases_expired_leases(shared_workshop: Workshop, work: Work) -> None:
    job_id = shared_workshop.add_job("running", lease_token="dead", lease_until=1.0)
    poll = Poll(shared_workshop.resources)
    poll.look()
    poll.wait_for_searches()
    assert work.done == [job_id]
    assert get_job(shared_workshop.database, job_id).lost_leases == 1


def test_the_poll_survives_a_database_that_is_away(workshop: Workshop, work: Work, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []

    def away(resources: Resources) -> None:
        calls.append(1)
        if len(calls) == 1:
            raise Unavailable("as the test says")
        if len(calls) == 2:
            raise RuntimeError("a bug")

    monkeypatch.setattr(polling, "free_expired_leases", away)
    workshop.add_job()
    poll = Poll(workshop.resources)
    thread = threading.Thread(target=poll.run)
    thread.start()
    wait_for(lambda: bool(work.done), 20)
    workshop.resources.stopping.set()
    thread.join(10)
    poll.wait_for_searches()
    assert len(work.done) == 1
