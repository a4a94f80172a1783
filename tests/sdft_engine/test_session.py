"""sdft_engine.session: what a run starts with, what it settles before its first step, and what it refuses to start with."""

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from sdft_engine import session as session_module
from sdft_engine.contract.errors import BaseModelError, ConfigurationError, DatasetError
from sdft_engine.contract.run_directory import RunDirectory
from sdft_engine.lora import STUDENT, LoraShape
from sdft_engine.rollouts import Rollout
from sdft_engine.session import open_session, settle
from sdft_engine.step import PassBudget
from sdft_engine.teacher import TEACHER, TEMPERATURES, automatic_temperature
from sdft_engine.trainer import train
from tests.sdft_engine.recording import watched
from tests.sdft_engine.runs import example, make_parent, make_run, messages_of, records, stop_after, write_lines


def test_the_teacher_is_shown_the_whole_question_and_the_whole_demonstration(tmp_path: Path, tiny_model_dir: Path) -> None:
    """Nothing is ever cut off a prompt, on either side."""
    line = example(1)
    line["messages"][0]["content"] = "Start of the question. " + "more words of it, " * 20 + "End of the question?"
    run = make_run(tmp_path / "run", tiny_model_dir, rows=3)
    write_lines(run.train_path, [example(0), line])
    session = open_session(run)
    decode = session.model.chat_format.tokenizer.decode
    student, teacher = decode(session.texts[1].prompt_ids), decode(session.teacher_prompts[1])
    for prompt in (student, teacher):
        assert line["messages"][0]["content"] in prompt
    assert "The lamp is blue." in teacher
    assert "The lamp is blue." not in student
    assert decode(session.texts[1].completion_ids, skip_special_tokens=False) == "The lamp is blue.<|im_end|>"


def test_validation_rows_and_general_questions_must_fit_too(tmp_path: Path, tiny_model_dir: Path) -> None:
    run = make_run(tmp_path / "run", tiny_model_dir, validation_rows=1, config={"retention": "end"})
    long = "lamp " * 600
    with run.validation_path.open("a") as lines:
        lines.write(json.dumps({"prompt": long, "completion": "Red."}) + "\n")
    with pytest.raises(DatasetError, match=r"row 2: it needs .* context holds 512") as raised:
        open_session(run)
    assert raised.value.param == "validation_file"
    run.validation_path.unlink()
    run.retention_path.write_text(json.dumps({"probe": "facts", "question": long, "answers": ["red"]}))
    with pytest.raises(DatasetError, match=r"retention\.jsonl: line 1: it needs .* context holds 512"):
        open_session(run)


def test_tools_that_the_chat_template_does_not_show_are_refused(tmp_path: Path, tiny_model_dir: Path) -> None:
    """An answer that is nothing but a call would be learned as an empty one."""
    directory = tmp_path / "model"
    shutil.copytree(tiny_model_dir, directory)
    template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}{{ '<|im_start|>assistant\n' if add_generation_prompt }}"
    )
    (directory / "chat_template.jinja").write_text(template)
    run = make_run(tmp_path / "run", directory)
    call = {"role": "assistant", "content": None, "tool_calls": [{"type": "function", "function": {"name": "look", "arguments": "{}"}}]}
    write_lines(run.train_path, [example(0), {"messages": [example(1)["messages"][0], call]}])
    with pytest.raises(DatasetError, match="line 2: this base model's chat template has no place for tool calls"):
        open_session(run)


@pytest.mark.parametrize(
    ("words", "hyperparameters", "method", "reason"),
    [
        (600, {}, "sdft", "line 2: .* context holds 512"),
        (600, {}, "supervised", "line 2: .* context holds 512"),
        (1, {"max_completion_tokens": 480}, "sdft", "line 1: .* context holds 512"),
    ],
    ids=["prompt", "supervised", "completion"],
)
def test_what_does_not_fit_the_context_is_refused_by_line(
    tmp_path: Path, tiny_model_dir: Path, words: int, hyperparameters: dict[str, Any], method: Any, reason: str
) -> None:
    run = make_run(tmp_path / "run", tiny_model_dir, method, **hyperparameters)
    line = example(1)
    line["messages"][0]["content"] = "lamp " * words
    write_lines(run.train_path, [example(0), line])
    with pytest.raises(DatasetError, match=reason):
        open_session(run)


