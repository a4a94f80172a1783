"""What a finished run leaves: the adapter in PEFT's format with its attestation."""

from pathlib import Path

from sdft_engine.contract.run_directory import Attestation
from sdft_engine.contract.sealed_directory import ATTESTATION_NAME, sealed_directory
from sdft_engine.lora import STUDENT
from sdft_engine.model import LanguageModel


def write_final(directory: Path, model: LanguageModel, base_model: str, attestation: Attestation) -> None:
    """Write `final/`, whole or not at all. Raises DiskFull."""
    with sealed_directory(directory) as temporary:
        model.adapters.save(STUDENT, temporary, base_model)
        (temporary / ATTESTATION_NAME).write_text(attestation.model_dump_json())
