"""The demo's scoring, on values worked out by hand."""

import sys
from pathlib import Path

from tests.examples.scripted_client import ScriptedClient, silent_progress

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))

from demo_scoring import Question, evaluate, shown_twice

from sdft_engine.contract.dataset import Demonstration
from sdft_engine.contract.teacher_prompts import TeacherView, teacher_messages


def test_the_teacher_sees_the_exchange_twice() -> None:
    messages = shown_twice("Q2", {"messages": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]})
    assert [message["content"] for message in messages] == ["Q", "A", "Q", "A", "Please answer the question again: Q2"]
    question, answer = {"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}
    assert shown_twice("Q", {"messages": [question, answer]}) == teacher_messages(Demonstration(1, [question], answer), TeacherView("history_twice"))


def test_questions_are_asked_greedily_and_scored_in_order() -> None:
    client = ScriptedClient([], lambda model, question: f"It is {question[-1]}.")
    questions = [Question(f"number {number}", (str(number if number != 2 else 7),), None, "facts") for number in range(4)]
    found = evaluate(client, "tuned", questions, "asking", silent_progress())
    assert found.hits == (True, True, False, True)
    assert found.answers == ("It is 0.", "It is 1.", "It is 2.", "It is 3.")
    assert client.scored_models == ["tuned"]
    assert all(len(messages) == 1 for _, messages in client.asked)


def test_a_question_about_a_demonstration_is_asked_after_that_one() -> None:
    demonstrations = [{"messages": [{"role": "user", "content": f"Q{n}"}, {"role": "assistant", "content": f"A{n}"}]} for n in (1, 2)]
    client = ScriptedClient([])
    questions = [Question("reworded", ("A2",), 2, None), Question("general", ("x",), None, "facts")]
    evaluate(client, "base", questions, "asking", silent_progress(), demonstrations)
    by_text = {messages[-1]["content"]: messages for _, messages in client.asked}
    assert by_text["Please answer the question again: reworded"] == shown_twice("reworded", demonstrations[1])
    assert by_text["general"] == [{"role": "user", "content": "general"}]
