"""What a finished run leaves: the adapter in PEFT's format with its attestation."""

import shutil
from pathlib import Path

from safetensors import SafetensorError

from sdft_engine.checkpoint import raise_if_disk_full, seal
from sdft_engine.contract.run_directory import Attestation, sync_directory
from sdft_engine.model import LanguageModel
from sdft_engine.teacher import STUDENT


def write_final(directory: Path, model: LanguageModel, base_model: str, attestation: Attestation) -> None:
    """Write `final/`, whole or not at all. Raises DiskFull."""
    temporary = directory.with_name(f".{directory.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
        model.adapters.save(STUDENT, temporary, base_model)
        (temporary / "attestation.json").write_text(attestation.model_dump_json())
        seal(temporary)
        shutil.rmtree(directory, ignore_errors=True)
        temporary.rename(directory)
        sync_directory(directory.parent)
    except (OSError, SafetensorError) as error:
        raise_if_disk_full(error, "the trained adapter")
        raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
