"""sdft_engine.model: loading, the choice of precision, and logits that equal those of transformers."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, CohereConfig, Gemma2Config, GraniteConfig, PretrainedConfig
from transformers import modeling_gguf_pytorch_utils as gguf_loader
from transformers.utils import logging as transformers_logging

from sdft_engine import model as model_module
from sdft_engine.contract.errors import BaseModelError, ConfigurationError
from sdft_engine.lora import LoraAdapters
from sdft_engine.model import LanguageModel, choose_device, choose_dtype, dtype_name, load_base_model, matmul_seconds
from sdft_engine.products import packs
from tests.sdft_engine.plain import PlainModel, tokens

CPU = torch.device("cpu")
ROWS = torch.tensor([tokens(seed, 12) for seed in range(3)])
SMALL: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "initializer_range": 0.3,
}


@pytest.fixture
def copied(tiny_model_dir: Path, tmp_path: Path) -> Path:
    """A copy of the tiny model's directory that a test may spoil."""
    return Path(shutil.copytree(tiny_model_dir, tmp_path / "copied"))


def test_logits_equal_the_transformers_forward(model: LanguageModel, plain: PlainModel) -> None:
    mine = model.logits(model.hidden_states(ROWS))
    assert mine.dtype == torch.float32
    expected = torch.stack([plain.logits(row) for row in ROWS.tolist()])
    torch.testing.assert_close(mine.double(), expected, rtol=1e-4, atol=1e-4)


def test_bfloat16_weights_give_float32_logits(bfloat16_model: LanguageModel, plain: PlainModel) -> None:
    mine = bfloat16_model.logits(bfloat16_model.hidden_states(ROWS))
    assert bfloat16_model.network.get_input_embeddings().weight.dtype == torch.bfloat16
    assert mine.dtype == torch.float32
    expected = torch.stack([plain.logits(row) for row in ROWS.tolist()])
    assert (mine.double() - expected).abs().mean() < 0.02 * expected.abs().mean()


def test_padding_on_the_right_needs_no_mask(model: LanguageModel) -> None:
    padded = ROWS.clone()
    padded[1, 7:] = 0
    whole, short = model.hidden_states(padded)[1, :7], model.hidden_states(ROWS[1:2, :7])[0]
    torch.testing.assert_close(whole, short, rtol=0, atol=1e-5)


def test_the_head_is_packed_where_weights_can_be(model: LanguageModel) -> None:
    assert (model.packed_head is not None) is packs(model.head.weight)


def test_the_base_is_frozen_and_evaluating(model: LanguageModel) -> None:
    assert [name for name, weight in model.network.named_parameters() if weight.requires_grad] == []
    assert not model.network.training


def test_attention_takes_its_fastest_form_where_the_family_has_it(model: LanguageModel) -> None:
    assert model.network.config._attn_implementation == "sdpa"


@pytest.mark.parametrize(
    ("config", "neutral"),
    [
        (Gemma2Config(**SMALL, final_logit_softcapping=3.0), {"final_logit_softcapping": None}),
        (CohereConfig(**{k: v for k, v in SMALL.items() if k != "head_dim"}, logit_scale=0.25, pad_token_id=0), {"logit_scale": 1.0}),
        (GraniteConfig(**SMALL, logits_scaling=8.0), {"logits_scaling": 1.0}),
    ],
    ids=["gemma", "cohere", "granite"],
)
def test_a_models_own_cap_and_scale_are_applied(config: PretrainedConfig, neutral: dict[str, Any], model: LanguageModel) -> None:
    torch.manual_seed(0)
    network = AutoModelForCausalLM.from_config(config).eval()
    head = network.get_output_embeddings()
    rows = ROWS % SMALL["vocab_size"]
    with torch.no_grad():
        expected = network(input_ids=rows).logits
        mine = LanguageModel(network, network.base_model, head, LoraAdapters(network, head), model.chat_format, CPU, torch.float32)
        hidden = mine.hidden_states(rows)
        torch.testing.assert_close(mine.logits(hidden), expected, rtol=1e-4, atol=1e-4)
        for option, value in neutral.items():  # the case must be able to fail
            setattr(network.config, option, value)
        assert (mine.logits(hidden) - expected).abs().max() > 0.1


@pytest.mark.parametrize(
    ("bfloat16_seconds", "chosen"), [(1.0, torch.bfloat16), (1.5, torch.bfloat16), (1.9, torch.float32), (2.0, torch.float32), (1200.0, torch.float32)]
)
def test_the_automatic_precision_is_the_measured_faster_one(monkeypatch: pytest.MonkeyPatch, bfloat16_seconds: float, chosen: torch.dtype) -> None:
    """bfloat16 has to be faster by 1.3, float32 takes 2 seconds here."""
    monkeypatch.setattr(model_module, "matmul_seconds", {torch.bfloat16: bfloat16_seconds, torch.float32: 2.0}.__getitem__)
    assert choose_dtype("auto", CPU) == chosen


