"""Which rows fit the context, at the very edge, and what is said of the others."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import jinja2
import pytest
from tokenizers import Tokenizer

from sdft_engine.contract.dataset import DatasetLimits, DatasetReader
from sdft_engine.contract.prompts import ChatFormat
from sdft_engine.contract.teacher_prompts import TeacherView
from tests.worker.conftest import demonstration_line
from worker.row_lengths import MeasuredFile, RowLength, fit, measure, name_lines

CALL = {"id": "c1", "type": "function", "function": {"name": "look", "arguments": "{}"}}
CALLING = {"role": "assistant", "content": None, "tool_calls": [CALL]}
QUESTION = {"role": "user", "content": "Which lamp?"}
WITHOUT_TOOLS = "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}" + (
    "{{ '<|im_start|>assistant\n' if add_generation_prompt }}"
)
"""As small instruct models ship it."""


def no_check() -> None:
    """Nothing stops the count."""


def measured_rows(*rows: RowLength) -> MeasuredFile:
    return MeasuredFile(DatasetReader(), list(rows))


def conversation_line(*messages: dict[str, Any], **keys: Any) -> bytes:
    return json.dumps({"messages": messages, **keys}).encode()


@pytest.fixture(scope="module")
def chat_format(tiny_model_dir: Path) -> ChatFormat:
    return ChatFormat.from_directory(tiny_model_dir)


def test_a_row_is_counted_in_the_tokens_that_the_trainer_uses(chat_format: ChatFormat) -> None:
    line = demonstration_line("What is the capital?", "The capital is red.")
    measured = measure([b"", line], DatasetLimits(), chat_format, TeacherView(), no_check)
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


@pytest.mark.parametrize(
    "line",
    [
        conversation_line(QUESTION, CALLING),
        conversation_line(QUESTION, CALLING, {"role": "tool", "content": "on", "tool_call_id": "c1"}, {"role": "assistant", "content": "It is on."}),
        conversation_line(QUESTION, {"role": "assistant", "content": "It is on."}, tools=[{"type": "function", "function": {"name": "look"}}]),
    ],
    ids=["answer", "earlier call", "tools"],
)
def test_tools_that_the_chat_template_would_drop_are_a_problem_of_their_line(chat_format: ChatFormat, line: bytes) -> None:
    assert len(measure([line], DatasetLimits(), chat_format, TeacherView(), no_check).rows) == 1
    without = replace(chat_format, template=jinja2.Environment().from_string(WITHOUT_TOOLS))
    measured = measure([demonstration_line("What?", "That."), line], DatasetLimits(), without, TeacherView(), no_check)
    assert [(problem.line, problem.code) for problem in measured.reader.problems] == [(2, "unsupported_conversation")]
    assert "has no place for tool" in measured.reader.problems[0].message
    assert [row.line for row in measured.rows] == [1]


def test_arguments_that_are_nested_without_end_are_a_problem_of_their_line(chat_format: ChatFormat) -> None:
    deep = {**CALL, "function": {"name": "look", "arguments": "[" * 100_000 + "]" * 100_000}}
    measured = measure([conversation_line(QUESTION, {**CALLING, "tool_calls": [deep]})], DatasetLimits(), chat_format, TeacherView(), no_check)
    (problem,) = measured.reader.problems
    assert (problem.line, problem.code) == (1, "unsupported_conversation")
    assert "deeper than 64 levels" in problem.message


@pytest.mark.parametrize(
    ("question", "answer", "teacher_template"),
    [("x" * 20_000, "That.", None), ("What?", "x" * 20_000, None), ("What?", "That.", "{demonstration}" + "x" * 20_000)],
    ids=["prompt", "answer", "teacher's prompt"],
)
def test_a_text_that_is_certainly_too_long_is_never_tokenized(chat_format: ChatFormat, question: str, answer: str, teacher_template: str | None) -> None:
    counted: list[int] = []

    class Watched:
        normalizer = None
        get_vocab = chat_format.tokenizer.get_vocab

        def encode(self, text: str, **options: Any) -> Any:
            counted.append(len(text))
            return chat_format.tokenizer.encode(text, **options)

    watched = replace(chat_format, tokenizer=cast(Tokenizer, Watched()))
    lines = [demonstration_line(question, answer), b"broken", demonstration_line("word " * 400, "That.")]
    measured = measure(lines, DatasetLimits(), watched, TeacherView(teacher_template) if teacher_template else None, no_check)
    found = fit(measured, None, chat_format.context_length)
    assert [(problem.line, problem.code) for problem in measured.reader.problems] == [(2, "invalid_json")]
    assert found.too_long[0].line == 1
    assert found.too_long[0].code == "context_length_exceeded"
    assert "more tokens than the 512 that the context holds" in found.too_long[0].message
    assert [problem.line for problem in found.too_long] == ([1, 3])
    assert max(counted) < 20_000


@pytest.mark.parametrize(("context", "fits"), [(100, True), (99, False)])
def test_a_supervised_row_fits_to_the_last_token(context: int, fits: bool) -> None:
    found = fit(measured_rows(RowLength(1, prompt=60, answer=40, teacher_prompt=0)), None, context)
    assert (len(found.rows) == 1) is fits


@pytest.mark.parametrize(("context", "fits"), [(216, True), (215, False)])
def test_a_rollout_of_the_whole_length_fits_after_the_teachers_prompt(context: int, fits: bool) -> None:
    found = fit(measured_rows(RowLength(13, prompt=60, answer=10, teacher_prompt=200)), 16, context)
    assert (len(found.rows) == 1) is fits
    if not fits:
        assert str(found.too_long[0]) == (
            "line 13: the teacher's prompt has 200 tokens and the completion (max_completion_tokens) needs 16: it needs 216 tokens, the context holds 215"
        )


def test_the_demonstration_itself_must_fit_even_where_rollouts_are_short() -> None:
    found = fit(measured_rows(RowLength(1, prompt=60, answer=50, teacher_prompt=70)), 1, 100)
    assert "it needs 110 tokens" in found.too_long[0].message


def test_an_automatic_completion_leaves_room_for_common_answers_in_every_row() -> None:
    """One row with a long prompt must not shrink the rollouts of all the others."""
    rows = [RowLength(line, prompt=50, answer=30, teacher_prompt=100) for line in range(1, 20)]
    long = RowLength(20, prompt=50, answer=5, teacher_prompt=180)
    assert [problem.line for problem in fit(measured_rows(*rows, long), "auto", 200).too_long] == [20]
    assert fit(measured_rows(*rows, long), "auto", 210).too_long == []


def test_an_answer_longer_than_the_common_ones_needs_its_own_room() -> None:
    rows = [RowLength(line, prompt=10, answer=10, teacher_prompt=20) for line in range(1, 40)]
    found = fit(measured_rows(*rows, RowLength(40, prompt=10, answer=90, teacher_prompt=100)), "auto", 180)
    assert [problem.line for problem in found.too_long] == [40]


def test_no_rows_at_all() -> None:
    assert fit(measured_rows(), "auto", 100).rows == []


def test_lines_are_named_up_to_a_hundred() -> None:
    found = fit(measured_rows(*(RowLength(line, 10, 10, 0) for line in range(1, 151))), None, 10)
    assert name_lines(found.too_long[:1]) == "line 1"
    assert name_lines(found.too_long[:3]) == "lines 1, 2, 3"
    assert name_lines(found.too_long).endswith(", 99, 100 and 50 more")
