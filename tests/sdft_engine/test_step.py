"""sdft_engine.step against a plain implementation: float64, one row at a time, whole (T, V) logits, autograd end to end."""

import dataclasses
import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from sdft_engine import model as model_module
from sdft_engine.batching import ScoredText
from sdft_engine.divergences import TokenLoss, forward_kl, token_divergence
from sdft_engine.lora import STUDENT, LoraShape
from sdft_engine.model import LanguageModel
from sdft_engine.rollouts import Rollout
from sdft_engine.step import Objective, PassBudget, demonstration_loss, sdft_gradient, supervised_gradient
from sdft_engine.teacher import TEACHER
from sdft_engine.token_statistics import TokenStatistics
from tests.sdft_engine.plain import Factors, PlainModel, add_adapter, in_float64, tokens
from tests.sdft_engine.recording import watched

SHAPE = LoraShape(rank=3, alpha=6)
VOCABULARY = 512
TINY = PassBudget(student_tokens=20, teacher_tokens=25)


def rollout(row: int, prompt: int, length: int, *, finished: bool = True) -> Rollout:
    """The teacher's prompt is longer, and another one."""
    return Rollout(row, tokens(row, prompt), tokens(50 + row, prompt + 5), tokens(100 + row, length), finished)


ROLLOUTS = [rollout(0, 6, 9), rollout(1, 3, 1), rollout(2, 11, 4, finished=False), rollout(3, 5, 13), rollout(4, 8, 2)]


def objective(divergence: Any, temperature: float = 1.0) -> Objective:
    return Objective(TokenLoss(divergence), temperature)


def masks_of(skip: int = 3, mask_clipped: bool = True) -> list[list[bool]]:
    return [each.loss_mask(skip, mask_clipped) for each in ROLLOUTS]


@pytest.fixture
def trained(model: LanguageModel) -> LanguageModel:
    """With a student and a teacher that differ."""
    add_adapter(model, STUDENT, seed=1, shape=SHAPE, trainable=True)
    add_adapter(model, TEACHER, seed=2, shape=SHAPE)
    return model


