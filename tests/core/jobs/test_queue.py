"""Who is next, on both databases: projects take turns, what was begun goes on first, and a project's limit is kept."""

import random
from concurrent.futures import ThreadPoolExecutor

import pytest
from sqlalchemy import func, select, update

from core.database import Database
from core.jobs import transitions
from core.jobs.leases import Claim
from core.jobs.queue import ProjectLoad, Waiting, forecast, work_waits
from core.tables.jobs import Job
from core.tables.projects import Project
from tests.rows import add_job, add_project, succeed_job


def claim(database: Database, max_running: int | None = None) -> Claim | None:
    with database.transaction() as session:
        return transitions.claim_for_training(session, 60, max_running)


def claim_all(database: Database, max_running: int | None = None) -> list[str]:
    found = []
    while (claimed := claim(database, max_running)) is not None:
        found.append(claimed.job_id)
    return found


def forecast_of(database: Database, limit: int | None = None) -> list[str]:
    with database.reading() as session:
        jobs = session.scalars(select(Job).where(Job.status == "queued")).all()
        running = dict(session.execute(select(Job.project_id, func.count()).where(Job.status == "running").group_by(Job.project_id)).all())
        projects = {p.id: ProjectLoad(running.get(p.id, 0), limit, p.last_claimed_at) for p in session.scalars(select(Project))}
    return forecast([Waiting(job.id, job.project_id, job.created_at, job.attempt > 0) for job in jobs], projects)


def test_a_project_with_many_jobs_does_not_starve_another(database: Database) -> None:
    """One job at a time, each ended before the next is claimed: the oldest job of all would be the first project's for ever."""
    many, few = add_project(database, "many"), add_project(database, "few")
    first = [add_job(database, many, created_at=float(number)) for number in range(6)]
    late = [add_job(database, few, created_at=100.0 + number) for number in range(2)]
    order = []
    for _ in range(8):
        claimed = claim(database)
        assert claimed is not None
        order.append(claimed.job_id)
        with database.transaction() as session:
            succeed_job(session, claimed)
    assert order == [first[0], late[0], first[1], late[1], *first[2:]]


def test_what_was_training_goes_on_first(database: Database) -> None:
    project, other = add_project(database, "a"), add_project(database, "b")
    add_job(database, other, created_at=0.0)
    begun = add_job(database, project, created_at=5.0, attempt=1)
    claimed = claim(database)
    assert claimed is not None
    assert (claimed.job_id, claimed.attempt) == (begun, 2)


def test_a_project_at_its_limit_waits_and_others_do_not(database: Database) -> None:
    full, other = add_project(database, "full"), add_project(database, "other")
    waiting = [add_job(database, full, created_at=float(number)) for number in range(4)]
    theirs = add_job(database, other, created_at=50.0)
    first = claim(database, 2)
    assert first is not None
    assert {first.job_id, *claim_all(database, 2)} == {*waiting[:2], theirs}
    with database.transaction() as session:
        succeed_job(session, first)
    assert claim_all(database, 2) == [waiting[2]]


def test_a_project_s_own_limit_goes_before_the_server_s(database: Database) -> None:
    more, less = add_project(database, "more"), add_project(database, "less")
    with database.transaction() as session:
        session.execute(update(Project).where(Project.id == more).values(max_running_jobs=3))
        session.execute(update(Project).where(Project.id == less).values(max_running_jobs=1))
    for project in (more, less):
        for number in range(5):
            add_job(database, project, created_at=float(number))
    assert len(claim_all(database, 2)) == 4
    assert len(claim_all(database)) == 0, "without a server's limit too"


def test_nobody_overshoots_a_limit_however_many_claim_at_once(database: Database) -> None:
    project = add_project(database, "p")
    for number in range(40):
        add_job(database, project, created_at=float(number))
    with ThreadPoolExecutor(16) as threads:
        claims = list(threads.map(lambda _: claim(database, 3), range(48)))
    assert sum(claimed is not None for claimed in claims) == 3


@pytest.mark.parametrize("seed", range(5))
def test_the_forecast_is_what_happens_where_no_job_ends_meanwhile(database: Database, seed: int) -> None:
    chance = random.Random(seed)
    projects = [add_project(database, f"p{number}") for number in range(4)]
    for _number in range(24):
        add_job(database, chance.choice(projects), created_at=float(chance.randrange(10)), attempt=chance.choice([0, 0, 0, 1]))
    for project in projects[:2]:
        add_job(database, project, "running")
    with database.transaction() as session:
        session.execute(update(Project).where(Project.id.in_(projects[1:3])).values(last_claimed_at=chance.random()))
    expected = forecast_of(database)
    assert len(expected) == 24
    assert claim_all(database) == expected


def test_who_waits_for_a_limit_is_foretold_after_those_who_do_not() -> None:
    projects = {"full": ProjectLoad(2, 2, 5.0), "free": ProjectLoad(0, 2, 9.0)}
    waiting = [Waiting("f1", "full", 0.0, True), *(Waiting(f"e{number}", "free", 10.0 + number, False) for number in range(3))]
    assert forecast(waiting, projects) == ["e0", "e1", "f1", "e2"]


def test_a_forecast_of_many_jobs_is_quick() -> None:
    projects = {f"p{number}": ProjectLoad(0, 3, None) for number in range(50)}
    waiting = [Waiting(f"j{number:05}", f"p{number % 50}", float(number), False) for number in range(5000)]
    assert len(set(forecast(waiting, projects))) == 5000


def test_work_waits_where_a_claim_would_find_it(database: Database) -> None:
    def waits() -> bool:
        with database.reading() as session:
            return work_waits(session, 1)

    project = add_project(database)
    assert not waits()
    first = add_job(database, project)
    assert waits()
    with database.transaction() as session:
        assert transitions.request_pause(session, first)
    assert not waits()
    add_job(database, project)
    assert waits()
    assert claim(database, 1) is not None
    add_job(database, project)
    assert not waits(), "its project has as many running jobs as it may"
    validating = add_job(database, project, "validating_files")
    assert waits()
    with database.transaction() as session:
        assert transitions.claim_for_validation(session, 60) is not None
    assert not waits(), f"{validating} is held"
