"""GGUF files, read back with the gguf package. That llama.cpp answers the same is tests/llama's to show."""

import json
import shutil
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from safetensors.numpy import load_file

from sdft_engine.contract.errors import ConfigurationError
from sdft_engine.contract.prompts import ChatFormat
from sdft_engine.gguf_export import QWEN2_PATTERN, WORD_SPLITTERS, write_gguf


@pytest.fixture
def base_dir(tiny_model_dir: Path, tmp_path: Path) -> Path:
    shutil.copytree(tiny_model_dir, tmp_path / "base")
    return tmp_path / "base"


def change(path: Path, **values: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def fields_of(path: Path) -> dict[str, Any]:
    return {name: field.contents() for name, field in gguf.GGUFReader(path).fields.items()}


def test_weights_tokens_and_template_are_in_the_file(base_dir: Path, tmp_path: Path) -> None:
    write_gguf(base_dir, tmp_path / "tiny.gguf", "tiny")
    reader = gguf.GGUFReader(tmp_path / "tiny.gguf")
    fields = {name: field.contents() for name, field in reader.fields.items()}
    config = json.loads((base_dir / "config.json").read_text())
    assert (fields["general.architecture"], fields["general.name"]) == ("llama", "tiny")
    assert fields["llama.block_count"] == config["num_hidden_layers"]
    assert fields["llama.attention.head_count_kv"] == config["num_key_value_heads"]
    assert (fields["tokenizer.ggml.model"], fields["tokenizer.ggml.pre"]) == ("gpt2", "gpt-2")
    assert fields["tokenizer.chat_template"] == (base_dir / "chat_template.jinja").read_text()
    tokens = json.loads((base_dir / "tokenizer.json").read_text())["model"]["vocab"]
    assert [fields["tokenizer.ggml.tokens"][number] for number in tokens.values()] == list(tokens)
    assert fields["tokenizer.ggml.add_bos_token"] is False
    assert {fields["tokenizer.ggml.eos_token_id"], fields["tokenizer.ggml.eot_token_id"]} == {0, 2}
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    weights = load_file(base_dir / "model.safetensors")
    assert len(tensors) == len(weights)
    same = {"token_embd.weight": "model.embed_tokens.weight", "blk.1.ffn_down.weight": "model.layers.1.mlp.down_proj.weight"}
    for name, original in same.items():
        np.testing.assert_allclose(tensors[name].data, weights[original], atol=1e-3)
        assert tensors[name].tensor_type == gguf.GGMLQuantizationType.F16
    assert tensors["output_norm.weight"].tensor_type == gguf.GGMLQuantizationType.F32


def test_queries_and_keys_are_rotated_in_neighbouring_pairs(base_dir: Path, tmp_path: Path) -> None:
    write_gguf(base_dir, tmp_path / "tiny.gguf", "tiny")
    tensors = {tensor.name: tensor.data for tensor in gguf.GGUFReader(tmp_path / "tiny.gguf").tensors}
    weights, heads, half = load_file(base_dir / "model.safetensors"), {"q": 4, "k": 2}, 8
    for kind, count in heads.items():
        original, written = weights[f"model.layers.0.self_attn.{kind}_proj.weight"], tensors[f"blk.0.attn_{kind}.weight"]
        for head in range(count):
            for feature in range(half):
                start = head * 2 * half
                np.testing.assert_allclose(written[start + 2 * feature], original[start + feature], atol=1e-3)
                np.testing.assert_allclose(written[start + 2 * feature + 1], original[start + half + feature], atol=1e-3)


@pytest.mark.parametrize(
    ("file", "values", "said"),
    [
        ("config.json", {"model_type": "mamba"}, "models of the type 'mamba'"),
        ("config.json", {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}}, "rotary embeddings of the type 'yarn'"),
        ("config.json", {"use_sliding_window": True}, "sliding windows"),
        ("tokenizer.json", {"pre_tokenizer": {"type": "Whitespace"}}, "llama.cpp has no name for"),
        ("tokenizer.json", {"normalizer": {"type": "Lowercase"}}, "kind of tokenizer"),
        ("config.json", {"vocab_size": 500}, "has no place in a vocabulary of 500"),
        ("config.json", {"bos_token_id": 512}, "the token id 512 has no place"),
        ("generation_config.json", {"eos_token_id": [2, -1]}, "the token id -1 has no place"),
        ("generation_config.json", {"eos_token_id": [2, 0, 1, 7]}, "4 tokens end this model's answers"),
    ],
)
def test_what_llama_cpp_would_answer_otherwise_is_refused(base_dir: Path, tmp_path: Path, file: str, values: dict[str, Any], said: str) -> None:
    change(base_dir / file, **values)
    with pytest.raises(ConfigurationError, match=said) as refused:
        write_gguf(base_dir, tmp_path / "tiny.gguf", "tiny")
    assert "convert_hf_to_gguf.py" in refused.value.message


def test_every_token_that_ends_an_answer_has_its_place(base_dir: Path, tmp_path: Path) -> None:
    """The generation config's, and the tokenizer's own, which may be named nowhere else."""
    change(base_dir / "generation_config.json", eos_token_id=[0, 7])
    change(base_dir / "config.json", eos_token_id=7, pad_token_id=-1)
    write_gguf(base_dir, tmp_path / "tiny.gguf", "tiny")
    fields = fields_of(tmp_path / "tiny.gguf")
    assert [fields[f"tokenizer.ggml.{name}_token_id"] for name in ("eos", "eot", "eom")] == [0, 7, 2]
    assert set(ChatFormat.from_directory(base_dir).eos_token_ids) == {0, 7, 2}
    assert "tokenizer.ggml.padding_token_id" not in fields


def test_of_several_chat_templates_the_one_that_the_model_is_trained_with_is_written(base_dir: Path, tmp_path: Path) -> None:
    template = (base_dir / "chat_template.jinja").read_text()
    (base_dir / "chat_template.jinja").unlink()
    change(base_dir / "tokenizer_config.json", chat_template=[{"name": "tool_use", "template": "no"}, {"name": "default", "template": template}])
    write_gguf(base_dir, tmp_path / "tiny.gguf", "tiny")
    assert fields_of(tmp_path / "tiny.gguf")["tokenizer.chat_template"] == template


def test_the_way_of_splitting_words_is_told_apart(base_dir: Path, tmp_path: Path) -> None:
    patterns = dict(WORD_SPLITTERS)
    change(base_dir / "tokenizer.json", pre_tokenizer={"type": "Sequence", "pretokenizers": [{**part, "trim_offsets": True} for part in patterns["qwen2"]]})
    write_gguf(base_dir, tmp_path / "tiny.gguf", "tiny")
    assert gguf.GGUFReader(tmp_path / "tiny.gguf").fields["tokenizer.ggml.pre"].contents() == "qwen2"
    assert QWEN2_PATTERN.count(r"\p{N}") == 3
