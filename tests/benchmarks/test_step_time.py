"""The step benchmark's own arithmetic: equal texts for every side, and no comparison of unequal work."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks.step_time import check_equal_work
from benchmarks.step_time_parts.floor import Machine, floor_of
from benchmarks.step_time_parts.report import rest_of, verdicts, write
from benchmarks.step_time_parts.shapes import Shape, texts_of
from sdft_engine.contract.prompts import ChatFormat


def test_every_question_has_exactly_the_shapes_tokens(tiny_model_dir: Path) -> None:
    texts = texts_of(Shape("any", batch=3, prompt=90, completion=20), tiny_model_dir, None)
    chat_format = ChatFormat.from_directory(tiny_model_dir)
    assert [len(chat_format.prompt_ids([{"role": "user", "content": question}])) for question in texts["questions"]] == [90] * 3
    assert len(set(texts["questions"])) == 3
    assert all(10 < len(chat_format.encode(answer)) <= 20 for answer in texts["answers"])


def run(seconds: float, peak: int, prompt: int = 40) -> dict[str, Any]:
    return {"step_seconds": [seconds], "peak_bytes": peak, "tokens": {"prompt": prompt}}


def test_the_floor_counts_the_models_own_weights(tiny_model_dir: Path) -> None:
    """One operation a second, and memory that takes no time."""
    shape, rank = Shape("any", batch=3, prompt=5, completion=4), 2
    config = AutoConfig.from_pretrained(tiny_model_dir)
    network = AutoModelForCausalLM.from_config(config)
    weights = [module.weight for name, module in network.named_modules() if isinstance(module, torch.nn.Linear) and name != "lm_head"]
    linear, head = sum(weight.numel() for weight in weights), config.vocab_size * config.hidden_size
    pairs = 4 * config.num_hidden_layers * config.hidden_size  # a query with a key, and its probability with a value
    runs = {"sdft": [{"tokens": {"teacher_prompt": 3 * 11}}]}
    floor = floor_of(shape, tiny_model_dir, runs, Machine(flops=1.0, bandwidth=1e30), rank, "float32")
    decoded = sum(2 * (linear + head) + pairs * (5 + token) for token in (1, 2, 3))  # the first of four comes from the prompt
    assert floor["rollout"] == pytest.approx(3 * (2 * linear * 5 + pairs * 5 * 5 / 2 + 2 * head + decoded))
    assert floor["teacher"] == pytest.approx(3 * (2 * linear * 15 + pairs * 15 * 15 / 2 + 2 * head * 4))
    factors = rank * sum(sum(weight.shape) for weight in weights)
    forward, backward = 2 * linear * 9 + pairs * 9 * 9 / 2, 2 * linear * 9 + 2 * pairs * 9 * 9 / 2  # two products forward, four back
    assert floor["student"] == pytest.approx(3 * (forward + backward + 6 * factors * 9 + 4 * head * 4))
    assert floor["step"] == pytest.approx(floor["rollout"] + floor["teacher"] + floor["student"])
    slow_memory = floor_of(shape, tiny_model_dir, runs, Machine(flops=1e30, bandwidth=1.0), rank, "float32")
    assert slow_memory["step"] == pytest.approx(3 * 4 * (linear + head)), "three decoding steps read all weights"


def test_unequal_work_is_not_compared() -> None:
    check_equal_work({"sdft": [run(1, 1)], "trl": [run(2, 2)], "sft": [run(1, 1, prompt=7)]})
    with pytest.raises(SystemExit, match="did not do the same work"):
        check_equal_work({"sdft": [run(1, 1)], "trl": [run(2, 2, prompt=41)]})


def test_ratios_are_of_paired_processes() -> None:
    runs = {"sdft": [run(1, 4), run(10, 4), run(2, 4)], "trl": [run(3, 10), run(30, 10), run(2, 10)], "sft": [run(0.5, 1), run(5, 1), run(1, 1)]}
    result = {"shape": asdict(Shape("any", 1, 1, 1)), "runs": runs, "floor": {"step": 1.0}, "dtype": "float32"}
    lines = verdicts(result)
    assert "2.00 times the floor (aim: at most 1.3): missed" in lines[0]
    assert "3.00 times TRL's speed (aim: at least 2.0): reached" in lines[1]
    assert "0.40 of TRL's peak memory (aim: at most 0.5): reached" in lines[2]
    assert "2.0 times the time of an SFT step" in lines[3]
    assert "3.00 times TRL's speed (aim: at least 4.0): missed" in verdicts(result | {"dtype": "bfloat16"})[1]


def test_the_rest_is_what_each_steps_phases_leave() -> None:
    phases = {"rollout_seconds": [2.0, 5.0, 3.0], "teacher_seconds": [1.0, 1.0, 2.0], "student_seconds": [4.0, 1.0, 1.0]}
    assert rest_of([{"step_seconds": [7.1, 7.3, 6.2]} | phases]) == pytest.approx(0.2)
    assert rest_of([{"step_seconds": [2.0], "rollout_seconds": [], "teacher_seconds": [], "student_seconds": [1.5]}]) == pytest.approx(0.5)


def test_a_shape_replaces_its_own_earlier_result_and_leaves_the_others(tmp_path: Path) -> None:
    def result(name: str, seconds: float, dtype: str = "float32", rank: int = 16) -> dict[str, Any]:
        floor = {"step": 1.0, "rollout": 0.5, "teacher": 0.2, "student": 0.3}
        return {
            "shape": asdict(Shape(name, 2, 3, 4)),
            "floor": floor,
            "runs": {"sft": [run(seconds, 10**9)]},
            "machine": "two cores",
            "steps": 4,
            "dtype": dtype,
            "rank": rank,
        }

    write(result("short", 8.0) | {"profile": {"products": 0.9}}, tmp_path)
    assert "one step): products 90%." in (tmp_path / "step_time.md").read_text()
    write(result("long", 2.0), tmp_path)
    write(result("short", 4.0), tmp_path)
    write(result("short", 3.0, "bfloat16"), tmp_path)
    write(result("short", 5.0, rank=64), tmp_path)
    page = (tmp_path / "step_time.md").read_text()
    headings = [line for line in page.splitlines() if line.startswith("## ")]
    shapes = (("short", "float32", 16), ("long", "float32", 16), ("short", "bfloat16", 16), ("short", "float32", 64))
    assert headings == [f"## {shape}: 2 x (3 + 4) tokens, {dtype}, rank {rank}" for shape, dtype, rank in shapes]
    rows = [line for line in page.splitlines() if line.startswith("| SFT |")]
    assert rows == [f"| SFT | {seconds:.2f} | - | - | - | {seconds:.2f} | {14 / seconds:.0f} | 1.00 |" for seconds in (4.0, 2.0, 3.0, 5.0)]
    assert "| floor | 1.00 | 0.50 | 0.20 | 0.30 |" in page
