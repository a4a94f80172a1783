"""Lines that teach by something else than a demonstration, and demonstrations without the thoughts that led to them."""

from pathlib import Path
from typing import Any

import pytest

from sdft_engine import session as session_module
from sdft_engine import trainer
from sdft_engine.contract.errors import DatasetError
from sdft_engine.generation import decode_all
from sdft_engine.rollouts import Rollout
from sdft_engine.sampling import Decoding, SamplingParams
from sdft_engine.session import PROBED_ANSWER_TOKENS, Session, open_session, settle
from sdft_engine.teacher import TEACHER, automatic_temperature
from sdft_engine.trainer import train
from tests.sdft_engine.recording import watched
from tests.sdft_engine.runs import example, make_run, messages_of, records, stop_after, write_lines

HINTS: dict[str, dict[str, Any]] = {
    "document": {"context": "Every lamp here is violet."},
    "feedback": {"feedback": "It is a colour.", "attempt": "A cow."},
}


def hinted(number: int, hint: str) -> dict[str, Any]:
    return {"messages": example(number)["messages"][:1], **HINTS[hint]}


@pytest.mark.parametrize("hint", HINTS)
@pytest.mark.parametrize("template", ["example", "history", "{question} {context} {feedback}"])
def test_a_run_without_any_demonstration_learns_from_its_teacher(tmp_path: Path, tiny_model_dir: Path, hint: str, template: str) -> None:
    run = make_run(tmp_path / "run", tiny_model_dir, config={"teacher_template": template}, temperature="auto", divergence="reverse")
    write_lines(run.train_path, [hinted(number, hint) for number in range(6)])
    session = open_session(run)
    decode = session.model.chat_format.decode
    assert all("colour" in decode(text.prompt_ids) and not text.completion_ids for text in session.texts)
    for text, teacher_prompt in zip(session.texts, session.teacher_prompts, strict=True):
        shown = HINTS[hint].get("context") or HINTS[hint]["feedback"]
        assert shown in decode(teacher_prompt)
        assert shown not in decode(text.prompt_ids)
    result = train(run)
    assert (result.outcome, result.final_step) == ("succeeded", 8)
    assert all(record["train_loss"] > 0 for record in records(run.metrics_path))


def test_without_demonstrations_the_temperature_is_measured_on_the_teachers_own_answers(
    tmp_path: Path, tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run(tmp_path / "run", tiny_model_dir, temperature="auto")
    write_lines(run.train_path, [hinted(number, "document") for number in range(6)])
    seen: list[Any] = []
    monkeypatch.setattr(session_module, "automatic_temperature", watched(automatic_temperature, lambda *arguments: seen.extend(arguments)))
    session = open_session(run)
    settle(session, lambda: None)
    model, texts, adapter = seen[:3]
    assert adapter == TEACHER
    assert [text.prompt_ids for text in texts] == session.teacher_prompts
    answers = [
        Decoding(prompt, SamplingParams(PROBED_ANSWER_TOKENS, temperature=0, stop_token_ids=model.chat_format.eos_token_ids), TEACHER)
        for prompt in session.teacher_prompts
    ]
    decode_all(model, answers)
    assert [text.completion_ids for text in texts] == [answer.token_ids for answer in answers]
    event = next(event for event in records(run.events_path) if "Temperature settled" in event["message"])
    assert event["data"]["greedy_token_accuracy"] == pytest.approx(1, abs=0.02)
    assert "of its own greedy answers' tokens" in event["message"]
    assert event["message"].endswith("; nothing needs to be done") or "set temperature to try one" in event["message"]
    assert event["level"] == "info"


def test_what_the_template_hides_and_a_teacher_that_says_nothing_are_warned_of(tmp_path: Path, tiny_model_dir: Path) -> None:
    run = make_run(tmp_path / "run", tiny_model_dir, temperature="auto", config={"teacher_template": "{question} Hint: {context}"})
    write_lines(run.train_path, [example(number) | {"context": f"Lamps are {number}."} for number in range(6)])
    settle(open_session(run), lambda: None)
    hidden, useless = messages_of(run, "warn")
    assert hidden == "6 of 6 lines have a demonstration that teacher_template does not show"
    assert "use another teacher_template" in useless  # the random model's teacher


@pytest.mark.parametrize(("method", "file"), [("supervised", "train"), ("sdft", "validation")])
def test_what_imitates_needs_an_answer(tmp_path: Path, tiny_model_dir: Path, method: Any, file: str) -> None:
    run = make_run(tmp_path / "run", tiny_model_dir, method, validation_rows=2)
    path = run.train_path if file == "train" else run.validation_path
    write_lines(path, [example(0), hinted(1, "document")])
    with pytest.raises(DatasetError, match="line 2: it has no answer") as raised:
        open_session(run)
    assert raised.value.param == ("training_file" if file == "train" else "validation_file")


@pytest.mark.parametrize("reasoning", [True, False])
def test_the_length_of_thoughts_is_measured_and_a_cap_below_it_is_said(
    tmp_path: Path, tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch, reasoning: bool
) -> None:
    """A scripted model: of three answers one is cut off within its thoughts, the others think for a known number of tokens."""
    run = make_run(tmp_path / "run", tiny_model_dir, config={"reasoning": reasoning})
    lengths: list[int] = []

    def thoughtful(session: Session, step: int, rows: list[int]) -> list[Rollout]:
        encode = session.model.chat_format.encode
        thoughts = [encode("a lamp</think>"), encode("one lamp, two lamps</think>"), []]
        lengths[:] = map(len, thoughts)
        answers = [[*thought, *encode(" red lamp")] for thought in thoughts]
        return [
            Rollout(row, session.texts[row].prompt_ids, session.teacher_prompts[row], answer, finished=bool(thought))
            for row, answer, thought in zip(rows, answers, thoughts, strict=True)
        ]

    monkeypatch.setattr(trainer, "rollouts_of_step", thoughtful)
    train(run, stop_after(run, 2, "cancel"))
    measured = [record["thinking_tokens_mean"] for record in records(run.metrics_path)]
    warnings = [event["message"] for event in records(run.events_path) if event["level"] == "warn"]
    if reasoning:
        assert measured == [pytest.approx(sum(lengths) / 3)] * 2
        assert lengths[0] < lengths[1]
        assert [message for message in warnings if "1 of 3 first answers" in message and "raise max_completion_tokens" in message] == warnings
        assert len(warnings) == 1
    else:
        assert measured == [None, None]
        assert warnings == []


def test_reasoning_changes_what_the_teacher_is_asked(tmp_path: Path, tiny_model_dir: Path) -> None:
    prompts = [
        open_session(make_run(tmp_path / str(reasoning), tiny_model_dir, config={"reasoning": reasoning, "teacher_template": "example"})).teacher_prompts
        for reasoning in (False, True)
    ]
    assert prompts[0] != prompts[1]
