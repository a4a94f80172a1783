"""sdft_engine.sampling: choosing a token from given logits, against arithmetic and against frequencies."""

import math
from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor

from sdft_engine.sampling import Decoding, SamplingParams, quantile, sample
from sdft_engine.seeds import seed_of

PROBABILITIES = [0.45, 0.25, 0.15, 0.1, 0.05]
LOGITS = torch.tensor(PROBABILITIES).log() + 3.0  # the constant must not matter
DRAWS = 8_000

CHI_SQUARE_999 = {1: 10.83, 2: 13.82, 4: 18.47, 63: 103.44}
"""What the statistic exceeds once in a thousand experiments, by degrees of freedom. The seeds are fixed, so a pass stays one."""


def sequence(history: list[int] | None = None, **options: Any) -> Decoding:
    made = Decoding([1], SamplingParams(**({"max_new_tokens": 1 << 30, "seed": 7} | options)))
    made.token_ids = history or []
    return made


def draw(logits_V: Tensor, count: int = DRAWS, **options: Any) -> Counter[int]:
    drawer = sequence(**options)
    return Counter(sample(logits_V[None], [drawer])[0] for _ in range(count))


def chi_square(counts: Counter[int], probabilities: list[float]) -> float:
    total = counts.total()
    return sum((counts[token] - total * p) ** 2 / (total * p) for token, p in enumerate(probabilities) if p)


def choose(logits: list[float], history: list[int] | None = None, **options: Any) -> int:
    return sample(torch.tensor([logits]), [sequence(history, temperature=0.0, **options)])[0]


def test_frequencies_match_the_softmax() -> None:
    assert chi_square(draw(LOGITS), PROBABILITIES) < CHI_SQUARE_999[4]


@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_frequencies_match_the_softmax_at_a_temperature(temperature: float) -> None:
    weights = [p ** (1 / temperature) for p in PROBABILITIES]
    counts = draw(LOGITS, temperature=temperature)
    assert chi_square(counts, [w / sum(weights) for w in weights]) < CHI_SQUARE_999[4]
    assert chi_square(counts, PROBABILITIES) > 20 * CHI_SQUARE_999[4]


def test_first_draws_of_different_seeds_match_the_softmax_too() -> None:
    """Each rollout has a generator of its own, so across rollouts it is the seeds that must be independent."""
    logits = torch.randn(64, generator=torch.Generator().manual_seed(1))
    first: Counter[int] = Counter()
    second: Counter[int] = Counter()
    for step in range(100):
        for row in range(40):
            drawer = sequence(seed=seed_of(0, step, row))
            first[sample(logits[None], [drawer])[0]] += 1
            second[sample(logits[None], [drawer])[0]] += 1
    probabilities = logits.softmax(dim=-1).tolist()
    assert chi_square(first, probabilities) < CHI_SQUARE_999[63]
    assert chi_square(second, probabilities) < CHI_SQUARE_999[63]


@pytest.mark.parametrize(
    ("top_p", "kept"),
    [(0.01, 1), (0.449, 1), (0.451, 2), (0.699, 2), (0.701, 3), (0.951, 5)],
)
def test_top_p_keeps_the_smallest_set_that_reaches_it(top_p: float, kept: int) -> None:
    order = [3, 0, 4, 1, 2]
    shuffled = torch.empty_like(LOGITS)
    shuffled[order] = LOGITS
    counts = draw(shuffled, count=3_000, top_p=top_p)
    assert set(counts) == set(order[:kept])
    if kept in (2, 3):
        mass = sum(PROBABILITIES[:kept])
        expected = [0.0] * 5
        for token, probability in zip(order[:kept], PROBABILITIES, strict=False):
            expected[token] = probability / mass
        assert chi_square(counts, expected) < CHI_SQUARE_999[kept - 1]


def test_top_p_counts_probabilities_after_the_temperature() -> None:
    # at temperature 0.5 the likeliest token alone has 0.2025 / 0.3 = 0.675 of the mass
    assert set(draw(LOGITS, count=2_000, top_p=0.6, temperature=0.5)) == {0}
    assert set(draw(LOGITS, count=2_000, top_p=0.6)) == {0, 1}


def test_greedy_takes_the_likeliest() -> None:
    assert choose([1.0, 3.0, 2.0]) == 1


def test_logit_bias_is_added_to_the_logits() -> None:
    assert choose([1.0, 3.0, 2.0], logit_bias={2: 0.9}) == 1
    assert choose([1.0, 3.0, 2.0], logit_bias={2: 1.1}) == 2
    assert choose([1.0, 3.0, 2.0], logit_bias={1: -100.0, 0: 0.5}) == 2
    counts = draw(LOGITS, logit_bias={0: math.log(2), 4: -100.0})
    weights = [0.9, 0.25, 0.15, 0.1]
    assert counts[4] == 0
    assert chi_square(counts, [w / sum(weights) for w in weights]) < CHI_SQUARE_999[4]


