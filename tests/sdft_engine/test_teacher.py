"""sdft_engine.teacher: where it starts, how it follows, and the temperature that it allows."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from sdft_engine import teacher as teacher_module
from sdft_engine.batching import ScoredText
from sdft_engine.lora import STUDENT, LoraShape
from sdft_engine.model import LanguageModel
from sdft_engine.teacher import KEPT_PROBABILITY, TEACHER, TEMPERATURES, Teacher, automatic_temperature
from tests.sdft_engine.plain import PlainModel, add_adapter, in_float64, randomise, tokens

ROWS = torch.tensor([tokens(seed, 12) for seed in range(3)])


def factors_of(model: LanguageModel, name: str) -> dict[str, Tensor]:
    return {key: value.detach().clone() for key, value in model.adapters.parameters(name).items()}


def logits_of(model: LanguageModel, adapter: str | None) -> Tensor:
    with torch.no_grad(), model.adapters.use(adapter):
        return model.logits(model.hidden_states(ROWS))


@pytest.mark.parametrize("kind", ["ema", "frozen"])
def test_starts_as_an_exact_copy_of_the_student(model: LanguageModel, kind: Any) -> None:
    add_adapter(model, STUDENT, seed=1, trainable=True, shape=LoraShape(3, 5))
    teacher = Teacher(model, kind, 0.02, "parent")
    assert teacher.adapter == TEACHER
    assert model.adapters.shapes[TEACHER] == LoraShape(3, 5)
    student = model.adapters.parameters(STUDENT)
    for name, value in model.adapters.parameters(TEACHER).items():
        assert torch.equal(value, student[name])
        assert value.data_ptr() != student[name].data_ptr()
        assert not value.requires_grad
    assert torch.equal(logits_of(model, TEACHER), logits_of(model, STUDENT))


def test_a_teacher_that_starts_from_the_base_has_no_effect(model: LanguageModel) -> None:
    add_adapter(model, STUDENT, seed=1, trainable=True)
    teacher = Teacher(model, "ema", 0.5, "base")
    assert torch.equal(logits_of(model, TEACHER), logits_of(model, None))
    assert not torch.equal(logits_of(model, TEACHER), logits_of(model, STUDENT))
    teacher.follow()
    assert not torch.equal(logits_of(model, TEACHER), logits_of(model, None))


def test_a_live_teacher_is_the_student(model: LanguageModel) -> None:
    add_adapter(model, STUDENT, seed=1, trainable=True)
    teacher = Teacher(model, "live", 0.02, "parent")
    before = factors_of(model, STUDENT)
    teacher.follow()
    assert teacher.adapter == STUDENT
    assert list(model.adapters.shapes) == [STUDENT]
    assert all(torch.equal(value, before[name]) for name, value in factors_of(model, STUDENT).items())
    assert teacher.state() == {}
    teacher.restore({})


def test_a_frozen_teacher_stays(model: LanguageModel) -> None:
    add_adapter(model, STUDENT, seed=1, trainable=True)
    teacher = Teacher(model, "frozen", 0.02, "parent")
    before = factors_of(model, TEACHER)
    for seed in range(3):
        randomise(model.adapters, STUDENT, seed=seed)
        teacher.follow()
    assert all(torch.equal(value, before[name]) for name, value in factors_of(model, TEACHER).items())


@pytest.mark.parametrize("rate", [0.02, 0.05, 0.5])
def test_the_recurrence_is_exact_over_many_steps(model: LanguageModel, rate: float) -> None:
    """phi_k = (1 - a)^k phi_0 + sum_j a (1 - a)^(k - j) theta_j, factor by factor."""
    add_adapter(model, STUDENT, seed=100, trainable=True)
    teacher = Teacher(model, "ema", rate, "parent")
    steps = 12
    expected = {name: value * (1 - rate) ** steps for name, value in in_float64(model.adapters.parameters(TEACHER)).items()}
    for step in range(1, steps + 1):
        randomise(model.adapters, STUDENT, seed=step)
        for name, theta in in_float64(model.adapters.parameters(STUDENT)).items():
            expected[name] = expected[name] + rate * (1 - rate) ** (steps - step) * theta
        student = factors_of(model, STUDENT)
        teacher.follow()
        assert all(torch.equal(value, student[name]) for name, value in factors_of(model, STUDENT).items())
    for name, phi in model.adapters.parameters(TEACHER).items():
        torch.testing.assert_close(phi.detach().double(), expected[name], rtol=0, atol=1e-7)


def test_factors_are_averaged_and_not_the_product(model: LanguageModel) -> None:
    """The average of the factors has another product than the average of the products: this is the one that is meant."""
    add_adapter(model, STUDENT, seed=1, trainable=True)
    teacher = Teacher(model, "ema", 0.5, "parent")
    module = next(iter(model.adapters.layers))
    a0, b0 = (factors_of(model, TEACHER)[f"{module}.{factor}"] for factor in ("lora_A", "lora_B"))
    randomise(model.adapters, STUDENT, seed=2)
    a1, b1 = (factors_of(model, STUDENT)[f"{module}.{factor}"] for factor in ("lora_A", "lora_B"))
    teacher.follow()
    after = factors_of(model, TEACHER)
    product = after[f"{module}.lora_B"] @ after[f"{module}.lora_A"]
    torch.testing.assert_close(product, (b0 + b1) @ (a0 + a1) / 4)
    assert (product - (b0 @ a0 + b1 @ a1) / 2).abs().max() > 1e-3


def test_the_gap_to_the_average_of_the_products_is_exact(model: LanguageModel) -> None:
    add_adapter(model, STUDENT, seed=1, trainable=True)
    teacher = Teacher(model, "ema", 0.3, "parent")
    assert teacher.ema_gap() == pytest.approx(0, abs=1e-7)

    def product(adapter: str) -> Tensor:
        factors = in_float64(model.adapters.parameters(adapter))
        return factors[f"{teacher.watched}.lora_B"] @ factors[f"{teacher.watched}.lora_A"]

    mean = product(TEACHER)
    for seed in range(2, 6):
        randomise(model.adapters, STUDENT, seed=seed)
        mean = 0.7 * mean + 0.3 * product(STUDENT)
        teacher.follow()
    gap = teacher.ema_gap()
    assert gap == pytest.approx(float((product(TEACHER) - mean).norm() / mean.norm()), rel=1e-4)
    assert gap > 0.1


def test_the_gap_is_watched_in_one_of_the_smallest_layers(model: LanguageModel) -> None:
    add_adapter(model, STUDENT, seed=1, trainable=True)
    layers = model.adapters.layers
    watched = layers[Teacher(model, "ema", 0.3, "parent").watched].base.weight
    assert watched.numel() == min(layer.base.weight.numel() for layer in layers.values())


@pytest.mark.parametrize(("kind", "start"), [("frozen", "parent"), ("live", "parent"), ("ema", "base")])
def test_there_is_no_gap_where_nothing_is_averaged_or_everything_is_zero(model: LanguageModel, kind: Any, start: Any) -> None:
    add_adapter(model, STUDENT, seed=1, trainable=True)
    assert Teacher(model, kind, 0.3, start).ema_gap() is None


def test_factors_are_matched_by_name_and_not_by_position(model: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """q_proj and o_proj have the same shape, so a pairing by position would go wrong without an error."""
    add_adapter(model, STUDENT, seed=1, trainable=True)
    teacher = Teacher(model, "ema", 0.25, "parent")
    randomise(model.adapters, STUDENT, seed=2)
    old, new = in_float64(model.adapters.parameters(TEACHER)), in_float64(model.adapters.parameters(STUDENT))
    parameters = model.adapters.parameters
    backwards = {STUDENT: lambda items: dict(reversed(items)), TEACHER: dict}
    monkeypatch.setattr(model.adapters, "parameters", lambda name: backwards[name](list(parameters(name).items())))
    teacher.follow()
    for name, value in parameters(TEACHER).items():
        torch.testing.assert_close(value.detach().double(), 0.75 * old[name] + 0.25 * new[name], rtol=0, atol=1e-7)


def test_two_thousand_tiny_updates_move_the_teacher_of_a_bfloat16_base(bfloat16_model: LanguageModel) -> None:
    """Each moves it by 0.01% of the distance, far below what bfloat16 can hold."""
    model, rate, steps = bfloat16_model, 1e-4, 2000
    add_adapter(model, STUDENT, seed=1, trainable=True, strength=1.0)
    teacher = Teacher(model, "ema", rate, "parent")
    start = in_float64(model.adapters.parameters(TEACHER))
    for value in model.adapters.parameters(STUDENT).values():
        value.data += 0.1
    for _ in range(steps):
        teacher.follow()
    moved = 0.1 * (1 - (1 - rate) ** steps)  # 0.0181
    for name, value in model.adapters.parameters(TEACHER).items():
        assert value.dtype == torch.float32
        assert float((value.detach().double() - start[name] - moved).abs().max()) < 0.02 * moved


def test_the_state_restores_a_teacher(model: LanguageModel) -> None:
    add_adapter(model, STUDENT, seed=1, trainable=True)
    teacher = Teacher(model, "ema", 0.02, "parent")
    saved = {name: value.clone() for name, value in teacher.state().items()}
    for seed in range(2, 5):
        randomise(model.adapters, STUDENT, seed=seed)
        teacher.follow()
    assert all(not torch.equal(value, saved[name]) for name, value in teacher.state().items())
    teacher.restore(dict(reversed(saved.items())))
    assert all(torch.equal(value, saved[name]) for name, value in teacher.state().items())


def scripted(logits_by_token: dict[int, list[float]]) -> Any:
    """A model whose hidden state is the token id that it predicts, and whose logits are looked up by it."""
    return SimpleNamespace(
        adapters=SimpleNamespace(use=lambda name: torch.no_grad()),
        device=torch.device("cpu"),
        logits=lambda hidden_NH: torch.tensor([logits_by_token[int(token)] for token in hidden_NH[:, 0]]),
        chunks=lambda count: [slice(start, start + 2) for start in range(0, count, 2)],
    )


def settled(monkeypatch: pytest.MonkeyPatch, logits_by_token: dict[int, list[float]], *completions: list[int]) -> tuple[float, dict[str, float]]:
    def hidden_states(model: Any, texts: list[ScoredText]) -> Tensor:
        return torch.tensor([[float(token)] for text in texts for token in text.completion_ids])

    monkeypatch.setattr(teacher_module, "completion_hidden_states", hidden_states)
    return automatic_temperature(scripted(logits_by_token), [ScoredText([9], ids) for ids in completions], TEACHER, 4)


def gap_for(probability: float, temperature: float) -> float:
    """How far the likeliest of two tokens must lead to have this probability at this temperature."""
    return float(torch.tensor(probability).logit()) * temperature


@pytest.mark.parametrize(
    ("at", "expected"),
    [(1.0, 1.0), (0.8, 0.8), (0.65, 0.65), (0.5, 0.5), (0.3, 0.5)],
)
def test_the_automatic_temperature_is_the_highest_that_keeps_the_share(monkeypatch: pytest.MonkeyPatch, at: float, expected: float) -> None:
    """The teacher's token has just the share that has to be kept at `at`, and less at anything higher."""
    lead = gap_for(KEPT_PROBABILITY + 0.001, at)
    tau, measured = settled(monkeypatch, {0: [lead, 0.0], 1: [0.0, lead]}, [0, 1, 0], [1], [0])
    assert tau == expected
    assert measured["greedy_token_accuracy"] == 1.0
    if at in TEMPERATURES:
        assert measured[f"sampled_token_accuracy_at_{at:g}"] == pytest.approx(KEPT_PROBABILITY + 0.001, abs=1e-5)


