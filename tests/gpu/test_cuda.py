"""The engine on a CUDA device: `make gpu` runs these where there is one.

What the CPU tests prove in float64 is compared here once more on the device: decoding, gradients, the optimizer's effect,
checkpoints, memory, and bfloat16 with adapters in float32.
"""

import shutil
from pathlib import Path

import pytest
import torch

from sdft_engine.batching import ScoredText
from sdft_engine.contract.run_directory import RunDirectory
from sdft_engine.generation import decode_all
from sdft_engine.lora import STUDENT, LoraShape, read_adapter
from sdft_engine.model import LanguageModel, load_base_model
from sdft_engine.prompt_cache import PromptCache
from sdft_engine.rollouts import Rollout
from sdft_engine.sampling import Decoding, SamplingParams
from sdft_engine.step import Objective, PassBudget, sdft_gradient
from sdft_engine.teacher import TEACHER
from sdft_engine.trainer import train
from tests.sdft_engine.plain import PlainModel, add_adapter, in_float64, tokens
from tests.sdft_engine.runs import make_run, measured, records, stop_after

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")]

SHAPE = LoraShape(rank=3, alpha=6)
ROLLOUTS = [Rollout(row, tokens(row, 4 + row), tokens(50 + row, 9 + row), tokens(100 + row, 5 + 2 * row), True) for row in range(4)]
MASKS = [[True] * len(rollout.completion_ids) for rollout in ROLLOUTS]


def loaded(model_dir: Path, dtype: str = "float32") -> LanguageModel:
    model = load_base_model(model_dir, device="cuda", dtype=dtype)
    add_adapter(model, STUDENT, seed=1, shape=SHAPE, trainable=True)
    add_adapter(model, TEACHER, seed=2, shape=SHAPE)
    return model


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 2e-3), ("bfloat16", 0.15)])
def test_gradients_equal_those_of_float64_on_the_cpu(tiny_model_dir: Path, dtype: str, tolerance: float) -> None:
    model, plain = loaded(tiny_model_dir, dtype), PlainModel(tiny_model_dir)
    statistics = sdft_gradient(model, ROLLOUTS, MASKS, TEACHER, Objective(), PassBudget(40, 60))
    student, teacher = (in_float64(model.adapters.parameters(name)) for name in (STUDENT, TEACHER))
    student = {name: value.cpu().requires_grad_() for name, value in student.items()}
    teacher = {name: value.cpu() for name, value in teacher.items()}
    means = []
    for each in ROLLOUTS:
        q = plain.completion_logps(each.student_prompt_ids, each.completion_ids, student, SHAPE.scaling)
        p = plain.completion_logps(each.teacher_prompt_ids, each.completion_ids, teacher, SHAPE.scaling)
        means.append((p.exp() * (p - q)).sum(dim=-1).mean())
    loss = torch.stack(means).mean()
    loss.backward()  # type: ignore[no-untyped-call]
    assert statistics.loss == pytest.approx(float(loss), rel=tolerance)
    found = torch.cat([value.grad.cpu().double().flatten() for value in model.adapters.parameters(STUDENT).values() if value.grad is not None])
    expected = torch.cat([value.grad.flatten() for value in student.values() if value.grad is not None])
    assert float((found - expected).norm() / expected.norm()) < tolerance


def test_greedy_answers_are_those_of_the_cpu(tiny_model_dir: Path) -> None:
    answers = []
    for device in ("cuda", "cpu"):
        model = load_base_model(tiny_model_dir, device=device, dtype="float32")
        add_adapter(model, STUDENT, seed=1)
        sequences = [Decoding(tokens(row, 5 + 3 * row), SamplingParams(20, temperature=0.0), STUDENT) for row in range(5)]
        with model.use(STUDENT):
            decode_all(model, sequences, max_batch=3)
        answers.append([sequence.token_ids for sequence in sequences])
    assert answers[0] == answers[1]


def test_kept_prompts_give_the_same_states(tiny_model_dir: Path) -> None:
    model = loaded(tiny_model_dir)
    texts = [ScoredText(tokens(row, 6 + row), tokens(40 + row, 3 + row)) for row in range(3)]
    cache = PromptCache([text.prompt_ids for text in texts])
    with torch.no_grad(), model.adapters.use(TEACHER):
        assert all(cache.keeps(model, row) for row in range(3))
        kept = cache.completion_hidden_states(model, range(3), texts)
        whole = torch.cat([model.hidden_states(torch.tensor([t.prompt_ids + t.completion_ids[:-1]], device="cuda"))[0, len(t.prompt_ids) - 1 :] for t in texts])
    torch.testing.assert_close(kept, whole, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("gradient_checkpointing", [False, True])
def test_a_run_learns_and_writes_everything(tmp_path: Path, tiny_model_dir: Path, dtype: str, gradient_checkpointing: bool) -> None:
    options = {"device": "cuda", "dtype": dtype, "gradient_checkpointing": gradient_checkpointing, "retention": "end"}
    run = make_run(tmp_path / "run", tiny_model_dir, "supervised", config=options, n_epochs=30)
    assert train(run).outcome == "succeeded"
    lines = records(run.metrics_path)
    assert lines[-1]["train_loss"] < 0.7 * lines[0]["train_loss"]
    assert lines[-1]["peak_memory_bytes"] > 0
    _, factors = read_adapter(run.final_dir)
    assert all(value.dtype == torch.float32 for value in factors.values())
    assert all(bool(value.any()) for value in factors.values())


def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path: Path, tiny_model_dir: Path) -> None:
    def run_at(name: str) -> RunDirectory:
        return make_run(tmp_path / name, tiny_model_dir, config={"device": "cuda"})

    whole, stopped = run_at("whole"), run_at("stopped")
    train(whole)
    train(stopped, stop_after(stopped, 5, "requeue"))
    elsewhere = run_at("elsewhere")
    shutil.copytree(stopped.checkpoint_dir(5), elsewhere.resume_dir)
    train(elsewhere)
    for mine, theirs in zip(measured(elsewhere), measured(whole)[5:], strict=True):
        assert mine["train_loss"] == pytest.approx(theirs["train_loss"], rel=1e-3)
    (_, expected), (_, found) = read_adapter(whole.final_dir), read_adapter(elsewhere.final_dir)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-3, atol=1e-5)


def test_memory_does_not_grow_with_positions_times_vocabulary(tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Twice the completions take less than what one more tensor of their logits would."""
    monkeypatch.setattr("sdft_engine.model.CHUNK_ELEMENTS", 512 * 16)
    peaks = []
    for length in (256, 512):
        model = loaded(tiny_model_dir)
        rollouts = [Rollout(row, tokens(row, 8), tokens(50 + row, 8), tokens(row, length), True) for row in range(8)]
        torch.cuda.reset_peak_memory_stats()
        sdft_gradient(model, rollouts, [[True] * length] * 8, TEACHER, Objective(), PassBudget(length + 8, length + 8))
        peaks.append(torch.cuda.max_memory_allocated())
        del model
        torch.cuda.empty_cache()
    assert peaks[1] - peaks[0] < 8 * 256 * 512 * 4
