"""What the demo makes of its scores: counts by kind of question, checks, tables, times."""

import sys
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))

from demo_report import ProbeCount, Results, by_probe, durations, print_results, report_of, verdict
from demo_scoring import Question, Score

PROBES = ("facts",) * 4 + ("format",) * 2


def hits(pattern: str) -> Score:
    return Score(tuple(letter == "x" for letter in pattern), tuple(f"answer {index}" for index in range(len(pattern))))


def score(right: int, n: int) -> Score:
    return hits("x" * right + "." * (n - right))


def general(probes: tuple[str, ...]) -> list[Question]:
    return [Question(f"general question {index}", ("a",), None, probe) for index, probe in enumerate(probes)]


def results(base_known: int = 0, learned: int = 50, kept: int = 45, sft_kept: int = 30, sft_trained: int = 28) -> Results:
    questions = {
        "trained": [Question("t", ("a",), 1, None)] * 30,
        "paraphrases": [Question("p", ("a",), 1, None)] * 60,
        "retention": general(("facts",) * 48 + ("format",) * 48),
    }
    base = {"trained": score(0, 30), "paraphrases": score(base_known, 60), "retention": score(50, 96)}
    sdft = {"trained": score(28, 30), "paraphrases": score(learned, 60), "retention": score(kept, 96)}
    sft = {"trained": score(sft_trained, 30), "paraphrases": score(20, 60), "retention": score(sft_kept, 96)}
    teacher = {"trained": score(30, 30), "paraphrases": score(55, 60)}
    return Results(questions, base, teacher, sdft, sft, 9, {"sdft_training": 61.0})


@pytest.mark.parametrize(
    ("changes", "failing"),
    [({}, None), ({"base_known": 7}, 0), ({"learned": 41}, 1), ({"kept": 37}, 2), ({"sft_trained": 27}, 3), ({"sft_kept": 45}, 4)],
)
def test_each_threshold_decides(changes: dict[str, int], failing: int | None) -> None:
    holding = [holds for holds, _ in verdict(results(**changes))]
    assert [index for index, holds in enumerate(holding) if not holds] == ([] if failing is None else [failing])


def test_sft_may_know_more_than_sdft() -> None:
    assert results(sft_trained=30).matched


def test_gains_do_not_hide_what_was_lost() -> None:
    base, arm = hits("xx..x."), hits(".xxx.x")
    assert by_probe(general(PROBES), base, arm) == {
        "facts": ProbeCount(right=3, n=4, kept=1, known=2),
        "format": ProbeCount(right=1, n=2, kept=0, known=1),
        "all": ProbeCount(right=4, n=6, kept=1, known=3),
    }


def test_the_base_keeps_what_it_knows() -> None:
    counts = by_probe(general(PROBES), hits("xx..x."), hits("xx..x."))
    assert counts["all"] == ProbeCount(right=3, n=6, kept=3, known=3)


def test_what_was_gained_does_not_count_as_kept() -> None:
    found = results()
    found.sdft["retention"] = hits("." * 10 + "x" * 50 + "." * 36)  # as many right as the base, ten others
    assert found.retention(found.sdft) == ProbeCount(right=50, n=96, kept=40, known=50)
    assert "of the general questions that the base answers, SDFT still answers 80%" in verdict(found)[2][1]


def test_the_report_counts_by_probe() -> None:
    report = report_of(results(), seed=3)
    assert report["probes"]["sdft"]["facts"] == {"right": 45, "n": 48, "kept": 45, "known": 48}
    assert report["probes"]["sft"]["all"] == {"right": 30, "n": 96, "kept": 30, "known": 50}
    assert report["probes"]["base"]["format"] == {"right": 2, "n": 48, "kept": 2, "known": 2}
    assert report["n"] == {"trained": 30, "paraphrases": 60, "retention": 96}
    assert report["right"]["teacher"] == {"trained": 30, "paraphrases": 55}
    assert report["seconds"] == {"sdft_training": 61.0}


def printed(found: Results) -> str:
    console = Console(file=StringIO(), width=160)
    print_results(found, console)
    assert isinstance(console.file, StringIO)
    return console.file.getvalue()


def test_the_tables_show_counts_with_intervals() -> None:
    text = printed(results())
    assert "90% (45/50)" in text  # retention of SDFT
    assert "94% [83%-98%] n=48" in text  # SDFT on facts, and kept of the 48 that the base knew
    assert "format" in text
    assert "general question 25" in text
    assert "never knew" not in text


def test_an_unmatched_comparison_is_named() -> None:
    assert "the comparison is not matched" in printed(results(sft_trained=27))


def test_durations_name_the_parts_in_order() -> None:
    parts = {"whole_run": 1080.0, "service_start": 21.4, "sdft_training": 588.0}
    assert durations(parts) == "service start 21 s, SDFT training 9.8 min, whole run 18.0 min"
