"""Any order of events that workers, users and crashes can bring about, against a model of what should come of it."""

from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, multiple, rule, run_state_machine_as_test

from core.database import Database
from core.jobs import leases, transitions
from core.jobs.leases import Claim, LeaseLost
from core.tables.jobs import TERMINAL_STATUSES
from tests.rows import add_job, add_project, assert_all_sound, get_job, succeed_job

MAX_LOST_LEASES = 3


class Jobs(RuleBasedStateMachine):
    """`held` maps a job to its living claim; `validating` holds the tokens of claims for validation, living or not."""

    database: Database
    project_number = 0
    claims: Bundle[Claim] = Bundle("claims")

    @initialize(target=claims)
    def begin(self) -> Any:
        with self.database.transaction() as session:  # what earlier examples left must not be claimed here
            while claim := transitions.claim_for_training(session, 3600) or transitions.claim_for_validation(session, 3600):
                transitions.finish_cancellation(session, claim)
        Jobs.project_number += 1
        self.project_id = add_project(self.database, f"p{Jobs.project_number}")
        self.jobs: list[str] = []
        self.held: dict[str, Claim] = {}
        self.tokens: set[str] = set()
        self.validating: set[str] = set()
        self.final: dict[str, str] = {}
        self.create("queued")
        self.create("validating_files")
        return self.claim(validating=False)

    @rule(status=st.sampled_from(["validating_files", "queued"]))
    def create(self, status: str) -> None:
        self.jobs.append(add_job(self.database, self.project_id, status))

    @rule(target=claims, validating=st.booleans())
    def claim(self, validating: bool) -> Any:
        with self.database.transaction() as session:
            take = transitions.claim_for_validation if validating else transitions.claim_for_training
            claim = take(session, 3600)
        if claim is None:
            return multiple()
        assert claim.job_id not in self.held, "claimed while another holds it"
        assert claim.lease_token not in self.tokens, "a token was used twice"
        self.tokens.add(claim.lease_token)
        if validating:
            self.validating.add(claim.lease_token)
        self.held[claim.job_id] = claim
        return claim

    def change(self, claim: Claim, action: Any, *arguments: Any) -> None:
        """Apply a transition; it must succeed exactly if the claim is alive, and let go of the job unless it is a renewal."""
        alive = self.held.get(claim.job_id) == claim
        try:
            with self.database.transaction() as session:
                action(session, claim, *arguments)
            assert alive, "a stale claim was accepted"
        except LeaseLost:
            assert not alive, "a living claim was refused"
        if alive and action is not leases.renew_lease:
            assert get_job(self.database, claim.job_id).lease_token is None, "its holder could not let go of it"
            del self.held[claim.job_id]

    @rule(claim=claims)
    def renew(self, claim: Claim) -> None:
        self.change(claim, leases.renew_lease, 3600)

    @rule(claim=claims)
    def let_go(self, claim: Claim) -> None:
        if claim.lease_token in self.validating:
            self.change(claim, transitions.release_validation)
        else:
            self.change(claim, transitions.requeue, "the worker restarts")

    @rule(claim=claims)
    def advance(self, claim: Claim) -> None:
        if claim.lease_token in self.validating:
            self.change(claim, transitions.finish_validation, {}, 10)
        else:
            self.change(claim, succeed_job)

    @rule(claim=claims)
    def crash(self, claim: Claim) -> None:
        if claim.lease_token not in self.validating:
            self.change(claim, transitions.requeue_after_crash, "the trainer died", MAX_LOST_LEASES)

    @rule(claim=consumes(claims))
    def fail(self, claim: Claim) -> None:
        self.change(claim, transitions.fail, {"code": "x", "message": "x", "param": None})

    @rule(claim=claims)
    def stop_as_asked(self, claim: Claim) -> None:
        job = get_job(self.database, claim.job_id) if claim.job_id in self.held else None
        if job is not None and job.stop_requested:
            self.change(claim, transitions.finish_cancellation if job.stop_requested == "cancel" else transitions.finish_pause)

    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        self.request_cancellation(data.draw(st.sampled_from(self.jobs)))

    @rule(claim=claims)
    def cancel_what_is_or_was_held(self, claim: Claim) -> None:
        self.request_cancellation(claim.job_id)

    def request_cancellation(self, job_id: str) -> None:
        with self.database.transaction() as session:
            accepted = transitions.request_cancellation(session, job_id)
        assert accepted == (job_id not in self.final)

    @rule(data=st.data(), pauses=st.lists(st.booleans(), min_size=1, max_size=4))
    def pause_and_resume(self, data: st.DataObject, pauses: list[bool]) -> None:
        self.request_pauses(data.draw(st.sampled_from(self.jobs)), pauses)

    @rule(claim=claims, pauses=st.lists(st.booleans(), min_size=1, max_size=4))
    def pause_and_resume_what_is_or_was_held(self, claim: Claim, pauses: list[bool]) -> None:
        self.request_pauses(claim.job_id, pauses)

    def request_pauses(self, job_id: str, pauses: list[bool]) -> None:
        """The last wish counts, unless a cancellation was asked for before."""
        for pause in pauses:
            with self.database.transaction() as session:
                accepted = (transitions.request_pause if pause else transitions.resume)(session, job_id)
            assert accepted == (job_id not in self.final)
        job = get_job(self.database, job_id)
        if job_id not in self.final and job.stop_requested != "cancel":
            assert (job.status == "paused" or job.stop_requested == "pause") == pauses[-1]

    @rule(claim=claims)
    def lose_worker(self, claim: Claim) -> None:
        """The lease runs out and any other worker notices."""
        if self.held.get(claim.job_id) != claim:
            return
        with self.database.transaction() as session:
            leases.renew_lease(session, claim, -1)
            assert transitions.release_expired_leases(session, MAX_LOST_LEASES) == [claim.job_id]
        del self.held[claim.job_id]

    @invariant()
    def every_job_is_sound(self) -> None:
        for job in assert_all_sound(self.database, self.project_id) if hasattr(self, "project_id") else ():
            living = self.held.get(job.id)
            assert job.lease_token == (living.lease_token if living else None)
            assert job.lost_leases <= MAX_LOST_LEASES
            assert self.final.get(job.id, job.status) == job.status, "a finished job changed its status"
            if job.status in TERMINAL_STATUSES:
                self.final[job.id] = job.status


@pytest.mark.slow
def test_no_order_of_events_breaks_a_job(database: Database) -> None:
    Jobs.database = database
    checks = settings(max_examples=50, stateful_step_count=25, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
    run_state_machine_as_test(Jobs, settings=checks)
