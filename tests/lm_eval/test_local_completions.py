"""EleutherAI's lm-eval against the service's completions: prompts as token ids, echo, log-probabilities."""

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from sdft_engine.generation import score
from sdft_engine.model import LanguageModel, load_base_model
from tests.e2e.conftest import Service, service

pytestmark = [pytest.mark.lm_eval, pytest.mark.timeout(600)]

__all__ = ["service"]

PROGRAM = Path(__file__).parents[2] / ".venv-lm-eval" / "bin" / "lm_eval"
BASE = "smollm2-135m-instruct"
ROWS = [
    {"text": "The capital of France is", "choices": ["Paris", "Berlin", "a bicycle"], "label": 0},
    {"text": "The opposite of hot is", "choices": ["green", "cold", "seven"], "label": 1},
    {"text": "Two plus two is", "choices": ["four", "the moon", "Tuesday"], "label": 0},
    {"text": "The colour of grass is", "choices": ["loud", "green", "Paris"], "label": 1},
    {"text": "One, two, three,", "choices": ["window", "because", "four"], "label": 2},
    {"text": "The sun rises in the", "choices": ["east", "refrigerator", "verb"], "label": 0},
]
TASK = """\
task: choices
dataset_path: json
dataset_kwargs:
  data_files:
    test: {path}
output_type: multiple_choice
test_split: test
doc_to_text: text
doc_to_choice: choices
doc_to_target: label
metric_list:
  - metric: acc
"""


@pytest.fixture(autouse=True)
def _needs_lm_eval() -> None:
    if not PROGRAM.exists():
        pytest.skip("lm-eval is not installed: make lm-eval")


@pytest.fixture
def task_dir(tmp_path: Path) -> Path:
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    directory = tmp_path / "tasks"
    directory.mkdir()
    (directory / "choices.yaml").write_text(TASK.format(path=rows))
    return directory


def expected_choices(model: LanguageModel) -> list[int]:
    """Which choice is likeliest, by the engine's own log-probabilities of its tokens after the prompt's."""
    chosen = []
    for row in ROWS:
        sums = []
        for choice in row["choices"]:  # type: ignore[attr-defined]
            prompt, whole = (model.chat_format.encode(text) for text in (str(row["text"]), f"{row['text']} {choice}"))
            sums.append(sum(score(model, whole, None)[0][len(prompt) - 1 :]))
        chosen.append(max(range(len(sums)), key=sums.__getitem__))
    return chosen


def test_it_scores_choices_as_the_engine_does(service: Service, real_model_dir: Path, task_dir: Path, tmp_path: Path) -> None:
    arguments = f"base_url={service.client.base_url}completions,model={BASE},tokenizer={real_model_dir},tokenized_requests=True,num_concurrent=2,max_retries=1"
    command = [str(PROGRAM), "run", "--model", "local-completions", "--model_args", arguments, "--tasks", "choices"]
    command += ["--include_path", str(task_dir), "--output_path", str(tmp_path / "out"), "--log_samples", "--batch_size", "2"]
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf"), "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(command, env=os.environ | offline | {"OPENAI_API_KEY": service.client.api_key}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    (results,) = (tmp_path / "out").rglob("results_*.json")
    (samples,) = (tmp_path / "out").rglob("samples_*.jsonl")
    rows: list[dict[str, Any]] = sorted((json.loads(line) for line in samples.read_text().splitlines()), key=lambda row: row["doc_id"])
    found = [max(range(3), key=lambda place, row=row: float(row["filtered_resps"][place][0])) for row in rows]  # type: ignore[misc]
    model = load_base_model(real_model_dir, device="cpu", dtype="float32")
    assert found == expected_choices(model)
    right = sum(choice == row["label"] for choice, row in zip(found, ROWS, strict=True))
    assert json.loads(results.read_text())["results"]["choices"]["acc,none"] == pytest.approx(right / len(ROWS))
    assert right >= 4, "a model that knows nothing of this would prove little"
