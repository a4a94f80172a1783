"""Attempts that are lost: how many a job has, and what counts as one."""

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from sqlalchemy import update

from core.database import Database
from core.jobs.transitions import claim_for_training, release_expired_leases
from core.settings import Settings
from core.tables.jobs import Job
from sdft_engine.contract.run_directory import EXIT_LEASE_EXPIRED, Control, RunDirectory
from tests.rows import assert_sound, get_job, messages_of
from tests.worker.conftest import Workshop, workshop_of
from tests.worker.test_supervisor import train_next


def lose_its_worker(workshop: Workshop) -> None:
    """A worker that claims the job and is never heard of again."""
    with workshop.database.transaction() as session:
        assert claim_for_training(session, 60) is not None
    with workshop.database.transaction() as session:
        session.execute(update(Job).values(lease_until=0))
        release_expired_leases(session, 3)


def test_losses_are_forgiven_once_the_job_comes_further(workshop: Workshop) -> None:
    """Five in all, of three that a job may have without a new checkpoint."""
    workshop.script(at={"2": {"6": "kill"}, "4": {"10": "kill"}})
    job_id = workshop.add_job()
    for _ in range(2):
        lose_its_worker(workshop)
        train_next(workshop)
        assert get_job(workshop.database, job_id).lost_leases == 1
    lose_its_worker(workshop)
    train_next(workshop)
    assert (get_job(workshop.database, job_id).status, get_job(workshop.database, job_id).attempt) == ("succeeded", 6)
    assert_sound(workshop.database, job_id)


def test_a_job_that_stores_the_same_step_again_and_again_gets_nowhere(workshop: Workshop) -> None:
    workshop.script(at={"1": {"9": "kill"}, "2": {"9": "fail:checkpoint_damaged"}, "3": {"9": "kill"}})
    job_id = workshop.add_job()
    for losses in (1, 2):
        train_next(workshop)
        assert (get_job(workshop.database, job_id).status, get_job(workshop.database, job_id).lost_leases) == ("queued", losses)
    train_next(workshop)
    job = get_job(workshop.database, job_id)
    assert job.error is not None
    assert (job.status, job.error["code"]) == ("failed", "trainer_crashed")
    assert "follows" not in job.error["message"]
    assert [message for message in messages_of(workshop.database, job_id) if message.startswith("resumed")] == ["resumed at step 8", "resumed at step 4"]
    assert_sound(workshop.database, job_id)


def test_a_disk_too_full_to_tell_the_trainer_fails_the_job_and_says_so(
    worker_settings: Callable[..., Settings], sqlite_database: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The trainer stops itself at the last deadline that it was told, and the lease is good all the while."""
    workshop = workshop_of(worker_settings(lease_seconds=3, heartbeat_seconds=0.5), sqlite_database, tmp_path)
    workshop.script(steps=1000, step_seconds=0.05)
    write_control, told = RunDirectory.write_control, list[Control]()

    def fill_up(run: RunDirectory, control: Control) -> None:
        told.append(control)
        if len(told) > 1:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write_control(run, control)

    monkeypatch.setattr(RunDirectory, "write_control", fill_up)
    job_id = workshop.add_job()
    train_next(workshop)
    job = get_job(workshop.database, job_id)
    assert job.error is not None
    assert (job.status, job.error["code"], job.lost_leases) == ("failed", "disk_full", 0)
    assert_sound(workshop.database, job_id)


def test_a_trainer_that_says_its_lease_ran_out_when_it_did_not_has_crashed(workshop: Workshop) -> None:
    """Left held, the job would wait for the lease's end with nobody at work."""
    workshop.script(at={"1": {"3": f"exit:{EXIT_LEASE_EXPIRED}"}})
    job_id = workshop.add_job()
    train_next(workshop)
    job = get_job(workshop.database, job_id)
    assert (job.status, job.lost_leases, job.lease_token) == ("queued", 1, None)
    assert any("exit status 75" in message for message in messages_of(workshop.database, job_id))
