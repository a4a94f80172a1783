"""Several machines: one Postgres, one bucket, one broker, and workers that share no disk. And the bucket's bad days (fault 16)."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from openai import OpenAI
from sqlalchemy import select

from core.inference_servers import InferenceServers
from core.tables.models import Model
from tests.faults.deployment import BASE, Deployment, wait_for
from tests.fixtures.faulty_proxy import Fault, FaultyProxy
from tests.fixtures.s3_server import Bucket

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


def storage_variables(bucket: Bucket, endpoint_url: str | None = None) -> dict[str, str]:
    found: dict[str, Any] = bucket.settings | ({"s3_endpoint_url": endpoint_url} if endpoint_url else {})
    return {f"SDFT_{name.upper()}": value for name, value in found.items()}


@pytest.fixture
def machines(postgres_url: str, bucket: Bucket, make_deployment: Callable[..., Deployment]) -> tuple[Deployment, Deployment]:
    """The first has broker, inference server and API; each has a data directory of its own."""
    first = make_deployment(postgres_url, **storage_variables(bucket))
    shared = {"SDFT_INFERENCE_URLS": first.settings.inference_urls[0], "SDFT_REDIS_URL": first.stack.broker_url}
    second = make_deployment(postgres_url, **storage_variables(bucket), **shared)
    assert first.settings.data_dir != second.settings.data_dir
    first.start("valkey", "inference", "api")
    return first, second


@pytest.mark.parametrize("how", ["deployed", "killed"])
def test_a_job_interrupted_on_one_machine_goes_on_on_another(machines: tuple[Deployment, Deployment], how: str) -> None:
    first, second = machines
    file_id = first.upload()
    job_id = first.create_job(file_id)
    second.start("worker")
    first.wait_for_checkpoint(job_id)
    assert second.trainers(job_id)
    if how == "killed":
        second.kill("worker")
    else:
        second.signal("worker", 15)
        assert second.ended("worker") == 0
    first.start("worker")
    job = first.wait_for_end(job_id)
    assert (job.attempt, job.lost_leases) == (2, 0), "a loss is forgiven once a new checkpoint is stored"
    assert any("resumed at step" in message for message in first.messages(job_id))
    assert first.losses(job_id) == first.undisturbed_losses(file_id)
    question: Any = [{"role": "user", "content": "Which lamp is lamp 3?"}]
    assert first.client.chat.completions.create(model=str(job.fine_tuned_model), messages=question, max_tokens=3).choices
    assert not (first.settings.storage_dir / "files").exists(), "nothing but the bucket was written to"


def test_two_machines_share_a_queue(machines: tuple[Deployment, Deployment]) -> None:
    first = machines[0]
    file_id = first.upload()
    job_ids = [first.create_job(file_id, seed=number, n_epochs=10) for number in range(6)]
    for machine in machines:
        machine.start("worker")
    for job_id in job_ids:
        assert first.wait_for_end(job_id).attempt == 1
    worked = [{job_id for job_id in job_ids if (machine.settings.runs_dir / job_id).exists()} for machine in machines]
    assert worked[0] | worked[1] == set(job_ids)
    assert worked[0].isdisjoint(worked[1])
    assert all(worked), "each had its share"


def test_machines_without_a_common_disk_train_and_answer(postgres_url: str, bucket: Bucket, make_deployment: Callable[..., Deployment]) -> None:
    """API, worker and inference server on a machine each. The server's copy goes with the server, and is sent again."""
    variables = storage_variables(bucket) | {"SDFT_INFERENCE_ADAPTERS": "upload", "SDFT_INFERENCE_API_KEY": "secret"}
    serving = make_deployment(postgres_url, **variables)
    variables["SDFT_INFERENCE_URLS"] = serving.settings.inference_urls[0]
    asked = make_deployment(postgres_url, **variables)
    training = make_deployment(postgres_url, **variables, SDFT_REDIS_URL=asked.stack.broker_url)
    serving.start("inference")
    asked.start("valkey", "api")
    training.start("worker")
    job_id = asked.create_job(n_epochs=2)
    model = str(asked.wait_for_end(job_id).fine_tuned_model)
    question: Any = [{"role": "user", "content": "Which lamp is lamp 3?"}]

    def answer(client: OpenAI) -> str | None:
        return client.chat.completions.create(model=model, messages=question, max_tokens=8, temperature=0).choices[0].message.content

    first = answer(asked.client)
    serving.kill("inference")
    serving.start("inference")
    assert not any(path.is_dir() and path.name[0] != "." for path in serving.settings.uploaded_adapters_dir.iterdir())
    assert answer(asked.client.with_options(max_retries=5)) == first
    with asked.database.reading() as session:
        (name,) = session.scalars(select(Model.serving_name))
    (server,) = InferenceServers(asked.settings).clients
    assert server.prompt_logprobs(name, [5, 6, 7, 8]) != server.prompt_logprobs(BASE, [5, 6, 7, 8])
    sent = serving.settings.uploaded_adapters_dir / name
    assert {path.name for path in sent.iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
    for machine in (asked, training):
        assert list(machine.settings.served_adapters_dir.iterdir()) == []
    asked.client.models.delete(model)
    assert not sent.exists()


@pytest.fixture
def proxy(bucket: Bucket) -> Iterator[FaultyProxy]:
    with FaultyProxy(bucket.endpoint_url) as found:
        yield found


def test_16_a_bucket_that_fails_delays_a_job_and_never_lets_it_succeed_unstored(
    postgres_url: str, bucket: Bucket, proxy: FaultyProxy, make_deployment: Callable[..., Deployment]
) -> None:
    deployment = make_deployment(postgres_url, **storage_variables(bucket, proxy.url))
    deployment.start("valkey", "inference", "api", "worker")
    file_id = deployment.upload()
    job_id = deployment.create_job(file_id)
    deployment.wait_for_step(job_id, 5)
    is_write: Callable[[str, str], bool] = lambda method, path: method in ("PUT", "POST")  # noqa: E731
    deployment.leaves_something = True  # what can't be deleted is left to the collection
    proxy.faults = [Fault("status", meant=is_write)]
    wait_for(lambda: (deployment.job(job_id).step or 0) == deployment.job(job_id).total_steps, 120, lambda: deployment.story(job_id))
    wait_for(lambda: any("storage" in message for message in deployment.messages(job_id)), 60, lambda: deployment.story(job_id))
    assert deployment.job(job_id).status == "running", "it waits, with everything at hand"
    proxy.faults = [
        Fault("cut_request", times=1, meant=is_write, after_bytes=1000),
        Fault("lost_answer", times=1, meant=is_write),
        Fault("hang", times=1, meant=is_write),
    ]
    job = deployment.wait_for_end(job_id)
    assert (job.attempt, job.lost_leases) == (1, 0)
    proxy.faults = []
    assert deployment.losses(job_id) == deployment.undisturbed_losses(file_id)