@pytest.fixture(params=["whole", "chunks"])
def chunks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Also with the head run on three positions at a time."""
    if request.param == "chunks":
        monkeypatch.setattr(model_module, "CHUNK_ELEMENTS", 3 * VOCABULARY + 5)
    return str(request.param)


def plain_divergences(plain: PlainModel, student: Factors, teacher: Factors, divergence: str, temperature: float) -> list[Tensor]:
    """Per rollout, the divergence at every completion token."""
    found = []
    for each in ROLLOUTS:
        q = plain.completion_logps(each.student_prompt_ids, each.completion_ids, student, SHAPE.scaling, temperature)
        p = plain.completion_logps(each.teacher_prompt_ids, each.completion_ids, teacher, SHAPE.scaling, temperature)
        found.append((p.exp() * (p - q) if divergence == "forward" else q.exp() * (q - p)).sum(dim=-1))
    return found


def plain_loss(divergences: list[Tensor], masks: list[list[bool]]) -> Tensor:
    means = [each[torch.tensor(mask)].mean() for each, mask in zip(divergences, masks, strict=True) if any(mask)]
    return torch.stack(means).sum() / len(masks)


def assert_gradients(model: LanguageModel, expected: Factors) -> None:
    for name, factor in model.adapters.parameters(STUDENT).items():
        wanted = expected[name].grad
        assert wanted is not None
        assert factor.grad is not None
        assert float(wanted.abs().max()) > 1e-6
        torch.testing.assert_close(
            factor.grad.double(), wanted, rtol=1e-3, atol=1e-4 * float(wanted.abs().max()), msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.parametrize("divergence", ["forward", "reverse"])
@pytest.mark.parametrize("temperature", [1.0, 0.5])
@pytest.mark.parametrize("budget", [PassBudget(), TINY], ids=["one_pass", "many_passes"])
def test_sdft_loss_and_gradient_equal_the_plain_ones(
    trained: LanguageModel, plain: PlainModel, divergence: str, temperature: float, budget: PassBudget, chunks: str
) -> None:
    student = in_float64(trained.adapters.parameters(STUDENT), requires_grad=True)
    teacher = in_float64(trained.adapters.parameters(TEACHER))
    divergences = plain_divergences(plain, student, teacher, divergence, temperature)
    masks = masks_of()
    expected = plain_loss(divergences, masks)
    expected.backward()
    statistics = sdft_gradient(trained, ROLLOUTS, masks, TEACHER, objective(divergence, temperature), budget)
    assert statistics.loss == pytest.approx(expected.item(), rel=1e-4)
    assert_gradients(trained, student)
    assert sorted(statistics.per_token) == list(range(len(ROLLOUTS)))
    for row, each in enumerate(divergences):
        assert statistics.per_token[row] == pytest.approx(each.tolist(), rel=1e-3, abs=1e-5)


LOSSES = [
    TokenLoss("jsd", jsd_beta=0.3),
    TokenLoss("forward", estimator="top_k", top_k=20),
    TokenLoss("reverse", estimator="top_k", top_k=20),
    TokenLoss("reverse", estimator="sampled"),
    TokenLoss("forward", entry_clip=0.01),
    TokenLoss("jsd", entry_clip=0.004, token_clip=0.5),
    TokenLoss("forward", token_clip=0.9),
]


@pytest.mark.parametrize("token_loss", LOSSES, ids=str)
def test_every_loss_of_a_token_reaches_the_gradient(trained: LanguageModel, plain: PlainModel, token_loss: TokenLoss, chunks: str) -> None:
    student = in_float64(trained.adapters.parameters(STUDENT), requires_grad=True)
    teacher = in_float64(trained.adapters.parameters(TEACHER))
    expected, masks, top_mass = [], masks_of(), 0.0
    for each, mask in zip(ROLLOUTS, masks, strict=True):
        q = plain.completion_logps(each.student_prompt_ids, each.completion_ids, student, SHAPE.scaling, 0.7)
        p = plain.completion_logps(each.teacher_prompt_ids, each.completion_ids, teacher, SHAPE.scaling, 0.7)
        expected.append(token_divergence(token_loss, p, q, torch.tensor(each.completion_ids)))
        chooser = (q if token_loss.divergence == "reverse" else p).detach()
        top_mass += float(chooser.exp().topk(20).values.sum(dim=-1)[torch.tensor(mask)].sum())
    loss = plain_loss(expected, masks)
    loss.backward()
    statistics = sdft_gradient(trained, ROLLOUTS, masks, TEACHER, Objective(token_loss, 0.7), TINY)
    assert statistics.loss == pytest.approx(loss.item(), rel=1e-4)
    assert statistics.top_k_mass_sum == pytest.approx(top_mass if token_loss.estimator == "top_k" else 0, rel=1e-4)
    assert statistics.ratio_sum == 0
    assert_gradients(trained, student)


@pytest.mark.parametrize("correction", ["sequence", "prefix"])
def test_rollouts_of_another_sampler_are_weighted(trained: LanguageModel, plain: PlainModel, correction: Any, chunks: str) -> None:
    """The sampler's probabilities, which it tells at temperature 1, are the trainer's, perturbed; one rollout of the five is the
    trainer's own."""
    student = in_float64(trained.adapters.parameters(STUDENT), requires_grad=True)
    teacher = in_float64(trained.adapters.parameters(TEACHER))
    masks, rollouts, ratio_sum, total = masks_of(), [], 0.0, torch.zeros((), dtype=torch.float64)
    for row, (each, mask) in enumerate(zip(ROLLOUTS, masks, strict=True)):
        q = plain.completion_logps(each.student_prompt_ids, each.completion_ids, student, SHAPE.scaling, 0.7)
        p = plain.completion_logps(each.teacher_prompt_ids, each.completion_ids, teacher, SHAPE.scaling, 0.7)
        at_one = plain.completion_logps(each.student_prompt_ids, each.completion_ids, student, SHAPE.scaling, 1.0).detach()
        own = [float(at_one[position, token]) for position, token in enumerate(each.completion_ids)]
        noise = torch.randn(len(own), generator=torch.Generator().manual_seed(row)).tolist() if row else [0.0] * len(own)
        ratios = [math.exp(value / 0.7) for value in noise]  # trainer / sampler, at the sampling temperature
        rollouts.append(dataclasses.replace(each, sampler_logps=[a - b for a, b in zip(own, noise, strict=True)] if row else None))
        counted = [position for position, flag in enumerate(mask) if flag]
        ratio_sum += sum(ratios[position] for position in counted) if row else 0
        values = forward_kl(p, q)
        for position in counted:
            mean_ratio = sum(min(ratios[other], 2.0) for other in counted) / len(counted)
            weight = {"sequence": mean_ratio, "prefix": min(math.prod(ratios[:position]), 2.0)}[correction]
            total = total + weight * values[position] / len(counted) / len(ROLLOUTS)
    total.backward()
    statistics = sdft_gradient(trained, rollouts, masks, TEACHER, Objective(temperature=0.7, importance=correction), TINY)
    assert statistics.loss == pytest.approx(total.item(), rel=1e-4)
    assert statistics.ratio_sum == pytest.approx(ratio_sum, rel=1e-3)
    assert_gradients(trained, student)


