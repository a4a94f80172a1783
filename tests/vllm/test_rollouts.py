"""A run whose rollouts vLLM samples learns what one with rollouts of its own learns."""

from pathlib import Path
from typing import Any

import pytest

from core.settings import Settings
from sdft_engine.contract.config import TrainingConfig
from sdft_engine.contract.hyperparameters import ResolvedSdft
from sdft_engine.contract.run_directory import RunDirectory
from sdft_engine.trainer import train
from tests.e2e.conftest import EXAMPLES
from tests.sdft_engine.runs import records
from tests.vllm.conftest import BASE, KEY, Server

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(900)]

ROWS = 8
HYPERPARAMETERS = ResolvedSdft(
    n_epochs=14,
    batch_size=8,
    learning_rate=1e-3,
    lora_rank=16,
    lora_alpha=32,
    warmup_ratio=0.1,
    checkpoint_every_steps=100,
    weight_decay=0.0,
    max_grad_norm=1.0,
    max_completion_tokens=12,
    divergence="forward",
    estimator="full",
    teacher="frozen",
    ema_rate=0.05,
    teacher_start="parent",
    temperature=0.5,
    skip_first_tokens=0,
    mask_clipped_completions=False,
    over_length="reject",
)


def trained(path: Path, model_dir: Path, hyperparameters: ResolvedSdft = HYPERPARAMETERS, **config: Any) -> list[dict[str, Any]]:
    """The metrics of a short run on the first demonstrations."""
    path.mkdir()
    run = RunDirectory(path)
    whole = TrainingConfig(
        method="sdft",
        base_model=BASE,
        base_model_dir=model_dir,
        seed=3,
        device="cpu",
        dtype="float32",
        teacher_template="history_twice",
        sdft=hyperparameters,
        **config,
    )
    run.config_path.write_text(whole.model_dump_json())
    lines = (EXAMPLES / "demonstrations.jsonl").read_text().splitlines()[:ROWS]
    run.train_path.write_text("\n".join(lines) + "\n")
    assert train(run).outcome == "succeeded"
    return records(run.metrics_path)


def test_both_samplers_lead_to_the_same_model(
    vllm_server: Server, vllm_settings: Settings, real_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SAMPLER_KEY", KEY)
    sampler = {"url": vllm_server.url, "adapters_dir": str(vllm_settings.served_adapters_dir), "name_prefix": "rollout-test-1", "api_key_env": "SAMPLER_KEY"}
    theirs, ours = trained(tmp_path / "vllm", real_model_dir, sampler=sampler), trained(tmp_path / "own", real_model_dir)
    assert all(row["importance_ratio"] == pytest.approx(1, abs=0.01) for row in theirs)
    first, last = slice(0, 2), slice(-3, None)

    def mean(rows: list[dict[str, Any]], part: slice) -> float:
        values = [row["train_loss"] for row in rows[part]]
        return sum(values) / len(values)

    for rows in (theirs, ours):
        assert mean(rows, last) < 0.6 * mean(rows, first), "a run that learns nothing proves nothing"
    assert mean(theirs, last) == pytest.approx(mean(ours, last), rel=0.4)
    assert theirs[-1]["adapter_norm"] == pytest.approx(ours[-1]["adapter_norm"], rel=0.1)
    assert vllm_server.model_ids() == [BASE], "every step's adapter was unloaded"


def test_a_trainer_that_shares_no_disk_with_the_server_has_its_rollouts_from_there(
    vllm_server: Server, vllm_settings: Settings, real_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every step's weights are sent, or their log-probabilities would not be the trainer's."""
    monkeypatch.setenv("SAMPLER_KEY", KEY)
    own_dir = tmp_path / "the trainer's own"
    sampler = {"url": vllm_server.url, "adapters_dir": str(own_dir), "upload": True, "name_prefix": "rollout-test-2", "api_key_env": "SAMPLER_KEY"}
    rows = trained(tmp_path / "vllm", real_model_dir, HYPERPARAMETERS.model_copy(update={"n_epochs": 4}), sampler=sampler)
    assert len(rows) == 4
    assert all(row["importance_ratio"] == pytest.approx(1, abs=0.01) for row in rows)
    assert rows[-1]["train_loss"] != rows[0]["train_loss"]
    assert list(own_dir.iterdir()) == []
    assert vllm_server.model_ids() == [BASE]
    assert vllm_server.client.get("/adapter_files").json() == {"names": []}
