"""Faults of the API and of what it talks to: killed in the middle of an upload or between a commit and its answer; an inference server
that is killed; clients that change their minds all the time."""

import json
import random
import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx2
import pytest
from openai import APIConnectionError, APIStatusError, BadRequestError, OpenAI
from sqlalchemy import func, select

from core.tables.files import File
from core.tables.jobs import TERMINAL_STATUSES, Job
from local_stack.ports import free_local_port
from tests.faults.conftest import on_postgres, on_sqlite
from tests.faults.deployment import BASE, LINES, ROOT, Deployment, wait_for

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

QUESTION: Any = [{"role": "user", "content": "Which lamp is lamp 3?"}]


def count(deployment: Deployment, table: Any) -> int:
    with deployment.database.reading() as session:
        return session.scalar(select(func.count()).select_from(table)) or 0


def temporary_files(deployment: Deployment) -> list[Path]:
    return list((deployment.settings.storage_dir / ".tmp").iterdir())


def begun_upload(deployment: Deployment) -> socket.socket:
    """An upload of which a megabyte has arrived, and more is to come."""
    before = len(temporary_files(deployment))
    address = urlsplit(deployment.url)
    key = deployment.settings.admin_key_path.read_text().strip()
    fields = ['name="purpose"\r\n\r\nfine-tune', 'name="file"; filename="l.jsonl"\r\n\r\n']
    content = b"\r\n".join(f"--b\r\nContent-Disposition: form-data; {field}".encode() for field in fields) + LINES * 1000
    lines = ["POST /v1/files HTTP/1.1", "Host: 127.0.0.1", f"Authorization: Bearer {key}", "Content-Type: multipart/form-data; boundary=b"]
    head = "\r\n".join([*lines, "Content-Length: 99999999", "", ""])
    connection = socket.create_connection((address.hostname or "", address.port or 0))
    connection.sendall(head.encode() + content)
    wait_for(lambda: len(temporary_files(deployment)) > before, 20)
    return connection


@on_sqlite
def test_6_an_upload_that_is_cut_off_leaves_nothing_and_can_be_repeated(deployment: Deployment) -> None:
    connection = begun_upload(deployment)
    deployment.kill("api")
    connection.close()
    deployment.start("api")
    assert count(deployment, File) == 0
    begun_upload(deployment).close()
    wait_for(lambda: len(temporary_files(deployment)) == 1, 20)  # that of the API that was killed, which a worker sweeps
    file_id = deployment.upload()
    assert deployment.client.files.content(file_id).read() == LINES
    assert [file.id for file in deployment.client.files.list()] == [file_id]


@on_postgres
@pytest.mark.parametrize("fault", ["after_ring", "before_ring"], ids=["7_before_the_response", "8_before_the_nudge"])
def test_a_job_whose_creation_killed_the_api_is_there_once_and_runs(deployment: Deployment, fault: str) -> None:
    """The stock client sends a request that was cut off again by itself, and says so."""
    file_id = deployment.upload()
    deployment.signal("api", 15)
    deployment.ended("api")
    deployment.start("api", application="tests.fixtures.faulty_api:app", API_FAULT=fault, PYTHONPATH=str(ROOT))
    patient = OpenAI(base_url=f"{deployment.url}/v1", api_key=deployment.settings.admin_key_path.read_text().strip(), timeout=20, max_retries=8)
    method: Any = {"type": "sdft", "sdft": {"hyperparameters": {"n_epochs": 1, "batch_size": 4, "max_completion_tokens": 8, "lora_rank": 4}}}
    with ThreadPoolExecutor(1) as thread:
        creating = thread.submit(lambda: patient.fine_tuning.jobs.create(model=BASE, training_file=file_id, method=method))
        deployment.ended("api", 60)
        if fault == "before_ring":
            wait_for(lambda: count(deployment, Job) == 1, 5)
        deployment.start("api")
        job = creating.result(60)
    assert count(deployment, Job) == 1
    assert deployment.wait_for_end(job.id).attempt == 1


@on_sqlite
def test_19_a_storm_of_pauses_leaves_the_same_training(deployment: Deployment) -> None:
    file_id = deployment.upload()
    job_id = deployment.create_job(file_id)
    deployment.wait_for_step(job_id, 5)
    chance = random.Random(1)
    for _ in range(12):
        action = chance.choice(["pause", "resume", "resume"])
        if deployment.job(job_id).finished_at is None:
            with suppress(BadRequestError):  # it ended just now
                deployment.client.post(f"/fine_tuning/jobs/{job_id}/{action}", cast_to=object)
            time.sleep(chance.random() * 1.5)
    if deployment.job(job_id).finished_at is None:
        deployment.client.post(f"/fine_tuning/jobs/{job_id}/resume", cast_to=object)
    assert deployment.wait_for_end(job_id).lost_leases == 0
    assert deployment.losses(job_id) == deployment.undisturbed_losses(file_id)


