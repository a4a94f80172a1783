"""Questions that show what a model still knows: their file, how an answer is judged, and how a measurement is written down.

A probe file is JSON Lines: `{"probe": "facts", "question": "What is the capital of France?", "answers": ["Paris"]}`. An answer
is right when one of `answers` stands in it, in any case, with no letter, digit or underscore directly before or after it.
Torch-free.
"""

import json
import math
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from sdft_engine.contract.errors import ContextExceeded, DatasetError
from sdft_engine.contract.strict_json import has_lone_surrogate

DEFAULT_PROBES_PATH = Path(__file__).parents[1] / "general_probes.jsonl"
"""A hundred questions of this project's own: facts, arithmetic, instructions, formats."""
PARAM = "method.sdft.retention_file"
MAX_QUESTIONS = 2000
MAX_LINE_BYTES = 65_536
MAX_FILE_BYTES = 16 * 1024**2
"""More than any sensible file; lines are only looked at whole."""
MAX_ANSWER_TOKENS = 32
"""An answer is judged by that many tokens of it."""


class ProbeQuestion(BaseModel):
    """One line of a probe file."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    probe: str = Field(min_length=1, max_length=64)
    question: str = Field(min_length=1)
    answers: list[str] = Field(min_length=1)


class ProbeScore(BaseModel):
    """Of one kind of question: `right` of `n` are answered, with the 95% interval `low` to `high` of that share. The base
    answers `base_right`, and of those the model still answers `kept`."""

    n: int
    right: int
    low: float
    high: float
    base_right: int
    kept: int


class Retention(BaseModel):
    """What a model kept of the base's abilities at a step. `kl_from_base`: mean over the tokens of the base's own answers of
    KL(base || model) over the whole vocabulary, in nats."""

    step: int
    kl_from_base: float
    probes: dict[str, ProbeScore]

    @property
    def n(self) -> int:
        return sum(score.n for score in self.probes.values())

    @property
    def right(self) -> int:
        return sum(score.right for score in self.probes.values())

    @property
    def base_right(self) -> int:
        return sum(score.base_right for score in self.probes.values())

    @property
    def kept(self) -> int:
        return sum(score.kept for score in self.probes.values())


@dataclass(frozen=True)
class Judged:
    """One question, and whether the base and the model answered it."""

    probe: str
    base: bool
    model: bool


def read_probes(path: Path, prompt_tokens: Callable[[str], int] | None = None, context_length: int = 0) -> list[ProbeQuestion]:
    """As `parse_probes`. Raises DatasetError naming the first line that can't be used, or where there is none at all."""
    with path.open("rb") as lines:
        return parse_probes(lines, path.name, prompt_tokens, context_length)


def parse_probes(lines: Iterable[bytes], name: str, prompt_tokens: Callable[[str], int] | None = None, context_length: int = 0) -> list[ProbeQuestion]:
    """The questions of a probe file that errors call `name`. With `prompt_tokens`, which counts a question's prompt, one that
    leaves no room for its answer in the context is an error too. Raises DatasetError as above."""
    questions: list[ProbeQuestion] = []
    for number, question in _parsed(lines, name):
        if prompt_tokens is not None and (problem := _too_long(question, prompt_tokens, context_length)):
            raise DatasetError(f"{name}: line {number}: {problem}", param=PARAM)
        if len(questions) == MAX_QUESTIONS:
            raise DatasetError(f"{name}: line {number}: at most {MAX_QUESTIONS:,} questions are asked", param=PARAM)
        questions.append(question)
    if not questions:
        raise DatasetError(f"{name} has no questions", param=PARAM)
    return questions


def _too_long(question: ProbeQuestion, prompt_tokens: Callable[[str], int], context_length: int) -> str | None:
    try:
        needed = prompt_tokens(question.question) + MAX_ANSWER_TOKENS
    except ContextExceeded as error:
        return error.message
    return f"it needs {needed:,} tokens with its answer, the context holds {context_length:,}" if needed > context_length else None


def _parsed(lines: Iterable[bytes], name: str) -> Iterator[tuple[int, ProbeQuestion]]:
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        if len(line) > MAX_LINE_BYTES:
            raise DatasetError(f"{name}: line {number}: longer than {MAX_LINE_BYTES:,} bytes", param=PARAM)
        try:
            question = ProbeQuestion.model_validate(json.loads(line))
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"])) or "the line"
            raise DatasetError(f"{name}: line {number}: {where}: {first['msg']}", param=PARAM) from error
        except (ValueError, RecursionError) as error:
            raise DatasetError(f"{name}: line {number}: not valid JSON", param=PARAM) from error
        if has_lone_surrogate(question.model_dump()) or not question.probe.isprintable():
            raise DatasetError(f"{name}: line {number}: it holds control characters or half of a surrogate pair", param=PARAM)
        answers = [answer.strip() for answer in question.answers]
        if not all(answers):
            raise DatasetError(f"{name}: line {number}: answers: an accepted answer is empty", param=PARAM)
        yield number, question.model_copy(update={"answers": answers})


def is_right(answer: str, accepted: Sequence[str]) -> bool:
    """Whether an accepted string stands in the answer on word boundaries, in any case."""
    return any(re.search(rf"(?<!\w){re.escape(text)}(?!\w)", answer, re.IGNORECASE) for text in accepted)


def wilson_interval(right: int, n: int, z: float = 1.96) -> tuple[float, float]:
    """The 95% score interval of a proportion (Wilson 1927)."""
    share = right / n
    centre = share + z * z / (2 * n)
    margin = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return max(0.0, (centre - margin) / (1 + z * z / n)), min(1.0, (centre + margin) / (1 + z * z / n))


def scores_of(judged: Sequence[Judged]) -> dict[str, ProbeScore]:
    """Counts by probe, in the order in which the probes first occur."""
    scores = {}
    for probe in dict.fromkeys(each.probe for each in judged):
        own = [each for each in judged if each.probe == probe]
        right, known = sum(each.model for each in own), [each for each in own if each.base]
        low, high = wilson_interval(right, len(own))
        scores[probe] = ProbeScore(n=len(own), right=right, low=low, high=high, base_right=len(known), kept=sum(each.model for each in known))
    return scores
