"""What the engine is checked against: the transformers model in float64, whole logits, adapters multiplied out."""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor
from torch.func import functional_call
from transformers import AutoModelForCausalLM

from sdft_engine.lora import LoraAdapters, LoraShape
from sdft_engine.model import LanguageModel

Factors = dict[str, Tensor]


class PlainModel:
    """One row at a time, no cache, no padding, every position's logits."""

    def __init__(self, model_dir: Path) -> None:
        self.network = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float64, attn_implementation="eager").eval()
        self.network.requires_grad_(False)
        self.weights: dict[str, Tensor] = dict(self.network.named_parameters())

    def logits(self, token_ids: list[int], factors: Mapping[str, Tensor] | None = None, scaling: float = 0.0) -> Tensor:
        """(T, V). With factors, every weight W becomes W + scaling B A first, differentiably."""
        changed: Factors = {}
        for name, a in (factors or {}).items():
            if name.endswith(".lora_A"):
                module = name.removesuffix(".lora_A")
                changed[f"{module}.weight"] = self.weights[f"{module}.weight"] + scaling * factors[f"{module}.lora_B"] @ a  # type: ignore[index]
        logits_TV: Tensor = functional_call(self.network, changed, kwargs={"input_ids": torch.tensor([token_ids])}).logits[0]
        return logits_TV

    def completion_logps(
        self, prompt_ids: list[int], completion_ids: list[int], factors: Mapping[str, Tensor] | None = None, scaling: float = 0.0, temperature: float = 1.0
    ) -> Tensor:
        """(completion length, V): log-probabilities of what may stand at each place of the completion."""
        logits_TV = self.logits(prompt_ids + completion_ids, factors, scaling)[len(prompt_ids) - 1 : -1]
        return (logits_TV / temperature).log_softmax(dim=-1)


def add_adapter(
    model: LanguageModel, name: str, seed: int, *, shape: LoraShape | None = None, trainable: bool = False, strength: float = 0.1
) -> dict[str, torch.nn.Parameter]:
    """An adapter whose two factors are random, so that it changes every answer. Returns its factors by name."""
    model.adapters.add(name, shape or LoraShape(rank=4, alpha=8), trainable=trainable)
    randomise(model.adapters, name, seed, strength)
    return model.adapters.parameters(name)


def randomise(adapters: LoraAdapters, name: str, seed: int, strength: float = 0.1) -> None:
    generator = torch.Generator().manual_seed(seed)
    for factor in adapters.parameters(name).values():
        factor.data.copy_(torch.randn(factor.shape, generator=generator) * strength)


def in_float64(factors: Mapping[str, Tensor], *, requires_grad: bool = False) -> Factors:
    """Copies that plain computations can use, and differentiate."""
    return {name: value.detach().double().clone().requires_grad_(requires_grad) for name, value in factors.items()}


def tokens(seed: int, length: int) -> list[int]:
    """Random ids without the special ones."""
    ids: list[int] = torch.randint(3, 512, (length,), generator=torch.Generator().manual_seed(seed)).tolist()
    return ids
