"""Probe files, how answers are judged, and intervals worked out by hand."""

from pathlib import Path

import pytest

from sdft_engine.contract.errors import DatasetError
from sdft_engine.contract.probes import DEFAULT_PROBES_PATH, Judged, ProbeQuestion, ProbeScore, Retention, is_right, read_probes, scores_of, wilson_interval

GOOD = '{"probe": "facts", "question": "Capital of France?", "answers": ["Paris"]}'


def test_a_probe_file_is_read_in_order(tmp_path: Path) -> None:
    path = tmp_path / "probes.jsonl"
    path.write_text(f'{GOOD}\n\n{{"probe": "sums", "question": "1+1?", "answers": ["2", "two"]}}\n')
    assert read_probes(path) == [
        ProbeQuestion(probe="facts", question="Capital of France?", answers=["Paris"]),
        ProbeQuestion(probe="sums", question="1+1?", answers=["2", "two"]),
    ]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("nonsense", "line 2: not valid JSON"),
        ("[]", "line 2"),
        ('{"probe": "facts", "question": "Q?"}', "line 2: answers"),
        ('{"probe": "facts", "question": "Q?", "answers": []}', "line 2: answers"),
        ('{"probe": "facts", "question": "Q?", "answers": ["a", " "]}', "line 2: answers"),
        ('{"probe": "facts", "question": "Q?", "answers": "Paris"}', "line 2: answers"),
        ('{"probe": "", "question": "Q?", "answers": ["a"]}', "line 2: probe"),
        ('{"probe": "facts", "question": 7, "answers": ["a"]}', "line 2: question"),
        ('{"probe": "facts", "question": "Q?", "answers": ["a"], "more": 1}', "line 2: more"),
    ],
)
def test_a_wrong_line_is_named(tmp_path: Path, line: str, reason: str) -> None:
    path = tmp_path / "probes.jsonl"
    path.write_text(f"{GOOD}\n{line}\n")
    with pytest.raises(DatasetError, match=reason) as raised:
        read_probes(path)
    assert raised.value.param == "retention_file"


def test_a_file_without_questions_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "probes.jsonl"
    path.write_text("\n")
    with pytest.raises(DatasetError, match="no questions"):
        read_probes(path)


def test_the_default_questions_cover_four_kinds() -> None:
    questions = read_probes(DEFAULT_PROBES_PATH)
    counts = {probe: sum(each.probe == probe for each in questions) for probe in {each.probe for each in questions}}
    assert len(questions) == len({each.question for each in questions}) == 100
    assert set(counts) == {"facts", "arithmetic", "instructions", "format"}
    assert min(counts.values()) >= 15


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


def test_counts_by_probe() -> None:
    """What the model gained does not make up for what it lost."""
    judged = [Judged("b", True, True), Judged("a", True, False), Judged("b", False, True), Judged("a", True, True), Judged("b", False, False)]
    scores = scores_of(judged)
    assert list(scores) == ["b", "a"]
    low, high = wilson_interval(2, 3)
    assert scores["b"] == ProbeScore(n=3, right=2, low=low, high=high, base_right=1, kept=1)
    assert (scores["a"].right, scores["a"].base_right, scores["a"].kept) == (1, 2, 1)
    retention = Retention(step=3, kl_from_base=0.1, probes=scores)
    assert (retention.n, retention.right, retention.base_right, retention.kept) == (5, 3, 3, 2)
