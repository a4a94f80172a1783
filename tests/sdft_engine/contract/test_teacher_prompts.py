"""What the teacher is shown: every template on every shape of conversation, and templates that users write."""

from pathlib import Path
from typing import Any

import pytest

from sdft_engine.contract.dataset import Demonstration
from sdft_engine.contract.errors import ConfigurationError
from sdft_engine.contract.prompts import ChatFormat
from sdft_engine.contract.teacher_prompts import (
    NAMED_TEMPLATES,
    TeacherView,
    answer_text,
    check_teacher_template,
    require_hint,
    teacher_messages,
    unshown_hints,
)

SYSTEM = {"role": "system", "content": "Be brief."}
EARLIER = {"role": "user", "content": "Hello"}
GREETING = {"role": "assistant", "content": "Hi!"}
QUESTION = {"role": "user", "content": "Which lamp?"}
ANSWER = {"role": "assistant", "content": "The red one."}
CALL = {"id": "c1", "type": "function", "function": {"name": "look", "arguments": '{"lamp": "röd"}'}}
CALLING = {"role": "assistant", "content": None, "tool_calls": [CALL]}
RESULT = {"role": "tool", "content": "on", "tool_call_id": "c1"}

EXAMPLE = """{}

Here is an example of a good response to this question:

{}

Now give a response of your own to the question, including your thinking if the question needs any."""
RESPOND = EXAMPLE.rsplit("\n\n", 1)[1]
INFORMATION = "Use the following information:\n\nLamps are red.\n\n"
AGAIN = "Please answer the question again: {}"
CONTINUE = "Continue from the tool result above."


def user(content: str) -> dict[str, Any]:
    return {"role": "user", "content": content}


SINGLE = Demonstration(1, [QUESTION], ANSWER)
WITH_CONTEXT = Demonstration(1, [QUESTION], ANSWER, context="Lamps are red.")
TURNS = Demonstration(1, [SYSTEM, EARLIER, GREETING, QUESTION], ANSWER)
AFTER_TOOL = Demonstration(1, [SYSTEM, QUESTION, CALLING, RESULT], ANSWER)
AFTER_ANSWER = Demonstration(1, [QUESTION, GREETING], ANSWER)
DOCUMENT = Demonstration(1, [QUESTION], None, context="Lamps are red.")
REVIEWED = Demonstration(1, [QUESTION], None, attempt="Blue?", feedback="Not blue.")
FEEDBACK = Demonstration(1, [QUESTION], None, feedback="Not blue.")
EVERYTHING = Demonstration(1, [QUESTION], ANSWER, context="Lamps are red.", attempt="Blue?", feedback="Not blue.")
ATTEMPT = {"role": "assistant", "content": "Blue?"}

