"""Scoring of the demo: an answer counts when an accepted string stands in it on word boundaries, whatever the case."""

import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from openai import OpenAI
from rich.progress import Progress

from sdft_engine.contract.probes import is_right

DATA_DIR = Path(__file__).parent / "support_facts"
MAX_ANSWER_TOKENS = 32
PARALLEL_REQUESTS = 16


@dataclass(frozen=True)
class Question:
    """`demonstration` is the 1-based line of the fact that answers it; None for general questions."""

    text: str
    answers: tuple[str, ...]
    demonstration: int | None
    probe: str | None


@dataclass(frozen=True)
class Score:
    """How many of `n` questions were answered; `answers` are the model's texts, in order."""

    hits: tuple[bool, ...]
    answers: tuple[str, ...]

    @property
    def n(self) -> int:
        return len(self.hits)

    @property
    def right(self) -> int:
        return sum(self.hits)

    @property
    def accuracy(self) -> float:
        return self.right / self.n


def read_lines(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (DATA_DIR / name).read_text().splitlines()]


def read_questions(name: str) -> list[Question]:
    return [Question(row["question"], tuple(row["answers"]), row.get("demonstration"), row.get("probe")) for row in read_lines(name)]


def shown_twice(question: str, demonstration: dict[str, Any]) -> list[dict[str, str]]:
    """The base as teacher: the demonstrated exchange stands twice before the question (`teacher_template: history_twice`)."""
    exchange = demonstration["messages"]
    return [*exchange, *exchange, {"role": "user", "content": f"Please answer the question again: {question}"}]


def evaluate(
    client: OpenAI, model: str, questions: list[Question], title: str, progress: Progress, demonstrations: list[dict[str, Any]] | None = None
) -> Score:
    """Ask every question greedily, several at a time; with `demonstrations`, the model is shown the one that answers it."""
    task = progress.add_task(title, total=len(questions))

    def ask(question: Question) -> str:
        messages: Any = [{"role": "user", "content": question.text}]
        if demonstrations is not None and question.demonstration is not None:
            messages = shown_twice(question.text, demonstrations[question.demonstration - 1])
        answer = client.chat.completions.create(model=model, messages=messages, temperature=0, max_tokens=MAX_ANSWER_TOKENS)
        progress.advance(task)
        return answer.choices[0].message.content or ""

    with ThreadPoolExecutor(PARALLEL_REQUESTS) as pool:
        answers = tuple(pool.map(ask, questions))
    hits = tuple(is_right(answer, question.answers) for answer, question in zip(answers, questions, strict=True))
    return Score(hits, answers)
