"""Jobs outlive the processes that run them: kills in the middle of training, on the real service."""

import statistics
import time
from typing import Any

import pytest

from tests.e2e.conftest import Service
from tests.e2e.test_main_job import BASE, QUESTION, sdft

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

SHARE_OF_SOLO_SPEED = 0.35


def start(service: Service, training_file: str, **hyperparameters: Any) -> str:
    """A job of six steps, with a checkpoint at every second."""
    quick = {"batch_size": 4, "n_epochs": 1, "max_completion_tokens": 6, "temperature": 1.0, "checkpoint_every_steps": 2}
    method = sdft(**(quick | hyperparameters))
    return service.client.fine_tuning.jobs.create(model=BASE, training_file=training_file, method=method, seed=3).id


def steps_of(service: Service, job_id: str) -> list[int]:
    page: Any = service.client.get(f"/fine_tuning/jobs/{job_id}/metrics", cast_to=dict)
    return [row["step"] for row in page["data"]]


def test_a_killed_trainer_resumes_from_its_checkpoint(service: Service, training_file: str) -> None:
    job_id = start(service, training_file)
    service.wait(job_id, "running", step=3)
    for process in service.processes("sdft_engine.train", job_id):
        process.kill()
    finished = service.wait(job_id)
    assert finished.status == "succeeded", finished.error
    assert finished.model_extra["attempt"] == 2
    messages = [event.message for event in service.events(job_id)]
    assert any("resumed at step" in message for message in messages), messages
    assert steps_of(service, job_id) == [1, 2, 3, 4, 5, 6]


def test_a_killed_worker_is_replaced_and_the_job_goes_on(service: Service, training_file: str) -> None:
    job_id = start(service, training_file)
    service.wait(job_id, "running", step=3)
    for process in service.processes("celery"):
        process.kill()
    deadline = time.monotonic() + 30
    while service.processes("sdft_engine.train", "attempt-1", job_id):
        assert time.monotonic() < deadline, "the trainer outlived its worker"
        time.sleep(0.1)
    finished = service.wait(job_id)
    assert finished.status == "succeeded", finished.error
    assert steps_of(service, job_id) == [1, 2, 3, 4, 5, 6]
    messages = [event.message for event in service.events(job_id)]
    assert messages.count("The job has successfully completed") == 1


def test_cancelling_stops_the_trainer(service: Service, training_file: str) -> None:
    job_id = start(service, training_file, n_epochs=50)
    service.wait(job_id, "running", step=1)
    service.client.fine_tuning.jobs.cancel(job_id)
    assert service.wait(job_id, timeout_seconds=60).status == "cancelled"
    assert not service.processes("sdft_engine.train", job_id)


def chat_seconds(service: Service) -> float:
    before = time.monotonic()
    answer = service.client.chat.completions.create(model=BASE, messages=QUESTION, temperature=0, max_tokens=24, logit_bias={"2": -100})
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 24
    return time.monotonic() - before


def test_chat_and_training_share_the_machine(service: Service, training_file: str) -> None:
    """Neither starves the other: each keeps a share of its solo speed that spinning OpenMP threads would not leave it."""
    chat_alone = statistics.median(chat_seconds(service) for _ in range(4))
    job_id = start(service, training_file, n_epochs=50, checkpoint_every_steps=1000)
    service.wait(job_id, "running", step=4)
    step = service.client.fine_tuning.jobs.retrieve(job_id).model_extra["progress"]["step"]
    together = []
    while service.client.fine_tuning.jobs.retrieve(job_id).model_extra["progress"]["step"] < step + 6 or len(together) < 6:
        together.append(chat_seconds(service))
    service.client.fine_tuning.jobs.cancel(job_id)
    service.wait(job_id, "cancelled", timeout_seconds=60)
    page: Any = service.client.get(f"/fine_tuning/jobs/{job_id}/metrics", cast_to=dict)
    seconds = {row["step"]: row["step_seconds"] for row in page["data"]}
    training_alone = statistics.median(seconds[number] for number in range(2, step + 1))
    training_together = statistics.median(seconds[number] for number in range(step + 2, step + 6))
    shares = {"chat": chat_alone / statistics.median(together), "training": training_alone / training_together}
    assert min(shares.values()) >= SHARE_OF_SOLO_SPEED, shares
