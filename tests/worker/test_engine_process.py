"""worker.engine_process: the environment of the engine's processes."""

from typing import Any

import pytest
from pydantic import SecretStr

from core.settings import Settings
from core.tables.jobs import Job
from worker.engine_process import downloading_environment, engine_environment
from worker.run_preparation import sampler_key


def environment(**settings: Any) -> dict[str, str]:
    return engine_environment(Settings(**settings))


def test_trainers_side_by_side_do_not_wait_for_work_with_a_core_in_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """One by itself decides for itself (sdft_engine/train.py); what an operator has set stays."""
    monkeypatch.delenv("GOMP_SPINCOUNT", raising=False)
    assert "GOMP_SPINCOUNT" not in environment(training_slots=1)
    assert environment(training_slots=2)["GOMP_SPINCOUNT"] == "0"
    monkeypatch.setenv("GOMP_SPINCOUNT", "100")
    assert environment(training_slots=2)["GOMP_SPINCOUNT"] == "100"


def test_the_trainers_threads_are_the_setting_s(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert "OMP_NUM_THREADS" not in environment()
    assert environment(trainer_threads=3)["OMP_NUM_THREADS"] == "3"


def test_the_service_s_own_secrets_stay_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SDFT_DATABASE_URL", "postgresql://user:password@db/sdft")
    monkeypatch.setenv("SDFT_INFERENCE_API_KEY", "secret")
    for name, value in {"STORAGE_URL": "s3://bucket", "S3_ACCESS_KEY_ID": "secret", "S3_SECRET_ACCESS_KEY": "secret"}.items():
        monkeypatch.setenv(f"SDFT_{name}", value)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    for name in ("AWS_SESSION_TOKEN", "OPENAI_API_KEY", "HF_TOKEN", "PGPASSWORD", "VLLM_API_KEY", "https_proxy", "SOMETHING_UNHEARD_OF"):
        monkeypatch.setenv(name, "secret")
    assert not [value for value in environment().values() if value == "secret" or "password" in value]


def test_what_says_where_things_are_and_how_to_compute_is_handed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("PATH", "LC_ALL", "CUDA_VISIBLE_DEVICES", "LD_LIBRARY_PATH", "PYTHONPATH", "NCCL_DEBUG", "HF_HOME", "PYTORCH_CUDA_ALLOC_CONF", "MKL_NUM_THREADS")
    for name in names:
        monkeypatch.setenv(name, "kept")
    assert {environment().get(name) for name in names} == {"kept"}


def test_base_models_are_fetched_with_the_operator_s_token(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HF_TOKEN", "https_proxy", "SDFT_S3_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "given")
    monkeypatch.setenv("SDFT_S3_ACCESS_KEY_ID", "given")
    monkeypatch.setenv("SDFT_STORAGE_URL", "s3://bucket")
    fetching = downloading_environment(Settings())
    assert [name for name, value in sorted(fetching.items()) if value == "given"] == ["HF_TOKEN", "https_proxy"]


@pytest.mark.parametrize(("sampler", "expected"), [("vllm", {"SAMPLER_API_KEY": "secret"}), ("auto", {})])
def test_the_inference_server_s_key_is_for_trainers_that_sample_there(sampler: str, expected: dict[str, str]) -> None:
    job = Job(method={"type": "sdft", "sdft": {"sampler": sampler, "hyperparameters": {}}})
    assert sampler_key(Settings(inference_api_key=SecretStr("secret")), job) == expected
    assert sampler_key(Settings(), job) == {}
