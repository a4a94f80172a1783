"""sdft_engine.anchor: holding on to the base's own answers, exactly and on questions that measure nothing."""

import json
import re
from pathlib import Path

import pytest
import torch

from sdft_engine import anchor as anchor_module
from sdft_engine.anchor import PROMPTS_PATH, ROWS_OF_STEP, Anchor, read_prompts
from sdft_engine.contract.probes import DEFAULT_PROBES_PATH
from sdft_engine.lora import STUDENT, LoraShape
from sdft_engine.model import LanguageModel
from sdft_engine.ranks import Ranks
from sdft_engine.step import PassBudget
from sdft_engine.trainer import train
from tests.sdft_engine.plain import PlainModel, add_adapter, in_float64
from tests.sdft_engine.recording import watched
from tests.sdft_engine.runs import make_run, records

ALONE = Ranks()
SHAPE = LoraShape(rank=3, alpha=6)
DEMO_PROBES = Path(__file__).resolve().parents[2] / "examples" / "support_facts" / "retention.jsonl"
TINY = PassBudget(student_tokens=90, teacher_tokens=200)


@pytest.fixture(autouse=True)
def few_prompts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "anchor_prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in read_prompts(PROMPTS_PATH)[:6]))
    monkeypatch.setattr(anchor_module, "PROMPTS_PATH", path)
    monkeypatch.setattr(anchor_module, "MAX_ANSWER_TOKENS", 7)


def test_none_of_the_prompts_measures_retention() -> None:
    def plain(text: str) -> str:
        return " ".join(re.findall(r"\w+", text.casefold()))

    prompts = [plain(prompt) for prompt in read_prompts(PROMPTS_PATH)]
    asked = {plain(json.loads(line)["question"]) for path in (DEFAULT_PROBES_PATH, DEMO_PROBES) for line in path.read_text().splitlines()}
    assert len(set(prompts)) == len(prompts) >= 64
    assert asked.isdisjoint(prompts)


@pytest.mark.parametrize("budget", [PassBudget(), TINY])
def test_the_gradient_is_that_of_the_plain_divergence(model: LanguageModel, plain: PlainModel, budget: PassBudget) -> None:
    student = add_adapter(model, STUDENT, seed=1, shape=SHAPE, trainable=True)
    anchor = Anchor(model, 0.7, 3, budget)
    rows = anchor.rows_of(2)
    statistics = anchor.add_gradient(2, ALONE, budget)

    factors = in_float64(student, requires_grad=True)
    divergences = []
    for row in rows:
        text = anchor.texts[row]
        base = plain.completion_logps(text.prompt_ids, text.completion_ids)
        own = plain.completion_logps(text.prompt_ids, text.completion_ids, factors, SHAPE.scaling)
        divergences.append((base.exp() * (base - own)).sum(dim=-1))
    loss = 0.7 * torch.stack([each.mean() for each in divergences]).mean()
    loss.backward()  # type: ignore[no-untyped-call]
    assert statistics.kl == pytest.approx(float(torch.cat(divergences).detach().mean()), rel=1e-4)
    assert statistics.tokens == sum(anchor.texts[row].input_length for row in rows)
    for name, expected in factors.items():
        assert expected.grad is not None
        torch.testing.assert_close(student[name].grad.double(), expected.grad, rtol=2e-3, atol=1e-3 * float(expected.grad.abs().max()))  # type: ignore[union-attr]


def test_the_answers_are_the_bases_greedy_ones_whatever_the_student_is(model: LanguageModel, plain: PlainModel) -> None:
    add_adapter(model, STUDENT, seed=1, trainable=True, strength=0.5)
    for text in Anchor(model, 1.0, 3, PassBudget()).texts:
        likeliest = plain.completion_logps(text.prompt_ids, text.completion_ids).argmax(dim=-1)
        assert likeliest.tolist() == text.completion_ids


def test_a_student_like_the_base_is_not_pulled(model: LanguageModel) -> None:
    student = add_adapter(model, STUDENT, seed=1, trainable=True)
    for name, value in student.items():
        if name.endswith("lora_B"):
            value.data.zero_()
    statistics = Anchor(model, 1.0, 3, PassBudget()).add_gradient(1, ALONE, PassBudget())
    assert statistics.kl == pytest.approx(0, abs=1e-6)
    assert max(float(value.grad.abs().max()) for value in student.values() if value.grad is not None) < 1e-5


def test_every_row_comes_before_any_comes_again(model: LanguageModel) -> None:
    add_adapter(model, STUDENT, seed=1, trainable=True)
    anchor = Anchor(model, 1.0, 3, PassBudget())
    rows = [row for step in range(1, 4) for row in anchor.rows_of(step)]
    assert len(rows) == 3 * ROWS_OF_STEP
    assert sorted(rows[:6]) == sorted(rows[6:]) == list(range(6))
    assert rows != [row for step in range(1, 4) for row in Anchor(model, 1.0, 4, PassBudget()).rows_of(step)]


@pytest.mark.parametrize("method", ["sdft", "supervised"])
def test_an_anchored_run_stays_nearer_to_the_base_and_says_so(method: str, tmp_path: Path, tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    monkeypatch.setattr(Anchor, "add_gradient", watched(Anchor.add_gradient, lambda anchor, step, *_: asked.append(step)))
    last: dict[float, float] = {}
    for weight in (1e-6, 10.0):
        run = make_run(tmp_path / f"{weight}", tiny_model_dir, method, anchor_weight=weight)  # type: ignore[arg-type]
        assert train(run).outcome == "succeeded"
        lines = records(run.metrics_path)
        assert lines[0]["anchor_kl"] == pytest.approx(0, abs=1e-6)  # the student starts as the base
        assert all(line["anchor_seconds"] > 0 for line in lines)
        last[weight] = sum(line["anchor_kl"] for line in lines[-3:]) / 3
    assert last[10.0] < 0.8 * last[1e-6]
    assert asked == [*range(1, 9)] * 2, "every step has rows of its own"


def test_without_a_weight_nothing_is_read(tmp_path: Path, tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr("sdft_engine.session.Anchor")
    run = make_run(tmp_path / "run", tiny_model_dir, "supervised")
    assert train(run).outcome == "succeeded"
    assert all(line["anchor_kl"] is None for line in records(run.metrics_path))
