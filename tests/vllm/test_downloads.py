"""An adapter as it is downloaded in a stock vLLM, started as its documentation says, with nothing of ours."""

from pathlib import Path

import pytest

from core.inference_client import InferenceClient
from core.settings import Settings
from local_stack import vllm
from local_stack.ports import free_local_port
from sdft_engine.generation import score
from sdft_engine.model import LanguageModel
from tests.vllm.conftest import BASE, running

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(600)]


def test_an_adapter_is_served_by_lora_modules(
    vllm_settings: Settings, real_model_dir: Path, adapters: dict[str, Path], model: LanguageModel, tmp_path_factory: pytest.TempPathFactory
) -> None:
    port = free_local_port()
    words = ["--model", str(real_model_dir), "--served-model-name", BASE, "--port", str(port), "--dtype", "float32", "--enforce-eager"]
    words += ["--enable-lora", "--max-lora-rank", "16", "--lora-modules", f"tuned={adapters['first']}"]
    command = [str(vllm.python_of(vllm_settings)), "-m", vllm.MODULE, *words]
    environment = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_PLUGINS": "", "HF_HUB_OFFLINE": "1"}
    ids = model.chat_format.prompt_ids([{"role": "user", "content": "Who maintains the Corvane scanner?"}])
    with running("stock", command, environment, port, vllm_settings, tmp_path_factory) as server:
        served = InferenceClient(server.url, Settings()).prompt_logprobs("tuned", ids)
    assert served == pytest.approx(score(model, ids, "first")[0], abs=2e-3)
    assert served != pytest.approx(score(model, ids, None)[0], abs=0.1)
