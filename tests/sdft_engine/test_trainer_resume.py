"""A run that is interrupted and resumed equals one that is not, bit for bit."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from sdft_engine import session, trainer
from sdft_engine.contract.errors import CheckpointDamaged, NumericalError
from sdft_engine.contract.run_directory import RunDirectory
from sdft_engine.trainer import train
from tests.sdft_engine.recording import watched
from tests.sdft_engine.runs import content_of, make_run, measured, messages_of, records, steps_done, stop_after

KINDS: dict[str, dict[str, Any]] = {
    "sdft_ema": {"method": "sdft"},
    "sdft_frozen": {"method": "sdft", "teacher": "frozen", "divergence": "reverse"},
    "sdft_live": {"method": "sdft", "teacher": "live"},
    "sdft_automatic_temperature": {"method": "sdft", "temperature": "auto", "weight_decay": 0.01},
    "sdft_anchored": {"method": "sdft", "anchor_weight": 0.5},
    "sdft_narrow": {
        "method": "sdft",
        "estimator": "top_k",
        "top_k": 9,
        "mask_clipped_completions": "auto",
        "config": {"dtype": "bfloat16", "gradient_checkpointing": True, "tokens_per_pass": 100},
    },
    "supervised": {"method": "supervised"},
}
MACHINE_DEPENDENT = ("metrics.json", "manifest.json")


@pytest.fixture(scope="module", params=KINDS)
def kind(request: pytest.FixtureRequest) -> dict[str, Any]:
    return KINDS[request.param]


@pytest.fixture(scope="module")
def uninterrupted(kind: dict[str, Any], tmp_path_factory: pytest.TempPathFactory, tiny_model_dir: Path) -> RunDirectory:
    run = make_run(tmp_path_factory.mktemp("uninterrupted") / "run", tiny_model_dir, validation_rows=2, **kind)
    assert train(run).outcome == "succeeded"
    return run


def assert_same_files(run: RunDirectory, expected: RunDirectory) -> None:
    assert content_of(run.final_dir) == content_of(expected.final_dir)
    mine, theirs = (content_of(each.checkpoint_dir(8), without=MACHINE_DEPENDENT) for each in (run, expected))
    assert mine == theirs
    assert mine.keys() > {"adapter_model.safetensors", "optimizer.safetensors", "teacher.safetensors", "training_state.json"}


def test_stopped_after_five_steps_and_resumed(kind: dict[str, Any], uninterrupted: RunDirectory, tmp_path: Path, tiny_model_dir: Path) -> None:
    run = make_run(tmp_path / "stopped", tiny_model_dir, validation_rows=2, **kind)
    first = train(run, stop_after(run, 5, "requeue"))
    assert (first.outcome, first.stop, first.final_step, first.total_steps) == ("stopped", "requeue", 5, 8)
    assert [step for step, _ in run.complete_checkpoints()] == [4, 5]
    assert not run.final_dir.exists()
    second = train(run)
    assert (second.outcome, second.final_step) == ("succeeded", 8)
    assert [record["step"] for record in records(run.metrics_path)] == [1, 2, 3, 4, 5, 6, 7, 8]
    assert "Training resumed at step 5" in messages_of(run)
    assert measured(run) == measured(uninterrupted)
    assert_same_files(run, uninterrupted)


def test_killed_in_the_middle_and_continued_elsewhere(kind: dict[str, Any], uninterrupted: RunDirectory, tmp_path: Path, tiny_model_dir: Path) -> None:
    """Another attempt has another directory, and the last checkpoint in `resume/`."""
    killed = make_run(tmp_path / "killed", tiny_model_dir, validation_rows=2, **kind)

    def kill_after_six_steps() -> None:
        if steps_done(killed) == 6:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(killed, kill_after_six_steps)
    assert [record["step"] for record in records(killed.metrics_path)] == [1, 2, 3, 4, 5, 6]
    run = make_run(tmp_path / "elsewhere", tiny_model_dir, validation_rows=2, **kind)
    shutil.copytree(killed.checkpoint_dir(4), run.resume_dir)
    result = train(run)
    assert (result.outcome, result.final_step) == ("succeeded", 8)
    assert [record["step"] for record in records(run.metrics_path)] == [5, 6, 7, 8]
    assert measured(run) == measured(uninterrupted)[4:]
    assert_same_files(run, uninterrupted)


def test_a_resumed_run_counts_tokens_from_where_it_was(tmp_path: Path, tiny_model_dir: Path) -> None:
    run = make_run(tmp_path / "run", tiny_model_dir)
    train(run, stop_after(run, 3, "pause"))
    result = train(run)
    assert result.trained_tokens == sum(record["trained_tokens"] for record in records(run.metrics_path)) > 0


def test_steps_that_taught_nothing_are_counted_over_attempts(tmp_path: Path, tiny_model_dir: Path) -> None:
    run = make_run(tmp_path / "run", tiny_model_dir, n_epochs=30, max_completion_tokens=1, mask_clipped_completions=True)
    train(run, stop_after(run, 6, "requeue"))
    with pytest.raises(NumericalError, match="10 steps in a row"):
        train(run)
    assert steps_done(run) == 9


def test_a_settled_temperature_is_not_measured_again(tmp_path: Path, tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make_run(tmp_path / "run", tiny_model_dir, temperature="auto")
    train(run, stop_after(run, 2, "requeue"))
    (settled,) = [event for event in records(run.events_path) if "Temperature" in event["message"]]
    tau = settled["data"]["resolved"]["temperature"]
    assert tau in (0.5, 0.65, 0.8, 1.0)
    monkeypatch.delattr(session, "automatic_temperature")
    train(run)
    assert f'"temperature": {tau}' in (run.checkpoint_dir(8) / "training_state.json").read_text()


@pytest.mark.parametrize(("reason", "checkpoints"), [("pause", [3]), ("requeue", [3]), ("cancel", [])])
def test_only_a_cancelled_run_stops_without_a_checkpoint(reason: Any, checkpoints: list[int], tmp_path: Path, tiny_model_dir: Path) -> None:
    run = make_run(tmp_path / "run", tiny_model_dir)
    result = train(run, stop_after(run, 3, reason))
    assert (result.outcome, result.stop, result.final_step) == ("stopped", reason, 3)
    assert [step for step, _ in run.complete_checkpoints()] == checkpoints


@pytest.mark.parametrize("steps", [0, 4])
def test_a_stop_with_nothing_new_writes_no_checkpoint(steps: int, tmp_path: Path, tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before the first step, or right after a regular checkpoint."""
    run = make_run(tmp_path / "run", tiny_model_dir)
    written: list[int] = []
    monkeypatch.setattr(trainer, "write_checkpoint", watched(trainer.write_checkpoint, lambda opened, metrics: written.append(metrics.step)))
    assert train(run, stop_after(run, steps, "requeue")).final_step == steps
    assert written == ([4] if steps else [])


