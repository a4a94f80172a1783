"""A running server with two adapters made by PEFT, and the same models in plain transformers and PEFT to compare with."""

import shutil
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from tests.inference.serving import RunningServer, serving

ADAPTERS = ("first", "second")


def _plain(model_dir: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32).eval()


@pytest.fixture(scope="session")
def peft_adapters_dir(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Adapters as PEFT writes them, with weights large enough to change what the tiny model says."""
    directory = tmp_path_factory.mktemp("adapters")
    for seed, name in enumerate(ADAPTERS):
        torch.manual_seed(seed)
        model = get_peft_model(_plain(tiny_model_dir), LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM"))
        for key, parameter in model.named_parameters():
            if "lora_B" in key:
                torch.nn.init.normal_(parameter, std=0.1)
        model.save_pretrained(str(directory / name))
    return directory


@pytest.fixture(scope="session")
def reference_logprobs(tiny_model_dir: Path, peft_adapters_dir: Path) -> Callable[[list[int], str | None], torch.Tensor]:
    """Natural log-probabilities (T - 1, V) after each token of a sequence, from plain transformers or stock PEFT."""
    models: dict[str | None, Any] = {None: _plain(tiny_model_dir)}
    for name in ADAPTERS:
        models[name] = PeftModel.from_pretrained(_plain(tiny_model_dir), peft_adapters_dir / name).eval()

    @torch.inference_mode()
    def logprobs(token_ids: list[int], adapter: str | None) -> torch.Tensor:
        result: torch.Tensor = models[adapter](torch.tensor([token_ids])).logits[0, :-1].log_softmax(dim=-1)
        return result

    return logprobs


@pytest.fixture
def adapters_dir(peft_adapters_dir: Path, tmp_path: Path) -> Path:
    """A directory of the test's own with both adapters, to break as it likes."""
    return Path(shutil.copytree(peft_adapters_dir, tmp_path / "adapters"))


@pytest.fixture(scope="module")
def server(tiny_model_dir: Path, peft_adapters_dir: Path) -> Iterator[RunningServer]:
    """A server for tests that leave it as it was; both adapters are loaded."""
    with serving(tiny_model_dir, peft_adapters_dir) as running:
        for name in ADAPTERS:
            assert running.load(name, peft_adapters_dir / name).status_code == 200
        yield running


@pytest.fixture
def make_server(tiny_model_dir: Path, adapters_dir: Path) -> Callable[..., AbstractContextManager[RunningServer]]:
    """A server of the test's own; options go to the engine."""
    return lambda **options: serving(tiny_model_dir, adapters_dir, **options)
