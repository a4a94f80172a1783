"""sdft_engine.trainer: what a run does, measures and leaves behind."""

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from sdft_engine import trainer
from sdft_engine.contract.errors import NumericalError
from sdft_engine.contract.metrics import StepMetrics
from sdft_engine.contract.probes import ProbeScore, Retention
from sdft_engine.contract.prompts import ChatFormat
from sdft_engine.lora import STUDENT, LoraShape, read_adapter
from sdft_engine.session import open_session
from sdft_engine.teacher import PRODUCT_STATE, TEACHER
from sdft_engine.token_statistics import TokenStatistics
from sdft_engine.trainer import train
from tests.sdft_engine.plain import PlainModel, in_float64
from tests.sdft_engine.recording import watched
from tests.sdft_engine.runs import content_of, example, make_parent, make_run, measured, messages_of, records


def test_supervised_training_learns_its_demonstrations(tmp_path: Path, tiny_model_dir: Path) -> None:
    """The random model's frozen head can't be surer than a loss of about 1.9."""
    run = make_run(tmp_path / "run", tiny_model_dir, "supervised", rows=2, batch_size=2, n_epochs=20, lora_rank=16, lora_alpha=32, checkpoint_every_steps=100)
    result = train(run)
    lines = records(run.metrics_path)
    assert (result.outcome, result.final_step, result.total_steps) == ("succeeded", 20, 20)
    assert lines[0]["train_loss"] > 6
    assert lines[-1]["train_loss"] < 2.5
    assert lines[0]["train_mean_token_accuracy"] < 0.1
    assert lines[-1]["train_mean_token_accuracy"] > 0.6


@pytest.mark.parametrize("divergence", ["forward", "reverse"])
def test_self_distillation_moves_the_student_to_its_teacher(tmp_path: Path, tiny_model_dir: Path, divergence: str) -> None:
    run = make_run(
        tmp_path / "run",
        tiny_model_dir,
        rows=4,
        batch_size=4,
        n_epochs=20,
        learning_rate=2e-2,
        divergence=divergence,
        teacher="frozen",
        checkpoint_every_steps=100,
        config={"rollout_sample_every_steps": 10},
    )
    assert train(run).outcome == "succeeded"
    losses = [record["train_loss"] for record in records(run.metrics_path)]
    assert sum(losses[-5:]) < 0.7 * sum(losses[:5])
    rewards = [record["implicit_reward"] for record in records(run.metrics_path)]
    assert all(math.isfinite(reward) for reward in rewards)
    assert sorted(path.name for path in run.rollouts_dir.iterdir()) == [f"step_{step:06d}.jsonl" for step in (1, 10, 20)]


def test_what_a_run_measures_and_leaves(tmp_path: Path, tiny_model_dir: Path) -> None:
    run = make_run(tmp_path / "run", tiny_model_dir, rows=5, validation_rows=2, batch_size=3, n_epochs=2, checkpoint_every_steps=3)
    result = train(run)
    lines = records(run.metrics_path)
    metrics = [StepMetrics.model_validate(line) for line in lines]
    assert [m.step for m in metrics] == [1, 2, 3, 4]
    assert {m.total_steps for m in metrics} == {4}
    assert [m.epoch for m in metrics] == pytest.approx([0.6, 1.2, 1.8, 2.0])  # the last batch has one row
    assert [m.valid_loss is not None for m in metrics] == [m.valid_mean_token_accuracy is not None for m in metrics] == [False, False, True, True]
    assert result.trained_tokens == sum(m.trained_tokens for m in metrics)
    for m in metrics:
        assert m.gradient_norm > 0
        assert m.adapter_norm > 0
        assert m.divergence_max is not None
        assert m.divergence_max >= m.train_loss > 0
        assert m.student_entropy is not None
        assert 0 < m.student_entropy < math.log(512)
        assert m.completion_tokens_mean is not None
        assert 1 <= m.completion_tokens_mean <= 8
        assert m.clipped_ratio == pytest.approx(1 - (m.eos_ratio or 0))
        assert m.step_seconds >= (m.rollout_seconds or 0) + (m.teacher_seconds or 0) + m.student_seconds
        assert m.tokens_per_second == pytest.approx(m.trained_tokens / m.step_seconds, rel=0.01)
        assert m.peak_memory_bytes > 50_000_000
    assert [step for step, _ in run.complete_checkpoints()] == [3]
    assert sorted(path.name for path in run.final_dir.iterdir()) == ["adapter_config.json", "adapter_model.safetensors", "attestation.json", "manifest.json"]
    assert messages_of(run) == ["Training started on cpu in float32: 4 steps of 3"]
    assert not run.result_path.exists()  # its caller writes it


