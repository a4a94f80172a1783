"""The demo's scoring, on values worked out by hand."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))

from demo import Results, verdict
from demo_scoring import Score, is_right, shown_twice, wilson_interval

from sdft_engine.contract.dataset import Demonstration
from sdft_engine.contract.prompts import teacher_messages


@pytest.mark.parametrize(
    ("answer", "right"),
    [
        ("It is Martin Fern.", True),
        ("martin fern", True),
        ("Martin Ferny", False),
        ("Martin  Fern", False),
        ("unMartin Fern", False),
        ("", False),
    ],
)
def test_matching_is_on_word_boundaries(answer: str, right: bool) -> None:
    assert is_right(answer, ("Martin Fern",)) is right


def test_accepted_strings_are_not_patterns() -> None:
    assert not is_right("the answer is 7", ("7.",))
    assert is_right("b>hello</b", ("b>hello</b",))


def test_wilson_interval() -> None:
    assert wilson_interval(8, 10) == pytest.approx((0.4902, 0.9433), abs=1e-4)
    assert wilson_interval(0, 10)[0] == 0.0
    assert wilson_interval(10, 10)[1] == 1.0


def test_the_teacher_sees_the_exchange_twice() -> None:
    messages = shown_twice("Q2", {"messages": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]})
    assert [message["content"] for message in messages] == ["Q", "A", "Q", "A", "Please answer the question again: Q2"]
    question, answer = {"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}
    assert shown_twice("Q", {"messages": [question, answer]}) == teacher_messages(Demonstration(1, [question], answer), "history_twice")


def score(right: int, n: int) -> Score:
    return Score(tuple(index < right for index in range(n)), ("",) * n)


def results(base_known: int = 0, learned: int = 50, kept: int = 45, sft_kept: int = 30) -> Results:
    base = {"paraphrases": score(base_known, 60), "retention": score(50, 96)}
    return Results(base, {}, {"paraphrases": score(learned, 60), "retention": score(kept, 96)}, {"retention": score(sft_kept, 96)}, 9)


@pytest.mark.parametrize(
    ("changes", "failing"),
    [({}, None), ({"base_known": 7}, 0), ({"learned": 41}, 1), ({"kept": 42}, 2), ({"sft_kept": 45}, 3)],
)
def test_each_threshold_decides(changes: dict[str, int], failing: int | None) -> None:
    holding = [holds for holds, _ in verdict(results(**changes))]
    assert [index for index, holds in enumerate(holding) if not holds] == ([] if failing is None else [failing])
