"""How many tokens each row of a file needs, and which rows fit the base model's context. Nothing is ever truncated.

A supervised row needs its prompt and its answer. A self-distillation row needs also the teacher's prompt and the
rollout after it: `max_completion_tokens`, or where that is automatic the row's own answer and the 95th percentile of all
answers (the automatic value may go below its 50% of headroom, never below that).
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from sdft_engine.contract.dataset import MAX_REPORTED_PROBLEMS, DatasetLimits, DatasetProblem, DatasetReader
from sdft_engine.contract.errors import ConfigurationError, ContextExceeded
from sdft_engine.contract.hyperparameters import Auto, common_answer_tokens
from sdft_engine.contract.prompts import ChatFormat
from sdft_engine.contract.teacher_prompts import TeacherView

TOO_LONG = "context_length_exceeded"


@dataclass(frozen=True)
class RowLength:
    """Tokens of one row. `teacher_prompt` is 0 in a supervised run, `answer` where only a context or feedback teaches."""

    line: int
    prompt: int
    answer: int
    teacher_prompt: int

    @property
    def longest_prompt(self) -> int:
        return max(self.prompt, self.teacher_prompt)


@dataclass
class MeasuredFile:
    """`reader` holds the problems of lines that can't be used at all, `too_long` those of rows that weren't even counted."""

    reader: DatasetReader
    rows: list[RowLength] = field(default_factory=list)
    too_long: list[DatasetProblem] = field(default_factory=list)


@dataclass
class FittingRows:
    rows: list[RowLength] = field(default_factory=list)
    too_long: list[DatasetProblem] = field(default_factory=list)


def measure(lines: Iterable[bytes], limits: DatasetLimits, chat_format: ChatFormat, teacher: TeacherView | None, check: Callable[[], None]) -> MeasuredFile:
    """Count the tokens of every line. No `teacher`: a supervised run. `check` is called at every line and may raise."""
    measured = MeasuredFile(DatasetReader(limits))
    for raw in lines:
        check()
        demonstration = measured.reader.feed(raw)
        if demonstration is None:
            continue
        if teacher is None and demonstration.answer is None:
            measured.reader.report(demonstration.line, "example_missing_assistant_message", "it has no answer, which supervised training and validation need")
            continue
        try:
            chat_format.require_shown([*demonstration.prompt, *([demonstration.answer] if demonstration.answer else [])], demonstration.tools)
            prompt = len(chat_format.student_prompt_ids(demonstration))
            answer = len(chat_format.answer_ids(demonstration))
            teacher_prompt = len(chat_format.teacher_prompt_ids(demonstration, teacher)) if teacher else 0
        except ContextExceeded as error:
            measured.too_long.append(DatasetProblem(demonstration.line, TOO_LONG, error.message))
            continue
        except ConfigurationError as error:
            measured.reader.report(demonstration.line, "unsupported_conversation", error.message.removeprefix(f"line {demonstration.line}: "))
            continue
        measured.rows.append(RowLength(demonstration.line, prompt, answer, teacher_prompt))
    return measured


def fit(measured: MeasuredFile, max_completion_tokens: int | Auto | None, context_length: int) -> FittingRows:
    """Part the rows into those that fit and those that don't. No `max_completion_tokens`: a supervised run."""
    rows = measured.rows
    found = FittingRows(too_long=list(measured.too_long))
    common = common_answer_tokens([row.answer for row in rows])
    for row in rows:
        needed, why = row.prompt + row.answer, f"the prompt has {row.prompt:,} tokens and the answer {row.answer:,}"
        if max_completion_tokens is not None:
            completion = max(row.answer, common) if max_completion_tokens == "auto" else max_completion_tokens
            if row.longest_prompt + completion > needed:
                whose = "the teacher's prompt" if row.teacher_prompt >= row.prompt else "the prompt"
                needed, why = (
                    row.longest_prompt + completion,
                    f"{whose} has {row.longest_prompt:,} tokens and the completion (max_completion_tokens) needs {completion:,}",
                )
        if needed <= context_length:
            found.rows.append(row)
        else:
            found.too_long.append(DatasetProblem(row.line, TOO_LONG, f"{why}: it needs {needed:,} tokens, the context holds {context_length:,}"))
    found.too_long.sort(key=lambda problem: problem.line)
    return found


def name_lines(problems: list[DatasetProblem]) -> str:
    """`lines 4, 13 and 20`, the first hundred."""
    lines = [str(problem.line) for problem in problems[:MAX_REPORTED_PROBLEMS]]
    rest = f" and {len(problems) - len(lines):,} more" if len(problems) > len(lines) else ""
    return f"line{'s' if len(problems) > 1 else ''} {', '.join(lines)}{rest}"
