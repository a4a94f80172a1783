"""Which rows fit the context, at the very edge, and what is said of the others."""

from dataclasses import replace
from pathlib import Path

import jinja2
import pytest

from sdft_engine.contract.dataset import DatasetLimits
from sdft_engine.contract.prompts import ChatFormat
from tests.worker.conftest import demonstration_line
from worker.row_lengths import RowLength, fit, measure, name_lines


def no_check() -> None:
    """Nothing stops the count."""


@pytest.fixture(scope="module")
def chat_format(tiny_model_dir: Path) -> ChatFormat:
    return ChatFormat.from_directory(tiny_model_dir)


def test_a_row_is_counted_in_the_tokens_that_the_trainer_uses(chat_format: ChatFormat) -> None:
    line = demonstration_line("What is the capital?", "The capital is red.")
    measured = measure([b"", line], DatasetLimits(), chat_format, "example", no_check)
    (row,) = measured.rows
    question = [{"role": "user", "content": "What is the capital?"}]
    assert row.line == 2
    assert row.prompt == len(chat_format.encode(chat_format.render(question)))
    assert row.answer == len(chat_format.encode("The capital is red.<|im_end|>"))
    assert row.teacher_prompt > row.prompt + row.answer, "the teacher is shown the demonstration"


def test_a_supervised_row_needs_no_teacher(chat_format: ChatFormat) -> None:
    (row,) = measure([demonstration_line("What?", "That.")], DatasetLimits(), chat_format, None, no_check).rows
    assert row.teacher_prompt == 0


def test_lines_that_are_no_demonstrations_are_problems(chat_format: ChatFormat) -> None:
    measured = measure([b"{", demonstration_line("What?", "That.")], DatasetLimits(), chat_format, None, no_check)
    assert [(problem.line, problem.code) for problem in measured.reader.problems] == [(1, "invalid_json")]
    assert len(measured.rows) == 1


def test_what_the_chat_template_refuses_is_a_problem_of_its_line(chat_format: ChatFormat) -> None:
    strict = replace(chat_format, template=jinja2.Environment(undefined=jinja2.StrictUndefined).from_string("{{ messages[0]['name'] }}"))
    measured = measure([b"", demonstration_line("What?", "That.")], DatasetLimits(), strict, None, no_check)
    (problem,) = measured.reader.problems
    assert (problem.line, problem.code) == (2, "unsupported_conversation")
    assert problem.message.startswith("the base model's chat template refuses this conversation")
    assert measured.rows == []


@pytest.mark.parametrize(("context", "fits"), [(100, True), (99, False)])
def test_a_supervised_row_fits_to_the_last_token(context: int, fits: bool) -> None:
    found = fit([RowLength(1, prompt=60, answer=40, teacher_prompt=0)], None, context)
    assert (len(found.rows) == 1) is fits


@pytest.mark.parametrize(("context", "fits"), [(216, True), (215, False)])
def test_a_rollout_of_the_whole_length_fits_after_the_teachers_prompt(context: int, fits: bool) -> None:
    found = fit([RowLength(13, prompt=60, answer=10, teacher_prompt=200)], 16, context)
    assert (len(found.rows) == 1) is fits
    if not fits:
        assert str(found.too_long[0]) == (
            "line 13: the teacher's prompt has 200 tokens and the completion needs 16: it needs 216 tokens, the context holds 215"
        )


def test_the_demonstration_itself_must_fit_even_where_rollouts_are_short() -> None:
    found = fit([RowLength(1, prompt=60, answer=50, teacher_prompt=70)], 1, 100)
    assert "it needs 110 tokens" in found.too_long[0].message


def test_an_automatic_completion_leaves_room_for_common_answers_in_every_row() -> None:
    """One row with a long prompt must not shrink the rollouts of all the others."""
    rows = [RowLength(line, prompt=50, answer=30, teacher_prompt=100) for line in range(1, 20)]
    long = RowLength(20, prompt=50, answer=5, teacher_prompt=180)
    assert [problem.line for problem in fit([*rows, long], "auto", 200).too_long] == [20]
    assert fit([*rows, long], "auto", 210).too_long == []


def test_an_answer_longer_than_the_common_ones_needs_its_own_room() -> None:
    rows = [RowLength(line, prompt=10, answer=10, teacher_prompt=20) for line in range(1, 40)]
    found = fit([*rows, RowLength(40, prompt=10, answer=90, teacher_prompt=100)], "auto", 180)
    assert [problem.line for problem in found.too_long] == [40]


def test_no_rows_at_all() -> None:
    assert fit([], "auto", 100).rows == []


def test_lines_are_named_up_to_a_hundred() -> None:
    found = fit([RowLength(line, 10, 10, 0) for line in range(1, 151)], None, 10)
    assert name_lines(found.too_long[:1]) == "line 1"
    assert name_lines(found.too_long[:3]) == "lines 1, 2, 3"
    assert name_lines(found.too_long).endswith(", 99, 100 and 50 more")
