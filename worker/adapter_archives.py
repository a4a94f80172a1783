"""What a trained adapter is in storage: a tar.gz of PEFT's two files and the attestation that a server must reproduce."""

import shutil
import tempfile
from pathlib import Path

from core.archives import store_directory
from core.storage import Check, Storage
from core.tables.models import Model
from sdft_engine.contract.sealed_directory import ADAPTER_CONFIG_NAME, ADAPTER_WEIGHTS_NAME, ATTESTATION_NAME
from worker.stored_objects import check_stored


def store_adapter(storage: Storage, model: Model, directory: Path, scratch_dir: Path, check: Check) -> None:
    """Store the adapter in `directory` (a checkpoint or a final one) as the model's archive, read it back, and note its size
    and hash in the model. `check` is called before every chunk and may raise.

    Raises ObjectDamaged where storage returns other bytes, StorageFull where it is full.
    """
    with tempfile.TemporaryDirectory(prefix=".adapter-", dir=scratch_dir) as scratch:
        for name in (ADAPTER_CONFIG_NAME, ADAPTER_WEIGHTS_NAME, ATTESTATION_NAME):
            shutil.copyfile(directory / name, Path(scratch) / name)
        stored = store_directory(storage, model.storage_key, Path(scratch), scratch_dir, check)
    check_stored(storage, stored, check)
    model.archive_bytes, model.archive_sha256 = stored.size_bytes, stored.sha256
