"""The GGUF form of a model in llama.cpp itself: the same answers as transformers gives with the merged weights."""

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, Qwen2Config, Qwen3Config

from sdft_engine.contract.config import TrainingConfig
from sdft_engine.contract.prompts import ChatFormat
from sdft_engine.contract.run_directory import RunDirectory
from sdft_engine.gguf_export import write_gguf
from sdft_engine.trainer import train
from sdft_engine.weights_export import export
from tests.e2e.conftest import EXAMPLES
from tests.sdft_engine.runs import SUPERVISED

pytestmark = [pytest.mark.llama, pytest.mark.timeout(600)]

ROOT = Path(__file__).parents[2]
PYTHON = ROOT / ".venv-llama" / "bin" / "python"
BASE = "smollm2-135m-instruct"
TEXTS = ["Hello, world! 12345 naïve café", "  two  spaces\n\nand lines\t", "It's the user's: don't", "<|im_start|>user\nHi<|im_end|>\n", "日本語 🙂"]


@pytest.fixture(autouse=True)
def _needs_llama_cpp() -> None:
    if not PYTHON.exists():
        pytest.skip("llama.cpp is not installed: make llama")


def llama_cpp(path: Path, prompts: list[list[int]], ends: list[int], max_tokens: int) -> dict[str, Any]:
    asked = json.dumps({"prompts": prompts, "ends": ends, "max_tokens": max_tokens, "texts": TEXTS})
    script = ROOT / "tests" / "fixtures" / "llama_cpp_answers.py"
    done = subprocess.run([str(PYTHON), str(script), str(path)], input=asked, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    answers: dict[str, Any] = json.loads(done.stdout)
    return answers


def transformers(model_dir: Path, prompts: list[list[int]], max_tokens: int, ends: list[int]) -> list[list[int]]:
    """Greedy, in float32."""
    network = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    options: dict[str, Any] = {"max_new_tokens": max_tokens, "do_sample": False, "eos_token_id": ends, "pad_token_id": ends[0]}
    return [network.generate(torch.tensor([prompt]), **options)[0, len(prompt) :].tolist() for prompt in prompts]


def test_a_trained_model_gives_the_same_answers(real_model_dir: Path, tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "run")
    run.path.mkdir()
    settings = SUPERVISED.model_copy(
        update={"n_epochs": 12, "batch_size": 8, "learning_rate": 1e-3, "lora_rank": 16, "lora_alpha": 32, "checkpoint_every_steps": 1000}
    )
    config = TrainingConfig(method="supervised", base_model=BASE, base_model_dir=real_model_dir, seed=1, device="cpu", dtype="float32", supervised=settings)
    run.config_path.write_text(config.model_dump_json())
    shutil.copyfile(EXAMPLES / "demonstrations.jsonl", run.train_path)
    assert train(run).outcome == "succeeded"
    for form in ("merged", "gguf"):
        export(form, real_model_dir, run.final_dir, tmp_path / form, "support")
    chat_format = ChatFormat.from_directory(tmp_path / "merged")
    questions = [json.loads(line)["question"] for line in (EXAMPLES / "trained.jsonl").read_text().splitlines()]
    prompts, ends = [chat_format.prompt_ids([{"role": "user", "content": question}]) for question in questions], sorted(chat_format.eos_token_ids)
    found = llama_cpp(tmp_path / "gguf" / "support.gguf", prompts, ends, 20)
    assert found["answers"] == transformers(tmp_path / "merged", prompts, 20, ends)
    assert found["answers"] != transformers(real_model_dir, prompts, 20, ends)
    assert found["texts"] == [chat_format.encode(text) for text in TEXTS]
    assert found["template"] == (real_model_dir / "chat_template.jinja").read_text()


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_every_family_is_laid_out_as_llama_cpp_reads_it(family: str, tiny_model_dir: Path, tmp_path: Path) -> None:
    """Random weights, and the same tokenizer for all."""
    base_dir = tiny_model_dir
    if family != "llama":
        base_dir = tmp_path / family
        shutil.copytree(tiny_model_dir, base_dir)
        small: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
        small |= {"vocab_size": 512, "max_position_embeddings": 512, "initializer_range": 0.1, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}
        config = Qwen2Config(**small, tie_word_embeddings=True) if family == "qwen2" else Qwen3Config(**small, head_dim=32, tie_word_embeddings=False)
        torch.manual_seed(1)
        network = AutoModelForCausalLM.from_config(config)
        for name, parameter in network.named_parameters():
            if name.endswith("bias"):
                torch.nn.init.normal_(parameter, std=0.5)
        network.save_pretrained(base_dir)
    write_gguf(base_dir, tmp_path / "tiny.gguf", "tiny")
    chat_format = ChatFormat.from_directory(base_dir)
    prompts = [chat_format.encode(f"the {word} lamp is red and") for word in ("blue", "red", "old", "last", "seventh")]
    found = llama_cpp(tmp_path / "tiny.gguf", prompts, [0, 2], 8)
    assert found["answers"] == transformers(base_dir, prompts, 8, [0, 2])
    assert len({tuple(answer) for answer in found["answers"]}) > 1, "answers that are all the same would prove nothing"