def test_presence_counts_once_and_frequency_counts_each() -> None:
    history = [1, 1, 1, 0]
    # token 1 leads by 1; presence takes the same off token 0, so token 2 has to overtake
    assert choose([0.0, 3.0, 2.0], history, presence_penalty=0.9) == 1
    assert choose([0.0, 3.0, 2.0], history, presence_penalty=1.1) == 2
    assert choose([0.0, 3.0, 2.0], history, frequency_penalty=0.3) == 1
    assert choose([0.0, 3.0, 2.0], history, frequency_penalty=0.34) == 2
    # both: 3 - 0.4 - 3 x 0.1 = 2.3; 3 - 0.8 - 3 x 0.1 = 1.9
    assert choose([0.0, 3.0, 2.0], history, presence_penalty=0.4, frequency_penalty=0.1) == 1
    assert choose([0.0, 3.0, 2.0], history, presence_penalty=0.8, frequency_penalty=0.1) == 2
    assert choose([0.0, 3.0, 2.0], [1, 1], frequency_penalty=-1.0) == 1
    assert choose([2.9, 3.0, 2.0], [0], presence_penalty=-0.2) == 0
    assert choose([0.0, 3.0, 2.0], [], presence_penalty=2.0, frequency_penalty=2.0) == 1


def test_each_row_keeps_its_own_parameters() -> None:
    logits = torch.tensor([[1.0, 3.0, 2.0]] * 4)
    rows = [
        sequence(temperature=0.0),
        sequence(temperature=0.0, logit_bias={0: 5.0}),
        sequence([1], temperature=0.0, presence_penalty=2.0),
        sequence(temperature=1.0, top_p=0.01),
    ]
    before = logits.clone()
    assert sample(logits, rows) == [1, 0, 2, 1]
    assert torch.equal(logits, before)


def test_seeds_are_functions_of_all_their_parts() -> None:
    assert seed_of(1, 2, 3) == seed_of(1, 2, 3)
    parts = [(1, 2, 3), (1, 23), (12, 3), (1, 2, 30), (3, 2, 1), (0, 2, 3), (1, "epoch", 3)]
    seeds = [seed_of(*each) for each in parts]
    assert len(set(seeds)) == len(parts)
    assert all(0 <= seed < 1 << 63 for seed in seeds)


@pytest.mark.parametrize("vocabulary", [5, 512, 513, 1024, 1300])
def test_the_quantile_is_that_of_the_cumulative_distribution(vocabulary: int) -> None:
    """In blocks as in one sum, at points just inside both ends of every token's share; tokens without mass are never met."""
    generator = torch.Generator().manual_seed(vocabulary)
    masses = torch.rand(vocabulary, generator=generator, dtype=torch.float64) ** 4 + 1e-6
    masses[torch.rand(vocabulary, generator=generator) < 0.3] = 0.0
    masses[-1] = 0.0
    cumulative = masses.cumsum(0) / masses.sum()
    tokens = masses.nonzero()[:, 0]
    shares = masses[tokens] / masses.sum()
    for inside in (0.001, 0.5, 0.999):
        points = cumulative[tokens] - shares + inside * shares
        assert quantile(masses.expand(len(tokens), -1), points[:, None]).tolist() == tokens.tolist()
    ends = torch.tensor([[0.0], [1.0 - 2**-53]], dtype=torch.float64)
    assert quantile(masses.expand(2, -1), ends).tolist() == [int(tokens[0]), int(tokens[-1])]
    assert quantile(masses.float().expand(2, -1), ends).tolist() == [int(tokens[0]), int(tokens[-1])]


def test_frequencies_match_the_softmax_over_many_blocks() -> None:
    """A vocabulary of nine blocks, the last of them short, with one likely token in each."""
    logits = torch.full((512 * 8 + 7,), -30.0)
    likely = [40, 512, 1535, 1536, 3000]
    logits[likely] = LOGITS
    counts = draw(logits)
    assert set(counts) == set(likely)
    assert chi_square(Counter({place: counts[token] for place, token in enumerate(likely)}), PROBABILITIES) < CHI_SQUARE_999[4]


def test_logits_that_are_not_finite_still_give_tokens() -> None:
    """What is wrong shows in the loss, which ends the job with a reason."""
    logits = torch.full((2, 700), float("nan"))
    assert all(0 <= token < 700 for token in sample(logits, [sequence(), sequence(temperature=0.5)]))