def test_unusable_lines_are_named(tmp_path: Path, tiny_model_dir: Path) -> None:
    run = make_run(tmp_path / "run", tiny_model_dir, "supervised", validation_rows=1)
    with run.validation_path.open("a") as file:
        file.write("{}\n")
    with pytest.raises(DatasetError, match=r"validation\.jsonl: line 2") as raised:
        open_session(run)
    assert raised.value.param == "validation_file"
    with run.train_path.open("a") as file:
        file.write("nonsense\n")
    with pytest.raises(DatasetError, match=r"train\.jsonl: line 7") as raised:
        open_session(run)
    assert raised.value.param == "training_file"
    run.train_path.write_text("\n")
    with pytest.raises(DatasetError, match="no demonstrations"):
        open_session(run)
    run.train_path.unlink()
    with pytest.raises(DatasetError, match=r"train\.jsonl does not exist") as raised:
        open_session(run)
    assert raised.value.param == "training_file"


def test_a_line_has_the_number_that_it_had_in_the_users_file(tmp_path: Path, tiny_model_dir: Path) -> None:
    """The worker leaves dropped lines empty; and how long a line may be is the service's to say, not the trainer's."""
    run = make_run(tmp_path / "run", tiny_model_dir)
    long = example(1)
    long["messages"][0]["content"] = "lamp " * 300_000  # more than the service's default allows
    run.train_path.write_text(f"\n{json.dumps(example(0))}\n\n{json.dumps(long)}\n")
    with pytest.raises(DatasetError, match=r"line 4: .* tokens") as raised:
        open_session(run)
    assert raised.value.param == "training_file"


def test_a_configuration_without_its_section_or_model_is_refused(tmp_path: Path, tiny_model_dir: Path) -> None:
    run = make_run(tmp_path / "run", tiny_model_dir, "supervised")
    config = run.config_path.read_text()
    run.config_path.write_text(config.replace('"method":"supervised"', '"method":"sdft"'))
    with pytest.raises(ConfigurationError, match="sdft"):
        open_session(run)
    run.config_path.write_text(config.replace(str(tiny_model_dir), "/nowhere"))
    with pytest.raises(BaseModelError, match="nowhere"):
        open_session(run)
    run.config_path.write_text("{}")
    with pytest.raises(ConfigurationError, match="method"):
        open_session(run)


def test_a_new_student_starts_without_effect_and_so_does_its_teacher(tmp_path: Path, tiny_model_dir: Path) -> None:
    session = open_session(make_run(tmp_path / "run", tiny_model_dir))
    for name in (STUDENT, TEACHER):
        factors = session.model.adapters.parameters(name)
        assert not any(factor.any() for key, factor in factors.items() if key.endswith("lora_B"))
        assert all(factor.any() for key, factor in factors.items() if key.endswith("lora_A"))


@pytest.mark.parametrize("method", ["sdft", "supervised"])
def test_a_parents_adapter_is_continued_and_is_the_first_teacher(tmp_path: Path, tiny_model_dir: Path, method: Any) -> None:
    run = make_run(tmp_path / "run", tiny_model_dir, method)
    parent = make_parent(run, tiny_model_dir, LoraShape(2, 6))
    session = open_session(run)
    adapters = session.model.adapters
    assert list(adapters.shapes) == [STUDENT, TEACHER][: 2 if method == "sdft" else 1]
    for name in adapters.shapes:
        assert adapters.shapes[name] == LoraShape(2, 6)
        assert all(torch.equal(value, parent[key]) for key, value in adapters.parameters(name).items())
    assert all(value.requires_grad for value in adapters.parameters(STUDENT).values())
    warnings = [record for record in records(run.events_path) if record["level"] == "warn"]
    assert [record["message"] for record in warnings] == ["Continuing the parent's adapter: its rank 2 and alpha 6 are kept"]
    assert warnings[0]["data"] == {"resolved": {"lora_rank": 2, "lora_alpha": 6}}  # so that the job object tells the truth
    train(run, stop_after(run, 1, "requeue"))
    trained = load_file(run.checkpoint_dir(1) / "adapter_model.safetensors")
    changed = [(trained[f"base_model.model.{key}.weight"] - value).abs().max() for key, value in parent.items()]
    assert 0 < max(changed) <= 0.011  # one step of AdamW from the parent: at most its learning rate away


