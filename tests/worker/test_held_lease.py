"""The thread that keeps a claim: renewals, cancellations, and letting go before anybody else may claim the job or the export."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import cast

import pytest
from sqlalchemy.orm import Session

from core.database import Database, unix_now
from core.errors import Unavailable
from core.ids import new_token
from core.jobs.leases import Claim, LeaseLost
from core.jobs.transitions import Progress, claim_for_training, record_progress, request_cancellation, request_pause, requeue, resume
from core.model_exports import ExportClaim, claim_export, release_export, renew_export, request_export
from core.tables.exports import ModelExport
from core.tables.jobs import Job
from core.tables.models import Model
from sdft_engine.contract.machine_clock import machine_seconds
from tests.rows import add_job, get_job
from tests.worker.conftest import Workshop
from tests.worker.test_supervisor import wait_for
from worker.held_lease import ExportLease, HeldLease, StopRequested
from worker.resources import Resources


class Unreachable:
    """A database that is away."""

    @contextmanager
    def transaction(self) -> Iterator[Session]:
        raise Unavailable("as the test says")
        yield

    reading = transaction


def without_database(workshop: Workshop) -> Resources:
    found = workshop.resources
    unreachable = cast(Database, Unreachable())
    return Resources(settings=found.settings, database=unreachable, storage=found.storage, inference=found.inference, doorbell=found.doorbell)


def is_lost(check: Callable[[], None]) -> bool:
    try:
        check()
    except LeaseLost:
        return True
    return False


def claim_job(workshop: Workshop) -> tuple[str, Claim]:
    job_id = workshop.add_job()
    with workshop.database.transaction() as session:
        claim = claim_for_training(session, workshop.resources.settings.lease_seconds)
    assert claim is not None
    return job_id, claim


def test_the_lease_is_renewed_and_the_deadline_follows(workshop: Workshop) -> None:
    job_id, claim = claim_job(workshop)
    first = get_job(workshop.database, job_id).lease_until
    with HeldLease(workshop.resources, claim, machine_seconds()) as lease:
        deadline = lease.deadline
        assert first is not None
        wait_for(lambda: (get_job(workshop.database, job_id).lease_until or 0) > first + 0.9)
        lease.check()
        assert lease.deadline > deadline + 0.9
        assert lease.deadline < machine_seconds() + 10, "before anybody else may claim the job"


@pytest.mark.parametrize("step_seconds", [-3600, 3600])
def test_a_step_of_this_machine_s_time_of_day_changes_nothing(workshop: Workshop, monkeypatch: pytest.MonkeyPatch, step_seconds: float) -> None:
    job_id, claim = claim_job(workshop)
    now = time.time
    with HeldLease(workshop.resources, claim, machine_seconds()) as lease:
        first = get_job(workshop.database, job_id).lease_until
        monkeypatch.setattr(time, "time", lambda: now() + step_seconds)
        assert first is not None
        wait_for(lambda: (get_job(workshop.database, job_id).lease_until or 0) > first + 0.9)
        lease.check()
        later = get_job(workshop.database, job_id).lease_until
    assert later is not None
    assert later < first + 60


def test_nothing_is_renewed_after_the_block(workshop: Workshop) -> None:
    job_id, claim = claim_job(workshop)
    with HeldLease(workshop.resources, claim, machine_seconds()):
        pass
    left = get_job(workshop.database, job_id).lease_until
    time.sleep(1.2)
    assert get_job(workshop.database, job_id).lease_until == left


def test_a_cancellation_is_seen_within_a_second(workshop: Workshop) -> None:
    job_id, claim = claim_job(workshop)
    with HeldLease(workshop.resources, claim, machine_seconds()) as lease:
        told: list[str | None] = []
        lease.report_to(lambda lease: told.append(lease.stop))
        with workshop.database.transaction() as session:
            request_cancellation(session, job_id)
        wait_for(lambda: lease.stop is not None)
        with pytest.raises(StopRequested) as stop:
            lease.check_wanted()
        assert stop.value.reason == "cancel"
        assert told[0] is None
        assert told[-1] == "cancel"


def test_a_pause_is_seen_and_its_taking_back_too(workshop: Workshop) -> None:
    job_id, claim = claim_job(workshop)
    with HeldLease(workshop.resources, claim, machine_seconds()) as lease:
        for change, stop in ((request_pause, "pause"), (resume, None), (request_pause, "pause"), (request_cancellation, "cancel")):
            with workshop.database.transaction() as session:
                assert change(session, job_id)
            wait_for(lambda stop=stop: lease.stop == stop)  # type: ignore[misc]


def test_a_deploy_goes_before_a_pause_and_is_seen_without_the_database(workshop: Workshop) -> None:
    job_id, claim = claim_job(workshop)
    with workshop.database.transaction() as session:
        request_pause(session, job_id)
    with HeldLease(workshop.resources, claim, machine_seconds()) as lease:
        wait_for(lambda: lease.stop == "pause")
        workshop.resources.stopping.set()
        wait_for(lambda: lease.stop == "requeue")
    away = without_database(workshop)
    away.stopping.set()
    with HeldLease(away, claim, machine_seconds()) as lease:
        wait_for(lambda: lease.stop == "requeue")


def test_cancel_goes_before_a_deploy(workshop: Workshop) -> None:
    job_id, claim = claim_job(workshop)
    workshop.resources.stopping.set()
    with HeldLease(workshop.resources, claim, machine_seconds()) as lease:
        wait_for(lambda: lease.stop == "requeue")
        with workshop.database.transaction() as session:
            request_cancellation(session, job_id)
        wait_for(lambda: lease.stop == "cancel")


def test_a_job_taken_by_another_is_noticed_and_nothing_is_written(workshop: Workshop) -> None:
    job_id, claim = claim_job(workshop)
    with HeldLease(workshop.resources, replace(claim, lease_token="stale"), machine_seconds()) as lease:
        with pytest.raises(LeaseLost):
            lease.write(lambda session: record_progress(session, lease.claim, Progress(step=7)))
        with pytest.raises(LeaseLost):
            lease.check()
    assert get_job(workshop.database, job_id).step is None


def test_the_thread_notices_it_by_itself(workshop: Workshop) -> None:
    _, claim = claim_job(workshop)
    with HeldLease(workshop.resources, replace(claim, lease_token="stale"), machine_seconds()) as lease:
        wait_for(lambda: is_lost(lease.check))


def test_without_the_database_the_job_is_held_until_the_deadline_and_no_longer(workshop: Workshop) -> None:
    _, claim = claim_job(workshop)
    resources = without_database(workshop)
    with HeldLease(resources, claim, machine_seconds() - 6) as lease:
        lease.check()
        assert lease.try_write(lambda session: None) is False
        started = time.monotonic()
        with pytest.raises(LeaseLost):
            lease.write(lambda session: None)
        assert 1 < time.monotonic() - started < 8  # 80% of 10 seconds, of which 6 were over


def test_a_write_goes_through_once_the_database_is_back(workshop: Workshop) -> None:
    job_id, claim = claim_job(workshop)
    database = workshop.database
    resources = without_database(workshop)
    with HeldLease(resources, claim, machine_seconds()) as lease:
        assert lease.try_write(lambda session: None) is False
        resources.database = database
        lease.write(lambda session: record_progress(session, lease.claim, Progress(step=7)))
    assert get_job(database, job_id).step == 7


def test_settling_lets_go(workshop: Workshop) -> None:
    job_id, claim = claim_job(workshop)
    with HeldLease(workshop.resources, claim, machine_seconds()) as lease:
        lease.settle(lambda session: requeue(session, claim, "as the test says"))
        time.sleep(0.8)
    job: Job = get_job(workshop.database, job_id)
    assert (job.status, job.lease_token) == ("queued", None)


def claim_model_export(workshop: Workshop) -> ExportClaim:
    model = Model(
        id="ft:tiny:default::1",
        project_id=workshop.project_id,
        job_id=add_job(workshop.database, workshop.project_id, "cancelled"),
        base_model="tiny",
        status="servable",
        serving_name=new_token(),
        storage_key="models/x.tar.gz",
        archive_bytes=1,
        archive_sha256="cd",
        created_at=unix_now(),
    )
    with workshop.database.transaction() as session:
        session.add(model)
    with workshop.database.transaction() as session:
        request_export(session, model, "merged")
        claim = claim_export(session, workshop.resources.settings.lease_seconds)
    assert claim is not None
    return claim


def export_lease_until(workshop: Workshop, claim: ExportClaim) -> float:
    with workshop.database.reading() as session:
        until = session.get_one(ModelExport, (claim.model_id, claim.format)).lease_until
    assert until is not None
    return until


def test_an_export_s_lease_is_renewed_whatever_goes_wrong_on_the_way(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    claim = claim_model_export(workshop)
    first, calls = export_lease_until(workshop, claim), list[float]()

    def renew(session: Session, claim: ExportClaim, lease_seconds: float) -> None:
        calls.append(lease_seconds)
        if len(calls) == 1:
            raise RuntimeError("odd")
        renew_export(session, claim, lease_seconds)

    monkeypatch.setattr("worker.held_lease.renew_export", renew)
    with ExportLease(workshop.resources, claim, machine_seconds()) as lease:
        wait_for(lambda: export_lease_until(workshop, claim) > first + 0.9)
        lease.check_wanted()
    assert len(calls) >= 2


def test_an_export_taken_by_another_or_deleted_is_noticed_within_a_second(workshop: Workshop) -> None:
    claim = claim_model_export(workshop)
    with ExportLease(workshop.resources, claim, machine_seconds()) as lease:
        lease.check_wanted()
        with workshop.database.transaction() as session:
            session.delete(session.get_one(ModelExport, (claim.model_id, claim.format)))
        wait_for(lambda: is_lost(lease.check_wanted))
        with pytest.raises(LeaseLost, match="the merged export of ft:tiny:default::1 is no longer held"):
            lease.check_wanted()


def test_without_the_database_an_export_is_let_go_of_before_another_may_claim_it(workshop: Workshop) -> None:
    claim = claim_model_export(workshop)
    with ExportLease(without_database(workshop), claim, machine_seconds() - 7) as lease:
        lease.check_wanted()
        wait_for(lambda: is_lost(lease.check_wanted))
    assert export_lease_until(workshop, claim) > time.time() + 7


def test_a_worker_that_ends_lets_go_of_an_export_at_once_with_or_without_the_database(workshop: Workshop) -> None:
    claim = claim_model_export(workshop)
    for resources in (without_database(workshop), workshop.resources):
        with ExportLease(resources, claim, machine_seconds()) as lease:
            lease.check_wanted()
            resources.stopping.set()
            with pytest.raises(StopRequested):
                lease.check_wanted()
            if resources is workshop.resources:
                lease.settle(lambda session: release_export(session, claim))
    with workshop.database.reading() as session:
        export = session.get_one(ModelExport, (claim.model_id, claim.format))
    assert (export.status, export.attempts) == ("pending", 0)
