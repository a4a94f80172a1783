"""sdft_engine.fused_decoder: what transformers' modules compute, gradients included, for every family that it takes."""

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    DynamicCache,
    Gemma2Config,
    GraniteConfig,
    LlamaConfig,
    MistralConfig,
    PretrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

from sdft_engine import attention, fused_decoder
from sdft_engine.fused_decoder import FusedDecoder, fused_decoder_of
from sdft_engine.growing_cache import GrowingCache
from sdft_engine.lora import LoraAdapters, LoraShape, RowGroup
from sdft_engine.products import FEW_ROWS

VOCABULARY = 64
SMALL: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.3,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
FAMILIES: dict[str, tuple[type[PretrainedConfig], dict[str, Any]]] = {
    "llama": (LlamaConfig, {}),
    "llama_biases": (LlamaConfig, {"attention_bias": True, "mlp_bias": True}),
    "llama_rope_scaling": (LlamaConfig, {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 100.0}}),
    "mistral": (MistralConfig, {"sliding_window": None, "head_dim": 16}),
    "qwen2": (Qwen2Config, {}),
    "qwen3": (Qwen3Config, {"head_dim": 16}),
}
ADAPTERS = ("a", "b")


def network_of(config: type[PretrainedConfig], options: dict[str, Any]) -> Any:
    torch.manual_seed(0)
    network = AutoModelForCausalLM.from_config(config(**SMALL, **options)).eval().requires_grad_(False)
    for name, parameter in network.named_parameters():
        if name.endswith(("bias", "norm.weight")):
            parameter.normal_()
    return network


def norms_in_float64(network: Any) -> None:
    """transformers takes every norm in float32 whatever the model's precision."""
    for module in network.modules():
        if type(module).__name__.endswith("RMSNorm"):
            module.forward = lambda x, norm=module: torch.rms_norm(x, norm.weight.shape, norm.weight, norm.variance_epsilon)


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> tuple[Any, LoraAdapters, FusedDecoder]:
    network = network_of(*FAMILIES[request.param])
    adapters = LoraAdapters(network, network.get_output_embeddings())
    for seed, name in enumerate(ADAPTERS):
        adapters.add(name, LoraShape(4, 8), trainable=False)
        generator = torch.Generator().manual_seed(seed)
        for factor in adapters.parameters(name).values():
            factor.data.copy_(torch.randn(factor.shape, generator=generator) * 0.1)
    fused = fused_decoder_of(network.base_model)
    assert fused is not None
    return network.base_model, adapters, fused


def ids(rows: int, length: int, seed: int = 0) -> Tensor:
    return torch.randint(3, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))


ROUTES: dict[str, Any] = {
    "base": None,
    "adapter": "a",
    "rows": [RowGroup("a", torch.tensor([0, 2])), RowGroup("b", torch.tensor([1]))],
}


@pytest.mark.parametrize("route", [*ROUTES, "gathered"])
@torch.no_grad()
def test_prefill_and_decoding_with_padded_rows_equal_transformers(family: tuple[Any, LoraAdapters, FusedDecoder], route: str) -> None:
    decoder, adapters, fused = family
    active = ROUTES.get(route, "a")
    mask = torch.ones(3, 9, dtype=torch.long)
    mask[0, :4] = 0
    mask[2, :1] = 0
    theirs, mine = DynamicCache(), GrowingCache()
    tokens, positions = ids(3, 9), (mask.cumsum(1) - 1).clamp(min=0)
    for turn in range(4):
        with adapters.use(active):
            expected = decoder(input_ids=tokens, attention_mask=mask, position_ids=positions, past_key_values=theirs, use_cache=True).last_hidden_state
            with fused.gathered("a") if route == "gathered" else nullcontext():
                found = fused(tokens, mask, positions, mine, active)
        real = mask[:, -tokens.shape[1] :, None]
        torch.testing.assert_close(found * real, expected * real, rtol=1e-4, atol=1e-4)
        assert found.isfinite().all()
        tokens = ids(3, 1, seed=turn + 1)
        mask = torch.cat([mask, mask.new_ones(3, 1)], dim=1)
        positions = (mask.cumsum(1) - 1)[:, -1:]


