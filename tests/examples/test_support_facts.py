"""The demo's data holds what its README promises."""

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

DATA = Path(__file__).resolve().parents[2] / "examples" / "support_facts"


def load(name: str) -> list[dict[str, Any]]:
    lines = (DATA / name).read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def found(answer: str, text: str) -> bool:
    return re.search(rf"(?<!\w){re.escape(answer)}(?!\w)", text, re.IGNORECASE) is not None


def normal(text: str) -> str:
    return " ".join(re.findall(r"\w+", text.casefold()))


DEMONSTRATIONS = load("demonstrations.jsonl")
PARAPHRASES = load("paraphrases.jsonl")
TRAINED = load("trained.jsonl")
RETENTION = load("retention.jsonl")

FACTS = 24

QUESTIONS = [row["messages"][0]["content"] for row in DEMONSTRATIONS]
ANSWERS = [row["messages"][1]["content"] for row in DEMONSTRATIONS]
ENTITIES = [row["answers"][0] for row in TRAINED]


def product(question: str) -> str:
    """The product's invented name: the only capitalised word inside a trained question."""
    names = re.findall(r"(?<=\s)[A-Z][a-z]+", question)
    assert len(names) == 1, question
    return str(names[0])


PRODUCTS = [product(question) for question in QUESTIONS]


def test_counts() -> None:
    assert len(DEMONSTRATIONS) == len(TRAINED) == FACTS
    assert len(PARAPHRASES) == 48
    assert len(RETENTION) >= 80
    assert Counter(row["probe"] for row in RETENTION) == {
        "facts": 100,
        "arithmetic": 26,
        "instructions": 48,
        "format": 26,
    }


def test_demonstrations_are_one_question_and_one_short_answer() -> None:
    for row in DEMONSTRATIONS:
        assert set(row) == {"messages"}
        assert [message["role"] for message in row["messages"]] == ["user", "assistant"]
        assert all(set(message) == {"role", "content"} for message in row["messages"])
    assert all(len(answer.split()) <= 11 for answer in ANSWERS)


def test_three_kinds_of_relation_eight_each() -> None:
    forms = {"maintained by": "maintainer", "returned to": "depot", "code-named": "code name"}
    kinds = Counter(kind for answer in ANSWERS for word, kind in forms.items() if word in answer.casefold())
    assert kinds == {"maintainer": 8, "depot": 8, "code name": 8}


def test_trained_questions_are_the_demonstrations() -> None:
    assert [row["demonstration"] for row in TRAINED] == list(range(1, FACTS + 1))
    assert [row["question"] for row in TRAINED] == QUESTIONS


@pytest.mark.parametrize("rows", [TRAINED, PARAPHRASES], ids=["trained", "paraphrases"])
def test_rows_point_at_a_demonstration_that_answers_them(rows: list[dict[str, Any]]) -> None:
    for row in rows:
        assert set(row) == {"question", "answers", "demonstration"}
        assert 1 <= row["demonstration"] <= len(DEMONSTRATIONS)
        index = row["demonstration"] - 1
        assert row["answers"] == TRAINED[index]["answers"]
        assert all(found(answer, ANSWERS[index]) for answer in row["answers"])
        assert [name for name in PRODUCTS if found(name, row["question"])] == [PRODUCTS[index]]
        assert not any(found(entity, row["question"]) for entity in ENTITIES)


def test_every_fact_has_one_demonstration_and_two_paraphrases() -> None:
    assert Counter(row["demonstration"] for row in PARAPHRASES) == dict.fromkeys(range(1, FACTS + 1), 2)
    assert len(set(QUESTIONS)) == FACTS


def test_no_paraphrase_is_trained_on() -> None:
    def wording(question: str, name: str) -> str:
        return normal(re.sub(rf"{name} \w+", "PRODUCT", question))

    questions = [row["question"] for row in PARAPHRASES]
    assert len({normal(question) for question in questions}) == 48
    assert not {normal(q) for q in questions} & {normal(q) for q in QUESTIONS}
    trained = {wording(q, name) for q, name in zip(QUESTIONS, PRODUCTS, strict=True)}
    held_out = {wording(row["question"], PRODUCTS[row["demonstration"] - 1]) for row in PARAPHRASES}
    assert not trained & held_out


def test_facts_do_not_share_words() -> None:
    assert len(set(PRODUCTS)) == FACTS
    words = [word for entity in ENTITIES for word in entity.casefold().split()]
    assert len(words) == len(set(words)) == 48
    assert not set(words) & {name.casefold() for name in PRODUCTS}


def test_retention_has_nothing_of_the_facts() -> None:
    for row in RETENTION:
        assert set(row) == {"question", "answers", "probe"}
        texts = [row["question"], *row["answers"]]
        for name in [*PRODUCTS, *ENTITIES]:
            assert not any(found(name, text) for text in texts), (name, row)
        for entity in ENTITIES:
            assert not any(found(answer, entity) for answer in row["answers"]), (entity, row)
    assert len({normal(row["question"]) for row in RETENTION}) == len(RETENTION)


def test_no_learned_answer_is_a_retention_hit() -> None:
    for row in RETENTION:
        assert not any(found(answer, text) for answer in row["answers"] for text in ANSWERS), row


def test_answers_can_be_matched_on_word_boundaries() -> None:
    for row in [*TRAINED, *PARAPHRASES, *RETENTION]:
        assert row["answers"]
        for answer in row["answers"]:
            assert re.fullmatch(r"\w(.*\w)?", answer), answer


def test_facts_and_sums_are_not_answered_by_their_question() -> None:
    for row in RETENTION:
        if row["probe"] in ("facts", "arithmetic"):
            assert not any(found(answer, row["question"]) for answer in row["answers"]), row