def test_a_parent_of_the_wanted_shape_needs_no_warning_and_may_be_left_out_of_the_teacher(tmp_path: Path, tiny_model_dir: Path) -> None:
    run = make_run(tmp_path / "run", tiny_model_dir, teacher_start="base")
    make_parent(run, tiny_model_dir, LoraShape(4, 8))
    session = open_session(run)
    teacher = session.model.adapters.parameters(TEACHER)
    assert not any(factor.any() for key, factor in teacher.items() if key.endswith("lora_B"))
    assert messages_of(run, "warn") == []


def test_a_parent_that_does_not_fit_is_refused(tmp_path: Path, tiny_model_dir: Path) -> None:
    run = make_run(tmp_path / "run", tiny_model_dir)
    make_parent(run, tiny_model_dir, LoraShape(4, 8))
    config = json.loads((run.parent_adapter_dir / "adapter_config.json").read_text())
    (run.parent_adapter_dir / "adapter_config.json").write_text(json.dumps(config | {"use_dora": True}))
    with pytest.raises(ConfigurationError, match="use_dora"):
        train(run)


def settled(run: RunDirectory, name: str) -> list[Any]:
    """What the run's events say was settled for a hyperparameter."""
    data = [event.get("data", {}) for event in records(run.events_path)]
    return [each["resolved"][name] for each in data if name in each.get("resolved", {})]


def test_a_given_temperature_and_masking_are_kept(tmp_path: Path, tiny_model_dir: Path) -> None:
    run = make_run(tmp_path / "run", tiny_model_dir, temperature=0.7, mask_clipped_completions=True)
    session = open_session(run)
    settle(session, lambda: None)
    assert (session.state.temperature, session.state.mask_clipped_completions) == (0.7, True)
    assert len(messages_of(run)) == 1


