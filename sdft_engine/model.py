"""A base model in memory: transformer, LM head, chat format, and its LoRA adapters."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from sdft_engine.contract.errors import BaseModelError, ConfigurationError
from sdft_engine.contract.prompts import ChatFormat
from sdft_engine.fused_decoder import FusedDecoder, fused_decoder_of
from sdft_engine.lora import LoraAdapters
from sdft_engine.products import frozen_linear, pack, packed_is_faster, packed_linear, packs

CHUNK_ELEMENTS = 1 << 23
"""Logits held at a time: 8M floats, 32 MiB."""


@dataclass
class LanguageModel:
    """`network` is the transformers model; everything here calls its decoder and its LM head apart, so that logits exist
    only for the positions that are needed."""

    network: Any
    decoder: nn.Module
    head: nn.Module
    adapters: LoraAdapters
    chat_format: ChatFormat
    device: torch.device
    dtype: torch.dtype
    fused: FusedDecoder | None = None
    """The same decoder in fewer operations, on a CPU and where the family has that form."""
    packed_head: Tensor | None = None
    """The LM head's weight for products of few rows without gradients, likewise."""
    recomputes_layers: bool = False
    """Gradient checkpointing, see `recompute_layers`."""

    def recompute_layers(self) -> None:
        """From now on keep, in passes with gradients, only the input of each layer, and compute the layer again when its gradient
        is due: a third more work for a fraction of the memory. Such passes can't read a cache."""
        self.recomputes_layers = True
        if self.fused is not None:
            self.fused.recomputes_layers = True
        else:
            self.network.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})

    @property
    def folds_adapters(self) -> bool:
        """Whether passes without gradients through transformers' modules fold the adapter into a second copy of the weights. In
        float32 on a CPU that is exact to rounding and saves more than it costs; in bfloat16 it would round the adapter away, and
        GPU memory is dear."""
        return self.device.type == "cpu" and self.dtype == torch.float32

    @property
    def has_windows(self) -> bool:
        """Whether some layer looks back over a window only. transformers counts it in columns of the batch, so that columns which
        a row leaves unused between its tokens would push earlier ones out."""
        config = self.decoder.config
        types = getattr(config, "layer_types", None)
        return set(types) != {"full_attention"} if types else getattr(config, "sliding_window", None) is not None

    def wait(self) -> None:
        """Until the device has done what it was told, so that what follows is timed apart."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    @contextmanager
    def use(self, adapter: str) -> Iterator[None]:
        """Apply one adapter to many passes without gradients, prepared once. It must not change inside the block."""
        if self.fused is not None:
            with self.adapters.use(adapter), self.fused.gathered(adapter):
                yield
        else:
            with self.adapters.use(adapter, fold=self.folds_adapters):
                yield

    def hidden_states(self, input_ids_BT: Tensor, **inputs: Any) -> Tensor:
        """Final hidden states (B, T, H). Without an attention mask, rows are causal and padding belongs on the right."""
        if self.fused is not None:
            active = self.adapters.routing.active
            return self.fused(input_ids_BT, inputs.get("attention_mask"), inputs.get("position_ids"), inputs.get("past_key_values"), active)
        with self._recomputing():
            hidden: Tensor = self.decoder(input_ids=input_ids_BT, use_cache="past_key_values" in inputs, **inputs).last_hidden_state
        return hidden

    @contextmanager
    def _recomputing(self) -> Iterator[None]:
        """transformers recomputes a layer that is in training mode. Only the layer itself is put into it, inside the block: the
        dropout of what it consists of stays off."""
        layers = [m for m in self.decoder.modules() if isinstance(m, GradientCheckpointingLayer)] if self.recomputes_layers and torch.is_grad_enabled() else []
        for layer in layers:
            layer.training = True
        try:
            yield
        finally:
            for layer in layers:
                layer.training = False

    def chunks(self, count: int) -> list[slice]:
        """Parts of so many positions whose logits are computed at a time."""
        size = max(1, CHUNK_ELEMENTS // self.network.config.vocab_size)
        return [slice(start, min(start + size, count)) for start in range(0, count, size)]

    def logits(self, hidden_NH: Tensor) -> Tensor:
        """float32 logits (N, V) of hidden states, with the model's own scale and soft cap where it has one."""
        hidden_NH = hidden_NH.to(self.dtype)
        if self.packed_head is not None and not torch.is_grad_enabled() and packed_is_faster(hidden_NH):
            logits_NV = packed_linear(hidden_NH, self.packed_head, self.head.bias).float()
        else:
            logits_NV = frozen_linear(hidden_NH, self.head.weight, self.head.bias).float()
        config = self.network.config
        if (scale := getattr(config, "logit_scale", None)) is not None:  # Cohere
            logits_NV = logits_NV * scale
        if (divisor := getattr(config, "logits_scaling", None)) is not None:  # Granite
            logits_NV = logits_NV / divisor
        if (cap := getattr(config, "final_logit_softcapping", None)) is not None:  # Gemma
            logits_NV = torch.tanh(logits_NV / cap) * cap
        return logits_NV


