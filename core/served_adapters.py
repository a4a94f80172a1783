"""From a model's row to the adapter that the inference server has loaded, and back."""

import shutil
from pathlib import Path

from core.archives import fetch_directory
from core.errors import InferenceUnavailable
from core.inference_client import AdapterRefused, InferenceClient
from core.logging import get_logger
from core.storage import Storage
from core.tables.models import Model

log = get_logger(__name__)


def load_into_server(model: Model, storage: Storage, served_adapters_dir: Path, client: InferenceClient) -> None:
    """Unpack the model's adapter where the inference server reads it, and have it loaded. Idempotent.

    Raises ObjectDamaged, InferenceUnavailable, or AdapterRefused with the server's reason.
    """
    directory = fetch_directory(storage, model.storage_key, model.archive_sha256, served_adapters_dir / model.serving_name)
    client.load_adapter(model.serving_name, directory)


def remove_from_server(model: Model, served_adapters_dir: Path, client: InferenceClient) -> None:
    """Have the model's adapter unloaded, and remove its unpacked files. Idempotent; whoever needs it loads it again.

    It only frees memory and disk, so a server that is away or refuses is no error.
    """
    try:
        client.unload_adapter(model.serving_name)
    except (InferenceUnavailable, AdapterRefused) as error:
        log.warning("adapter_not_unloaded", model=model.id, error=str(error))
    shutil.rmtree(served_adapters_dir / model.serving_name, ignore_errors=True)