def test_an_automatic_temperature_is_measured_on_the_teachers_prompts(tmp_path: Path, tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make_run(tmp_path / "run", tiny_model_dir, rows=40, temperature="auto")
    seen: list[Any] = []
    monkeypatch.setattr(session_module, "automatic_temperature", watched(automatic_temperature, lambda *arguments: seen.extend(arguments)))
    session = open_session(run)
    settle(session, lambda: None)
    _, texts, adapter, _ = seen
    assert adapter == TEACHER
    assert [text.prompt_ids for text in texts] == session.teacher_prompts[:32]
    assert [text.completion_ids for text in texts] == [text.completion_ids for text in session.texts[:32]]
    assert session.state.temperature in TEMPERATURES
    assert settled(run, "temperature") == [session.state.temperature]


@pytest.mark.parametrize(
    ("tokens", "masked", "advice"),
    [
        (1, False, r"3 of 3 .* expected of a model that rambles.* Nothing needs .* longest demonstration has 5 tokens.* raise max_completion_tokens then"),
        (400, True, "1 of 3 .* no harm while they are few"),
    ],
    ids=["all_cut_off", "all_finished"],
)
def test_automatic_masking_depends_on_how_many_first_answers_are_cut_off(tmp_path: Path, tiny_model_dir: Path, tokens: int, masked: bool, advice: str) -> None:
    """The random model ends an answer after a few dozen tokens, never after one."""
    run = make_run(tmp_path / "run", tiny_model_dir, rows=2, mask_clipped_completions="auto", max_completion_tokens=tokens)
    write_lines(run.train_path, [{"prompt": f"Lamp {number}?", "completion": "Red."} for number in range(2)])  # short enough for 400 more
    session = open_session(run)
    settle(session, lambda: None)
    assert session.state.mask_clipped_completions is masked
    assert settled(run, "mask_clipped_completions") == [masked]
    assert re.match(advice, messages_of(run)[-1])


def test_nothing_is_advised_where_no_answer_was_cut_off(tmp_path: Path, tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make_run(tmp_path / "run", tiny_model_dir, mask_clipped_completions="auto")
    session = open_session(run)
    whole = [Rollout(row, [1], [1], [2], finished=True) for row in range(2)]
    monkeypatch.setattr(session_module, "rollouts_of_step", lambda *arguments: whole)
    assert session_module.settle_masking(session) is True
    assert "0 of 2 first answers" in messages_of(run)[-1]
    assert messages_of(run)[-1].endswith("nothing needs to be done")


@pytest.mark.parametrize(("clipped", "masked"), [(3, True), (4, False)])
def test_cut_off_answers_are_masked_while_half_of_the_first_ones_end(
    clipped: int, masked: bool, tmp_path: Path, tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = open_session(make_run(tmp_path / "run", tiny_model_dir, mask_clipped_completions="auto"))
    monkeypatch.setattr(session_module, "rollouts_of_step", lambda *arguments: [Rollout(row, [1], [1], [2], finished=row >= clipped) for row in range(6)])
    assert session_module.settle_masking(session) is masked


def test_a_new_adapter_depends_on_the_seed(tmp_path: Path, tiny_model_dir: Path) -> None:
    def first_factors(name: str, seed: int) -> torch.Tensor:
        session = open_session(make_run(tmp_path / name, tiny_model_dir, config={"seed": seed}))
        return torch.cat([value.detach().flatten() for value in session.model.adapters.parameters(STUDENT).values()])

    first, same, other = first_factors("first", 1), first_factors("same", 1), first_factors("other", 2)
    assert torch.equal(first, same)
    assert not torch.equal(first, other)


def test_memory_and_threads_are_those_of_the_configuration(tmp_path: Path, tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    threads: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", threads.append)
    run = make_run(tmp_path / "run", tiny_model_dir, config={"tokens_per_pass": 300, "gradient_checkpointing": True, "threads": 3})
    session = open_session(run)
    assert session.budget == PassBudget(student_tokens=300, teacher_tokens=600)
    assert session.model.fused is not None
    assert session.model.fused.recomputes_layers
    assert threads == [3]


def test_student_and_teacher_are_told_of_the_tools(tmp_path: Path, tiny_model_dir: Path) -> None:
    run = make_run(tmp_path / "run", tiny_model_dir)
    tool = {"type": "function", "function": {"name": "lamp_lookup", "parameters": {}}}
    write_lines(run.train_path, [example(0) | {"tools": [tool]}, example(1)])
    session = open_session(run)
    decode = session.model.chat_format.tokenizer.decode
    told = [["lamp_lookup" in decode(ids) for ids in (session.texts[row].prompt_ids, session.teacher_prompts[row])] for row in (0, 1)]
    assert told == [[True, True], [False, False]]


@pytest.mark.parametrize(
    ("asked", "settled_before"), [(1, []), (2, ["temperature"]), (3, ["temperature", "mask_clipped_completions"])], ids=["loaded", "temperature", "masking"]
)
def test_a_stop_is_obeyed_between_the_parts_of_the_start(tmp_path: Path, tiny_model_dir: Path, asked: int, settled_before: list[str]) -> None:
    run = make_run(tmp_path / "run", tiny_model_dir, temperature="auto", mask_clipped_completions="auto")
    answers: Iterator[Any] = iter([*[None] * (asked - 1), "requeue"])
    result = train(run, lambda: next(answers))
    assert (result.outcome, result.stop, result.final_step, result.total_steps) == ("stopped", "requeue", 0, 8)
    assert [name for name in ("temperature", "mask_clipped_completions") if settled(run, name)] == settled_before
    assert run.complete_checkpoints() == []
    assert train(run).outcome == "succeeded"
    assert len(records(run.metrics_path)) == 8


def test_a_resumed_run_that_is_stopped_at_once_is_where_it_was(tmp_path: Path, tiny_model_dir: Path) -> None:
    run = make_run(tmp_path / "run", tiny_model_dir, temperature="auto", mask_clipped_completions="auto")
    train(run, stop_after(run, 3, "requeue"))
    result = train(run, lambda: "cancel")
    assert (result.outcome, result.stop, result.final_step) == ("stopped", "cancel", 3)
    assert len(settled(run, "temperature")) == len(settled(run, "mask_clipped_completions")) == 1


def test_a_stop_comes_before_the_anchor_is_made(tmp_path: Path, tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A hundred answers of the base take their time: who is asked to stop meanwhile does not begin them."""
    made: list[str] = []
    monkeypatch.setattr(session_module, "Anchor", lambda *arguments: made.append("anchor"))
    for method in ("sdft", "supervised"):
        session = open_session(make_run(tmp_path / method, tiny_model_dir, method, anchor_weight=1.0))  # type: ignore[arg-type]
        assert settle(session, lambda: "pause") == "pause"
        assert made == []
        assert settle(session, lambda: None) is None
        assert made.pop() == "anchor"
