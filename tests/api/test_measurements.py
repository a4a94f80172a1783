"""/metrics: what rows say, and the process's counters."""

import re
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from prometheus_client.core import Metric
from prometheus_client.parser import text_string_to_metric_families
from sqlalchemy.orm import Session

from api import measurements
from core.database import unix_now
from core.jobs.events import upsert_metrics
from core.workers import tell_presence
from tests.api.serving import Api
from tests.rows import add_job


def measured(api: Api) -> dict[tuple[str, ...], float]:
    """Every sample of /metrics: its name and the values of its labels."""
    api.state.measurements._known = None  # as a second later
    families = text_string_to_metric_families(api.client.get("/metrics").text)
    return {(sample.name, *sample.labels.values()): sample.value for family in families for sample in family.samples}


def test_requests_are_counted_by_route(api: Api) -> None:
    api.client.get("/v1/files/unknown")
    api.client.get("/v1/nowhere")
    samples = measured(api)
    assert samples["sdft_http_requests_total", "GET", "/v1/files/{file_id}", "404"] >= 1
    assert samples["sdft_http_requests_total", "GET", "unknown", "404"] >= 1
    assert samples["sdft_http_request_seconds_count", "GET", "/v1/files/{file_id}"] >= 1


def test_no_label_holds_an_id(api: Api) -> None:
    job = api.create_job()
    api.client.get(f"/v1/fine_tuning/jobs/{job['id']}")
    assert not re.search(r"(ftjob|file|proj|req)-[0-9a-f]", api.client.get("/metrics").text)


def test_without_jobs_and_workers(api_on_both: Api) -> None:
    samples = measured(api_on_both)
    assert samples["sdft_jobs", "queued"] == 0
    assert samples["sdft_oldest_job_wait_seconds", "queued"] == 0
    assert samples["sdft_worker_slots",] == 0
    assert not [name for name, *_ in samples if name in ("sdft_recent_job_wait_seconds", "sdft_step_seconds")]


def test_jobs_and_how_long_they_wait(api_on_both: Api) -> None:
    api, now = api_on_both, unix_now()
    for age in (500, 100):
        add_job(api.database, api.project_id, "queued", created_at=now - age)
    add_job(api.database, api.project_id, "queued", created_at=now - 9000, started_at=now - 8000, attempt=1)  # it waits again
    add_job(api.database, api.project_id, "validating_files", created_at=now - 30)
    for waited in (1, 2, 3, 40):
        add_job(api.database, api.project_id, "running", created_at=now - 200 - waited, started_at=now - 200, attempt=1)
    samples = measured(api)
    assert samples["sdft_jobs", "queued"] == 3
    assert samples["sdft_jobs", "running"] == 4
    assert samples["sdft_jobs", "paused"] == 0
    assert 500 <= samples["sdft_oldest_job_wait_seconds", "queued"] < 520
    assert 30 <= samples["sdft_oldest_job_wait_seconds", "validating_files"] < 50
    waits = [samples["sdft_recent_job_wait_seconds", quantile] for quantile in ("0.5", "0.9", "1")]
    assert [round(seconds) for seconds in waits] == [2, 40, 40], "and not of the job that started two hours ago"


def test_workers_and_slots(api_on_both: Api) -> None:
    with api_on_both.database.transaction() as session:
        tell_presence(session, "one", "host", [["GPU-0"], ["GPU-1"]])
        tell_presence(session, "two", "host", [[]])
    samples = measured(api_on_both)
    assert (samples["sdft_workers",], samples["sdft_worker_slots",]) == (2, 3)


def test_the_newest_step_of_each_running_job(api_on_both: Api) -> None:
    api = api_on_both
    for base_model, status, seconds, memory in (
        ("small", "running", 2.0, 10),
        ("small", "running", 4.0, 30),
        ("big", "running", 9.0, 99),
        ("big", "paused", 70.0, 700),
    ):
        job_id = add_job(api.database, api.project_id, status, base_model=base_model, step=2)
        with api.database.transaction() as session:
            upsert_metrics(session, job_id, 1, {1: {"step_seconds": 50.0, "peak_memory_bytes": 5}})
            upsert_metrics(session, job_id, 1, {2: {"step_seconds": seconds, "peak_memory_bytes": memory}})
    samples = measured(api)
    assert (samples["sdft_step_seconds", "small", "0.5"], samples["sdft_step_seconds", "small", "1"], samples["sdft_step_seconds", "big", "1"]) == (2, 4, 9)
    assert (samples["sdft_trainer_peak_memory_bytes", "small"], samples["sdft_trainer_peak_memory_bytes", "big"]) == (30, 99)


def test_many_who_ask_at_once_cost_one_look_at_the_database(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody needs a key for it."""
    looks = []

    def counted(session: Session) -> list[Metric]:
        looks.append(session)
        time.sleep(0.1)
        return []

    monkeypatch.setattr(measurements, "measure_rows", counted)
    monkeypatch.setattr(api.state.measurements, "_seconds", 60.0)
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda _: api.client.get("/metrics"), range(8)))
    assert {answer.status_code for answer in answers} == {200}
    assert len(looks) == 1