def test_tokens_of_a_hopeless_prefix_count_though_their_weight_is_zero(trained: LanguageModel) -> None:
    """A product of ratios that float32 can't hold: no gradient after it, but as many loss tokens and ratios as ever."""
    each, mask = ROLLOUTS[3], ROLLOUTS[3].loss_mask(0, True)
    other = dataclasses.replace(each, sampler_logps=[150.0] + [-1.0] * (len(each.completion_ids) - 1))
    statistics = sdft_gradient(trained, [other], [mask], TEACHER, Objective(importance="prefix"), TINY)
    assert statistics.loss_tokens == len(each.completion_ids)
    assert statistics.loss == pytest.approx(statistics.per_token[0][0] / len(each.completion_ids), rel=1e-4)


@pytest.mark.parametrize(("skip", "mask_clipped"), [(0, False), (0, True), (2, True), (32, False)])
def test_masked_tokens_give_neither_loss_nor_gradient(trained: LanguageModel, plain: PlainModel, skip: int, mask_clipped: bool, chunks: str) -> None:
    student = in_float64(trained.adapters.parameters(STUDENT), requires_grad=True)
    masks = masks_of(skip, mask_clipped)
    expected = plain_loss(plain_divergences(plain, student, in_float64(trained.adapters.parameters(TEACHER)), "forward", 1.0), masks)
    expected.backward()
    statistics = sdft_gradient(trained, ROLLOUTS, masks, TEACHER, Objective(), TINY)
    assert statistics.loss == pytest.approx(expected.item(), rel=1e-4)
    assert statistics.loss_tokens == sum(map(sum, masks))
    assert_gradients(trained, student)


def test_statistics_cover_the_loss_tokens(trained: LanguageModel, plain: PlainModel, chunks: str) -> None:
    student, teacher = (in_float64(trained.adapters.parameters(name)) for name in (STUDENT, TEACHER))
    divergences = plain_divergences(plain, student, teacher, "forward", 0.7)
    masks = masks_of()
    highest = max(range(len(ROLLOUTS)), key=lambda row: float(divergences[row].max()))
    masks[highest][int(divergences[highest].argmax())] = False  # the highest divergence of all must not count
    entropy, rewards = 0.0, []
    agreeing = 0
    for each, mask in zip(ROLLOUTS, masks, strict=True):
        q = plain.completion_logps(each.student_prompt_ids, each.completion_ids, student, SHAPE.scaling, 0.7)
        p = plain.completion_logps(each.teacher_prompt_ids, each.completion_ids, teacher, SHAPE.scaling, 0.7)
        rewards.append(0.0)
        for position, (token, counted) in enumerate(zip(each.completion_ids, mask, strict=True)):
            if counted:
                rewards[-1] += float(p[position, token] - q[position, token])
                entropy -= float((q[position].exp() * q[position]).sum())
                agreeing += int(q[position].argmax() == p[position].argmax())
    statistics = sdft_gradient(trained, ROLLOUTS, masks, TEACHER, Objective(temperature=0.7), TINY)
    assert sum(statistics.rewards.values()) == pytest.approx(sum(rewards), rel=1e-3)
    assert [statistics.rewards[row] for row in range(5)] == pytest.approx(rewards, rel=1e-3, abs=1e-4)
    assert statistics.entropy_sum == pytest.approx(entropy, rel=1e-4)
    assert statistics.correct_tokens == agreeing
    counted_values = torch.cat([each[torch.tensor(mask)] for each, mask in zip(divergences, masks, strict=True)])
    assert statistics.divergence_max == pytest.approx(float(counted_values.max()), rel=1e-3)
    assert float(counted_values.max()) < float(divergences[highest].max())
    assert statistics.teacher_seconds > 0
    assert statistics.student_seconds > 0


