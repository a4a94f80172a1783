"""Gradient checkpointing: the same gradients from less memory, in the fused decoder and in transformers' own layers."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from transformers import AutoModelForCausalLM

from sdft_engine.batching import ScoredText, completion_hidden_states, shared_prefix_length
from sdft_engine.lora import STUDENT, LoraAdapters
from sdft_engine.model import LanguageModel
from tests.sdft_engine.plain import add_adapter, tokens
from tests.sdft_engine.test_families import FAMILIES, SMALL

PREFIX = tokens(7, 60)
TEXTS = [ScoredText(PREFIX + tokens(row, 5 + row), tokens(20 + row, 4 + row)) for row in range(3)]
SMALL_TEXTS = [ScoredText([t % 60 + 3 for t in text.prompt_ids], [t % 60 + 3 for t in text.completion_ids]) for text in TEXTS]


def gradients(model: LanguageModel, texts: list[ScoredText]) -> tuple[dict[str, Tensor], int]:
    """Of the student's factors, and the bytes that the forward pass kept for them."""
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with model.adapters.use(STUDENT):
        with saved_tensors_hooks(note, lambda tensor: tensor):
            hidden_NH = completion_hidden_states(model, texts)
        (hidden_NH * torch.randn(hidden_NH.shape, generator=torch.Generator().manual_seed(3))).sum().backward()
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.network.parameters()}
    found = {name: parameter.grad for name, parameter in model.adapters.parameters(STUDENT).items() if parameter.grad is not None}
    for parameter in model.adapters.parameters(STUDENT).values():
        parameter.grad = None
    return found, sum(size for pointer, size in kept.items() if pointer not in weights)


def same_gradients_from_less_memory(model: LanguageModel, texts: list[ScoredText]) -> None:
    assert shared_prefix_length([text.prompt_ids for text in texts]) == len(PREFIX)
    in_training = [module for module in model.network.modules() if module.training]
    expected, bytes_before = gradients(model, texts)
    model.recompute_layers()
    found, bytes_after = gradients(model, texts)
    assert found.keys() == expected.keys() == model.adapters.parameters(STUDENT).keys()
    for name, gradient in found.items():
        torch.testing.assert_close(
            gradient, expected[name], rtol=2e-4, atol=2e-5 * float(expected[name].abs().max()), msg=lambda text, name=name: f"{name}: {text}"
        )
    assert bytes_after < bytes_before / 3
    assert [module for module in model.network.modules() if module.training] == in_training


def test_the_fused_decoder(model: LanguageModel) -> None:
    assert model.fused is not None
    add_adapter(model, STUDENT, seed=1, trainable=True)
    same_gradients_from_less_memory(model, TEXTS)


@pytest.mark.parametrize("name", FAMILIES)
def test_layers_of_transformers(model: LanguageModel, name: str) -> None:
    config, options = FAMILIES[name]
    torch.manual_seed(0)
    network = AutoModelForCausalLM.from_config(config(**SMALL, **options)).eval().requires_grad_(False)
    head = network.get_output_embeddings()
    family = LanguageModel(network, network.base_model, head, LoraAdapters(network, head), model.chat_format, torch.device("cpu"), torch.float32)
    add_adapter(family, STUDENT, seed=1, trainable=True)
    same_gradients_from_less_memory(family, SMALL_TEXTS)


def test_passes_without_gradients_still_share_prefixes_and_read_caches(model: LanguageModel) -> None:
    add_adapter(model, STUDENT, seed=1, trainable=True)
    with torch.no_grad(), model.adapters.use(STUDENT):
        before = completion_hidden_states(model, TEXTS)
    model.recompute_layers()
    lengths = watched_lengths(model)
    with torch.no_grad(), model.adapters.use(STUDENT):
        after = completion_hidden_states(model, TEXTS)
    assert torch.equal(after, before)
    assert lengths == [len(PREFIX), max(text.input_length for text in TEXTS) - len(PREFIX)]


def watched_lengths(model: LanguageModel) -> list[int]:
    """Filled with the number of tokens of every pass."""
    lengths: list[int] = []
    original: Callable[..., Tensor] = model.hidden_states

    def hidden_states(input_ids_BT: Tensor, **inputs: Any) -> Tensor:
        lengths.append(input_ids_BT.shape[1])
        return original(input_ids_BT, **inputs)

    model.hidden_states = hidden_states  # type: ignore[method-assign]
    return lengths
