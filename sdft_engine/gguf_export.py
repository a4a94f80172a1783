"""A transformers model directory as one GGUF file for llama.cpp: weights in float16, norms in float32, tokenizer, chat template.

Written with the `gguf` package, tensor by tensor. For the families in FAMILIES with a byte-level BPE tokenizer whose way of
splitting words llama.cpp knows by a name; everything else raises ConfigurationError, and can still be merged and converted by
llama.cpp's own convert_hf_to_gguf.py.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

from sdft_engine.contract.errors import ConfigurationError
from sdft_engine.contract.prompts import eos_token_ids, template_source

OTHERWISE = "download it merged and use llama.cpp's convert_hf_to_gguf.py"


@dataclass(frozen=True)
class Family:
    """`interleaved`: llama.cpp rotates neighbouring pairs of a head's features where transformers rotates its two halves, so that
    the rows of the query and key projections change places."""

    arch: gguf.MODEL_ARCH
    interleaved: bool


FAMILIES = {
    "llama": Family(gguf.MODEL_ARCH.LLAMA, interleaved=True),
    "qwen2": Family(gguf.MODEL_ARCH.QWEN2, interleaved=False),
    "qwen3": Family(gguf.MODEL_ARCH.QWEN3, interleaved=False),
}

BYTES: dict[str, Any] = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
BYTES_ONLY: dict[str, Any] = {**BYTES, "use_regex": False}
DIGITS: dict[str, Any] = {"type": "Digits", "individual_digits": True}
LLAMA3_PATTERN = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
QWEN2_PATTERN = LLAMA3_PATTERN.replace(r"\p{N}{1,3}", r"\p{N}")
WORD_SPLITTERS: list[tuple[str, list[dict[str, Any]]]] = [
    ("gpt-2", [BYTES]),
    ("smollm", [DIGITS, BYTES]),
    ("llama-bpe", [{"type": "Split", "pattern": {"Regex": LLAMA3_PATTERN}, "behavior": "Isolated", "invert": False}, BYTES_ONLY]),
    ("qwen2", [{"type": "Split", "pattern": {"Regex": QWEN2_PATTERN}, "behavior": "Isolated", "invert": False}, BYTES_ONLY]),
]
"""llama.cpp's names for the ways of splitting text into words before BPE, as they stand in tokenizer.json."""


def write_gguf(model_dir: Path, path: Path, name: str) -> None:
    """Convert the model in `model_dir`. Raises ConfigurationError where llama.cpp could not give the same answers."""
    config: dict[str, Any] = json.loads((model_dir / "config.json").read_text())
    family = FAMILIES.get(config.get("model_type", ""))
    if family is None:
        raise ConfigurationError(f"no GGUF is written for models of the type {config.get('model_type')!r}; {OTHERWISE}")
    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[family.arch])
    try:
        writer.add_name(name)
        _describe_network(writer, config)
        _describe_tokenizer(writer, model_dir, config)
        _write_tensors(writer, model_dir, config, family)
    finally:
        writer.close()


def _describe_network(writer: gguf.GGUFWriter, config: dict[str, Any]) -> None:
    rope = config.get("rope_parameters") or {**(config.get("rope_scaling") or {}), "rope_theta": config.get("rope_theta", 10_000.0)}
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind not in ("default", "linear"):
        raise ConfigurationError(f"no GGUF is written for rotary embeddings of the type {kind!r}; {OTHERWISE}")
    if config.get("use_sliding_window") or set(config.get("layer_types") or ()) - {"full_attention"}:
        raise ConfigurationError(f"no GGUF is written for sliding windows; {OTHERWISE}")
    heads = config["num_attention_heads"]
    head_dim = _head_dim(config)
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(config.get("num_key_value_heads") or heads)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_dimension_count(head_dim)
    writer.add_rope_freq_base(rope["rope_theta"])
    if kind == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16)


def _describe_tokenizer(writer: gguf.GGUFWriter, model_dir: Path, config: dict[str, Any]) -> None:
    tokenizer: dict[str, Any] = json.loads((model_dir / "tokenizer.json").read_text())
    model = tokenizer["model"]
    if model.get("type") != "BPE" or tokenizer.get("normalizer") not in (None, {"type": "NFC"}):
        raise ConfigurationError(f"no GGUF is written for this kind of tokenizer; {OTHERWISE}")
    tokens, types = _vocabulary(tokenizer, config["vocab_size"])
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(_word_splitter(tokenizer.get("pre_tokenizer")))
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]])
    _name_special_tokens(writer, config, eos_token_ids(model_dir, {token: number for number, token in enumerate(tokens)}.get))
    writer.add_add_bos_token(_adds_bos(tokenizer))
    if template := template_source(model_dir):
        writer.add_chat_template(template)


