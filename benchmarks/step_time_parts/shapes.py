"""What step_time.py runs: models, batches, and texts of exact lengths."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM

from core.settings import Settings
from sdft_engine.contract.prompts import ChatFormat
from sdft_engine.prepare_base_model import prepare_base_model

BASE_MODEL = "smollm2-135m-instruct"
TEACHER_TEMPLATE = "{question}\n\n{demonstration}"
WORDS = """river lamp stone garden winter paper window music table bread green seven market silver morning letter forest engine water
mountain simple yellow story kitchen summer house bridge circle ocean field"""
FILLERS = (" so", " a", ".", "x", "!")
"""One of them is a single token in most vocabularies."""


@dataclass(frozen=True)
class Shape:
    """`prompt` counts the chat template's tokens; `vocabulary`: random weights with an embedding and head of that many rows."""

    name: str
    batch: int
    prompt: int
    completion: int
    vocabulary: int | None = None
    size: str | None = None
    """Of SIZES: random weights of these dimensions instead of the default model's."""
    aimed_speed: float = 2.0
    """How many times TRL's speed is aimed at."""
    aims_at_half_the_memory: bool = True


SHAPES = (
    Shape("short", 8, 40, 24, aims_at_half_the_memory=False),
    Shape("long", 4, 1000, 128, aimed_speed=1.5),
    Shape("large", 32, 200, 64),
    Shape("wide", 8, 40, 128, vocabulary=150_000),
)
SIZES: dict[str, dict[str, int]] = {
    "1.5B": {
        "hidden_size": 1536,
        "intermediate_size": 8960,
        "num_hidden_layers": 28,
        "num_attention_heads": 12,
        "num_key_value_heads": 2,
        "head_dim": 128,
        "vocab_size": 151_936,
    },
    "7B": {
        "hidden_size": 3584,
        "intermediate_size": 18_944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "vocab_size": 152_064,
    },
}
GPU_SHAPES = (
    Shape("1.5b", 32, 200, 256, size="1.5B", aimed_speed=4.0),
    Shape("7b", 16, 200, 256, size="7B", aimed_speed=4.0),
)


def model_of(shape: Shape, scratch: Path) -> Path:
    """The default base model, or its family with another vocabulary or other dimensions and random weights."""
    settings = Settings()
    entry = next(each for each in settings.base_models if each.id == BASE_MODEL)
    base = prepare_base_model(entry.id, entry.source, entry.revision, entry.directory(settings.cache_dir))
    if shape.vocabulary is None and shape.size is None:
        return base
    directory = scratch / f"{shape.size or 'default'}-vocabulary-{shape.vocabulary}"
    directory.mkdir()
    for path in base.iterdir():
        if path.suffix != ".safetensors":
            (directory / path.name).write_bytes(path.read_bytes())
    config = AutoConfig.from_pretrained(base)
    for name, value in (SIZES[shape.size] if shape.size else {"vocab_size": shape.vocabulary}).items():
        setattr(config, name, value)
    torch.manual_seed(0)
    network = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16 if shape.size else torch.float32)
    save_file(
        {name: value.contiguous() for name, value in network.state_dict().items() if name != "lm_head.weight"},
        directory / "model.safetensors",
        {"format": "pt"},
    )
    config.save_pretrained(directory)
    return directory


def texts_of(shape: Shape, model_dir: Path, source: Path | None) -> dict[str, Any]:
    """Questions of exactly `prompt` tokens with the chat template, and answers of about `completion` tokens."""
    chat_format = ChatFormat.from_directory(model_dir)
    words = cycle(_words(source))

    def text(fits: Any) -> str:
        chosen: list[str] = []
        while fits(" ".join([*chosen, "x"])):
            chosen.append(next(words))
        while not fits(" ".join(chosen)):
            chosen.pop()
        return " ".join(chosen)

    def question() -> str:
        def length(content: str) -> int:
            return len(chat_format.prompt_ids([{"role": "user", "content": content}]))

        content = text(lambda content: length(content) <= shape.prompt)
        while length(content) < shape.prompt:
            longer = next((content + filler for filler in FILLERS if length(content) < length(content + filler) <= shape.prompt), None)
            if longer is None:
                raise SystemExit(f"no question of exactly {shape.prompt} tokens was found")
            content = longer
        return content

    questions = [question() for _ in range(shape.batch)]
    answers = [text(lambda content: len(chat_format.encode(content)) <= shape.completion) for _ in range(shape.batch)]
    return {"questions": questions, "answers": answers, "template": TEACHER_TEMPLATE}


def _words(source: Path | None) -> Iterator[str] | tuple[str, ...]:
    if source is None:
        words, generator = WORDS.split(), torch.Generator().manual_seed(3)
        return tuple(words[index] for index in torch.randint(len(words), (4099,), generator=generator).tolist())
    messages = [m for line in source.read_text().splitlines() if line.strip() for m in json.loads(line)["messages"]]
    return tuple(word for m in messages if m["role"] == "user" for word in m["content"].split())