def test_a_given_precision_is_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(model_module, "matmul_seconds")
    assert choose_dtype("float32", CPU) == torch.float32
    assert choose_dtype("bfloat16", CPU) == torch.bfloat16
    assert [dtype_name(dtype) for dtype in (torch.float32, torch.bfloat16)] == ["float32", "bfloat16"]


def test_the_measurement_takes_the_fastest_of_at_least_two_products(monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = iter([0.0, 10.0, 13.0, 20.0, 27.0, 30.0])
    monkeypatch.setattr(model_module.time, "perf_counter", lambda: next(ticks))
    assert matmul_seconds(torch.float32, budget_seconds=0.05) == 3.0


def test_auto_loads_what_was_measured(tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_module, "matmul_seconds", {torch.bfloat16: 1.0, torch.float32: 2.0}.__getitem__)
    loaded = load_base_model(tiny_model_dir, device="cpu", dtype="auto")
    assert loaded.dtype == loaded.network.dtype == torch.bfloat16


def test_adapters_are_folded_only_where_that_is_exact_and_cheap(model: LanguageModel, bfloat16_model: LanguageModel) -> None:
    assert model.folds_adapters
    assert not bfloat16_model.folds_adapters
    model.device = torch.device("cuda")
    assert not model.folds_adapters


def test_the_device_that_is_asked_for_must_be_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_device("auto") == choose_device("cpu") == CPU
    with pytest.raises(ConfigurationError, match="CUDA") as raised:
        choose_device("cuda")
    assert raised.value.param == "device"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert choose_device("auto").type == choose_device("cuda").type == "cuda"
    assert choose_device("cpu") == CPU


def test_loading_and_saving_show_no_progress_bars(tiny_model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    transformers_logging.enable_progress_bar()
    load_base_model(tiny_model_dir, device="cpu", dtype="float32").network.save_pretrained(tmp_path)
    assert [*gguf_loader.tqdm([1, 2], desc="Converting")] == [1, 2]
    assert capsys.readouterr().err == ""


def test_a_directory_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BaseModelError, match=str(tmp_path)):
        load_base_model(tmp_path, device="cpu", dtype="float32")


@pytest.mark.parametrize("kept_bytes", [0, 100, 100_000])
def test_damaged_weights_are_refused(copied: Path, kept_bytes: int) -> None:
    weights = copied / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:kept_bytes])
    with pytest.raises(BaseModelError, match="can't be loaded"):
        load_base_model(copied, device="cpu", dtype="float32")


@pytest.mark.parametrize("change", [lambda t: None, lambda t: t[:-1].clone()], ids=["missing", "another_shape"])
def test_weights_that_do_not_fit_are_refused(copied: Path, change: Callable[[torch.Tensor], torch.Tensor | None]) -> None:
    """Else transformers would go on with random ones."""
    name = "model.layers.1.mlp.up_proj.weight"
    tensors = load_file(copied / "model.safetensors")
    changed = change(tensors.pop(name))
    (copied / "model.safetensors").unlink()
    save_file(tensors if changed is None else tensors | {name: changed}, copied / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(BaseModelError, match="can't be loaded"):
        load_base_model(copied, device="cpu", dtype="float32")


def test_pickled_weights_are_never_opened(copied: Path) -> None:
    torch.save(load_file(copied / "model.safetensors"), copied / "pytorch_model.bin")
    (copied / "model.safetensors").unlink()
    with pytest.raises(BaseModelError, match="can't be loaded"):
        load_base_model(copied, device="cpu", dtype="float32")


def test_code_that_a_model_brings_is_never_run(copied: Path, tmp_path: Path) -> None:
    mark = tmp_path / "ran"
    (copied / "modeling_evil.py").write_text(f"open({str(mark)!r}, 'w').close()\nclass Evil: ...\n")
    config = json.loads((copied / "config.json").read_text())
    config |= {"model_type": "evil", "auto_map": {"AutoConfig": "modeling_evil.Evil", "AutoModelForCausalLM": "modeling_evil.Evil"}}
    (copied / "config.json").write_text(json.dumps(config))
    with pytest.raises(BaseModelError, match="can't be loaded"):
        load_base_model(copied, device="cpu", dtype="float32")
    assert not mark.exists()
