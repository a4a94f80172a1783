"""sdft_engine.lora on disk: PEFT's own files both ways, and every file that is refused."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from sdft_engine.contract.errors import ConfigurationError
from sdft_engine.contract.sealed_directory import ADAPTER_CONFIG_NAME, ADAPTER_WEIGHTS_NAME
from sdft_engine.lora import LoraShape, read_adapter
from sdft_engine.model import LanguageModel
from tests.sdft_engine.plain import add_adapter, tokens

ROWS = torch.tensor([tokens(seed, 12) for seed in range(3)])
LAYERS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def peft_logits(network: Any) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = network.eval()(input_ids=ROWS).logits
    return logits


def base_network(model_dir: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)


@pytest.fixture
def saved(model: LanguageModel, tmp_path: Path) -> Path:
    """An adapter's directory; the model itself doesn't hold it any more."""
    add_adapter(model, "a", seed=1, shape=LoraShape(4, 12))
    model.adapters.save("a", tmp_path, "tiny-llama")
    model.adapters.remove("a")
    return tmp_path


def test_stock_peft_loads_what_was_saved(model: LanguageModel, saved: Path, tiny_model_dir: Path) -> None:
    model.adapters.load("again", saved)
    with torch.no_grad(), model.adapters.use("again"):
        mine = model.logits(model.hidden_states(ROWS))
    network = base_network(tiny_model_dir)
    bare = peft_logits(network)
    theirs = peft_logits(PeftModel.from_pretrained(network, str(saved)))
    torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-5)
    assert (theirs - bare).abs().max() > 0.1


def test_an_adapter_made_by_peft_is_loaded(model: LanguageModel, tmp_path: Path, tiny_model_dir: Path) -> None:
    theirs = get_peft_model(base_network(tiny_model_dir), LoraConfig(r=3, lora_alpha=7, target_modules=LAYERS, init_lora_weights=False))
    theirs.save_pretrained(str(tmp_path))
    model.adapters.load("theirs", tmp_path)
    assert model.adapters.shapes["theirs"] == LoraShape(3, 7)
    with torch.no_grad(), model.adapters.use("theirs"):
        mine = model.logits(model.hidden_states(ROWS))
    torch.testing.assert_close(mine, peft_logits(theirs), rtol=0, atol=1e-5)


def test_a_round_trip_is_exact_and_loads_into_float32(model: LanguageModel, saved: Path) -> None:
    before = {name: value.detach().clone() for name, value in add_adapter(model, "a", seed=1, shape=LoraShape(4, 12)).items()}
    model.adapters.load("again", saved, trainable=True)
    after = model.adapters.parameters("again")
    assert all(torch.equal(value, before[name]) for name, value in after.items())
    assert all(value.requires_grad for value in after.values())
    rewrite_tensors(saved, lambda tensors: {key: value.half() for key, value in tensors.items()})
    model.adapters.load("rounded", saved)
    assert {value.dtype for value in model.adapters.parameters("rounded").values()} == {torch.float32}


def rewrite_config(directory: Path, **changes: Any) -> None:
    path = directory / ADAPTER_CONFIG_NAME
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def rewrite_tensors(directory: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> None:
    path = directory / ADAPTER_WEIGHTS_NAME
    tensors = change(load_file(path))
    path.unlink()
    save_file(tensors, path)


def _flip_header(directory: Path) -> None:
    path = directory / ADAPTER_WEIGHTS_NAME
    path.write_bytes(path.read_bytes()[:8] + b"x" + path.read_bytes()[9:])


def _truncate(directory: Path) -> None:
    path = directory / ADAPTER_WEIGHTS_NAME
    path.write_bytes(path.read_bytes()[:-10])


FIRST = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
REFUSED: dict[str, tuple[Callable[[Path], object], str]] = {
    "dora": (lambda d: rewrite_config(d, use_dora=True), "use_dora"),
    "rslora": (lambda d: rewrite_config(d, use_rslora=True), "use_rslora"),
    "rank_pattern": (lambda d: rewrite_config(d, rank_pattern={"q_proj": 8}), "rank_pattern"),
    "alpha_pattern": (lambda d: rewrite_config(d, alpha_pattern={"q_proj": 8}), "alpha_pattern"),
    "modules_to_save": (lambda d: rewrite_config(d, modules_to_save=["lm_head"]), "modules_to_save"),
    "transposed": (lambda d: rewrite_config(d, fan_in_fan_out=True), "fan_in_fan_out"),
    "not_lora": (lambda d: rewrite_config(d, peft_type="IA3"), "not a LoRA adapter"),
    "alpha_endless": (lambda d: rewrite_config(d, lora_alpha=1e308), "at most 1,000,000"),
    "alpha_bool": (lambda d: rewrite_config(d, lora_alpha=True), "positive"),
    "config_deep": (lambda d: (d / ADAPTER_CONFIG_NAME).write_text("[" * 100_000), "no readable adapter"),
    "not_finite": (lambda d: rewrite_tensors(d, lambda tensors: tensors | {FIRST: tensors[FIRST] * math.nan}), "finite"),
    "whole_numbers": (lambda d: rewrite_tensors(d, lambda tensors: tensors | {FIRST: tensors[FIRST].long()}), "floating-point"),
    "rank_zero": (lambda d: rewrite_config(d, r=0), "positive"),
    "alpha_text": (lambda d: rewrite_config(d, lora_alpha="8"), "positive"),
    "wrong_rank": (lambda d: rewrite_config(d, r=5), "shape"),
    "config_list": (lambda d: (d / ADAPTER_CONFIG_NAME).write_text("[]"), "not a LoRA adapter"),
    "config_not_json": (lambda d: (d / ADAPTER_CONFIG_NAME).write_text("{"), "no readable adapter"),
    "config_binary": (lambda d: (d / ADAPTER_CONFIG_NAME).write_bytes(b"\xff\xfe\x00"), "no readable adapter"),
    "config_missing": (lambda d: (d / ADAPTER_CONFIG_NAME).unlink(), "no readable adapter"),
    "weights_missing": (lambda d: (d / ADAPTER_WEIGHTS_NAME).unlink(), "no readable adapter"),
    "weights_truncated": (_truncate, "no readable adapter"),
    "weights_corrupt": (_flip_header, "no readable adapter"),
    "weights_pickled": (lambda d: torch.save({}, d / ADAPTER_WEIGHTS_NAME), "no readable adapter"),
    "foreign_tensor": (lambda d: rewrite_tensors(d, lambda t: t | {"base_model.model.lm_head.weight": torch.ones(2, 2)}), "lm_head"),
    "foreign_layer": (lambda d: rewrite_tensors(d, lambda t: t | {FIRST.replace("layers.0", "layers.9"): t[FIRST].clone()}), "layers.9"),
    "missing_layer": (lambda d: rewrite_tensors(d, lambda t: {k: v for k, v in t.items() if k != FIRST}), "q_proj.lora_A"),
    "transposed_tensor": (lambda d: rewrite_tensors(d, lambda t: t | {FIRST: t[FIRST].T.contiguous()}), "shape"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_with_the_reason_and_nothing_is_left_half_loaded(name: str, model: LanguageModel, saved: Path) -> None:
    files = {path.name: path.read_bytes() for path in saved.iterdir()}
    spoil, reason = REFUSED[name]
    spoil(saved)
    with pytest.raises(ConfigurationError, match=reason):
        model.adapters.load("a", saved)
    assert model.adapters.shapes == {}
    assert [key for key, _ in model.network.named_parameters() if "lora_" in key] == []
    for file_name, content in files.items():
        (saved / file_name).write_bytes(content)
    model.adapters.load("a", saved)


def test_reading_alone_tells_shape_and_factors(saved: Path) -> None:
    shape, factors = read_adapter(saved)
    assert shape == LoraShape(4, 12)
    assert len(factors) == 2 * 2 * 7
    assert factors["model.layers.1.mlp.down_proj.lora_A"].shape == (4, 128)
