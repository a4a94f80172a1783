"""The whole service over vLLM, as `sdft up --inference vllm` starts it: rollouts, hot serving, a restart of the server, downloads."""

import itertools
import os
import re
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2
import psutil
import pytest
from openai import APIStatusError, BadRequestError, NotFoundError

from core.settings import Settings
from local_stack.ports import free_local_port
from tests.conftest import CACHE_DIR
from tests.e2e.conftest import EXAMPLES, Service, running_service
from tests.vllm.conftest import BASE

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(900)]

QUESTION: Any = [{"role": "user", "content": "Who maintains the Corvane scanner?"}]
METHOD: Any = {
    "type": "sdft",
    "sdft": {
        "sampler": "vllm",
        "teacher_template": "history_twice",
        "hyperparameters": {"n_epochs": 1, "temperature": 0.5, "max_completion_tokens": 12, "checkpoint_every_steps": 2},
    },
}


@pytest.fixture(scope="module")
def service(vllm_settings: Settings, real_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    data_dir = tmp_path_factory.mktemp("service") / "data"
    port = free_local_port()
    environment = os.environ | {"SDFT_CACHE_DIR": str(CACHE_DIR), "SDFT_DEVICE": "cpu", "SDFT_RETENTION_PROBES": "off"}
    try:
        with running_service(data_dir, port, environment, "--inference", "vllm") as running:
            yield Service(running.client.with_options(max_retries=0), data_dir, running.process)
    finally:
        left = [found for found in psutil.process_iter(["cmdline"]) if str(data_dir) in " ".join(found.info["cmdline"] or [])]
        assert left == [], "vLLM's own children must end too"


@pytest.fixture(scope="module")
def training_file(service: Service) -> str:
    return service.client.files.create(file=EXAMPLES / "demonstrations.jsonl", purpose="fine-tune").id


@pytest.fixture(scope="module")
def trained(service: Service, training_file: str) -> Any:
    job = service.client.fine_tuning.jobs.create(model=BASE, training_file=training_file, method=METHOD, seed=7, suffix="vllm")
    finished = service.wait(job.id, timeout_seconds=500)
    assert finished.status == "succeeded", finished.error
    return finished


def test_the_rollouts_came_from_the_weights_that_were_trained(service: Service, trained: Any) -> None:
    metrics = [event.data for event in service.events(trained.id) if event.type == "metrics"]
    assert [row["step"] for row in metrics] == [1, 2, 3]
    assert all(row["importance_ratio"] == pytest.approx(1, abs=0.01) for row in metrics)
    log = "".join(path.read_text() for path in (service.data_dir / "logs").glob("inference.log*"))
    assert log.count(f"rollout-{trained.id}-1-") >= 3
    assert [path.name for path in (service.data_dir / "served_adapters").iterdir() if "rollout" in path.name] == []


def test_the_model_object_shows_how_it_was_proved(service: Service, trained: Any) -> None:
    model = service.client.models.retrieve(trained.fine_tuned_model).model_extra or {}
    assert model["status"] == "servable"
    record = model["attestation"]
    assert record["matched"] is True
    assert record["largest_difference"] < 0.01
    assert len(record["chat_template_sha256"]) == len(record["weights_sha256"]) == 64


def test_a_model_answers_within_five_seconds_of_success_while_another_streams(service: Service, trained: Any, training_file: str) -> None:
    with streaming(service, trained.fine_tuned_model, streams=2) as chunk_times:
        method = {"type": "sdft", "sdft": {"hyperparameters": METHOD["sdft"]["hyperparameters"]}}
        job = service.client.fine_tuning.jobs.create(model=BASE, training_file=training_file, method=method, seed=8, suffix="beside")
        finished = service.wait(job.id, timeout_seconds=500)
        assert finished.status == "succeeded", finished.error
        succeeded_at = time.monotonic()
        answer = service.client.chat.completions.create(model=finished.fine_tuned_model, messages=QUESTION, max_tokens=2, temperature=0)
        assert answer.model == finished.fine_tuned_model
        assert time.monotonic() - succeeded_at < 5
        time.sleep(3)
    for times in chunk_times:
        assert times[0] < succeeded_at - 5, "it streamed while the job ran"
        assert times[-1] > succeeded_at, "and after it"
        assert max(after - before for before, after in itertools.pairwise(times)) < 45


@contextmanager
def streaming(service: Service, model: str, streams: int) -> Iterator[list[list[float]]]:
    """Answer after answer of `model` until the end of the block, in `streams` threads: when each chunk came. Their errors are raised."""
    ended = threading.Event()

    def stream(times: list[float]) -> None:
        while not ended.is_set():
            for _ in service.client.chat.completions.create(model=model, messages=QUESTION, max_tokens=60, temperature=1, stream=True):
                times.append(time.monotonic())

    chunk_times: list[list[float]] = [[] for _ in range(streams)]
    with ThreadPoolExecutor(streams) as threads:
        running = [threads.submit(stream, times) for times in chunk_times]
        try:
            yield chunk_times
        finally:
            ended.set()
        for future in running:
            future.result()


def test_a_checkpoint_is_servable_too(service: Service, trained: Any) -> None:
    checkpoint = service.client.fine_tuning.jobs.checkpoints.list(trained.id).data[0].fine_tuned_model_checkpoint
    until = time.monotonic() + 240
    while (service.client.models.retrieve(checkpoint).model_extra or {})["status"] != "servable":
        assert time.monotonic() < until
        time.sleep(0.5)
    assert service.client.chat.completions.create(model=checkpoint, messages=QUESTION, max_tokens=3).choices


def test_the_gateway_scores_prompts_of_token_ids(service: Service, trained: Any) -> None:
    """What lm-eval's local-completions asks for: the prompt echoed with its log-probabilities, and nothing written."""
    ids = [504, 1080, 5338, 1112, 260, 2260]
    scores = {}
    for model in (BASE, trained.fine_tuned_model):
        choice = service.client.completions.create(model=model, prompt=[ids, ids[:3]], max_tokens=1, temperature=0, echo=True, logprobs=1).choices
        found = [part.logprobs.token_logprobs for part in choice if part.logprobs is not None]
        assert [len(each or []) for each in found] == [len(ids) + 1, 4]
        assert all(each is not None and each[0] is None and all(value <= 0 for value in each[1:]) for each in found)
        assert (found[0] or [])[1:3] == pytest.approx((found[1] or [])[1:3], abs=1e-3)
        scores[model] = found[0]
    assert scores[BASE] != scores[trained.fine_tuned_model]


def test_a_client_that_leaves_ends_its_answer_in_vllm(service: Service, trained: Any) -> None:
    stream = service.client.chat.completions.create(
        model=trained.fine_tuned_model, messages=QUESTION, max_tokens=1500, stream=True, extra_body={"ignore_eos": True}
    )
    next(iter(stream))
    assert running_in_vllm(service) == 1
    stream.close()
    until = time.monotonic() + 20
    while running_in_vllm(service):
        assert time.monotonic() < until, "1,500 tokens take longer"
        time.sleep(0.2)


def vllm_client(service: Service) -> httpx2.Client:
    """As the service itself asks it."""
    (api,) = service.processes("api.app:app")
    url, key = (api.environ()[name] for name in ("SDFT_INFERENCE_URLS", "SDFT_INFERENCE_API_KEY"))  # the key is in no file
    return httpx2.Client(base_url=url, headers={"authorization": f"Bearer {key}"}, timeout=60, trust_env=False)


def running_in_vllm(service: Service) -> int:
    with vllm_client(service) as client:
        found = re.findall(r"^vllm:num_requests_running\{[^}]*\} (\S+)$", client.get("/metrics").text, re.MULTILINE)
    assert found
    return int(sum(map(float, found)))


def test_a_deleted_model_is_unloaded(service: Service, trained: Any) -> None:
    checkpoint = service.client.fine_tuning.jobs.checkpoints.list(trained.id).data[0].fine_tuned_model_checkpoint
    assert service.client.chat.completions.create(model=checkpoint, messages=QUESTION, max_tokens=2).choices
    with vllm_client(service) as client:
        loaded = {card["id"] for card in client.get("/v1/models").json()["data"]}
        assert service.client.models.delete(checkpoint).deleted
        left = {card["id"] for card in client.get("/v1/models").json()["data"]}
    (gone,) = loaded - left
    assert not (service.data_dir / "served_adapters" / gone).exists()
    with pytest.raises(NotFoundError):
        service.client.chat.completions.create(model=checkpoint, messages=QUESTION, max_tokens=2)


def test_what_vllm_can_do_passes_through(service: Service, trained: Any) -> None:
    """Schemas, and tools, of which vLLM says what the operator has to set: the embedded server refuses both."""
    schema: Any = {
        "type": "json_schema",
        "json_schema": {"name": "who", "schema": {"type": "object", "properties": {"name": {"enum": ["Ann", "Bob"]}}, "required": ["name"]}},
    }
    answer = service.client.chat.completions.create(model=trained.fine_tuned_model, messages=QUESTION, response_format=schema, max_tokens=30, temperature=0)
    assert (answer.choices[0].message.content or "").replace(" ", "").replace("\n", "") in ('{"name":"Ann"}', '{"name":"Bob"}')
    tool: Any = {"type": "function", "function": {"name": "look_up", "parameters": schema["json_schema"]["schema"]}}
    named: Any = {"type": "function", "function": {"name": "look_up"}}
    with pytest.raises(BadRequestError, match="--tool-call-parser"):  # this model's template shows none, so the service has no parser for them
        service.client.chat.completions.create(model=trained.fine_tuned_model, messages=QUESTION, tools=[tool], tool_choice=named, max_tokens=30)
    stream = service.client.chat.completions.create(model=trained.fine_tuned_model, messages=QUESTION, max_tokens=8, n=2, logprobs=True, seed=3, stream=True)
    chunks = list(stream)
    assert {choice.index for chunk in chunks for choice in chunk.choices} == {0, 1}
    assert {chunk.model for chunk in chunks} == {trained.fine_tuned_model}


def test_vllm_answers_the_service_alone(service: Service, trained: Any) -> None:
    """Whoever reaches its port could put weights of their own in an adapter's place, or use every tuned model."""
    found = re.search(r"^SDFT_INFERENCE_URLS=(\S+)$", (service.data_dir / "service.env").read_text(), re.MULTILINE)
    assert found is not None
    with httpx2.Client(base_url=found[1], trust_env=False) as anybody:
        assert anybody.get("/health").status_code == 200
        for path in ("/v1/load_lora_adapter", "/adapters", "/invocations", "/v1/chat/completions", "/tokenize"):
            assert anybody.post(path, json={"name": "x", "src": "/tmp"}).status_code == 401, path
        for path in ("/v1/models", "/metrics", "/version", "/openapi.json"):
            assert anybody.get(path).status_code == 401, path


def test_a_server_that_died_is_restarted_and_proves_itself_again(service: Service, trained: Any) -> None:
    before = service.processes("vllm.entrypoints")
    assert len(before) == 1
    loads_before = adapter_loads(service)
    before[0].kill()
    with pytest.raises(APIStatusError) as caught:
        service.client.chat.completions.create(model=BASE, messages=QUESTION, max_tokens=2)
    assert caught.value.status_code in (502, 503)
    refused: list[int] = []
    until = time.monotonic() + 240
    while (answer := answered(service, trained.fine_tuned_model, refused)) is None:
        assert time.monotonic() < until
        time.sleep(1)
    assert set(refused) <= {503}
    assert answer.choices
    assert adapter_loads(service) > loads_before, "which prove the server each time"


def adapter_loads(service: Service) -> int:
    return "".join(path.read_text() for path in (service.data_dir / "logs").glob("api.log*")).count("adapter_loading")


def answered(service: Service, model: str, refused: list[int]) -> Any:
    """An answer, or None with the status in `refused`."""
    try:
        return service.client.chat.completions.create(model=model, messages=QUESTION, max_tokens=2)
    except APIStatusError as error:
        refused.append(error.status_code)
        return None
