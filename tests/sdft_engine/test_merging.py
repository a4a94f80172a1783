"""Merged weights: what stock transformers answers with them is what base and adapter answer together."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from sdft_engine.contract.errors import BaseModelError, ConfigurationError, DiskFull
from sdft_engine.lora import STUDENT, LoraShape
from sdft_engine.merging import merge_adapter
from sdft_engine.model import LanguageModel
from tests.sdft_engine.plain import add_adapter

IDS = torch.tensor([[5, 100, 7, 300, 41, 9]])


@pytest.fixture
def adapter_dir(model: LanguageModel, tmp_path: Path) -> Path:
    add_adapter(model, STUDENT, seed=1, shape=LoraShape(3, 6), trainable=True)
    directory = tmp_path / "adapter"
    directory.mkdir()
    model.adapters.save(STUDENT, directory, "tiny")
    return directory


def logits_of(directory: Path) -> torch.Tensor:
    network = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    with torch.no_grad():
        return network(IDS).logits


def test_stock_transformers_answers_as_base_and_adapter_together(model: LanguageModel, adapter_dir: Path, tiny_model_dir: Path, tmp_path: Path) -> None:
    merge_adapter(tiny_model_dir, adapter_dir, tmp_path / "merged")
    with torch.no_grad(), model.adapters.use(STUDENT):
        expected = model.network(IDS).logits
    torch.testing.assert_close(logits_of(tmp_path / "merged"), expected, rtol=1e-4, atol=1e-4)
    assert (logits_of(tiny_model_dir) - expected).abs().max() > 0.1


def test_all_but_the_weights_is_the_base_s(adapter_dir: Path, tiny_model_dir: Path, tmp_path: Path) -> None:
    merge_adapter(tiny_model_dir, adapter_dir, tmp_path / "merged")
    expected = {path.name for path in tiny_model_dir.iterdir()} - {"prepared.json"}
    assert {path.name for path in (tmp_path / "merged").iterdir()} == expected
    for name in ("config.json", "tokenizer.json", "chat_template.jinja"):
        assert (tmp_path / "merged" / name).read_bytes() == (tiny_model_dir / name).read_bytes()


def test_weights_in_several_files_keep_their_places_and_precision(adapter_dir: Path, tiny_model_dir: Path, tmp_path: Path) -> None:
    base_dir = tmp_path / "base"
    shutil.copytree(tiny_model_dir, base_dir)
    tensors = {name: value.to(torch.bfloat16) for name, value in load_file(base_dir / "model.safetensors").items()}
    (base_dir / "model.safetensors").unlink()
    names = sorted(tensors)
    parts = {"model-00001-of-00002.safetensors": names[: len(names) // 2], "model-00002-of-00002.safetensors": names[len(names) // 2 :]}
    for file, held in parts.items():
        save_file({name: tensors[name] for name in held}, base_dir / file, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": {name: file for file, held in parts.items() for name in held}}
    (base_dir / "model.safetensors.index.json").write_text(json.dumps(index))
    merge_adapter(base_dir, adapter_dir, tmp_path / "merged")
    for file, held in parts.items():
        merged = load_file(tmp_path / "merged" / file)
        assert sorted(merged) == held
        assert {value.dtype for value in merged.values()} == {torch.bfloat16}
    whole = logits_of(tmp_path / "merged")
    merge_adapter(tiny_model_dir, adapter_dir, tmp_path / "exact")
    torch.testing.assert_close(whole, logits_of(tmp_path / "exact"), rtol=0.1, atol=0.2)


def test_an_adapter_of_another_shape_is_refused_and_nothing_left(model: LanguageModel, adapter_dir: Path, tiny_model_dir: Path, tmp_path: Path) -> None:
    tensors = load_file(adapter_dir / "adapter_model.safetensors")
    wrong = {name: torch.zeros(value.shape[0], value.shape[1] + 1) if name.endswith("lora_A.weight") else value for name, value in tensors.items()}
    save_file(wrong, adapter_dir / "adapter_model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConfigurationError, match=r"has the shape"):
        merge_adapter(tiny_model_dir, adapter_dir, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_a_layer_that_the_base_s_files_do_not_name_is_refused(adapter_dir: Path, tiny_model_dir: Path, tmp_path: Path) -> None:
    """An architecture whose files name layers otherwise than its modules: leaving the adapter out of them would be a lie."""
    tensors = load_file(adapter_dir / "adapter_model.safetensors")
    save_file({name.replace("layers.1.", "layers.7."): value for name, value in tensors.items()}, adapter_dir / "adapter_model.safetensors")
    with pytest.raises(ConfigurationError, match=r"layers\.7\."):
        merge_adapter(tiny_model_dir, adapter_dir, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_a_full_disk_is_named(adapter_dir: Path, tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: object, **options: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("sdft_engine.merging.save_file", full)
    with pytest.raises(DiskFull):
        merge_adapter(tiny_model_dir, adapter_dir, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_a_file_that_can_t_be_read_now_is_no_reason_for_good(adapter_dir: Path, tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def away(*arguments: object, **options: object) -> None:
        raise OSError(116, "Stale file handle")

    monkeypatch.setattr("sdft_engine.merging.save_file", away)
    with pytest.raises(BaseModelError, match="Stale file handle"):
        merge_adapter(tiny_model_dir, adapter_dir, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()
