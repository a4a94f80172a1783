"""Model families that differ from Llama where the engine takes a model apart: biases, fused layers, windows, caps, scales."""

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GraniteConfig,
    MistralConfig,
    Phi3Config,
    PretrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

from sdft_engine.batching import ScoredText, completion_hidden_states, shared_prefix_length
from sdft_engine.generation import decode_all
from sdft_engine.lora import LoraAdapters
from sdft_engine.model import LanguageModel
from sdft_engine.prompt_cache import PromptCache
from sdft_engine.sampling import Decoding, SamplingParams
from tests.sdft_engine.plain import add_adapter

VOCABULARY = 64
SMALL: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "initializer_range": 0.3,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
WINDOW = 6  # shorter than the prompts
FAMILIES: dict[str, tuple[type[PretrainedConfig], dict[str, Any]]] = {
    "cohere": (CohereConfig, {"logit_scale": 0.25}),
    "gemma2": (Gemma2Config, {"head_dim": 16, "final_logit_softcapping": 3.0, "sliding_window": WINDOW}),
    "gemma3": (Gemma3TextConfig, {"head_dim": 16, "sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"]}),
    "granite": (GraniteConfig, {"logits_scaling": 8.0}),
    "mistral": (MistralConfig, {"head_dim": 16, "sliding_window": WINDOW}),
    "phi3": (Phi3Config, {}),  # fused projections
    "qwen2": (Qwen2Config, {}),  # biases
    "qwen3": (Qwen3Config, {"head_dim": 16}),
}
LENGTHS = (11, 3, 17)
PROMPTS = [torch.randint(3, VOCABULARY, (length,), generator=torch.Generator().manual_seed(length)).tolist() for length in LENGTHS]


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest, model: LanguageModel) -> LanguageModel:
    """A random model of the family, with every bias set. The chat format is the tiny Llama's, and not used."""
    config, options = FAMILIES[request.param]
    torch.manual_seed(0)
    network = AutoModelForCausalLM.from_config(config(**SMALL, **options)).eval().requires_grad_(False)
    for name, parameter in network.named_parameters():
        if name.endswith(".bias"):
            parameter.normal_()
    head = network.get_output_embeddings()
    adapters = LoraAdapters(network, head)
    return LanguageModel(network, network.base_model, head, adapters, model.chat_format, torch.device("cpu"), torch.float32)


def whole_logits(model: LanguageModel, token_ids: list[int]) -> Tensor:
    """By the family's own forward: (T, V)."""
    with torch.no_grad():
        logits_TV: Tensor = model.network(input_ids=torch.tensor([token_ids]), use_cache=False).logits[0]
    return logits_TV


def test_logits_equal_those_of_the_family(family: LanguageModel) -> None:
    for prompt in PROMPTS:
        with torch.no_grad():
            mine = family.logits(family.hidden_states(torch.tensor([prompt])))[0]
        torch.testing.assert_close(mine, whole_logits(family, prompt), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("adapter", [None, "a"])
@pytest.mark.parametrize("prefix", [[], [5, 9, 7, 3] * 12], ids=["", "after what all prompts begin with"])
def test_batched_decoding_equals_one_whole_forward_a_token(family: LanguageModel, adapter: str | None, prefix: list[int]) -> None:
    """Also where prompts of other lengths follow a common beginning that is longer than the windows."""
    if adapter:
        add_adapter(family, adapter, seed=1)
    sequences = [Decoding(prefix + prompt, SamplingParams(12, temperature=0.0), adapter) for prompt in PROMPTS]
    decode_all(family, sequences, max_batch=2)
    for sequence in sequences:
        ids = list(sequence.prompt_ids)
        for _ in range(12):
            with family.adapters.use(adapter):
                ids.append(int(whole_logits(family, ids)[-1].argmax()))
        assert sequence.token_ids == ids[len(sequence.prompt_ids) :]


def test_padding_on_the_right_changes_nothing(family: LanguageModel) -> None:
    texts = [ScoredText(prompt[:-2], prompt[-2:]) for prompt in PROMPTS]
    with torch.no_grad():
        together = completion_hidden_states(family, texts)
        alone = torch.cat([completion_hidden_states(family, [text]) for text in texts])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-4)


def test_a_shared_prefix_changes_nothing(family: LanguageModel) -> None:
    prefix = [5, 9] * 20  # longer than the windows
    texts = [ScoredText(prefix + prompt[:-2], prompt[-2:]) for prompt in PROMPTS]
    assert shared_prefix_length([text.prompt_ids for text in texts]) == 40
    with torch.no_grad():
        together = completion_hidden_states(family, texts)
        alone = torch.cat([completion_hidden_states(family, [text]) for text in texts])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-4)


def test_a_folded_adapter_equals_the_unfolded_one(family: LanguageModel) -> None:
    add_adapter(family, "a", seed=1)
    bare = whole_logits(family, PROMPTS[0])
    with family.adapters.use("a"):
        unfolded = whole_logits(family, PROMPTS[0])
    with torch.no_grad(), family.adapters.use("a", fold=True):
        folded = whole_logits(family, PROMPTS[0])
    torch.testing.assert_close(folded, unfolded, rtol=1e-4, atol=1e-4)
    assert (folded - bare).abs().max() > 0.05


@torch.no_grad()
def test_kept_prompts_give_the_states_of_whole_texts(family: LanguageModel) -> None:
    texts = [ScoredText(prompt, [5, 7, 9][: 1 + row]) for row, prompt in enumerate(PROMPTS[:3])]
    found = PromptCache([text.prompt_ids for text in texts]).completion_hidden_states(family, range(len(texts)), texts)
    torch.testing.assert_close(found, torch.cat([completion_hidden_states(family, [text]) for text in texts]), rtol=1e-3, atol=1e-4)
