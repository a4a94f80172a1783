"""sdft_engine.identity: a checkpoint is only continued by the run that wrote it; and what was chosen by the machine is kept."""

import json
import shutil
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from sdft_engine import products, session
from sdft_engine.contract.config import read_config
from sdft_engine.contract.errors import BaseModelError, ConfigurationError
from sdft_engine.contract.run_directory import Attestation, RunDirectory
from sdft_engine.contract.sealed_directory import ATTESTATION_NAME
from sdft_engine.trainer import train
from tests.sdft_engine.runs import SUPERVISED, content_of, example, make_run, messages_of, stop_after, write_lines


@pytest.fixture
def stopped(tmp_path: Path, tiny_model_dir: Path) -> RunDirectory:
    run = make_run(tmp_path / "run", tiny_model_dir, temperature=0.7)
    train(run, stop_after(run, 2, "pause"))
    return run


CHANGES: dict[str, dict[str, Any]] = {
    "n_epochs": {"sdft": {"n_epochs": 1}},
    "batch_size": {"sdft": {"batch_size": 2}},
    "learning_rate": {"sdft": {"learning_rate": 0.5}},
    "ema_rate": {"sdft": {"ema_rate": 0.5}},
    "teacher": {"sdft": {"teacher": "frozen"}},
    "temperature": {"sdft": {"temperature": 0.5}},
    "mask_clipped_completions": {"sdft": {"mask_clipped_completions": True}},
    "lora_alpha": {"sdft": {"lora_alpha": 64}},
    "lora_rank": {"sdft": {"lora_rank": 2}},
    "seed": {"seed": 1},
    "teacher_template": {"teacher_template": "history"},
    "method": {"method": "supervised", "supervised": SUPERVISED},
}


@pytest.mark.parametrize("name", CHANGES)
def test_another_run_does_not_continue_a_checkpoint(stopped: RunDirectory, name: str) -> None:
    config = read_config(stopped.config_path)
    assert config.sdft is not None
    changes = dict(CHANGES[name])
    if "sdft" in changes:
        changes["sdft"] = config.sdft.model_copy(update=changes["sdft"])
    stopped.config_path.write_text(config.model_copy(update=changes).model_dump_json())
    before = content_of(stopped.checkpoint_dir(2))
    with pytest.raises(ConfigurationError, match=f"^{name} is .* now, and was .* when step_000002 was written") as raised:
        train(stopped)
    assert raised.value.param == name
    assert content_of(stopped.checkpoint_dir(2)) == before


def test_another_base_model_of_the_same_id_does_not_continue_a_checkpoint(tmp_path: Path, tiny_model_dir: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(tiny_model_dir, base)
    run = make_run(tmp_path / "run", base)

    def name_source(source: str, revision: str | None) -> None:
        (base / "prepared.json").write_text(json.dumps({"id": "tiny", "source": source, "revision": revision}))

    name_source("hub:somebody/tiny", "1")
    train(run, stop_after(run, 2, "pause"))
    name_source("hub:somebody/tiny", "2")
    with pytest.raises(BaseModelError, match="is made from hub:somebody/tiny@2 now, and was made from hub:somebody/tiny@1 when step_000002"):
        train(run)
    name_source("/another/machine's/path", None)
    assert train(run).outcome == "succeeded"
    assert Attestation.model_validate_json((run.checkpoint_dir(2) / ATTESTATION_NAME).read_bytes()).base == "hub:somebody/tiny@1"


def test_other_data_do_not_continue_a_checkpoint(stopped: RunDirectory) -> None:
    write_lines(stopped.train_path, [example(number) for number in range(1, 7)])
    with pytest.raises(ConfigurationError, match="not the one that step_000002 was trained on"):
        train(stopped)


def test_what_does_not_decide_the_weights_may_change(stopped: RunDirectory) -> None:
    config = read_config(stopped.config_path)
    stopped.config_path.write_text(config.model_copy(update={"tokens_per_pass": 100, "retention": "off", "rollout_sample_every_steps": 1}).model_dump_json())
    assert train(stopped).outcome == "succeeded"


def test_what_was_settled_may_stand_in_the_configuration(tmp_path: Path, tiny_model_dir: Path) -> None:
    """As it does where the service starts another attempt."""
    run = make_run(tmp_path / "run", tiny_model_dir, temperature="auto", mask_clipped_completions="auto")
    train(run, stop_after(run, 2, "pause"))
    config = read_config(run.config_path)
    settled = {"temperature": session.read_state(run.checkpoint_dir(2)).temperature, "mask_clipped_completions": False}
    settled["mask_clipped_completions"] = session.read_state(run.checkpoint_dir(2)).mask_clipped_completions
    run.config_path.write_text(config.model_copy(update={"sdft": config.distillation.model_copy(update=settled)}).model_dump_json())
    assert train(run).outcome == "succeeded"


def test_a_resumed_run_keeps_its_products(tmp_path: Path, tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which of them is faster is measured, and a busy machine may measure otherwise."""
    measured = products.onednn_is_faster()
    run, whole = (make_run(tmp_path / name, tiny_model_dir) for name in ("run", "whole"))
    train(whole)
    train(run, stop_after(run, 3, "requeue"))
    monkeypatch.setattr(products, "_chosen", None)  # another process
    monkeypatch.setattr(products, "_is_measured_faster", lambda: not measured)
    train(run)
    assert products.onednn_is_faster() is measured
    assert content_of(run.final_dir) == content_of(whole.final_dir)


def test_a_run_has_one_date_however_long_it_takes(tmp_path: Path, tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = tmp_path / "model"
    shutil.copytree(tiny_model_dir, directory)
    template = (directory / "chat_template.jinja").read_text()
    (directory / "chat_template.jinja").write_text("{{ strftime_now('%d %b %Y') }}" + template)
    run = make_run(tmp_path / "run", directory)
    today: list[datetime] = [datetime(2026, 3, 1)]
    monkeypatch.setattr(session, "datetime", SimpleNamespace(now=lambda: today[0], fromisoformat=datetime.fromisoformat))
    first = session.open_session(run).texts
    train(run, stop_after(run, 2, "pause"))
    today[0] = datetime(2026, 11, 30)
    resumed = session.open_session(run)
    assert resumed.texts == first
    assert resumed.model.chat_format.tokenizer.decode(first[0].prompt_ids).startswith("01 Mar 2026")
    elsewhere = make_run(tmp_path / "elsewhere", directory)
    assert session.open_session(elsewhere).texts != first


def test_products_that_are_missing_where_a_run_goes_on_are_said(tmp_path: Path, tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "_is_measured_faster", products.onednn_is_available)
    monkeypatch.setattr(products, "_chosen", None)
    if not products.onednn_is_available():
        pytest.skip("this build of torch has no oneDNN")
    run = make_run(tmp_path / "run", tiny_model_dir)
    train(run, stop_after(run, 3, "requeue"))
    monkeypatch.setattr(products, "onednn_is_available", lambda: False)
    assert train(run).outcome == "succeeded"
    assert any("without oneDNN" in message for message in messages_of(run, "warn"))
