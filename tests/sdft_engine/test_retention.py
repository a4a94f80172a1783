"""sdft_engine.retention against the plain model, and a run that measures what it kept."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from sdft_engine.contract.errors import DatasetError
from sdft_engine.contract.probes import DEFAULT_PROBES_PATH, ProbeQuestion, is_right, read_probes
from sdft_engine.contract.run_directory import RunDirectory, StopReason
from sdft_engine.lora import STUDENT, LoraShape
from sdft_engine.model import LanguageModel, load_base_model
from sdft_engine.retention import MAX_ANSWER_TOKENS, RetentionProbe
from sdft_engine.trainer import train
from tests.sdft_engine.plain import PlainModel, add_adapter, in_float64
from tests.sdft_engine.runs import make_run, messages_of, records, steps_done, stop_after

SHAPE = LoraShape(rank=3, alpha=6)
QUESTIONS = [("lamps", "Which lamp is red?"), ("lamps", "Which one?"), ("other", "What is the colour of lamp 7?")]


def plain_answer(plain: PlainModel, model: LanguageModel, prompt: list[int], factors: Any) -> list[int]:
    answer: list[int] = []
    while len(answer) < MAX_ANSWER_TOKENS and not (answer and answer[-1] in model.chat_format.eos_token_ids):
        answer.append(int(plain.logits(prompt + answer, factors, SHAPE.scaling)[-1].argmax()))
    return answer


def only_in(text: str, other: str) -> str:
    return next(word for word in text.split() if is_right(text, [word]) and not is_right(other, [word]))


def test_accuracy_and_divergence_are_the_plain_ones(model: LanguageModel, plain: PlainModel) -> None:
    """The accepted answers are taken from what base and student say, so that each answers some and not others."""
    add_adapter(model, STUDENT, seed=3, shape=SHAPE, trainable=True)
    factors = in_float64(model.adapters.parameters(STUDENT))
    prompts = [model.chat_format.prompt_ids([{"role": "user", "content": text}]) for _, text in QUESTIONS]
    base_answers = [plain_answer(plain, model, prompt, None) for prompt in prompts]
    own_answers = [plain_answer(plain, model, prompt, factors) for prompt in prompts]
    decode = model.chat_format.decode
    accepted = [
        [only_in(decode(base_answers[0]), decode(own_answers[0]))],
        [only_in(decode(own_answers[1]), decode(base_answers[1]))],
        [decode(base_answers[2]).split()[0], decode(own_answers[2]).split()[0]],
    ]
    questions = [ProbeQuestion(probe=name, question=text, answers=words) for (name, text), words in zip(QUESTIONS, accepted, strict=True)]
    found = RetentionProbe(model, questions).measure(7, max_padded_tokens=60)
    base_hits = [is_right(decode(answer), words) for answer, words in zip(base_answers, accepted, strict=True)]
    own_hits = [is_right(decode(answer), words) for answer, words in zip(own_answers, accepted, strict=True)]
    assert (base_hits, own_hits) == ([True, False, True], [False, True, True])
    assert found.step == 7
    assert (found.probes["lamps"].n, found.probes["other"].n) == (2, 1)
    assert (found.base_right, found.right) == (sum(base_hits), sum(own_hits))
    assert found.kept == sum(a and b for a, b in zip(base_hits, own_hits, strict=True))
    total, count = 0.0, 0
    for prompt, answer in zip(prompts, base_answers, strict=True):
        p, q = (plain.completion_logps(prompt, answer, each, SHAPE.scaling) for each in (None, factors))
        total += float((p.exp() * (p - q)).sum())
        count += len(answer)
    assert found.kl_from_base == pytest.approx(total / count, rel=1e-3)
    assert found.kl_from_base > 0.01


def test_an_adapter_without_effect_keeps_everything(model: LanguageModel) -> None:
    model.adapters.add(STUDENT, SHAPE, trainable=True, generator=torch.Generator().manual_seed(1))
    questions = [ProbeQuestion(probe="lamps", question=text, answers=["a", "e", "lamp", "the"]) for _, text in QUESTIONS]
    found = RetentionProbe(model, questions).measure(0)
    assert found.kl_from_base == pytest.approx(0, abs=1e-6)
    assert found.right == found.base_right == found.kept


def probed_run(tmp_path: Path, model_dir: Path, **config: Any) -> RunDirectory:
    run = make_run(tmp_path / "run", model_dir, config=config)
    lines = [{"probe": name, "question": text, "answers": ["a"]} for name, text in QUESTIONS]
    run.retention_path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return run


@pytest.mark.parametrize(("when", "steps"), [("off", []), ("end", [8]), ("checkpoints", [4, 8])])
def test_a_run_measures_when_it_is_told_to(tmp_path: Path, tiny_model_dir: Path, when: str, steps: list[int]) -> None:
    run = probed_run(tmp_path, tiny_model_dir, retention=when)
    result = train(run)
    measured = [record for record in records(run.metrics_path) if record["retention_kl_from_base"] is not None]
    assert [record["step"] for record in measured] == steps
    events = [event for event in records(run.events_path) if event["message"].startswith("Retention at step")]
    assert [event["data"]["retention"]["step"] for event in events] == steps
    if not steps:
        assert result.retention is None
        return
    assert result.retention is not None
    assert result.retention.model_dump() == events[-1]["data"]["retention"]
    assert {name: score.n for name, score in result.retention.probes.items()} == {"lamps": 2, "other": 1}
    last = measured[-1]
    assert last["retention_kl_from_base"] == result.retention.kl_from_base > 0
    assert last["retention_accuracy"] == result.retention.right / 3
    assert last["retention_seconds"] > 0


def test_measuring_changes_nothing_in_what_is_learned(tmp_path: Path, tiny_model_dir: Path) -> None:
    losses = []
    for when in ("off", "checkpoints"):
        run = probed_run(tmp_path / when, tiny_model_dir, retention=when)
        train(run)
        losses.append([record["train_loss"] for record in records(run.metrics_path)])
    assert losses[0] == losses[1]


def test_a_stopped_run_has_no_retention_of_another_step(tmp_path: Path, tiny_model_dir: Path) -> None:
    run = probed_run(tmp_path, tiny_model_dir, retention="checkpoints")
    assert train(run, stop_after(run, 5, "requeue")).retention is None


def asked_in_the_questions(run: RunDirectory, reason: StopReason, calls: list[int]) -> Callable[[], StopReason | None]:
    """A `stop_requested` that asks for the stop from the third pass of the general questions on, until `calls` is cleared."""

    def stop_requested() -> StopReason | None:
        if any(message.startswith("Asking 3 general questions") for message in messages_of(run)):
            calls.append(steps_done(run))
        return reason if len(calls) > 2 else None

    return stop_requested


def test_a_cancelled_run_ends_in_the_middle_of_the_questions(tmp_path: Path, tiny_model_dir: Path) -> None:
    run, calls = probed_run(tmp_path, tiny_model_dir, retention="end"), list[int]()
    result = train(run, asked_in_the_questions(run, "cancel", calls))
    assert (result.outcome, result.stop, result.final_step, result.retention) == ("stopped", "cancel", 8, None)
    assert calls[:3] == [7, 7, 7], "asked while the last step's questions were"
    assert len(calls) < 8
    assert not any(message.startswith("Retention at step") for message in messages_of(run))
    assert records(run.metrics_path)[-1]["retention_kl_from_base"] is None
    assert not run.final_dir.exists()


def test_a_run_that_is_paused_in_the_middle_of_the_questions_asks_them_when_it_goes_on(tmp_path: Path, tiny_model_dir: Path) -> None:
    whole, run = probed_run(tmp_path / "whole", tiny_model_dir, retention="end"), probed_run(tmp_path, tiny_model_dir, retention="end")
    expected = train(whole)
    config = json.loads(run.config_path.read_text())
    config["sdft"]["checkpoint_every_steps"] = 5
    run.config_path.write_text(json.dumps(config))
    stopped = train(run, asked_in_the_questions(run, "pause", []))
    assert (stopped.outcome, stopped.stop) == ("stopped", "pause")
    assert [step for step, _ in run.complete_checkpoints()] == [5, 8], "what the last steps learned is kept"
    result = train(run)
    assert (result.outcome, result.retention) == ("succeeded", expected.retention)
    assert steps_done(run) == 8, "no step was done twice"


def test_a_wrong_probe_file_is_refused_before_training(tmp_path: Path, tiny_model_dir: Path) -> None:
    run = probed_run(tmp_path, tiny_model_dir, retention="end")
    run.retention_path.write_text("{}\n")
    with pytest.raises(DatasetError, match="line 1"):
        train(run)
    assert not run.metrics_path.exists()


@pytest.mark.slow
def test_the_real_base_knows_about_half_of_the_default_questions(real_model_dir: Path) -> None:
    """Hard enough to have something to lose, easy enough to have something to keep."""
    model = load_base_model(real_model_dir, device="cpu", dtype="float32")
    model.adapters.add(STUDENT, LoraShape(16, 32), trainable=True)
    found = RetentionProbe(model, read_probes(DEFAULT_PROBES_PATH)[::3]).measure(0)
    assert 0.3 < found.base_right / found.n < 0.8
    assert found.kept >= found.base_right - 1  # folded and unfolded passes round differently
    assert found.kl_from_base < 1e-4