@torch.no_grad()
def test_rows_without_padding_need_no_mask_and_no_cache(family: tuple[Any, LoraAdapters, FusedDecoder]) -> None:
    decoder, adapters, fused = family
    with adapters.use("b"):
        expected = decoder(input_ids=ids(2, 11), use_cache=False).last_hidden_state
        torch.testing.assert_close(fused(ids(2, 11), None, None, None, "b"), expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_several_tokens_after_a_cache_see_what_came_before(family: tuple[Any, LoraAdapters, FusedDecoder]) -> None:
    decoder, _, fused = family
    whole = decoder(input_ids=ids(2, 12), use_cache=False).last_hidden_state
    cache = DynamicCache()
    fused(ids(2, 12)[:, :7], None, None, cache, None)
    torch.testing.assert_close(fused(ids(2, 12)[:, 7:], None, None, cache, None), whole[:, 7:], rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_gathered_factors_are_those_of_the_moment_and_end_with_their_block(family: tuple[Any, LoraAdapters, FusedDecoder]) -> None:
    _, adapters, fused = family
    tokens = ids(2, 6)
    before = fused(tokens, None, None, None, "a")
    for factor in adapters.parameters("a").values():
        factor.mul_(1.5)
    bare = fused(tokens, None, None, None, None)
    with fused.gathered("a"):
        after = fused(tokens, None, None, None, "a")
        torch.testing.assert_close(fused(tokens, None, None, None, None), bare)  # others are not touched by it
    torch.testing.assert_close(after, fused(tokens, None, None, None, "a"), rtol=1e-4, atol=1e-4)
    assert (after - before).abs().max() > 0.01
    assert (fused(tokens, None, None, None, None) - after).abs().max() > 0.01


@torch.no_grad()
@pytest.mark.parametrize("route", ROUTES)
def test_many_rows_equal_transformers_too(family: tuple[Any, LoraAdapters, FusedDecoder], route: str) -> None:
    decoder, adapters, fused = family
    tokens = ids(3, FEW_ROWS)
    with adapters.use(ROUTES[route]):
        expected = decoder(input_ids=tokens, use_cache=False).last_hidden_state
        torch.testing.assert_close(fused(tokens, None, None, None, ROUTES[route]), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("prefix", [0, 5])
@pytest.mark.parametrize("in_blocks", [False, True])
def test_gradients_equal_those_of_transformers_in_float64(name: str, prefix: int, in_blocks: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a beginning that all rows share (see batching.py), computed once and with gradients, and without one; by torch's
    attention and by this project's own."""
    monkeypatch.setattr(fused_decoder, "causal_attention_is_faster", lambda x_BTH: in_blocks)
    monkeypatch.setattr(attention, "BLOCK", 4)
    network = network_of(*FAMILIES[name]).double()
    norms_in_float64(network)
    adapters = LoraAdapters(network, network.get_output_embeddings())
    adapters.add("a", LoraShape(4, 8), trainable=True)
    generator = torch.Generator().manual_seed(1)
    for factor in (factors := adapters.parameters("a")).values():
        factor.data = torch.randn(factor.shape, generator=generator, dtype=torch.float64) * 0.1
    decoder, fused = network.base_model, fused_decoder_of(network.base_model)
    assert fused is not None
    tokens = torch.cat([ids(1, prefix, seed=3).expand(3, -1), ids(3, 9)], dim=1)
    weights = torch.randn(3, 9, SMALL["hidden_size"], generator=generator, dtype=torch.float64)

    def gradients(hidden: Tensor) -> list[Tensor]:
        return list(torch.autograd.grad((hidden[:, prefix:] * weights).sum(), list(factors.values())))

    with adapters.use("a"):
        expected_states = decoder(input_ids=tokens, use_cache=False).last_hidden_state
        if prefix:
            alone, cache = DynamicCache(), DynamicCache()
            fused(tokens[:1, :prefix], None, None, alone, "a")
            for index, layer in enumerate(alone.layers):
                cache.update(layer.keys.expand(3, -1, -1, -1), layer.values.expand(3, -1, -1, -1), index)
            positions = torch.arange(prefix, prefix + 9)[None].expand(3, -1)
            states = torch.cat([expected_states[:, :prefix].detach(), fused(tokens[:, prefix:], None, positions, cache, "a")], dim=1)
        else:
            states = fused(tokens, None, None, None, "a")
        torch.testing.assert_close(states, expected_states, rtol=1e-9, atol=1e-10)
        for mine, theirs in zip(gradients(states), gradients(expected_states), strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("config", "options"),
    [(Gemma2Config, {}), (GraniteConfig, {}), (MistralConfig, {"sliding_window": 8}), (LlamaConfig, {"hidden_act": "gelu"})],
)
def test_families_that_compute_something_else_are_left_alone(config: type[PretrainedConfig], options: dict[str, Any]) -> None:
    network = network_of(config, options)
    LoraAdapters(network, network.get_output_embeddings())
    assert fused_decoder_of(network.base_model) is None


def rounded(name: str, precision: torch.dtype) -> tuple[Any, LoraAdapters, FusedDecoder]:
    """A family's model with weights that bfloat16 can hold, in `precision`; its adapter is in float32 at least."""
    network = network_of(*FAMILIES[name]).bfloat16().to(precision)
    if precision == torch.float64:
        norms_in_float64(network)
    adapters = LoraAdapters(network, network.get_output_embeddings())
    adapters.add("a", LoraShape(4, 8), trainable=True)
    generator = torch.Generator().manual_seed(1)
    for factor in adapters.parameters("a").values():
        factor.data = torch.randn(factor.shape, generator=generator).to(torch.promote_types(precision, torch.float32)) * 0.1
    fused = fused_decoder_of(network.base_model)
    assert fused is not None
    return network, adapters, fused


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("length", [1, FEW_ROWS])
def test_bfloat16_is_no_further_from_float64_than_transformers_own(name: str, length: int) -> None:
    """With an adapter in float32, of few rows and of many."""
    found: dict[str, Tensor] = {}
    for precision in (torch.float64, torch.bfloat16):
        network, adapters, fused = rounded(name, precision)
        with torch.no_grad(), adapters.use("a"):
            theirs = network.base_model(input_ids=ids(3, length), use_cache=False).last_hidden_state
            mine = fused(ids(3, length), None, None, None, "a")
            with fused.gathered("a"):
                gathered = fused(ids(3, length), None, None, None, "a")
        assert mine.dtype == gathered.dtype == precision
        found |= {f"{precision} {side}": states.double() for side, states in (("theirs", theirs), ("mine", mine), ("gathered", gathered))}
    exact = found["torch.float64 theirs"]
    torch.testing.assert_close(found["torch.float64 mine"], exact, rtol=1e-9, atol=1e-9)
    error = {side: float((found[f"torch.bfloat16 {side}"] - exact).norm()) for side in ("theirs", "mine", "gathered")}
    assert 0 < error["mine"] < 1.3 * error["theirs"]
    assert 0 < error["gathered"] < 1.3 * error["theirs"]


@pytest.mark.parametrize("name", FAMILIES)
def test_gradients_in_bfloat16_are_no_further_from_float64_than_transformers_own(name: str) -> None:
    gradients: dict[str, Tensor] = {}
    for precision in (torch.float64, torch.bfloat16):
        network, adapters, fused = rounded(name, precision)
        factors = adapters.parameters("a")
        weights = torch.randn(3, 30, SMALL["hidden_size"], generator=torch.Generator().manual_seed(2)).to(precision)
        with adapters.use("a"):
            sides = {"theirs": network.base_model(input_ids=ids(3, 30), use_cache=False).last_hidden_state, "mine": fused(ids(3, 30), None, None, None, "a")}
        for side, states in sides.items():
            found = torch.autograd.grad((states * weights).sum(), list(factors.values()), retain_graph=True)
            assert {gradient.dtype for gradient in found} == {torch.promote_types(precision, torch.float32)}
            gradients[f"{precision} {side}"] = torch.cat([gradient.double().flatten() for gradient in found])
    exact = gradients["torch.float64 theirs"]
    torch.testing.assert_close(gradients["torch.float64 mine"], exact, rtol=1e-8, atol=1e-8)
    error = {side: float((gradients[f"torch.bfloat16 {side}"] - exact).norm()) for side in ("theirs", "mine")}
    assert 0 < error["mine"] < 1.3 * error["theirs"]
