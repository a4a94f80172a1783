"""Does the method's assumption hold for this model and this data, and how good is a model when it may try several times?

SDFT assumes that the model which is shown a demonstration (the teacher) answers better than the model that is not, and stays
closer to it than a model that imitated the demonstrations: arXiv 2601.19897, section 3. `check_in_context` measures both.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from sdft_engine.batching import ScoredText, completion_hidden_states, passes
from sdft_engine.divergences import forward_kl
from sdft_engine.generation import decode_all
from sdft_engine.model import LanguageModel
from sdft_engine.sampling import Decoding, SamplingParams
from sdft_engine.seeds import seed_of


@dataclass(frozen=True)
class TeacherLift:
    """Greedy answers to the same questions with and without the demonstration: how many both answer, and only one of them."""

    n: int
    both: int
    teacher_only: int
    student_only: int

    @property
    def teacher_right(self) -> int:
        return self.both + self.teacher_only

    @property
    def student_right(self) -> int:
        return self.both + self.student_only

    @property
    def lift(self) -> float:
        """Teacher's accuracy minus the student's."""
        return (self.teacher_only - self.student_only) / self.n


@dataclass(frozen=True)
class InContextCheck:
    """`teacher_kl`: KL(teacher || base) on the teacher's own samples, mean over tokens, in nats; `compared_kl`: the same of
    another adapter without a demonstration, on its own samples (a model after SFT)."""

    lift: TeacherLift
    teacher_kl: float
    compared_kl: float | None


def pass_at_k(n: int, right: int, k: int) -> float:
    """The probability that one of k answers is right, estimated without bias from `right` of n samples:
    1 - C(n - right, k) / C(n, k) (Chen et al., arXiv 2107.03374). 1 <= k <= n."""
    if not (0 <= right <= n and 1 <= k <= n):
        raise ValueError(f"pass@k needs 0 <= right <= n and 1 <= k <= n, not n = {n}, right = {right}, k = {k}")
    return 1 - math.comb(n - right, k) / math.comb(n, k)


def check_in_context(
    model: LanguageModel,
    prompts: Sequence[list[int]],
    teacher_prompts: Sequence[list[int]],
    is_right: Callable[[int, str], bool],
    *,
    max_new_tokens: int,
    compared: str | None = None,
    temperature: float = 1.0,
    seed: int = 0,
) -> InContextCheck:
    """Compare the bare base with and without a demonstration, and the distance from the base of both kinds of pupil.

    Prompts are token ids, as `ChatFormat.student_prompt_ids` and `teacher_prompt_ids` make them of a demonstration (docs/library.md
    has an example). `is_right(row, answer)` judges an answer to a row's question; `compared` names an adapter in memory, or None.
    `temperature` is that of the samples on which the distances are measured; the distances themselves are at 1. Raises ValueError
    without prompts or such an adapter.
    """
    if not prompts or len(prompts) != len(teacher_prompts):
        raise ValueError(f"as many prompts as teacher prompts are needed, and one at least; these are {len(prompts)} and {len(teacher_prompts)}")
    if compared is not None and compared not in model.adapters.shapes:
        raise ValueError(f"there is no adapter {compared!r} in memory: model.adapters.load({compared!r}, directory)")
    own = greedy_answers(model, prompts, None, max_new_tokens)
    shown = greedy_answers(model, teacher_prompts, None, max_new_tokens)
    decode = model.chat_format.decode
    pairs = [(is_right(row, decode(a)), is_right(row, decode(b))) for row, (a, b) in enumerate(zip(own, shown, strict=True))]
    lift = TeacherLift(len(pairs), pairs.count((True, True)), pairs.count((False, True)), pairs.count((True, False)))
    teacher_kl = _kl_from_base(model, teacher_prompts, prompts, None, max_new_tokens, temperature, seed)
    compared_kl = None if compared is None else _kl_from_base(model, prompts, prompts, compared, max_new_tokens, temperature, seed)
    return InContextCheck(lift, teacher_kl, compared_kl)


def greedy_answers(
    model: LanguageModel, prompts: Sequence[list[int]], adapter: str | None, max_new_tokens: int, before_pass: Callable[[], None] = lambda: None
) -> list[list[int]]:
    """Token ids of one greedy answer a prompt, ending at any end-of-sequence id. `before_pass` may raise to end it."""
    params = SamplingParams(max_new_tokens, 0.0, stop_token_ids=model.chat_format.eos_token_ids)
    return _answers(model, prompts, adapter, [params] * len(prompts), before_pass)


@torch.no_grad()
def mean_token_kl(
    model: LanguageModel,
    first: Sequence[ScoredText],
    first_adapter: str | None,
    second: Sequence[ScoredText],
    second_adapter: str | None,
    max_tokens: int = 4096,
    before_pass: Callable[[], None] = lambda: None,
) -> float:
    """Mean over all completion tokens of KL(first || second), in nats: the same completions, each side after its own prompt and
    under its own adapter (None: the bare base). One pass holds at most `max_tokens` padded tokens. `before_pass` may raise to end it."""
    total = 0.0
    for rows in passes([_longer(a, b) for a, b in zip(first, second, strict=True)], max_tokens):
        before_pass()
        with model.adapters.use(first_adapter):
            first_NH = completion_hidden_states(model, [first[row] for row in rows])
        with model.adapters.use(second_adapter):
            second_NH = completion_hidden_states(model, [second[row] for row in rows])
        for part in model.chunks(len(first_NH)):
            first_logps_NV, second_logps_NV = (model.logits(hidden_NH[part]).log_softmax(dim=-1) for hidden_NH in (first_NH, second_NH))
            total += float(forward_kl(first_logps_NV, second_logps_NV).sum())
    return total / sum(len(text.completion_ids) for text in first)


def _longer(first: ScoredText, second: ScoredText) -> ScoredText:
    return first if first.input_length >= second.input_length else second


def _kl_from_base(
    model: LanguageModel,
    sampled_after: Sequence[list[int]],
    base_prompts: Sequence[list[int]],
    adapter: str | None,
    max_new_tokens: int,
    temperature: float,
    seed: int,
) -> float:
    stop = model.chat_format.eos_token_ids
    params = [SamplingParams(max_new_tokens, temperature, seed=seed_of(seed, "check", row), stop_token_ids=stop) for row in range(len(sampled_after))]
    answers = _answers(model, sampled_after, adapter, params)
    first = [ScoredText(prompt, answer) for prompt, answer in zip(sampled_after, answers, strict=True)]
    second = [ScoredText(prompt, answer) for prompt, answer in zip(base_prompts, answers, strict=True)]
    return mean_token_kl(model, first, adapter, second, None)


def _answers(
    model: LanguageModel, prompts: Sequence[list[int]], adapter: str | None, params: Sequence[SamplingParams], before_pass: Callable[[], None] = lambda: None
) -> list[list[int]]:
    sequences = [Decoding(prompt, each, adapter) for prompt, each in zip(prompts, params, strict=True)]
    if adapter is None:
        decode_all(model, sequences, before_pass=before_pass)
    else:
        with model.use(adapter):
            decode_all(model, sequences, before_pass=before_pass)
    return [sequence.token_ids for sequence in sequences]
