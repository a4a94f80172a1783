import json
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import pytest
import redis
from sqlalchemy import func, select, update

from api.fine_tuning.jobs.schemas import LARGEST_SEED
from core.base_models import BaseModelEntry
from core.doorbell import LOOK_FOR_WORK
from core.errors import Unavailable
from core.settings import Settings
from core.tables.jobs import Job
from core.tables.models import Model
from tests.api.conftest import SETTINGS
from tests.api.model_rows import add_model
from tests.api.serving import Api, serve, training_lines, wait_for
from tests.api.test_errors import assert_error
from tests.rows import get_job, messages_of

JOBS = "/v1/fine_tuning/jobs"
BAD_FIELDS: list[tuple[dict[str, Any], str, str]] = [
    ({"model": "x" * 513}, "string_too_long", "model"),
    ({"suffix": ""}, "string_too_short", "suffix"),
    ({"suffix": "x" * 65}, "string_too_long", "suffix"),
    ({"suffix": "a\x00b"}, "invalid_text", "suffix"),
    ({"suffix": 3}, "string_type", "suffix"),
    ({"seed": -1}, "greater_than_equal", "seed"),
    ({"seed": 2**31}, "less_than_equal", "seed"),
    ({"seed": 10**30}, "int_type", "seed"),
    ({"seed": 1.5}, "int_type", "seed"),
    ({"seed": True}, "int_type", "seed"),
    ({"seed": "7"}, "int_type", "seed"),
    ({"metadata": {str(number): "x" for number in range(17)}}, "too_long", "metadata"),
    ({"metadata": {"k" * 65: "x"}}, "string_too_long", "metadata." + "k" * 65),
    ({"metadata": {"": "x"}}, "string_too_short", "metadata."),
    ({"metadata": {"k": "x" * 513}}, "string_too_long", "metadata.k"),
    ({"metadata": {"k": 3}}, "string_type", "metadata.k"),
    ({"metadata": {"k": "\x00"}}, "invalid_text", "metadata.k"),
    ({"metadata": []}, "dict_type", "metadata"),
    ({"integrations": [{"type": "wandb"}]}, "unsupported_parameter", "integrations"),
    ({"method": "sdft"}, "dict_type", "method"),
    ({"method": {"type": "dpo"}}, "unsupported_method", "method.type"),
    ({"method": {"type": "sdft", "sdft": {"hyperparameters": {"foo": 1}}}}, "unknown_parameter", "method.sdft.hyperparameters.foo"),
    ({"method": {"type": "sdft", "sdft": {"hyperparameters": {"learning_rate": -1}}}}, "greater_than_equal", "method.sdft.hyperparameters.learning_rate"),
    ({"method": {"type": "sdft", "sdft": {"sampler": "vllm"}}}, "unsupported_parameter", "method.sdft.sampler"),
    ({"hyperparameters": {"n_epochs": 0}}, "greater_than_equal", "hyperparameters.n_epochs"),
    ({"hyperparameters": [1]}, "dict_type", "hyperparameters"),
]


@pytest.fixture
def broker(valkey: str) -> Iterator[redis.Redis]:
    with redis.Redis(unix_socket_path=valkey.removeprefix("redis+socket://")) as client:
        client.flushall()
        yield client


def rings(broker: redis.Redis) -> int:
    waiting: Any = broker.lrange("celery", 0, -1)
    assert {json.loads(message)["headers"]["task"] for message in waiting} <= {LOOK_FOR_WORK}
    return len(waiting)


def refuse(api: Api, status: int, code: str, param: str, **fields: Any) -> str:
    body = {"model": "tiny", "training_file": "file-unknown", **fields}
    message = assert_error(api.client.post(JOBS, json=body), status, code, param)
    with api.database.reading() as session:
        assert session.scalar(select(func.count()).select_from(Job).where(Job.status == "validating_files")) == 0
    return message