def test_a_stop_asked_for_during_the_last_step_lets_the_run_succeed(tmp_path: Path, tiny_model_dir: Path) -> None:
    run = make_run(tmp_path / "run", tiny_model_dir, "supervised")
    assert train(run, stop_after(run, 8, "cancel")).outcome == "succeeded"


def test_a_damaged_checkpoint_is_not_trained_on(tmp_path: Path, tiny_model_dir: Path) -> None:
    run = make_run(tmp_path / "run", tiny_model_dir, "supervised")
    train(run, stop_after(run, 2, "requeue"))
    optimizer = run.checkpoint_dir(2) / "optimizer.safetensors"
    optimizer.write_bytes(optimizer.read_bytes()[:-1])
    with pytest.raises(CheckpointDamaged, match=r"optimizer\.safetensors"):
        train(run)
    assert len(records(run.metrics_path)) == 2


@pytest.mark.parametrize(("n_epochs", "most", "remembered"), [(4, 1 << 20, 6), (1, 1 << 20, 0), (4, 6 * 8 - 1, 0)])
def test_answers_are_remembered_where_they_will_be_drafts(
    n_epochs: int, most: int, remembered: int, tmp_path: Path, tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session, "MOST_REMEMBERED_TOKENS", most)
    run = make_run(tmp_path / "run", tiny_model_dir, n_epochs=n_epochs, checkpoint_every_steps=2, config={"rollout_sample_every_steps": 1})
    train(run)
    state = json.loads((run.checkpoint_dir(2) / "training_state.json").read_text())
    assert len(state["last_answers"]) == remembered
    if remembered:
        last = {str(record["row"]): len(record["tokens"]) for step in (1, 2) for record in records(run.rollouts_dir / f"step_{step:06d}.jsonl")}
        assert {row: len(ids) for row, ids in state["last_answers"].items()} == last


def test_what_was_kept_is_measured_by_the_attempt_that_ends_the_run(tmp_path: Path, tiny_model_dir: Path) -> None:
    """Also where the one that took the last step died before it could say so."""
    first = make_run(tmp_path / "first", tiny_model_dir, config={"retention": "end"})
    expected = train(first)
    assert expected.retention is not None
    run = make_run(tmp_path / "elsewhere", tiny_model_dir, config={"retention": "end"})
    shutil.copytree(first.checkpoint_dir(8), run.resume_dir)
    result = train(run)
    assert steps_done(run) == 0
    assert result.retention == expected.retention


@pytest.mark.parametrize(
    ("began_in", "is_faster", "goes_on_in", "warns"),
    [("float32", "bfloat16", "float32", False), ("float32", "float32", "float32", False), ("bfloat16", "float32", "float32", True)],
)
def test_a_resumed_run_keeps_its_precision(
    tmp_path: Path, tiny_model_dir: Path, began_in: str, is_faster: str, goes_on_in: str, warns: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever is faster where it goes on; but a CPU that is slow with bfloat16 may be hundreds of times so."""
    first = make_run(tmp_path / "first", tiny_model_dir, config={"dtype": began_in})
    train(first, stop_after(first, 5, "requeue"))
    assert json.loads((first.checkpoint_dir(5) / "training_state.json").read_text())["dtype"] == began_in
    run = make_run(tmp_path / "elsewhere", tiny_model_dir, config={"dtype": "auto"})
    shutil.copytree(first.checkpoint_dir(5), run.resume_dir)
    monkeypatch.setattr(session, "choose_dtype", lambda dtype, device: getattr(torch, is_faster))
    opened = session.open_session(run)
    assert opened.model.dtype == getattr(torch, goes_on_in)
    assert opened.state.dtype == goes_on_in
    assert [message for message in messages_of(run, "warn") if "goes on in float32, because bfloat16 is slow here" in message] == messages_of(run, "warn")
    assert bool(messages_of(run, "warn")) is warns
