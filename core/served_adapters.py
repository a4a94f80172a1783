"""From a model's row to the directory that the inference server loads."""

from pathlib import Path

from core.archives import fetch_directory
from core.inference_client import InferenceClient
from core.storage import Storage
from core.tables.models import Model


def load_into_server(model: Model, storage: Storage, served_adapters_dir: Path, client: InferenceClient) -> None:
    """Unpack the model's adapter where the inference server reads it, and have it loaded. Idempotent.

    Raises ObjectDamaged, InferenceUnavailable, or AdapterRefused with the server's reason.
    """
    directory = fetch_directory(storage, model.storage_key, model.archive_sha256, served_adapters_dir / model.serving_name)
    client.load_adapter(model.serving_name, directory)