EXPECTED: dict[str, tuple[Demonstration, str, list[dict[str, Any]]]] = {
    "example": (SINGLE, "example", [user(EXAMPLE.format("Which lamp?", "The red one."))]),
    "example, context": (WITH_CONTEXT, "example", [user(INFORMATION + EXAMPLE.format("Which lamp?", "The red one."))]),
    "example, turns": (TURNS, "example", [SYSTEM, EARLIER, GREETING, user(EXAMPLE.format("Which lamp?", "The red one."))]),
    "example, after a tool": (AFTER_TOOL, "example", [SYSTEM, QUESTION, CALLING, RESULT, user(EXAMPLE.format(CONTINUE, "The red one."))]),
    "example, after an answer": (AFTER_ANSWER, "example", [QUESTION, GREETING, user(EXAMPLE.format("Continue the conversation above.", "The red one."))]),
    "history": (SINGLE, "history", [QUESTION, ANSWER, user(AGAIN.format("Which lamp?"))]),
    "history, context": (WITH_CONTEXT, "history", [QUESTION, ANSWER, user(INFORMATION + AGAIN.format("Which lamp?"))]),
    "history, turns": (TURNS, "history", [SYSTEM, EARLIER, GREETING, QUESTION, ANSWER, user(AGAIN.format("Which lamp?"))]),
    "history, after a tool": (AFTER_TOOL, "history", [SYSTEM, QUESTION, CALLING, RESULT, ANSWER, user(AGAIN.format(CONTINUE))]),
    "twice": (SINGLE, "history_twice", [QUESTION, ANSWER, QUESTION, ANSWER, user(AGAIN.format("Which lamp?"))]),
    "twice, turns": (TURNS, "history_twice", [SYSTEM, EARLIER, GREETING, QUESTION, ANSWER, QUESTION, ANSWER, user(AGAIN.format("Which lamp?"))]),
    "twice, after a tool": (
        AFTER_TOOL,
        "history_twice",
        [SYSTEM, QUESTION, CALLING, RESULT, ANSWER, user(AGAIN.format(CONTINUE)), ANSWER, user(AGAIN.format(CONTINUE))],
    ),
    "example, document alone": (DOCUMENT, "example", [user(INFORMATION + "Which lamp?")]),
    "example, attempt": (
        REVIEWED,
        "example",
        [user("Which lamp?\n\nHere is an earlier attempt at a response:\n\nBlue?\n\nHere is feedback on that attempt:\n\nNot blue.\n\n" + RESPOND)],
    ),
    "example, feedback": (FEEDBACK, "example", [user("Which lamp?\n\nHere is feedback on earlier attempts:\n\nNot blue.\n\n" + RESPOND)]),
    "example, everything": (
        EVERYTHING,
        "example",
        [
            user(
                INFORMATION
                + "Which lamp?\n\nHere is an earlier attempt at a response:\n\nBlue?\n\nHere is feedback on that attempt:\n\nNot blue.\n\n"
                + EXAMPLE.format("", "The red one.").lstrip()
            )
        ],
    ),
    "history, document alone": (DOCUMENT, "history", [user(INFORMATION + "Which lamp?")]),
    "history, attempt": (REVIEWED, "history", [QUESTION, ATTEMPT, user("Here is feedback on that attempt:\n\nNot blue.\n\n" + AGAIN.format("Which lamp?"))]),
    "history, feedback": (FEEDBACK, "history", [user("Here is feedback on earlier attempts:\n\nNot blue.\n\nWhich lamp?")]),
    "history, everything": (
        EVERYTHING,
        "history",
        [
            QUESTION,
            ATTEMPT,
            user("Here is feedback on that attempt:\n\nNot blue.\n\n" + AGAIN.format("Which lamp?")),
            ANSWER,
            user(INFORMATION + AGAIN.format("Which lamp?")),
        ],
    ),
    "twice, document after a tool": (
        Demonstration(1, [QUESTION, CALLING, RESULT], None, context="Lamps are red."),
        "history_twice",
        [QUESTION, CALLING, RESULT, user(INFORMATION + CONTINUE)],
    ),
    "own text, feedback": (REVIEWED, "{question}|{attempt}|{feedback}|{demonstration}", [user("Which lamp?|Blue?|Not blue.|")]),
    "own text": (WITH_CONTEXT, "{context} Q: {question} A: {demonstration} {{sic}}", [user("Lamps are red. Q: Which lamp? A: The red one. {sic}")]),
    "own text, no context": (SINGLE, "[{context}]{demonstration}", [user("[]The red one.")]),
    "own text, turns": (TURNS, "{demonstration}", [SYSTEM, EARLIER, GREETING, user("The red one.")]),
}


@pytest.mark.parametrize(("demonstration", "template", "expected"), EXPECTED.values(), ids=EXPECTED)
def test_teacher_messages(demonstration: Demonstration, template: str, expected: list[dict[str, Any]]) -> None:
    check_teacher_template(template)
    before = [dict(message) for message in demonstration.prompt]
    assert teacher_messages(demonstration, TeacherView(template)) == expected
    assert demonstration.prompt == before


@pytest.mark.parametrize("template", [*NAMED_TEMPLATES, "{demonstration}"])
@pytest.mark.parametrize("demonstration", [SINGLE, WITH_CONTEXT, TURNS, AFTER_TOOL, Demonstration(1, [QUESTION], CALLING)])
def test_only_the_teacher_sees_the_demonstration(tiny_model_dir: Path, demonstration: Demonstration, template: str) -> None:
    chat = ChatFormat.from_directory(tiny_model_dir)
    student, teacher = (
        chat.tokenizer.decode(ids) for ids in (chat.student_prompt_ids(demonstration), chat.teacher_prompt_ids(demonstration, TeacherView(template)))
    )
    shown = "röd" if demonstration.answer is CALLING else "The red one."
    assert shown in teacher
    assert student == chat.tokenizer.decode(chat.prompt_ids(demonstration.prompt))
    assert "The red one." not in student
    assert "Lamps are red." not in student
    assert teacher.endswith("assistant\n")


