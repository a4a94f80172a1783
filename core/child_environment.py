"""What processes get to see of the environment that read what users send, or what they had trained: trainers, inference servers, Valkey.

A list of what is allowed, because nobody knows every variable in which an operator keeps a password or token.
"""

from collections.abc import Mapping

PLACES = ("PATH", "HOME", "USER", "LOGNAME", "SHELL", "TMPDIR", "TEMP", "TMP", "VIRTUAL_ENV", "SSL_CERT_FILE", "SSL_CERT_DIR", "NO_PROXY", "no_proxy")
LANGUAGE = ("LANG", "LANGUAGE", "TZ", "TERM")
MODELS = ("HF_HOME", "HF_HUB_CACHE", "HF_HUB_OFFLINE", "HF_HUB_DISABLE_PROGRESS_BARS", "TOKENIZERS_PARALLELISM")
NAMES = frozenset((*PLACES, *LANGUAGE, *MODELS))
PREFIXES = ("LC_", "LD_", "DYLD_", "XDG_", "PYTHON", "MALLOC_")
COMPUTING = ("OMP_", "GOMP_", "KMP_", "MKL_", "OPENBLAS_", "DNNL_", "ONEDNN_", "ATEN_", "TORCH", "PYTORCH_", "TRITON_", "TRANSFORMERS_", "VLLM_")
DEVICES = ("CUDA_", "CUBLAS_", "CUDNN_", "NVIDIA_", "NCCL_", "GLOO_", "UCX_", "HIP_", "HSA_", "ROCR_", "ROCM_", "MIOPEN_")
SECRET_ENDINGS = ("_KEY", "_TOKEN", "_SECRET", "_PASSWORD", "_CREDENTIALS")


def child_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """The part of `environment` that says where things are and how to compute; no settings of the service."""
    return {name: value for name, value in environment.items() if _allowed(name)}


def _allowed(name: str) -> bool:
    return name in NAMES or (name.startswith((*PREFIXES, *COMPUTING, *DEVICES)) and not name.endswith(SECRET_ENDINGS))