def test_the_automatic_temperature_compares_with_what_the_teacher_gets_right_greedily(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokens that it gets wrong greedily too don't call for a lower temperature."""
    lead = gap_for(0.9, 1.0)
    tau, measured = settled(monkeypatch, {0: [lead, 0.0], 1: [lead, 0.0]}, [0, 0, 1], [1])
    assert measured["greedy_token_accuracy"] == 0.5
    assert measured["sampled_token_accuracy_at_1"] == pytest.approx(0.5)
    assert tau == 1.0


def test_the_automatic_temperature_reads_the_teachers_prompt(model: LanguageModel, plain: PlainModel) -> None:
    factors = in_float64(add_adapter(model, TEACHER, seed=3))
    texts = [ScoredText(tokens(seed, 4 + 3 * seed), tokens(10 + seed, 1 + seed)) for seed in range(5)]
    tau, measured = automatic_temperature(model, texts, TEACHER, 30)
    logits = torch.cat([plain.logits(t.prompt_ids + t.completion_ids, factors, 2.0)[len(t.prompt_ids) - 1 : -1] for t in texts])
    targets = torch.tensor([token for text in texts for token in text.completion_ids])
    assert measured["greedy_token_accuracy"] == float((logits.argmax(dim=-1) == targets).double().mean())
    for each in TEMPERATURES:
        expected = float((logits / each).softmax(dim=-1).gather(1, targets[:, None]).mean())
        assert measured[f"sampled_token_accuracy_at_{each:g}"] == pytest.approx(expected, rel=1e-3)
    assert tau in TEMPERATURES