@pytest.mark.parametrize("text", ["{demonstration}", "{0.__class__}", "{question!r}", "{}", "}{", "{{"])
@pytest.mark.parametrize("template", [*NAMED_TEMPLATES, "{question}|{demonstration}|{context}"])
def test_braces_in_the_data_are_only_text(text: str, template: str) -> None:
    demonstration = Demonstration(1, [user(text)], {"role": "assistant", "content": f"A{text}"}, context=f"C{text}")
    shown = " ".join(message["content"] for message in teacher_messages(demonstration, TeacherView(template)))
    assert text in shown
    assert f"A{text}" in shown
    assert f"C{text}" in shown


@pytest.mark.parametrize(
    "template",
    [
        "",
        "history_thrice",
        "{question}",
        "{{demonstration}}",
        "{demonstration} {answer}",
        "{demonstration} {}",
        "{demonstration} {0}",
        "{demonstration.__class__}",
        "{demonstration[0]} {demonstration}",
        "{question.__class__.__mro__} {demonstration}",
        "{demonstration!r}",
        "{demonstration:>1000000000}",
        "{demonstration:{question}}",
        "{demonstration",
        "demonstration}",
        "{demonstration} {",
        "{demonstration}" * 5,
        "{demonstration}" + "{context}" * 2_000,
        "{" + "x" * 30_000 + "}",
    ],
)
def test_templates_that_can_not_be_used_are_refused_by_field(template: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        check_teacher_template(template)
    assert caught.value.param == "method.sdft.teacher_template"
    assert "teacher_template" in caught.value.message
    assert len(caught.value.message) < 300


def test_a_field_may_stand_four_times() -> None:
    check_teacher_template("{demonstration}{question}{context}{{demonstration}}" * 4)
    with pytest.raises(ConfigurationError, match=r"\{question\} at most 4 times, not 2,000 times"):
        check_teacher_template("{demonstration}" + "{question}" * 2_000)


def test_demonstration_as_text() -> None:
    assert answer_text(ANSWER) == "The red one."
    assert answer_text(CALLING) == '[{"id": "c1", "type": "function", "function": {"name": "look", "arguments": "{\\"lamp\\": \\"röd\\"}"}}]'
    both = answer_text({**CALLING, "content": "Let me look."})
    assert both.startswith("Let me look.\n[{")


def test_reasoning_asks_for_the_thoughts_in_the_example_template_alone() -> None:
    plainly, reasoned = (teacher_messages(SINGLE, TeacherView("example", reasoning))[0]["content"] for reasoning in (False, True))
    assert plainly.rsplit("\n\n", 1)[0] == reasoned.rsplit("\n\n", 1)[0]
    assert "step by step" in reasoned
    assert "step by step" not in plainly
    for template in ("history", "history_twice", "{demonstration}"):
        assert teacher_messages(SINGLE, TeacherView(template, reasoning=True)) == teacher_messages(SINGLE, TeacherView(template))


@pytest.mark.parametrize(
    ("demonstration", "template", "lacks"),
    [
        (DOCUMENT, "{question} {demonstration}", "demonstration"),
        (SINGLE, "{feedback}{context}", "context or feedback"),
        (REVIEWED, "{attempt} {context}", "context"),
    ],
)
def test_a_template_that_shows_the_teacher_nothing_of_a_line_is_refused(tiny_model_dir: Path, demonstration: Demonstration, template: str, lacks: str) -> None:
    chat = ChatFormat.from_directory(tiny_model_dir)
    with pytest.raises(ConfigurationError, match=f"line 1: .* shows only the {lacks}, and this line has none"):
        chat.teacher_prompt_ids(demonstration, TeacherView(template))
    require_hint(demonstration, "{demonstration}{context}{feedback}")
    for name in NAMED_TEMPLATES:
        require_hint(demonstration, name)


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("example", {}),
        ("{question} {demonstration}", {"context": 2, "feedback": 1}),
        ("{question} {context} {feedback}", {"demonstration": 2}),
        ("{question} {demonstration} {context} {feedback}", {}),
    ],
)
def test_what_a_template_leaves_out_is_counted(template: str, expected: dict[str, int]) -> None:
    assert unshown_hints([SINGLE, DOCUMENT, EVERYTHING], template) == expected
