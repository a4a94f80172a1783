"""sdft_engine.collapse_guard on scripted measurements, and on a run whose student is driven into nonsense."""

from pathlib import Path
from typing import Any

import pytest

from sdft_engine import trainer
from sdft_engine.collapse_guard import WINDOW, CollapseGuard
from sdft_engine.contract.errors import Collapsed
from sdft_engine.contract.metrics import StepMetrics
from sdft_engine.rollouts import Rollout
from sdft_engine.session import Session
from sdft_engine.trainer import train
from tests.sdft_engine.runs import make_run, stop_after

HEALTHY = {"student_entropy": 0.7, "train_loss": 1.4, "completion_tokens_mean": 16.0, "clipped_ratio": 0.4}


def metrics(step: int, **changes: Any) -> StepMetrics:
    counts = {"step": step, "total_steps": 100, "epoch": 1.0, "gradient_norm": 1.0, "adapter_norm": 1.0, "learning_rate": 1e-3, "loss_tokens": 9}
    rest = {"trained_tokens": 9, "step_seconds": 1.0, "student_seconds": 1.0, "tokens_per_second": 9.0, "peak_memory_bytes": 1}
    return StepMetrics(**(counts | rest | HEALTHY | changes))


def watched(later: dict[str, Any], early: dict[str, Any] | None = None, teacher: str = "ema", checkpoints: tuple[int, ...] = (8, 16)) -> CollapseGuard:
    """Ten early steps, ten healthy ones, ten of the later kind."""
    guard = CollapseGuard()
    for step in range(1, 3 * WINDOW + 1):
        changes = (early or {}) | (later if step > 2 * WINDOW else {})
        guard.observe(metrics(step, **changes), teacher, [each for each in checkpoints if each < step])
    return guard


@pytest.mark.parametrize(
    ("later", "reason"),
    [
        ({"student_entropy": 3.0}, "entropy rose from 0.70 to 2.77"),
        ({"train_loss": 6.0}, "divergence from the teacher rose from 1.40 to 6.00"),
        ({"completion_tokens_mean": 1.2}, "answers shrank from 16.0 to 1.2 tokens"),
        ({"clipped_ratio": 1.0}, "100% of its answers no longer end, in the beginning 40% did not"),
    ],
)
def test_what_ends_a_run(later: dict[str, Any], reason: str) -> None:
    with pytest.raises(Collapsed, match=reason) as raised:
        watched(later)
    assert raised.value.code == "collapsed"
    assert raised.value.param == "method.sdft.hyperparameters.teacher"
    assert "the checkpoint of step 16 is from before that" in raised.value.message
    assert "frozen" in raised.value.message


@pytest.mark.parametrize(
    ("later", "early"),
    [
        ({"student_entropy": 0.01, "train_loss": 0.002, "completion_tokens_mean": 12.0, "clipped_ratio": 0.0}, {}),  # learning
        ({"student_entropy": 2.0, "train_loss": 4.0}, {}),  # worse, but not beyond the bounds
        ({"completion_tokens_mean": 4.1}, {}),
        ({"completion_tokens_mean": 1.0}, {"completion_tokens_mean": 3.0}),  # answers are one word
        ({"clipped_ratio": 1.0}, {"clipped_ratio": 0.6}),  # it always rambled
        ({"student_entropy": 1.9}, {"student_entropy": 0.1}),  # three times next to nothing is little
        ({"train_loss": 0.9}, {"train_loss": 0.01}),
    ],
)
def test_what_does_not(later: dict[str, Any], early: dict[str, Any]) -> None:
    watched(later, early)


def test_one_bad_step_is_not_enough() -> None:
    guard = watched({})
    guard.observe(metrics(31, train_loss=12.0), "ema", [])


def test_without_an_early_checkpoint_it_says_so_and_the_remedy_is_the_teachers() -> None:
    with pytest.raises(Collapsed, match=r"no checkpoint is from before that\. To avoid it, use the teacher frozen or ema instead of live"):
        watched({"train_loss": 9.0}, teacher="live", checkpoints=(28,))


def test_steps_that_taught_nothing_are_left_out() -> None:
    guard = CollapseGuard()
    for step in range(1, 40):
        guard.observe(metrics(step, student_entropy=None), "ema", [])
    assert guard.early == guard.recent == []


@pytest.mark.parametrize("stopped_at", [None, 7, 15])
def test_a_run_that_collapses_ends_at_the_same_step_whether_resumed_or_not(
    tmp_path: Path, tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch, stopped_at: int | None
) -> None:
    """The scripted student gives answers of eight tokens for ten steps, then of one."""

    def shrinking(session: Session, step: int, rows: list[int]) -> list[Rollout]:
        answer = session.model.chat_format.encode("a lamp, another lamp and a third one")[:8]
        chosen = answer if step <= WINDOW else answer[:1]
        return [Rollout(row, session.texts[row].prompt_ids, session.teacher_prompts[row], chosen, finished=True) for row in rows]

    monkeypatch.setattr(trainer, "rollouts_of_step", shrinking)
    run = make_run(tmp_path / "run", tiny_model_dir, n_epochs=15, checkpoint_every_steps=4)
    if stopped_at is not None:
        assert train(run, stop_after(run, stopped_at, "requeue")).outcome == "stopped"
    with pytest.raises(Collapsed, match=r"at step 20: its answers shrank from 8\.0 to 1\.0 tokens; the checkpoint of step 8 is from before"):
        train(run)
    assert not run.final_dir.exists()
    assert [step for step, _ in run.complete_checkpoints() if step % 4 == 0] == [4, 8, 12, 16]


@pytest.mark.parametrize(
    ("teacher", "remedy"),
    [
        ("live", "the teacher frozen or ema instead of live"),
        ("ema", "the frozen teacher or a smaller ema_rate"),
        ("frozen", "a lower learning_rate or temperature"),
    ],
)
def test_the_remedy_is_the_teachers(teacher: str, remedy: str) -> None:
    with pytest.raises(Collapsed, match=f"To avoid it, use {remedy}"):
        watched({"student_entropy": 3.0}, teacher=teacher)
