import json
from pathlib import Path
from typing import Any

import pytest

from sdft_engine.contract.config import TrainingConfig, read_config
from sdft_engine.contract.errors import ConfigurationError
from sdft_engine.contract.hyperparameters import DatasetStatistics, SdftHyperparameters, SupervisedHyperparameters, resolve_sdft, resolve_supervised

STATISTICS = DatasetStatistics(rows=12, answer_tokens=[5] * 12, hidden_size=64, longest_teacher_prompt=100, context_length=512)
SDFT = resolve_sdft(SdftHyperparameters(), STATISTICS)
SUPERVISED = resolve_supervised(SupervisedHyperparameters(), STATISTICS)


def write(path: Path, **changes: Any) -> Path:
    content = {"method": "sdft", "base_model": "tiny", "base_model_dir": "/models/tiny", "seed": 1, "sdft": SDFT.model_dump()} | changes
    path.write_text(json.dumps(content))
    return path


def test_round_trip(tmp_path: Path) -> None:
    config = TrainingConfig(method="sdft", base_model="tiny", base_model_dir=Path("/models/tiny"), seed=7, sdft=SDFT, threads=2)
    (tmp_path / "config.json").write_text(config.model_dump_json())
    assert read_config(tmp_path / "config.json") == config
    assert config.hyperparameters == SDFT


def test_each_method_has_its_own_section(tmp_path: Path) -> None:
    config = read_config(write(tmp_path / "config.json", method="supervised", sdft=None, supervised=SUPERVISED.model_dump()))
    assert config.hyperparameters == SUPERVISED
    wrong = read_config(write(tmp_path / "config.json", method="supervised"))
    with pytest.raises(ConfigurationError, match="supervised"):
        _ = wrong.hyperparameters


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        ({"method": "dpo"}, "method"),
        ({"version": 2}, "version"),
        ({"seed": "x"}, "seed"),
        ({"surprise": 1}, "surprise"),
        ({"teacher_template": "histroy"}, "teacher_template.*must be one of"),
        ({"teacher_template": "{question} {demonstration"}, "teacher_template.*not a valid template"),
        ({"teacher_template": "{answer} {demonstration}"}, "teacher_template.*unknown field"),
        ({"sdft": {"n_epochs": 1}}, "sdft.batch_size"),
        ({"sdft": SDFT.model_dump() | {"n_epoch": 1}}, "sdft.n_epoch"),
        ({"sdft": SDFT.model_dump() | {"batch_size": 0}}, "sdft.batch_size"),
        ({"sdft": SDFT.model_dump() | {"temperature": 0}}, "sdft.temperature"),
        ({"sdft": SDFT.model_dump() | {"jsd_beta": 1}}, "sdft.jsd_beta"),
        ({"sdft": SDFT.model_dump() | {"top_k": 0}}, "sdft.top_k"),
        ({"sdft": SDFT.model_dump() | {"estimator": "sampled"}}, "sdft.estimator"),
        ({"sdft": SDFT.model_dump() | {"divergence": "reverse", "estimator": "sampled", "entry_clip": 1}}, "sdft.entry_clip"),
        ({"rollout_sample_every_steps": 0}, "rollout_sample_every_steps"),
        ({"threads": 0}, "threads"),
    ],
)
def test_a_wrong_field_is_named(tmp_path: Path, changes: dict[str, Any], names: str) -> None:
    with pytest.raises(ConfigurationError, match=f"config.json: {names}"):
        read_config(write(tmp_path / "config.json", **changes))


def test_every_wrong_field_is_named_in_one_message(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError) as raised:
        read_config(write(tmp_path / "config.json", method="dpo", surprise=1, sdft=SDFT.model_dump() | {"batch_size": "many"}))
    assert [name for name in ("method: ", "surprise: ", "sdft.batch_size: ") if name not in raised.value.message] == []
    assert "\n" not in raised.value.message


def test_the_seed_may_be_left_out(tmp_path: Path) -> None:
    path = write(tmp_path / "config.json")
    path.write_text(json.dumps({name: value for name, value in json.loads(path.read_text()).items() if name != "seed"}))
    assert read_config(path).seed == 0


def test_missing_file_and_broken_json(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="does not exist"):
        read_config(tmp_path / "config.json")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ConfigurationError, match=r"config\.json: Invalid JSON"):
        read_config(tmp_path / "config.json")