@pytest.mark.parametrize("divergence", ["forward", "reverse"])
def test_a_batch_that_is_all_masked_gives_zero_and_no_nan(trained: LanguageModel, divergence: str) -> None:
    masks = [[False] * len(each.completion_ids) for each in ROLLOUTS]
    statistics = sdft_gradient(trained, ROLLOUTS, masks, TEACHER, objective(divergence), TINY)
    assert (statistics.loss, statistics.loss_tokens, statistics.divergence_max, sum(statistics.rewards.values())) == (0.0, 0, 0.0, 0.0)
    assert all(factor.grad is None or not factor.grad.any() for factor in trained.adapters.parameters(STUDENT).values())
    assert all(value >= 0 for values in statistics.per_token.values() for value in values)


def test_gradients_add_up_and_reach_the_student_only(trained: LanguageModel) -> None:
    for factor in trained.adapters.parameters(TEACHER).values():
        factor.requires_grad_()  # even so
    sdft_gradient(trained, ROLLOUTS, masks_of(), TEACHER, Objective(), PassBudget())
    once = {name: factor.grad.clone() for name, factor in trained.adapters.parameters(STUDENT).items() if factor.grad is not None}
    assert len(once) == 28
    sdft_gradient(trained, ROLLOUTS, masks_of(), TEACHER, Objective(), PassBudget())
    for name, factor in trained.adapters.parameters(STUDENT).items():
        torch.testing.assert_close(factor.grad, 2 * once[name])
    assert all(factor.grad is None for factor in trained.adapters.parameters(TEACHER).values())
    others = [name for name, weight in trained.network.named_parameters() if weight.grad is not None and ".lora_" not in name]
    assert others == []


def test_a_teacher_shown_nothing_more_diverges_by_nothing(trained: LanguageModel) -> None:
    """The student as its own teacher, with the same prompt: what a live teacher without a demonstration would be."""
    same = [Rollout(each.row, each.student_prompt_ids, each.student_prompt_ids, each.completion_ids, True) for each in ROLLOUTS]
    for divergence in ("forward", "reverse"):
        statistics = sdft_gradient(trained, same, masks_of(0, False), STUDENT, objective(divergence), PassBudget())
        assert statistics.loss == pytest.approx(0, abs=1e-5)
        assert statistics.correct_tokens == statistics.loss_tokens
    assert max(float(f.grad.abs().max()) for f in trained.adapters.parameters(STUDENT).values() if f.grad is not None) < 1e-4


@pytest.mark.parametrize(("length", "skipped"), [(1, 0), (2, 0), (3, 0), (4, 1), (7, 1), (8, 2), (11, 2), (12, 3), (100, 3)])
def test_the_skip_never_masks_a_short_answer_away(length: int, skipped: int) -> None:
    assert rollout(0, 2, length).loss_mask(3, True) == [False] * skipped + [True] * (length - skipped)
    assert rollout(0, 2, length).loss_mask(0, True) == [True] * length
    assert rollout(0, 2, length, finished=False).loss_mask(3, False) == [False] * skipped + [True] * (length - skipped)
    assert rollout(0, 2, length, finished=False).loss_mask(3, True) == [False] * length


@pytest.mark.parametrize(
    ("length", "answer_start", "skipped"),
    [(40, 0, {0, 1, 2}), (40, 20, {0, 1, 2, 20, 21, 22}), (40, 36, {0, 1, 2, 36}), (40, 39, {0, 1, 2}), (40, 40, {0, 1, 2}), (8, 1, {0, 1})],
)
def test_the_skip_may_begin_anew_after_the_thoughts(length: int, answer_start: int, skipped: set[int]) -> None:
    mask = rollout(0, 2, length).loss_mask(3, True, answer_start)
    assert {position for position, counted in enumerate(mask) if not counted} == skipped


class LargestTensor(TorchDispatchMode):
    """Remembers the largest result of any operation, of the forward and of the backward pass."""

    elements = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for each in result if isinstance(result, tuple | list) else [result]:
            if isinstance(each, Tensor):
                self.elements = max(self.elements, each.numel())
        return result


@pytest.mark.parametrize("method", ["sdft", "supervised", "validation"])
def test_no_tensor_grows_with_rows_times_tokens_times_vocabulary(trained: LanguageModel, method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_module, "CHUNK_ELEMENTS", 8 * VOCABULARY)
    rollouts = [rollout(row, 10, 45) for row in range(8)]
    texts = [ScoredText(each.student_prompt_ids, each.completion_ids) for each in rollouts]
    positions: list[int] = []
    monkeypatch.setattr(trained, "logits", watched(trained.logits, lambda hidden: positions.append(len(hidden))))
    with LargestTensor() as largest:
        if method == "sdft":
            sdft_gradient(trained, rollouts, [[True] * 45] * 8, TEACHER, Objective(), PassBudget())
        elif method == "supervised":
            supervised_gradient(trained, texts, PassBudget())
        else:
            demonstration_loss(trained, texts, STUDENT, 4096)
    assert max(positions) == 8
    assert sum(positions) == 8 * 45 * (2 if method == "sdft" else 1)  # completion positions only, and the head never twice
    widest_activation = 8 * 59 * 256  # gate and up as one
    assert largest.elements <= widest_activation < 8 * 45 * VOCABULARY