@on_postgres
def test_20_a_killed_inference_server_is_told_of_and_its_adapters_come_back(deployment: Deployment) -> None:
    job = deployment.wait_for_end(deployment.create_job(n_epochs=2))
    model = str(job.fine_tuned_model)
    client = deployment.client
    stream = client.chat.completions.create(model=model, messages=QUESTION, max_tokens=400, stream=True, temperature=2, extra_body={"ignore_eos": True})
    next(iter(stream))
    deployment.kill("inference")
    with pytest.raises(Exception, match=r"broke|too early"):
        list(stream)
    with pytest.raises(APIStatusError) as refused:
        client.chat.completions.create(model=model, messages=QUESTION, max_tokens=2)
    assert (refused.value.status_code, refused.value.code) == (503, "inference_unavailable")
    deployment.start("inference")
    statuses: list[int] = []
    threads = [threading.Thread(target=lambda: statuses.append(chat_status(client, model))) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert statuses == [200] * 6, "loaded again from the database's word"
    assert (deployment.stack.logs_dir / "api.log").read_text().count('"event": "adapter_loading"') == 1, "once, for all who ask"


@on_postgres
def test_18_a_cancellation_that_races_the_end_gives_one_ending(database_url: str, make_deployment: Callable[..., Deployment]) -> None:
    """The real API and worker, with a trainer that takes a moment. The thousand races are tests/core/jobs'. One that is asked for while the
    trained model is being stored may come too late."""
    deployment = make_deployment(database_url)
    deployment.start("valkey", "inference", "api")
    script = deployment.settings.data_dir / "script.json"
    script.write_text(json.dumps({"steps": 3, "step_seconds": 0.01, "checkpoint_every": 100}))
    deployment.start("worker", application="tests.fixtures.scripted_worker", TRAINER_SCRIPT=str(script), PYTHONPATH=str(ROOT))
    file_id = deployment.upload()
    first = deployment.create_job(file_id, n_epochs=1)
    ended = deployment.wait_for_end(first)
    delay_seconds = (ended.finished_at or 0) - ended.created_at
    accepted: dict[str, bool] = {}
    for number in range(15):
        job_id = deployment.create_job(file_id, seed=number, n_epochs=1)
        time.sleep(delay_seconds)
        accepted[job_id] = was_cancelled(deployment.client, job_id)
        delay_seconds *= 1.15 if accepted[job_id] else 0.87  # towards the end, from both sides
    for job_id, was_accepted in accepted.items():
        wait_for(lambda job_id=job_id: deployment.job(job_id).status in TERMINAL_STATUSES, 60)  # type: ignore[misc]
        assert deployment.job(job_id).status in (("cancelled", "succeeded") if was_accepted else ("succeeded",))
    assert 0 < sum(accepted.values()) < len(accepted), "else none was near the end"


def was_cancelled(client: OpenAI, job_id: str) -> bool:
    """False where the job had ended before."""
    try:
        client.fine_tuning.jobs.cancel(job_id)
    except BadRequestError as refused:
        if refused.code != "job_already_finished":
            raise
        return False
    return True


@on_sqlite
def test_20_of_two_inference_servers_a_dead_one_is_passed_over_and_catches_up(database_url: str, make_deployment: Callable[..., Deployment]) -> None:
    deployment = make_deployment(database_url, SDFT_INFERENCE_URLS=",".join(f"http://127.0.0.1:{free_local_port()}" for _ in range(2)))
    deployment.start("valkey", "inference", "inference2", "api", "worker")
    file_id = deployment.upload()
    jobs = [deployment.create_job(file_id, seed=seed, n_epochs=1) for seed in range(3)]
    models = [str(deployment.wait_for_end(job_id).fine_tuned_model) for job_id in jobs]
    client = deployment.client
    assert [chat_status(client, model) for model in models] == [200] * 3
    for dead, other in (("inference", "inference2"), ("inference2", "inference")):
        deployment.kill(dead)
        assert [chat_status(client, model) for model in models] == [200] * 3, f"{other} answers for every adapter"
        deployment.start(dead)
        wait_for(lambda: httpx2.get(f"{deployment.url}/readyz").json()["degraded"] == [], 30)


def chat_status(client: OpenAI, model: str) -> int:
    try:
        client.chat.completions.create(model=model, messages=QUESTION, max_tokens=2)
    except APIStatusError as error:
        return error.status_code
    except APIConnectionError:
        return 0
    return 200


@pytest.mark.parametrize(
    ("application", "said"),
    [(None, "the database can't be reached or is busy"), ("tests.fixtures.api_with_a_small_pool:app", "no database connection became free in time")],
    ids=["locked", "no_connection_left"],
)
def test_13_an_exhausted_database_is_a_503_that_passes(
    postgres_url: str, make_deployment: Callable[..., Deployment], application: str | None, said: str
) -> None:
    """Another program holds the table that every request reads, so that each waits for it: in a thread or, where there are fewer, for
    a connection."""
    deployment = make_deployment(postgres_url)
    deployment.start("valkey")
    deployment.start("api", application=application, PYTHONPATH=str(ROOT))
    job_id = deployment.create_job()
    client = deployment.client
    with deployment.database.transaction() as session:
        session.connection().exec_driver_sql("SET LOCAL idle_in_transaction_session_timeout = 0")
        session.connection().exec_driver_sql("LOCK TABLE fine_tuning_jobs IN ACCESS EXCLUSIVE MODE")
        with ThreadPoolExecutor(120) as threads:
            asked = [threads.submit(poll, client, job_id) for _ in range(120)]
            refused = [future.result(120) for future in asked]
    assert {answer.status for answer in refused} == {503}
    assert all(answer.retry_after is not None for answer in refused)
    assert any(said in answer.message for answer in refused)
    wait_for(lambda: poll(client, job_id).status == 200, 20)


@dataclass(frozen=True)
class Answer:
    status: int
    retry_after: str | None = None
    message: str = ""


def poll(client: OpenAI, job_id: str) -> Answer:
    try:
        client.with_options(timeout=100).fine_tuning.jobs.retrieve(job_id)
    except APIStatusError as error:
        return Answer(error.status_code, error.response.headers.get("retry-after"), error.message)
    return Answer(200)