def test_job_as_created(api_on_both: Api, broker: redis.Redis) -> None:
    api = api_on_both
    files = {"training_file": api.upload(), "validation_file": api.upload(training_lines(1))}
    method = {"type": "sdft", "sdft": {"teacher_template": "history", "hyperparameters": {"n_epochs": 3, "temperature": 0.5}}}
    job = api.create_job(**files, method=method, suffix="lamps", seed=7, metadata={"team": "support", "leer": ""}, integrations=None)
    expected = {
        "object": "fine_tuning.job",
        "model": "tiny",
        "status": "validating_files",
        "fine_tuned_model": None,
        "finished_at": None,
        "organization_id": api.project_id,
        "error": None,
        **files,
        "result_files": [],
        "seed": 7,
        "trained_tokens": None,
        "estimated_finish": None,
        "metadata": {"team": "support", "leer": ""},
        "integrations": [],
        "user_provided_suffix": "lamps",
        "queue_position": None,
        "estimated_start": None,
        "progress": None,
        "attempt": 0,
    }
    assert {name: job[name] for name in expected} == expected
    assert job["hyperparameters"]["n_epochs"] == 3
    assert job["hyperparameters"]["batch_size"] == "auto"
    assert job["method"]["sdft"] == {
        "hyperparameters": job["hyperparameters"],
        "teacher_template": "history",
        "reasoning": False,
        "retention_file": None,
        "sampler": "auto",
        "baseline": "none",
    }
    assert api.client.get(f"{JOBS}/{job['id']}").json() == job
    assert messages_of(api.database, job["id"]) == [f"Created fine-tuning job: {job['id']}"]
    row = get_job(api.database, job["id"])
    assert (row.base_model, row.parent_model, row.lease_token, row.stop_requested) == ("tiny", None, None, None)
    wait_for(lambda: rings(broker) == 1)


def test_defaults(api: Api) -> None:
    job = api.create_job()
    assert job["method"]["type"] == "sdft"
    assert job["hyperparameters"]["learning_rate"] == "auto"
    assert (job["metadata"], job["user_provided_suffix"], job["validation_file"]) == (None, None, None)
    assert 0 <= job["seed"] <= LARGEST_SEED
    assert len({api.create_job()["seed"] for _ in range(4)}) > 1