def test_passes_stay_within_their_budgets(trained: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: dict[bool, list[int]] = {True: [], False: []}
    monkeypatch.setattr(trained, "hidden_states", watched(trained.hidden_states, lambda ids: sizes[torch.is_grad_enabled()].append(ids.numel())))
    sdft_gradient(trained, ROLLOUTS, masks_of(), TEACHER, Objective(), PassBudget(student_tokens=30, teacher_tokens=40))
    assert sizes == {True: [2 * 9, 2 * 14, 17], False: [2 * 14, 2 * 19, 22]}  # inputs of 14, 3, 14, 17, 9 tokens; for the teacher 5 more


def test_supervised_loss_and_gradient_equal_the_plain_ones(trained: LanguageModel, plain: PlainModel, chunks: str) -> None:
    texts = [ScoredText(each.student_prompt_ids, each.completion_ids) for each in ROLLOUTS]
    student = in_float64(trained.adapters.parameters(STUDENT), requires_grad=True)
    logps = [plain.completion_logps(text.prompt_ids, text.completion_ids, student, SHAPE.scaling) for text in texts]
    own = [each.gather(1, torch.tensor(text.completion_ids)[:, None])[:, 0] for each, text in zip(logps, texts, strict=True)]
    expected = -torch.stack([each.mean() for each in own]).mean()
    expected.backward()
    statistics = supervised_gradient(trained, texts, TINY)
    assert statistics.loss == pytest.approx(expected.item(), rel=1e-4)
    assert_gradients(trained, student)
    targets = torch.cat([torch.tensor(text.completion_ids) for text in texts])
    together = torch.cat(logps).detach()
    assert statistics.loss_tokens == len(targets)
    assert statistics.correct_tokens == int((together.argmax(dim=-1) == targets).sum())
    assert statistics.entropy_sum == pytest.approx(-float((together.exp() * together).sum()), rel=1e-4)


def test_validation_is_the_mean_over_tokens(trained: LanguageModel, plain: PlainModel, chunks: str) -> None:
    logps = [plain.completion_logps(each.student_prompt_ids, each.completion_ids) for each in ROLLOUTS]
    completions = [[*each.completion_ids[:-1], int(each_logps[-1].argmax())] for each, each_logps in zip(ROLLOUTS, logps, strict=True)]  # one right each
    texts = [ScoredText(each.student_prompt_ids, completion) for each, completion in zip(ROLLOUTS, completions, strict=True)]
    together, targets = torch.cat(logps), torch.tensor([token for completion in completions for token in completion])
    for factor in trained.adapters.parameters("student").values():
        factor.data.zero_()
    loss, accuracy = demonstration_loss(trained, texts, STUDENT, 20)
    assert loss == pytest.approx(-float(together.gather(1, targets[:, None]).mean()), rel=1e-4)
    assert accuracy == int((together.argmax(dim=-1) == targets).sum()) / len(targets)
    assert accuracy >= 5 / len(targets)


def test_bfloat16_gives_nearly_the_same_loss_and_float32_gradients(bfloat16_model: LanguageModel, plain: PlainModel) -> None:
    student = in_float64(add_adapter(bfloat16_model, STUDENT, seed=1, shape=SHAPE, trainable=True))
    teacher = in_float64(add_adapter(bfloat16_model, TEACHER, seed=2, shape=SHAPE))
    expected = float(plain_loss(plain_divergences(plain, student, teacher, "forward", 1.0), masks_of()))
    statistics: TokenStatistics = sdft_gradient(bfloat16_model, ROLLOUTS, masks_of(), TEACHER, Objective(), TINY)
    assert statistics.loss == pytest.approx(expected, rel=0.05)
    gradients = [factor.grad for factor in bfloat16_model.adapters.parameters(STUDENT).values()]
    assert all(gradient is not None and gradient.dtype == torch.float32 and gradient.any() and gradient.isfinite().all() for gradient in gradients)