def _name_special_tokens(writer: gguf.GGUFWriter, config: dict[str, Any], ends: list[int]) -> None:
    """llama.cpp has three places for tokens that end an answer (of a sequence, a turn, a message), and stops at each of them."""
    size = config["vocab_size"]
    if not ends:
        raise ConfigurationError(f"the model names no end-of-sequence token; {OTHERWISE}")
    places = (writer.add_eos_token_id, writer.add_eot_token_id, writer.add_eom_token_id)
    if len(ends) > len(places):
        raise ConfigurationError(f"{len(ends)} tokens end this model's answers, and a GGUF has places for {len(places)}; {OTHERWISE}")
    for write_to_place, number in zip(places, ends, strict=False):
        write_to_place(_require_known(number, size))
    if isinstance(bos := config.get("bos_token_id"), int):
        writer.add_bos_token_id(_require_known(bos, size))
    if isinstance(pad := config.get("pad_token_id"), int) and 0 <= pad < size:  # -1 stands for none in some models
        writer.add_pad_token_id(pad)


def _vocabulary(tokenizer: dict[str, Any], size: int) -> tuple[list[str], list[gguf.TokenType]]:
    """Every id's token and kind; ids that the tokenizer doesn't have, at the end of a padded embedding, are named and unused. Added
    tokens that the embedding doesn't have are left out: the model can't read them either."""
    tokens, types = [f"[PAD{number}]" for number in range(size)], [gguf.TokenType.UNUSED] * size
    for token, number in tokenizer["model"]["vocab"].items():
        tokens[_require_known(number, size)], types[number] = token, gguf.TokenType.NORMAL
    for added in tokenizer.get("added_tokens") or []:
        number = added["id"]
        if 0 <= number < size:
            tokens[number] = added["content"]
            types[number] = gguf.TokenType.CONTROL if added["special"] else gguf.TokenType.USER_DEFINED
    return tokens, types


def _word_splitter(pre_tokenizer: dict[str, Any] | None) -> str:
    parts = (pre_tokenizer or {}).get("pretokenizers") or [pre_tokenizer or {}]
    told = [{key: value for key, value in part.items() if key != "trim_offsets"} for part in parts]
    for name, known in WORD_SPLITTERS:
        if told == known:
            return name
    raise ConfigurationError(f"this tokenizer splits text into words in a way that llama.cpp has no name for; {OTHERWISE}")


def _require_known(number: int, size: int) -> int:
    if not 0 <= number < size:
        raise ConfigurationError(f"the token id {number} has no place in a vocabulary of {size:,}; {OTHERWISE}")
    return number


def _adds_bos(tokenizer: dict[str, Any]) -> bool:
    """Whether encoding puts a token before the text."""
    processor = tokenizer.get("post_processor") or {}
    templates = [part for part in [processor, *(processor.get("processors") or [])] if part.get("type") == "TemplateProcessing"]
    return any("SpecialToken" in piece for part in templates for piece in part["single"][:1])


def _write_tensors(writer: gguf.GGUFWriter, model_dir: Path, config: dict[str, Any], family: Family) -> None:
    """Two passes over the files: the header lists every tensor before the first one's numbers."""
    names = gguf.get_tensor_name_map(family.arch, config["num_hidden_layers"])
    for name, tensor in _tensors(model_dir, config, names):
        dtype = np.dtype(np.float32 if tensor.dim() == 1 else np.float16)
        writer.add_tensor_info(name, list(tensor.shape), dtype, tensor.numel() * dtype.itemsize)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for name, tensor in _tensors(model_dir, config, names):
        if family.interleaved and ".attn_q." in name:
            tensor = _interleave(tensor, config["num_attention_heads"])
        elif family.interleaved and ".attn_k." in name:
            tensor = _interleave(tensor, config.get("num_key_value_heads") or config["num_attention_heads"])
        numbers = tensor.to(torch.float32 if tensor.dim() == 1 else torch.float16)
        if not bool(numbers.isfinite().all()):
            raise ConfigurationError(f"{name} holds numbers too large for float16; {OTHERWISE}")
        writer.write_tensor_data(numbers.contiguous().numpy())


def _tensors(model_dir: Path, config: dict[str, Any], names: gguf.TensorNameMap) -> Iterator[tuple[str, Tensor]]:
    for file in sorted(model_dir.glob("*.safetensors")):
        with safe_open(file, framework="pt") as opened:
            for name in sorted(opened.keys()):  # no mapping: it has keys() alone
                if name.endswith("rotary_emb.inv_freq") or (name == "lm_head.weight" and config.get("tie_word_embeddings")):
                    continue
                known = names.get_name(name, try_suffixes=(".weight", ".bias"))
                if known is None:
                    raise ConfigurationError(f"llama.cpp has no name for the weight {name}; {OTHERWISE}")
                yield known, opened.get_tensor(name)


def _interleave(tensor: Tensor, heads: int) -> Tensor:
    """Rows (heads x 2 halves x features) to (heads x features x 2)."""
    return tensor.reshape(heads, 2, tensor.shape[0] // heads // 2, *tensor.shape[1:]).transpose(1, 2).reshape(tensor.shape)


def _head_dim(config: dict[str, Any]) -> int:
    return int(config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"])