def load_base_model(model_dir: Path, *, device: str = "auto", dtype: str = "auto") -> LanguageModel:
    """Load a prepared base model. Its weights are frozen. Raises BaseModelError, ConfigurationError (no such device)."""
    from transformers import AutoModelForCausalLM

    disable_progress_bars()
    chat_format = ChatFormat.from_directory(model_dir)
    chosen_device = choose_device(device)
    chosen_dtype = choose_dtype(dtype, chosen_device)
    try:
        network, loading = AutoModelForCausalLM.from_pretrained(
            model_dir,
            dtype=chosen_dtype,
            local_files_only=True,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise BaseModelError(f"the base model in {model_dir} can't be loaded: {error}") from error
    if missing := sorted(loading["missing_keys"]):  # transformers would go on with random ones
        raise BaseModelError(f"the base model in {model_dir} can't be loaded: its files lack the weights of {missing[0]}")
    network.eval().requires_grad_(False).to(chosen_device)
    head = network.get_output_embeddings()
    model = LanguageModel(network, network.base_model, head, LoraAdapters(network, head), chat_format, chosen_device, chosen_dtype)
    if chosen_device.type == "cpu":
        model.fused = fused_decoder_of(model.decoder)
        model.packed_head = pack(head.weight) if packs(head.weight) else None
    return model


def disable_progress_bars() -> None:
    """For this whole process: transformers' own bars, and the one that its GGUF loader takes from tqdm past that switch."""
    from transformers import modeling_gguf_pytorch_utils as gguf_loader
    from transformers.utils import logging

    logging.disable_progress_bar()
    gguf_loader.tqdm = logging.tqdm


def choose_device(device: str) -> torch.device:
    available = torch.cuda.is_available()
    if device == "cuda" and not available:
        raise ConfigurationError("device is set to cuda, but torch sees no CUDA device", param="device")
    return torch.device("cuda" if device == "cuda" or (device == "auto" and available) else "cpu")


def choose_dtype(dtype: str, device: torch.device) -> torch.dtype:
    """`auto` measures on a CPU: bfloat16 is several times faster than float32 on one and hundreds of times slower on the next."""
    if dtype != "auto":
        return torch.float32 if dtype == "float32" else torch.bfloat16
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32
    return torch.bfloat16 if matmul_seconds(torch.bfloat16) * 1.3 < matmul_seconds(torch.float32) else torch.float32


def matmul_seconds(dtype: torch.dtype, budget_seconds: float = 0.05) -> float:
    """Fastest observed time of one (128, 512) x (512, 512) product within the budget (at least two tries)."""
    a, b = torch.ones(128, 512, dtype=dtype), torch.ones(512, 512, dtype=dtype)
    start = time.perf_counter()
    fastest = float("inf")
    tries = 0
    while tries < 2 or time.perf_counter() - start < budget_seconds:
        before = time.perf_counter()
        a @ b
        fastest = min(fastest, time.perf_counter() - before)
        tries += 1
    return fastest


def dtype_name(dtype: torch.dtype) -> Literal["float32", "bfloat16"]:
    return "float32" if dtype == torch.float32 else "bfloat16"
