"""sdft_engine.export: the trained adapter, whole or not at all."""

import errno
from pathlib import Path
from typing import Any

import pytest
import torch

from sdft_engine.contract import sealed_directory
from sdft_engine.contract.errors import CheckpointDamaged, DiskFull
from sdft_engine.contract.run_directory import Attestation
from sdft_engine.contract.sealed_directory import verify
from sdft_engine.export import write_final
from sdft_engine.lora import STUDENT, LoraShape
from sdft_engine.model import LanguageModel
from tests.sdft_engine.plain import add_adapter, randomise

ATTESTATION = Attestation(dtype="float32", probes=[])


@pytest.fixture
def student(model: LanguageModel) -> LanguageModel:
    add_adapter(model, STUDENT, seed=1, shape=LoraShape(3, 6), trainable=True)
    return model


def test_the_final_adapter_is_the_student_with_its_attestation(student: LanguageModel, tmp_path: Path) -> None:
    write_final(tmp_path / "final", student, "tiny-llama", ATTESTATION)
    assert sorted(path.name for path in (tmp_path / "final").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
        "attestation.json",
        "manifest.json",
    ]
    assert Attestation.model_validate_json((tmp_path / "final" / "attestation.json").read_bytes()) == ATTESTATION
    student.adapters.load("again", tmp_path / "final")
    again = student.adapters.parameters("again")
    assert all(torch.equal(value, again[name]) for name, value in student.adapters.parameters(STUDENT).items())
    verify(tmp_path / "final")
    (tmp_path / "final" / "adapter_config.json").write_text("{}")
    with pytest.raises(CheckpointDamaged, match="adapter_config"):
        verify(tmp_path / "final")


def test_an_earlier_final_adapter_is_replaced(student: LanguageModel, tmp_path: Path) -> None:
    write_final(tmp_path / "final", student, "tiny-llama", ATTESTATION)
    before = (tmp_path / "final" / "adapter_model.safetensors").read_bytes()
    randomise(student.adapters, STUDENT, seed=2)
    write_final(tmp_path / "final", student, "tiny-llama", ATTESTATION)
    assert (tmp_path / "final" / "adapter_model.safetensors").read_bytes() != before
    assert [path.name for path in tmp_path.iterdir()] == ["final"]


def test_a_full_disk_leaves_nothing(student: LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_space(directory: Path) -> Any:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(sealed_directory, "seal", no_space)
    with pytest.raises(DiskFull, match="final could not be written"):
        write_final(tmp_path / "final", student, "tiny-llama", ATTESTATION)
    assert list(tmp_path.iterdir()) == []
