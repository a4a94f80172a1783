"""The teacher: the same network with an adapter of its own, kept in float32 and moved after every optimizer step.

`ema`: phi <- (1 - alpha) phi + alpha theta, on the factors A and B (not on the product BA: a different average; every
published implementation averages the factors; `ema_gap` says how different). `frozen`: the student as it was when the stage began. `live`: the student.
The teacher starts as an exact copy of the student's adapter (`parent`), or with no adapter at all (`base`).
"""

from typing import Literal

import torch

from sdft_engine.batching import ScoredText, completion_hidden_states, passes
from sdft_engine.lora import STUDENT
from sdft_engine.model import LanguageModel

TEACHER = "teacher"
PRODUCT_STATE = "watched_product"

TEMPERATURES = (1.0, 0.8, 0.65, 0.5)
KEPT_PROBABILITY = 0.95
"""An automatic temperature keeps at least this share of the teacher's greedy token accuracy when it samples: an answer of ten
tokens then survives sampling more often than not (0.95^10 = 0.6)."""


class Teacher:
    """The teacher's adapter: how it starts, how it moves, what of it a checkpoint holds."""

    def __init__(self, model: LanguageModel, kind: Literal["ema", "frozen", "live"], ema_rate: float, start: Literal["parent", "base"]) -> None:
        self.model = model
        self.kind = kind
        self.ema_rate = ema_rate
        self.adapter = STUDENT if kind == "live" else TEACHER
        if kind != "live":
            model.adapters.add(TEACHER, model.adapters.shapes[STUDENT], trainable=False)
            copied = {name: value.detach() for name, value in model.adapters.parameters(STUDENT).items()}
            if start == "base":
                copied = {name: torch.zeros_like(value) if name.endswith("lora_B") else value for name, value in copied.items()}
            model.adapters.assign(TEACHER, copied)
        self.watched = _watched_module(model)
        self.mean_product = self._product(TEACHER) if kind == "ema" else None

    @torch.no_grad()
    def follow(self) -> None:
        """After an optimizer step: the EMA recurrence, factor by factor, matched by parameter name."""
        if self.kind != "ema":
            return
        student = self.model.adapters.parameters(STUDENT)
        for name, value in self.model.adapters.parameters(TEACHER).items():
            value.lerp_(student[name], self.ema_rate)
        assert self.mean_product is not None
        self.mean_product.lerp_(self._product(STUDENT), self.ema_rate)

    def ema_gap(self) -> float | None:
        """How far the product of the averaged factors is from the same average of the products BA, relative to the latter
        (Frobenius norms), in one layer: the smallest with an adapter, of several the middle one. None where nothing is averaged,
        or that average is zero."""
        norm = 0.0 if self.mean_product is None else float(self.mean_product.norm())
        return float((self._product(TEACHER) - self.mean_product).norm()) / norm if self.mean_product is not None and norm else None

    @torch.no_grad()
    def _product(self, adapter: str) -> torch.Tensor:
        layer = self.model.adapters.layers[self.watched]
        return layer.lora_B[adapter] @ layer.lora_A[adapter]

    def state(self) -> dict[str, torch.Tensor]:
        """The teacher's own factors, for checkpoints; empty where it is the student."""
        if self.kind == "live":
            return {}
        factors = {name: value.detach() for name, value in self.model.adapters.parameters(TEACHER).items()}
        return factors if self.mean_product is None else factors | {PRODUCT_STATE: self.mean_product}

    def restore(self, state: dict[str, torch.Tensor]) -> None:
        if self.kind == "live":
            return
        self.model.adapters.assign(TEACHER, {name: value for name, value in state.items() if name != PRODUCT_STATE})
        if self.mean_product is not None:
            self.mean_product = state[PRODUCT_STATE].to(self.mean_product.device)


def _watched_module(model: LanguageModel) -> str:
    sizes = {name: layer.base.weight.numel() for name, layer in model.adapters.layers.items()}
    smallest = [name for name, size in sizes.items() if size == min(sizes.values())]
    return smallest[len(smallest) // 2]


@torch.inference_mode()
def automatic_temperature(model: LanguageModel, texts: list[ScoredText], adapter: str, max_padded_tokens: int) -> tuple[float, dict[str, float]]:
    """The highest of TEMPERATURES at which the teacher still means what it shows greedily.

    `texts` pair teacher prompts with demonstrations. Greedy accuracy is the share of demonstration tokens that are the
    teacher's likeliest; sampled accuracy at tau is the mean probability it gives them under softmax(logits / tau). A small
    model's teacher is right greedily and wrong when sampled at 1, and a student would learn that noise; so tau is lowered
    until sampled accuracy is at least KEPT_PROBABILITY of greedy accuracy. Returns tau and what was measured.
    """
    greedy, count = 0.0, 0
    sampled = dict.fromkeys(TEMPERATURES, 0.0)
    for rows in passes(texts, max_padded_tokens):
        chosen = [texts[row] for row in rows]
        with model.adapters.use(adapter):
            hidden_NH = completion_hidden_states(model, chosen)
        targets_N = torch.tensor([token for text in chosen for token in text.completion_ids], device=model.device)
        for part in model.chunks(len(hidden_NH)):
            logits_NV, targets = model.logits(hidden_NH[part]), targets_N[part]
            greedy += float((logits_NV.argmax(dim=-1) == targets).sum())
            count += len(targets)
            for tau in TEMPERATURES:
                sampled[tau] += float((logits_NV / tau).softmax(dim=-1).gather(1, targets[:, None]).sum())
    accepted = [tau for tau in TEMPERATURES if sampled[tau] >= KEPT_PROBABILITY * greedy]
    chosen_tau = max(accepted) if accepted else min(TEMPERATURES)
    measured = {"greedy_token_accuracy": greedy / count} | {f"sampled_token_accuracy_at_{tau:g}": sampled[tau] / count for tau in TEMPERATURES}
    return chosen_tau, measured
