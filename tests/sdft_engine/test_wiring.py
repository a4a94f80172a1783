"""What the configuration says is what a step computes: recomputed from outside, in float64, without the engine's own steps."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sdft_engine import trainer
from sdft_engine.contract.dataset import Demonstration
from sdft_engine.contract.teacher_prompts import TeacherView
from sdft_engine.divergences import TokenLoss, token_divergence
from sdft_engine.generation import decode_all
from sdft_engine.lora import STUDENT, LoraShape
from sdft_engine.model import load_base_model
from sdft_engine.rollouts import Rollout
from sdft_engine.sampling import Decoding, SamplingParams
from sdft_engine.seeds import seed_of
from sdft_engine.trainer import train
from tests.sdft_engine.plain import PlainModel, in_float64
from tests.sdft_engine.recording import watched
from tests.sdft_engine.runs import example, make_parent, make_run, records, stop_after

SETTINGS: dict[str, dict[str, Any]] = {
    "defaults": {"temperature": 1.0, "divergence": "forward"},
    "colder": {"temperature": 0.5, "divergence": "forward"},
    "reverse": {"temperature": 1.0, "divergence": "reverse"},
    "history": {"temperature": 0.7, "divergence": "forward", "config": {"teacher_template": "history"}},
    "jsd": {"temperature": 0.7, "divergence": "jsd", "jsd_beta": 0.2},
    "top_k": {"temperature": 0.7, "divergence": "forward", "estimator": "top_k", "top_k": 9},
    "sampled": {"temperature": 0.7, "divergence": "reverse", "estimator": "sampled"},
    "clipped": {"temperature": 0.7, "divergence": "forward", "entry_clip": 0.02, "token_clip": 0.25},
    "parent_teacher": {"temperature": 0.7, "divergence": "reverse", "teacher_start": "parent"},
}


LOSS_FIELDS = ("divergence", "jsd_beta", "estimator", "top_k", "entry_clip", "token_clip")


@pytest.mark.parametrize("name", SETTINGS)
def test_the_first_step_is_what_the_settings_say(name: str, tmp_path: Path, tiny_model_dir: Path, plain: PlainModel, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = {"teacher_start": "base", "batch_size": 3, "max_completion_tokens": 12, "lora_rank": 2, "lora_alpha": 6} | SETTINGS[name]
    run = make_run(tmp_path / "run", tiny_model_dir, **settings)
    parent = in_float64(make_parent(run, tiny_model_dir, LoraShape(2, 6), strength=0.2))
    seen: list[Rollout] = []
    monkeypatch.setattr(trainer, "sdft_gradient", watched(trainer.sdft_gradient, lambda model, rollouts, *_: seen.extend(rollouts)))
    train(run, stop_after(run, 1, "cancel"))

    model = load_base_model(tiny_model_dir, device="cpu", dtype="float32")
    model.adapters.load(STUDENT, run.parent_adapter_dir)
    template = settings.get("config", {}).get("teacher_template", "example")
    written = records(run.rollouts_dir / "step_000001.jsonl")
    assert len(seen) == len(written) == 3
    for rollout, record in zip(seen, written, strict=True):
        messages = example(rollout.row)["messages"]
        demonstration = Demonstration(rollout.row + 1, messages[:1], messages[1])
        student_prompt, teacher_prompt = (
            model.chat_format.student_prompt_ids(demonstration),
            model.chat_format.teacher_prompt_ids(demonstration, TeacherView(template)),
        )
        params = SamplingParams(12, settings["temperature"], seed=seed_of(17, 1, rollout.row), stop_token_ids=model.chat_format.eos_token_ids)
        answer = Decoding(student_prompt, params, STUDENT)
        decode_all(model, [answer])
        assert rollout.completion_ids == answer.token_ids
        tau, teacher_factors = settings["temperature"], parent if settings["teacher_start"] == "parent" else None
        student_logps = plain.completion_logps(student_prompt, rollout.completion_ids, parent, 3.0, tau)
        teacher_logps = plain.completion_logps(teacher_prompt, rollout.completion_ids, teacher_factors, 3.0, tau)
        loss = TokenLoss(**{field: settings[field] for field in LOSS_FIELDS if field in settings})
        expected = token_divergence(loss, teacher_logps, student_logps, torch.tensor(rollout.completion_ids))
        torch.testing.assert_close(torch.tensor(record["per_token_divergence"], dtype=torch.float64), expected, rtol=1e-3, atol=2e-5)
        assert expected.max() > 0.05


def test_the_first_tokens_after_the_thoughts_are_left_out_on_demand(tmp_path: Path, tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The student's first answer is given thoughts that end after five tokens."""
    seen: dict[bool, list[bool]] = {}
    for after_think in (False, True):
        run = make_run(tmp_path / str(after_think), tiny_model_dir, skip_first_tokens=2, skip_after_think=after_think, batch_size=1)
        with monkeypatch.context() as patch:

            def thoughtful(session: Any, step: int, rows: list[int]) -> list[Rollout]:
                encode = session.model.chat_format.encode
                answer = encode("a lamp</think>") + encode(" lamp" * 8)
                return [Rollout(row, session.texts[row].prompt_ids, session.teacher_prompts[row], answer, finished=True) for row in rows]

            patch.setattr(trainer, "rollouts_of_step", thoughtful)
            masks: list[list[bool]] = []
            patch.setattr(trainer, "sdft_gradient", watched(trainer.sdft_gradient, lambda model, rollouts, m, *_, masks=masks: masks.extend(m)))
            train(run, stop_after(run, 1, "cancel"))
        seen[after_think] = masks[0]
    assert seen[False][:3] == [False, False, True]
    assert all(seen[False][2:])
    lost = [position for position, (plainly, anew) in enumerate(zip(seen[False], seen[True], strict=True)) if plainly and not anew]
    assert len(lost) == 2
    assert lost[1] == lost[0] + 1 > 3


def test_weight_decay_shrinks_what_gets_no_gradient(tmp_path: Path, tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the first step B is zero, so A gets no gradient: all that changes it is the decay."""
    factors: dict[float, list[Tensor]] = {}
    for decay in (0.0, 0.5):
        run = make_run(tmp_path / str(decay), tiny_model_dir, weight_decay=decay, learning_rate=0.01, warmup_ratio=0.0)
        with monkeypatch.context() as patch:
            sessions: list[Any] = []
            opened = trainer.open_session
            patch.setattr(trainer, "open_session", lambda run, ranks, opened=opened, sessions=sessions: sessions.append(opened(run, ranks)) or sessions[0])
            train(run, stop_after(run, 1, "cancel"))
        parameters = sessions[0].model.adapters.parameters(STUDENT)
        factors[decay] = [value.detach() for name, value in parameters.items() if name.endswith("lora_A")]
    for plain_value, decayed in zip(factors[0.0], factors[0.5], strict=True):
        torch.testing.assert_close(decayed, plain_value * (1 - 0.01 * 0.5))