def test_the_metrics_of_a_step_follow_from_its_rollouts(tmp_path: Path, tiny_model_dir: Path) -> None:
    run = make_run(tmp_path / "run", tiny_model_dir, rows=8, batch_size=8, n_epochs=3, max_completion_tokens=150, config={"rollout_sample_every_steps": 1})
    train(run)
    for measured_step in records(run.metrics_path):
        rollouts = records(run.rollouts_dir / f"step_{measured_step['step']:06d}.jsonl")
        assert sorted(rollout["row"] for rollout in rollouts) == list(range(8))  # one answer a prompt
        values = [rollout["per_token_divergence"] for rollout in rollouts]
        skipped = [min(1, len(each) // 4) for each in values]
        counted = [each[skip:] for each, skip in zip(values, skipped, strict=True)]
        first = [value for each, skip in zip(values, skipped, strict=True) for value in each[:skip]]
        assert measured_step["train_loss"] == pytest.approx(sum(sum(each) / len(each) for each in counted) / 8, rel=1e-3)
        assert measured_step["divergence_first_tokens"] == pytest.approx(sum(first) / len(first), rel=1e-3)
        assert measured_step["divergence_max"] == pytest.approx(max(map(max, counted)), rel=1e-3)
        assert measured_step["loss_tokens"] == sum(map(len, counted))
        assert measured_step["completion_tokens_mean"] == sum(map(len, values)) / 8
        assert measured_step["implicit_reward"] == pytest.approx(sum(rollout["implicit_reward"] for rollout in rollouts) / 8, abs=1e-4)
        assert measured_step["rollout_tokens_per_second"] == pytest.approx(sum(map(len, values)) / measured_step["rollout_seconds"])
        assert measured_step["teacher_tokens_per_second"] > 0 < measured_step["student_tokens_per_second"]
        assert measured_step["eos_ratio"] == sum(rollout["finished"] for rollout in rollouts) / 8
        assert measured_step["clipped_ratio"] == sum(len(each) == 150 and not r["finished"] for each, r in zip(values, rollouts, strict=True)) / 8


def test_the_distance_from_the_base_is_measured_where_rollouts_are_written(tmp_path: Path, tiny_model_dir: Path, plain: PlainModel) -> None:
    run = make_run(tmp_path / "run", tiny_model_dir, n_epochs=2, config={"rollout_sample_every_steps": 3}, checkpoint_every_steps=2, warmup_ratio=0.0)
    train(run)
    distances = [record["kl_from_base"] for record in records(run.metrics_path)]
    assert distances[0] == pytest.approx(0, abs=1e-6)  # the student starts as the base
    assert [value is None for value in distances] == [False, True, False, True]
    _, values = read_adapter(run.checkpoint_dir(2))
    student, total, count = in_float64(values), 0.0, 0
    chat = ChatFormat.from_directory(tiny_model_dir)
    for rollout in records(run.rollouts_dir / "step_000003.jsonl"):
        prompt = chat.prompt_ids(example(rollout["row"])["messages"][:1])
        ids = [chat.tokenizer.token_to_id(token) for token in rollout["tokens"]]
        q, p = plain.completion_logps(prompt, ids, student, 2.0), plain.completion_logps(prompt, ids)
        total += float((q.exp() * (q - p)).sum())
        count += len(ids)
    assert distances[2] == pytest.approx(total / count, rel=1e-3)


@pytest.mark.parametrize("threads", [1, 2])
def test_the_same_seed_repeats_a_run_and_another_does_not(tmp_path: Path, tiny_model_dir: Path, threads: int) -> None:
    runs = [make_run(tmp_path / str(index), tiny_model_dir, config={"seed": seed, "threads": threads}) for index, seed in enumerate([17, 17, 18])]
    for run in runs:
        train(run)
    assert measured(runs[0]) == measured(runs[1]) != measured(runs[2])
    assert content_of(runs[0].final_dir) == content_of(runs[1].final_dir)
    torch.set_num_threads(1)


def test_updates_use_the_clipped_gradient_and_the_planned_learning_rate(tmp_path: Path, tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make_run(tmp_path / "run", tiny_model_dir, "supervised", n_epochs=2, max_grad_norm=0.01, warmup_ratio=0.5)
    norms: list[float] = []
    rates: list[float] = []

    def observe(optimizer: torch.optim.AdamW) -> None:
        (group,) = optimizer.param_groups
        norms.append(math.sqrt(sum(float(parameter.grad.square().sum()) for parameter in group["params"])))
        rates.append(group["lr"])

    monkeypatch.setattr(torch.optim.AdamW, "step", watched(torch.optim.AdamW.step, observe))
    train(run)
    lines = records(run.metrics_path)
    assert norms == pytest.approx([0.01] * 4, rel=1e-3)
    assert all(line["gradient_norm"] > 0.02 for line in lines)  # as it was before
    assert rates == [line["learning_rate"] for line in lines] == pytest.approx([0.005, 0.01, 0.01, 0.005])


def test_the_teacher_follows_every_step(tmp_path: Path, tiny_model_dir: Path) -> None:
    run = make_run(tmp_path / "run", tiny_model_dir, n_epochs=2, checkpoint_every_steps=1, ema_rate=0.3)
    phi = {name: value.double() for name, value in open_session(run).model.adapters.parameters(TEACHER).items()}
    train(run)
    for step in range(1, 5):
        student = load_file(run.checkpoint_dir(step) / "adapter_model.safetensors")
        teacher = load_file(run.checkpoint_dir(step) / "teacher.safetensors")
        assert bool(teacher.pop(PRODUCT_STATE).any())
        for name, value in teacher.items():
            phi[name] = 0.7 * phi[name] + 0.3 * student[f"base_model.model.{name}.weight"].double()
            torch.testing.assert_close(value.double(), phi[name], rtol=0, atol=1e-7)
            assert step < 2 or not torch.equal(value, student[f"base_model.model.{name}.weight"])  # A stays in the first: B is zero then
    final = load_file(run.final_dir / "adapter_model.safetensors")
    assert all(torch.equal(value, student[name]) for name, value in final.items()), "what is left is the student"


def test_validation_and_norm_are_those_of_the_student(tmp_path: Path, tiny_model_dir: Path, plain: PlainModel) -> None:
    run = make_run(tmp_path / "run", tiny_model_dir, validation_rows=2, n_epochs=1, checkpoint_every_steps=2, warmup_ratio=0.0)
    train(run)
    _, values = read_adapter(run.checkpoint_dir(2))
    student, chat = in_float64(values), ChatFormat.from_directory(tiny_model_dir)
    losses: list[float] = []
    for messages in (line["messages"] for line in records(run.validation_path)):
        prompt, answer = chat.prompt_ids(messages[:1]), chat.encode(messages[1]["content"] + "<|im_end|>")
        losses += (-plain.completion_logps(prompt, answer, student, 2.0).gather(1, torch.tensor(answer)[:, None])[:, 0]).tolist()
    last = records(run.metrics_path)[-1]
    assert last["valid_loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-4)
    assert last["adapter_norm"] == pytest.approx(math.sqrt(sum(float(value.square().sum()) for value in student.values())), rel=1e-5)


def test_the_optimizer_is_adamw_as_published(tmp_path: Path, tiny_model_dir: Path) -> None:
    """Decoupled weight decay, and the usual betas (arXiv 1711.05101)."""
    session = open_session(make_run(tmp_path / "run", tiny_model_dir, weight_decay=0.25))
    assert isinstance(session.optimizer, torch.optim.AdamW)
    (group,) = session.optimizer.param_groups
    assert (group["betas"], group["eps"], group["weight_decay"]) == ((0.9, 0.999), 1e-8, 0.25)


def test_retention_metrics_by_hand(tmp_path: Path, tiny_model_dir: Path) -> None:
    """Of ten questions the base answers five; the model answers six, four of them among those five."""
    session = open_session(make_run(tmp_path / "run", tiny_model_dir, config={"retention": "end"}))
    session.state.step = session.total_steps
    measured = Retention(step=8, kl_from_base=0.25, probes={"facts": ProbeScore(n=10, right=6, low=0.3, high=0.8, base_right=5, kept=4)})
    session.retention_probe = SimpleNamespace(questions=[], measure=lambda step, **options: measured)  # type: ignore[assignment]
    found = trainer.measure_retention(session)
    assert (found["retention_accuracy"], found["retention_kept"], found["retention_kl_from_base"]) == (0.6, 0.8, 0.25)


def test_steps_without_a_loss_token_end_the_run_with_the_remedy(tmp_path: Path, tiny_model_dir: Path) -> None:
    """All rollouts are cut off after one token and masked. Neither weight decay nor an anchor may move the adapter meanwhile."""
    settings = {"n_epochs": 30, "max_completion_tokens": 1, "mask_clipped_completions": True, "weight_decay": 0.5, "anchor_weight": 1.0}
    run = make_run(tmp_path / "run", tiny_model_dir, checkpoint_every_steps=3, **settings)
    with pytest.raises(NumericalError, match="raise max_completion_tokens, or set mask_clipped_completions to false") as raised:
        train(run)
    assert raised.value.param == "method.sdft.hyperparameters.max_completion_tokens"
    (warning,) = messages_of(run, "warn")
    assert "Step 1 taught nothing" in warning
    lines = records(run.metrics_path)
    assert len(lines) == trainer.BARREN_STEPS - 1
    assert {(line["loss_tokens"], line["train_loss"], line["gradient_norm"], line["student_entropy"]) for line in lines} == {(0, 0.0, 0.0, None)}
    assert len({line["adapter_norm"] for line in lines}) == 1
    first, last = (load_file(run.checkpoint_dir(step) / "teacher.safetensors") for step in (3, 9))
    assert all(torch.equal(value, last[name]) for name, value in first.items())


def test_a_short_run_that_taught_nothing_is_no_success(tmp_path: Path, tiny_model_dir: Path) -> None:
    run = make_run(tmp_path / "run", tiny_model_dir, n_epochs=2, max_completion_tokens=1, mask_clipped_completions=True)
    with pytest.raises(NumericalError, match=r"no step taught anything: .* raise max_completion_tokens"):
        train(run)
    assert not run.final_dir.exists()


def test_one_step_with_a_loss_token_starts_the_count_anew(tmp_path: Path, tiny_model_dir: Path) -> None:
    run = make_run(tmp_path / "run", tiny_model_dir)
    session = open_session(run)
    for tokens in [0] * 9 + [1] + [0] * 9:
        trainer.watch_barren_steps(session, TokenStatistics(loss_tokens=tokens))
    with pytest.raises(NumericalError):
        trainer.watch_barren_steps(session, TokenStatistics())
    assert len(messages_of(run, "warn")) == 2


@pytest.mark.parametrize("method", ["sdft", "supervised"])
def test_numbers_that_are_not_finite_end_the_run_before_they_reach_the_weights(tmp_path: Path, tiny_model_dir: Path, method: Any) -> None:
    run = make_run(tmp_path / "run", tiny_model_dir, method, checkpoint_every_steps=1)
    make_parent(run, tiny_model_dir, LoraShape(4, 8), strength=1e25)
    with pytest.raises(NumericalError, match="not finite at step 1") as raised:
        train(run)
    assert raised.value.param == "learning_rate"
    assert not run.metrics_path.exists()
    assert run.complete_checkpoints() == []


def test_weights_that_are_not_finite_end_the_run_with_what_to_change(tmp_path: Path, tiny_model_dir: Path) -> None:
    run = make_run(tmp_path / "run", tiny_model_dir, "supervised", learning_rate=1e30, warmup_ratio=0.0)
    with pytest.raises(NumericalError, match=r"not finite (after|at) step \d+; lower learning_rate") as raised:
        train(run)
    assert raised.value.param == "learning_rate"


def test_a_gradient_that_is_not_finite_ends_the_run_too(tmp_path: Path, tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make_run(tmp_path / "run", tiny_model_dir, "supervised")

    def infinite(model: Any, *_: Any) -> TokenStatistics:
        for parameter in model.adapters.parameters(STUDENT).values():
            parameter.grad = torch.full_like(parameter, math.inf)
        return TokenStatistics(loss=1.0, loss_tokens=1)

    monkeypatch.setattr(trainer, "supervised_gradient", infinite)
    with pytest.raises(NumericalError, match="not finite at step 1"):
        train(run)