def test_stock_client(live_api: Api) -> None:
    client = live_api.openai
    file = client.files.create(file=("train.jsonl", training_lines()), purpose="fine-tune")
    method: Any = {"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 2, "batch_size": "auto", "learning_rate_multiplier": 0.5}}}
    job = client.fine_tuning.jobs.create(model="tiny", training_file=file.id, method=method, suffix="lamps")
    assert job.method is not None
    assert job.method.supervised is not None
    assert job.method.supervised.hyperparameters is not None
    assert job.method.supervised.hyperparameters.n_epochs == 2
    assert job.hyperparameters.learning_rate_multiplier == 0.5
    old_style = client.fine_tuning.jobs.create(model="tiny", training_file=file.id, hyperparameters={"n_epochs": 4})
    assert old_style.hyperparameters.n_epochs == 4
    assert [found.id for found in client.fine_tuning.jobs.list(limit=1)] == [old_style.id, job.id]
    assert client.fine_tuning.jobs.retrieve(job.id) == job
    cancelled = client.fine_tuning.jobs.cancel(job.id)
    assert cancelled.status == "cancelled"
    assert [event.message for event in client.fine_tuning.jobs.list_events(job.id, limit=1)] == [
        "The job was cancelled",
        f"Created fine-tuning job: {job.id}",
    ]
    assert list(client.fine_tuning.jobs.checkpoints.list(job.id)) == []


def test_broker_that_is_down_is_no_error(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    api.state.doorbell.app.conf.broker_url = "redis://127.0.0.1:1/0"
    job = api.create_job()
    assert api.client.get(f"{JOBS}/{job['id']}").json()["status"] == "validating_files"


def test_no_ring_without_a_commit(api: Api, broker: redis.Redis, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*arguments: object, **options: object) -> None:
        raise Unavailable("the database can't be reached or is busy")

    file_id = api.upload()
    monkeypatch.setattr("core.jobs.transitions.append_event", broken)
    assert_error(api.client.post(JOBS, json={"model": "tiny", "training_file": file_id}), 503, "service_unavailable")
    assert api.client.get(JOBS).json()["data"] == []
    time.sleep(0.3)  # nobody waits for a ring
    assert rings(broker) == 0


def test_unknown_model(api: Api) -> None:
    file_id = api.upload()
    for model in ("gpt-4o-mini", "/models/tiny", "../models/tiny", "hub:owner/name", "ft:tiny:default:x:1", "Tiny", "", "tiny/../tiny"):
        assert repr(model) in refuse(api, 404, "model_not_found", "model", model=model, training_file=file_id)


def test_training_file_that_cannot_be_used(api_on_both: Api) -> None:
    api = api_on_both
    for missing in ("file-unknown", "", "/etc/passwd", "x" * 500):
        refuse(api, 400, "file_not_found", "training_file", training_file=missing)
    refuse(api, 400, "invalid_file_purpose", "training_file", training_file=api.upload(purpose="evals"))
    short = api.upload(training_lines(9) + b"\n\n\n")
    assert "9 examples" in refuse(api, 400, "invalid_n_examples", "training_file", training_file=short)


def test_validation_file_that_cannot_be_used(api: Api) -> None:
    good = api.upload()
    refuse(api, 400, "file_not_found", "validation_file", training_file=good, validation_file="file-unknown")
    refuse(api, 400, "invalid_file_purpose", "validation_file", training_file=good, validation_file=api.upload(purpose="evals"))


def test_retention_file_that_cannot_be_used(api: Api) -> None:
    def job(file_id: Any) -> dict[str, Any]:
        return {"training_file": good, "method": {"type": "sdft", "sdft": {"retention_file": file_id}}}

    good, param = api.upload(), "method.sdft.retention_file"
    refuse(api, 400, "file_not_found", param, **job("file-unknown"))
    refuse(api, 400, "file_not_found", param, **job("x" * 5000))
    refuse(api, 400, "invalid_file_purpose", param, **job(good))
    refuse(api, 400, "string_type", param, **job(7))
    refuse(api, 400, "string_type", param, **job("a\0b"))
    too_large = api.upload(b'{"probe": "sums", "question": "' + b"1" * (16 * 1024**2) + b'", "answers": ["2"]}', purpose="evals")
    refuse(api, 400, "invalid_value", param, **job(too_large))
    for purpose in ("evals", "user_data"):
        questions = api.upload(b'{"probe": "sums", "question": "1+1?", "answers": ["2"]}', purpose=purpose)
        assert api.create_job(**job(questions))["method"]["sdft"]["retention_file"] == questions


def test_bad_fields(api: Api) -> None:
    for fields, code, param in BAD_FIELDS:
        refuse(api, 400, code, param, **fields)


@pytest.fixture
def vllm_api(make_settings: Callable[..., Settings], sqlite_url: str, valkey: str) -> Iterator[Callable[..., Any]]:
    """The API of a server whose adapters vLLM serves, with more settings."""
    with ExitStack() as opened:
        settings = {"redis_url": valkey, "inference_urls": ["http://127.0.0.1:1"], "inference": "vllm", **SETTINGS}
        yield lambda **more: opened.enter_context(serve(make_settings(**settings, **more)))


def of_rank(kind: str, rank: int) -> dict[str, Any]:
    return {"method": {"type": kind, kind: {"hyperparameters": {"lora_rank": rank}}}}


def test_a_rank_that_vllm_cannot_serve_is_refused(vllm_api: Callable[..., Api]) -> None:
    api = vllm_api()
    file_id = api.upload()
    for kind in ("sdft", "supervised"):
        param = f"method.{kind}.hyperparameters.lora_rank"
        said = refuse(api, 400, "invalid_value", param, training_file=file_id, **of_rank(kind, 33))
        assert said == f"{param}: at most 32 on this server (SDFT_VLLM_MAX_LORA_RANK), not 33"
    refuse(api, 400, "invalid_value", "hyperparameters.lora_rank", training_file=file_id, hyperparameters={"lora_rank": 64})
    for fields in (of_rank("sdft", 32), of_rank("supervised", 32), {}):
        assert api.create_job(**fields)["status"] == "validating_files"


def test_the_default_rank_is_refused_too_where_vllm_serves_less(vllm_api: Callable[..., Api]) -> None:
    api = vllm_api(vllm_max_lora_rank=8)
    said = refuse(api, 400, "invalid_value", "method.sdft.hyperparameters.lora_rank", training_file=api.upload())
    assert "at most 8 on this server" in said
    assert api.create_job(**of_rank("sdft", 8))["status"] == "validating_files"


def test_a_tuned_model_is_continued_with_its_own_rank(vllm_api: Callable[..., Api]) -> None:
    """Which is what counts, and not the one that is asked for."""
    api = vllm_api(vllm_max_lora_rank=8)
    for rank in (8, 64):
        model = add_model(api, f"ft:tiny:default:x:{rank}")
        with api.database.transaction() as session:
            session.execute(update(Job).where(Job.id == model.job_id).values(resolved_hyperparameters={"lora_rank": rank}))
    add_model(api, "ft:tiny:default:x:unknown")
    said = refuse(api, 400, "invalid_value", "model", training_file=api.upload(), model="ft:tiny:default:x:64")
    assert said == "model: the rank of its adapter is 64, and this server serves at most 8 (SDFT_VLLM_MAX_LORA_RANK)"
    for name in ("8", "unknown"):
        assert api.create_job(model=f"ft:tiny:default:x:{name}")["status"] == "validating_files"


def test_the_embedded_server_takes_every_rank(api: Api) -> None:
    assert api.create_job(**of_rank("sdft", 256))["status"] == "validating_files"


def test_unknown_top_level_fields_are_ignored(api: Api) -> None:
    assert api.create_job(something="else", integrations=[])["status"] == "validating_files"


def test_continuing_from_a_tuned_model(api_on_both: Api) -> None:
    api = api_on_both
    for model_id in ("ft:tiny:default:x:1", "ft:tiny:default:x:1:ckpt-step-20"):
        add_model(api, model_id)
        job = api.create_job(model=model_id)
        row = get_job(api.database, job["id"])
        assert (row.model, row.base_model, row.parent_model) == (model_id, "tiny", model_id)
        assert job["model"] == model_id


def test_tuned_model_that_cannot_be_continued(api: Api) -> None:
    add_model(api, "ft:tiny:default:unverified:1", status="unverified")
    add_model(api, "ft:tiny:default:deleted:1", status="deleted")
    add_model(api, "ft:tiny:other:x:1", project_id=api.other_project_id)
    add_model(api, "ft:gone:default:x:1", base_model="gone")
    file_id = api.upload()
    for name in ("ft:tiny:default:unverified:1", "ft:tiny:default:deleted:1", "ft:tiny:other:x:1", "ft:gone:default:x:1"):
        refuse(api, 404, "model_not_found", "model", model=name, training_file=file_id)


def test_a_model_of_another_revision_of_its_base_cannot_be_continued(api: Api) -> None:
    add_model(api, "ft:tiny:default:x:1", attestation={"base_source": "hub:somebody/tiny", "base_revision": "1"})
    file_id = api.upload()

    before = api.state

    def name_revision(name: str) -> None:
        entry = BaseModelEntry(id="tiny", source="hub:somebody/tiny", revision=name)
        api.app.state.api = replace(before, settings=api.settings.model_copy(update={"base_models": [entry]}))

    name_revision("2")
    assert "another 'tiny'" in refuse(api, 404, "model_not_found", "model", model="ft:tiny:default:x:1", training_file=file_id)
    name_revision("1")
    assert api.create_job(model="ft:tiny:default:x:1", training_file=file_id)["status"] == "validating_files"
    api.app.state.api = before


def test_parent_of_an_unfinished_job_cannot_be_deleted(api_on_both: Api) -> None:
    api = api_on_both
    model = add_model(api, "ft:tiny:default:x:1")
    job = api.create_job(model=model.id)
    assert job["id"] in assert_error(api.client.delete(f"/v1/models/{model.id}"), 409, "model_in_use", "model")
    with api.database.transaction() as session:
        session.execute(update(Job).where(Job.id == job["id"]).values(status="failed", finished_at=1))
    assert api.client.delete(f"/v1/models/{model.id}").status_code == 200
    with api.database.reading() as session:
        assert session.get_one(Model, model.id).status == "deleted"


def test_a_job_that_wants_vllm_where_there_is_none_is_told_what_the_operator_sets(api: Api) -> None:
    message = refuse(api, 400, "unsupported_parameter", "method.sdft.sampler", method={"type": "sdft", "sdft": {"sampler": "vllm"}})
    assert "SDFT_INFERENCE=vllm" in message


def test_unfinished_jobs_of_a_project_have_a_limit(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = api.settings.model_copy(update={"project_max_unfinished_jobs": 2})
    monkeypatch.setattr(api.app.state, "api", replace(api.state, settings=settings))
    file_id = api.upload()
    jobs = [api.create_job(training_file=file_id) for _ in range(2)]
    body = {"model": "tiny", "training_file": file_id}
    assert_error(api.client.post("/v1/fine_tuning/jobs", json=body), 400, "too_many_unfinished_jobs")
    assert api.client.post(f"/v1/fine_tuning/jobs/{jobs[0]['id']}/cancel").status_code == 200
    assert api.client.post("/v1/fine_tuning/jobs", json=body).status_code == 200
