"""The base model with an adapter added to its weights, as a transformers model directory of its own: W + (alpha / r) B A.

Tensor by tensor from the base's safetensors files, so memory holds one file's weights and no model; the products are computed in
float32 and rounded once, to the precision of the base's weights. Config, tokenizer and chat template are the base's.
"""

import shutil
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from sdft_engine.contract.errors import BaseModelError, ConfigurationError, DiskFull
from sdft_engine.contract.sealed_directory import is_disk_full
from sdft_engine.lora import read_adapter
from sdft_engine.prepare_base_model import PREPARED_MARK

A, B, WEIGHT = ".lora_A", ".lora_B", ".weight"


def merge_adapter(base_dir: Path, adapter_dir: Path, out_dir: Path) -> None:
    """Write the merged model into `out_dir`, which must not exist.

    W is (out, in) in the base's dtype, which the merged weight keeps; A is (r, in) and B (out, r), in any floating-point dtype.

    Raises ConfigurationError where the adapter does not fit this base, BaseModelError where a file can't be read or written, DiskFull;
    nothing is left then.
    """
    shape, factors = read_adapter(adapter_dir)
    modules = {name.removesuffix(A) for name in factors if name.endswith(A)}
    merged: set[str] = set()
    out_dir.mkdir(parents=True)
    try:
        for source in sorted(base_dir.glob("*.safetensors")):
            merged |= _merge_file(source, out_dir / source.name, factors, modules, shape.scaling)
        if missing := sorted(modules - merged):
            raise ConfigurationError(
                f"the base has no weight named {missing[0]}{WEIGHT}: an adapter can't be merged into an architecture that renames its layers"
            )
        for source in sorted(base_dir.iterdir()):
            if source.is_file() and source.suffix != ".safetensors" and source.name != PREPARED_MARK:
                shutil.copyfile(source, out_dir / source.name)
    except Exception as error:
        shutil.rmtree(out_dir, ignore_errors=True)
        if is_disk_full(error):  # safetensors reports it with an exception of its own
            raise DiskFull(f"the disk is full: {out_dir.name} could not be written") from error
        if isinstance(error, OSError | SafetensorError):  # may be another time: a file system that is away, say
            raise BaseModelError(f"the weights of {base_dir.name} could not be read, or the merged ones not be written: {error}") from error
        raise


def _merge_file(source: Path, target: Path, factors: dict[str, Tensor], modules: set[str], scaling: float) -> set[str]:
    """Returns the modules whose weights the file holds."""
    with safe_open(source, framework="pt") as opened:
        tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118  # no mapping: it has keys() alone
        metadata = opened.metadata()
    found = {name.removesuffix(WEIGHT) for name in tensors if name.endswith(WEIGHT)} & modules
    for module in found:
        weight, a, b = tensors[module + WEIGHT], factors[module + A], factors[module + B]
        if weight.shape != (b.shape[0], a.shape[1]):
            raise ConfigurationError(f"{module} has the shape {tuple(weight.shape)}; the adapter's is {(b.shape[0], a.shape[1])}")
        tensors[module + WEIGHT] = torch.addmm(weight.float(), b.float(), a.float(), alpha=scaling).to(weight.dtype)
    save_file(tensors, target, metadata=metadata)
    return found
