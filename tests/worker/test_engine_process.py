"""worker.engine_process: the environment of the engine's processes."""

from typing import Any

import pytest

from core.settings import Settings
from worker.engine_process import engine_environment


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


def test_of_the_service_s_own_secrets_a_trainer_gets_the_inference_server_s_key_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SDFT_DATABASE_URL", "postgresql://user:password@db/sdft")
    monkeypatch.setenv("SDFT_INFERENCE_API_KEY", "secret")
    found = environment()
    assert found["SAMPLER_API_KEY"] == "secret"
    assert [name for name in found if name.startswith("SDFT_")] == []
    monkeypatch.delenv("SDFT_INFERENCE_API_KEY")
    assert "SAMPLER_API_KEY" not in environment()
