"""Several processes train like one: dealing rows out and back, and two gloo processes against one."""

import subprocess
import sys
from pathlib import Path
from typing import Literal

import pytest
import torch
from torch import distributed

from sdft_engine.contract.run_directory import RunDirectory
from sdft_engine.lora import read_adapter
from sdft_engine.ranks import Ranks, join_ranks
from sdft_engine.token_statistics import TokenStatistics, merged
from tests.sdft_engine.runs import TIMINGS, make_run, messages_of, records

SCRIPT = "tests.fixtures.fixed_rollouts"


@pytest.mark.parametrize("count", range(8))
@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_what_was_dealt_out_comes_back_in_order(count: int, size: int) -> None:
    items = list(range(count))
    shares = [Ranks(rank, size).own(items) for rank in range(size)]
    assert sorted(item for share in shares for item in share) == items
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
    assert Ranks(0, size).deal_back(shares) == items


def test_one_process_needs_no_group() -> None:
    alone = Ranks()
    parameter = torch.nn.Parameter(torch.ones(2))
    alone.sum_gradients([parameter])
    assert parameter.grad is None
    assert (alone.is_first, alone.collect("x"), alone.agree("x"), alone.own([1, 2])) == (True, ["x"], "x", [1, 2])


def test_every_process_of_a_machine_has_a_device_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen: list[int] = []
    monkeypatch.setenv("WORLD_SIZE", "8")
    monkeypatch.setenv("LOCAL_RANK", "3")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setattr(distributed, "init_process_group", lambda *arguments, **options: None)
    monkeypatch.setattr(distributed, "get_rank", lambda: 11)
    assert join_ranks() == Ranks(11, 8)
    assert chosen == [3]


def test_statistics_of_shares_become_those_of_the_batch() -> None:
    first = TokenStatistics(1.0, 5, 2, 3.0, 0.5, per_token={0: [0.1], 1: [0.3]}, rewards={0: 1.0, 1: 3.0}, teacher_seconds=2.0, student_seconds=1.0)
    second = TokenStatistics(2.0, 3, 1, 1.0, 0.9, per_token={0: [0.2]}, rewards={0: 2.0}, teacher_seconds=1.0, student_seconds=4.0, top_k_mass_sum=0.5)
    first.ratio_sum, second.ratio_sum = 2.0, 3.5
    whole = merged([first, second])
    assert (whole.loss, whole.loss_tokens, whole.correct_tokens, whole.entropy_sum, whole.top_k_mass_sum, whole.ratio_sum) == (3.0, 8, 3, 4.0, 0.5, 5.5)
    assert (whole.divergence_max, whole.teacher_seconds, whole.student_seconds) == (0.9, 2.0, 4.0)
    assert whole.per_token == {0: [0.1], 1: [0.2], 2: [0.3]}
    assert whole.rewards == {0: 1.0, 1: 2.0, 2: 3.0}
    assert merged([first]) == first


def trained(run: RunDirectory, processes: int) -> RunDirectory:
    launcher = (
        [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", "-m"] if processes > 1 else [sys.executable, "-m"]
    )
    done = subprocess.run([*launcher, SCRIPT, str(run.path)], capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    return run


@pytest.mark.slow
@pytest.mark.parametrize("method", ["sdft", "supervised"])
def test_two_processes_learn_what_one_learns(tmp_path: Path, tiny_model_dir: Path, method: Literal["sdft", "supervised"]) -> None:
    """Three rows a step: the shares differ in size. Validation and retention are measured once; the anchor's rows are dealt out
    too."""
    one, two = (
        trained(make_run(tmp_path / str(count), tiny_model_dir, method, validation_rows=2, config={"retention": "end"}, anchor_weight=0.1), count)
        for count in (1, 2)
    )
    for run in (one, two):
        result = run.read_result()
        assert result is not None
        assert (result.outcome, result.final_step) == ("succeeded", 8)
        assert result.retention is not None
    (shape, expected), (other_shape, actual) = (read_adapter(run.final_dir) for run in (one, two))
    assert shape == other_shape
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, rtol=2e-3, atol=2e-5, msg=lambda text, name=name: f"{name}: {text}")
    assert any(bool(value.any()) for name, value in expected.items() if name.endswith("lora_B"))
    lines = [records(run.metrics_path) for run in (one, two)]
    assert len(lines[0]) == len(lines[1]) == 8
    for alone, shared in zip(*lines, strict=True):
        assert alone.keys() == shared.keys()
        for name in alone.keys() - TIMINGS - {"retention_seconds"}:
            assert shared[name] == (pytest.approx(alone[name], rel=5e-3, abs=1e-5) if isinstance(alone[name], float) else alone[name]), name
    said = [messages_of(run) for run in (one, two)]
    assert len(said[0]) == len(said[1])
    assert "by 2 processes" in said[1][0]
    if method == "sdft":
        rows = [[rollout["row"] for rollout in records(run.rollouts_dir / "step_000001.jsonl")] for run in (one, two)]
        assert rows[0] == rows[1]


@pytest.mark.slow
def test_a_process_that_fails_ends_them_all_with_a_typed_result(tmp_path: Path, tiny_model_dir: Path) -> None:
    run = make_run(tmp_path / "run", tiny_model_dir)
    run.train_path.write_text("nonsense\n")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m"]
    done = subprocess.run([*launcher, "sdft_engine.train", str(run.path)], capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode != 0
    result = run.read_result()
    assert result is not None
    assert result.error is not None
    assert (result.outcome, result.error["code"]) == ("failed", "invalid_dataset")
