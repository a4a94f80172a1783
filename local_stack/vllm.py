"""vLLM as the inference server of one machine: where it is installed, its command, and the settings it shares with trainers.

It lives in an environment of its own (`make vllm`), because its requirements are older than the service's.
"""

import json
import shutil
import struct
import subprocess
import sys
from functools import lru_cache
from pathlib import Path

from core.base_models import BaseModelEntry
from core.settings import Settings
from local_stack.errors import StackError

MODULE = "vllm.entrypoints.openai.api_server"
DRIVER_SECONDS = 20
PLUGIN = "sdft_cpu_lora"
"""The only plugin that is loaded: see vllm_plugin/. On a GPU it does nothing."""


def python_of(settings: Settings) -> Path:
    """The interpreter that has vLLM. Raises StackError where there is none."""
    python = settings.vllm_python or Path(sys.prefix).parent / ".venv-vllm" / "bin" / "python"
    if not python.is_file():
        raise StackError(f"vLLM is not installed at {python}: run `make vllm`, or name the Python that has it in SDFT_VLLM_PYTHON")
    if not any(python.parent.parent.glob("lib/python*/site-packages/sdft_vllm_plugin-*.dist-info")):
        raise StackError(
            f"the plugin in vllm_plugin/ is not installed for {python}, without which vLLM mixes adapters up on a CPU and leaves doors open: run `make vllm`"
        )
    return python


def on_cuda(settings: Settings) -> bool:
    """Whether trainer and server use a GPU; asked of the driver, so that this process imports no torch."""
    return _driver_finds_a_gpu() if settings.device == "auto" else settings.device == "cuda"


@lru_cache
def _driver_finds_a_gpu() -> bool:
    program = shutil.which("nvidia-smi")
    return program is not None and _lists_gpus(program)


def _lists_gpus(program: str) -> bool:
    try:
        return subprocess.run([program, "-L"], capture_output=True, check=False, timeout=DRIVER_SECONDS).returncode == 0
    except subprocess.TimeoutExpired:  # a driver that hangs has no GPU to give
        return False


def shared_dtype(settings: Settings, *, cuda: bool) -> str:
    """One precision for trainer and server: their log-probabilities are compared. What "auto" measures would be the trainer's alone."""
    return settings.dtype if settings.dtype != "auto" else "bfloat16" if cuda else "float32"


def server_command(settings: Settings, entry: BaseModelEntry, host: str, port: int) -> list[str]:
    """Of the process that answers for `entry` and its adapters. -P keeps modules of the current directory out."""
    cuda = on_cuda(settings)
    words = ["--model", str(entry.directory(settings.cache_dir)), "--served-model-name", entry.id, "--host", host, "--port", str(port)]
    words += ["--dtype", shared_dtype(settings, cuda=cuda), "--enable-lora", "--max-lora-rank", str(settings.vllm_max_lora_rank)]
    words += ["--max-loras", str(settings.vllm_max_loras), "--max-cpu-loras", str(max(settings.vllm_max_cpu_loras, settings.vllm_max_loras))]
    words += ["--max-num-seqs", str(settings.inference_max_batch), "--disable-uvicorn-access-log"]
    words += ["--middleware", "sdft_vllm_key.RequireKey", "--disable-fastapi-docs"]
    words += ["--generation-config", "vllm"]  # not the model's own defaults: what a request leaves open is left open
    if modules := adapted_modules(entry.directory(settings.cache_dir)):
        words += ["--lora-target-modules", *modules]
    words += ["--gpu-memory-utilization", str(settings.vllm_memory_share)] if cuda else ["--enforce-eager"]
    return [str(python_of(settings)), "-P", "-X", f"data_dir={settings.data_dir}", "-m", MODULE, *words, *settings.vllm_arguments]


def adapted_modules(model_dir: Path) -> list[str]:
    """The names of the linear layers that adapters change, from the headers of the model's weight files.

    vLLM is told them, because it would adapt the LM head too: that costs time, and its CPU kernels die where the log-probabilities of
    a prompt are asked for with an adapter while other answers are being written (seen in 0.32).
    """
    found: set[str] = set()
    for path in model_dir.glob("*.safetensors"):
        with path.open("rb") as file:
            header = json.loads(file.read(struct.unpack("<Q", file.read(8))[0]))
        for name, tensor in header.items():
            *modules, kind = name.split(".")
            if kind == "weight" and any(part.isdigit() for part in modules) and len(tensor["shape"]) == 2:
                found.add(modules[-1])
    return sorted(found)


def server_environment(settings: Settings) -> dict[str, str]:
    """Beside the stack's own. The prefix names its worker processes, so that a later start finds them."""
    environment = {
        "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1",
        "VLLM_PROCESS_NAME_PREFIX": f"data_dir={settings.data_dir}",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_PLUGINS": PLUGIN,
        "HF_HUB_OFFLINE": "1",
    }
    if settings.inference_adapters == "upload":
        environment["ADAPTER_UPLOADS_DIR"] = str(settings.uploaded_adapters_dir)
    if not on_cuda(settings):
        environment["VLLM_CPU_KVCACHE_SPACE"] = str(settings.vllm_kv_cache_gib)
    if settings.inference_threads:
        environment["OMP_NUM_THREADS"] = str(settings.inference_threads)
    if settings.inference_api_key:
        environment["VLLM_API_KEY"] = settings.inference_api_key.get_secret_value()
    return environment
