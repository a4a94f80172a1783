"""From a model's row to the adapter that an inference server has loaded, and back."""

import hashlib
import shutil
from pathlib import Path

from core.archives import fetch_directory
from core.errors import InferenceUnavailable
from core.inference_client import AdapterRefused, InferenceClient
from core.inference_servers import InferenceServers
from core.logging import get_logger
from core.storage import Storage
from core.tables.models import Model

WEIGHTS_NAME = "adapter_model.safetensors"
"""PEFT's name."""

log = get_logger(__name__)


def load_into_server(model: Model, storage: Storage, served_adapters_dir: Path, client: InferenceClient) -> None:
    """Unpack the model's adapter where the inference server reads it, and have it loaded. Idempotent. Where it was unpacked
    before, and its weights are no longer those that were verified, it is unpacked again.

    Raises ObjectDamaged, InferenceUnavailable, or AdapterRefused with the server's reason.
    """
    directory = served_adapters_dir / model.serving_name
    if directory.exists() and not _holds_verified_weights(directory, model):
        log.error("served_adapter_damaged", model=model.id, directory=str(directory))
        shutil.rmtree(directory, ignore_errors=True)
    fetch_directory(storage, model.storage_key, model.archive_sha256, directory)
    client.load_adapter(model.serving_name, directory)


def remove_from_servers(model: Model, served_adapters_dir: Path, servers: InferenceServers) -> None:
    """Have the model's adapter unloaded everywhere, and remove its unpacked files. Idempotent; whoever needs it loads it again.

    It only frees memory and disk, so a server that is away or refuses is no error.
    """
    for client in servers.clients:
        try:
            client.unload_adapter(model.serving_name)
        except (InferenceUnavailable, AdapterRefused) as error:
            log.warning("adapter_not_unloaded", model=model.id, server=client.url, error=str(error))
    shutil.rmtree(served_adapters_dir / model.serving_name, ignore_errors=True)


def _holds_verified_weights(directory: Path, model: Model) -> bool:
    """Also True for a model that was not verified yet: nothing says what its weights should be."""
    verified: str | None = (model.attestation or {}).get("weights_sha256")
    if verified is None:
        return True
    try:
        with (directory / WEIGHTS_NAME).open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest() == verified
    except FileNotFoundError:
        return False
