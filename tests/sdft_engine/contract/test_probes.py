"""Probe files, how answers are judged, and intervals worked out by hand."""

from pathlib import Path

import pytest

from sdft_engine.contract import probes
from sdft_engine.contract.errors import ContextExceeded, DatasetError
from sdft_engine.contract.probes import (
    DEFAULT_PROBES_PATH,
    Judged,
    ProbeQuestion,
    ProbeScore,
    Retention,
    is_right,
    parse_probes,
    read_probes,
    scores_of,
    wilson_interval,
)

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
        ('{"probe": "fa\\u0000cts", "question": "Q?", "answers": ["a"]}', "line 2: it holds control characters"),
        ('{"probe": "facts", "question": "Q?", "answers": ["\\ud800"]}', "line 2: it holds .* half of a surrogate pair"),
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
    assert raised.value.param == "method.sdft.retention_file"


def test_blanks_around_an_accepted_answer_do_not_count(tmp_path: Path) -> None:
    path = tmp_path / "probes.jsonl"
    path.write_text('{"probe": "facts", "question": "Q?", "answers": [" Paris\\n"]}')
    assert read_probes(path)[0].answers == ["Paris"]


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


def test_a_question_too_long_for_the_context_is_named() -> None:
    lines = [GOOD.encode(), b"", b'{"probe": "facts", "question": "aaaaaaaa", "answers": ["a"]}']
    assert len(parse_probes(lines, "the file", len, 50)) == 2
    with pytest.raises(DatasetError, match=r"the file: line 3: it needs 40 tokens with its answer, the context holds 39") as raised:
        parse_probes(lines[1:2] * 2 + lines[2:], "the file", len, 39)
    assert raised.value.param == "method.sdft.retention_file"


def test_more_questions_than_are_asked_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probes, "MAX_QUESTIONS", 2)
    assert len(parse_probes([GOOD.encode()] * 2, "the file")) == 2
    with pytest.raises(DatasetError, match="line 3: at most 2 questions"):
        parse_probes([GOOD.encode()] * 3, "the file")


@pytest.mark.parametrize(("line", "reason"), [(b"[" * 70_000, "longer than 65,536 bytes"), (b"[" * 60_000, "not valid JSON"), (b"\xff{}", "not valid JSON")])
def test_hostile_lines_are_named(line: bytes, reason: str) -> None:
    with pytest.raises(DatasetError, match=f"the file: line 1: {reason}"):
        parse_probes([line], "the file")


def test_a_question_too_long_to_be_counted_is_named() -> None:
    def count(question: str) -> int:
        raise ContextExceeded("a text of 20,000 characters needs more tokens")

    with pytest.raises(DatasetError, match="retention: line 1: a text of 20,000 characters") as raised:
        parse_probes([GOOD.encode()], "retention", count, 100)
    assert raised.value.param == "method.sdft.retention_file"
