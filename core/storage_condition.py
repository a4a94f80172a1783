"""Whether an uploaded file or a checkpoint could be stored now."""

import os
import shutil
from typing import Literal

from core.errors import StorageFull, StorageUnavailable
from core.s3_storage import S3Storage
from core.settings import Settings
from core.storage import LocalStorage, Storage

StorageCondition = Literal["ok", "unreachable", "not_writable", "full"]


def require_free_space(settings: Settings, storage: Storage) -> None:
    """Raises StorageFull where an upload would take what the database and checkpoints need, or StorageUnavailable. Nothing is known of a
    bucket's size."""
    if isinstance(storage, S3Storage):
        return
    try:
        free = shutil.disk_usage(settings.storage_dir).free
    except OSError as error:
        raise StorageUnavailable("the disk of storage can't be asked for its free space") from error
    if free < settings.min_free_bytes:
        message = f"the server's disk has {free:,} bytes left, and uploads leave {settings.min_free_bytes:,} of them free; nothing was stored"
        raise StorageFull(message)


def storage_condition(settings: Settings, storage: Storage) -> StorageCondition:
    """`unreachable`: the bucket, or a disk that is not mounted. `full`: the local disk has less free space than the largest file that may
    be uploaded and what uploads have to leave; a bucket's service needs the former too, for adapters on their way to inference servers.
    Asks the directory, or the one in which it will be made."""
    wanted = settings.served_adapters_dir if isinstance(storage, S3Storage) else settings.storage_dir
    directory = next(parent for parent in (wanted, *wanted.parents) if os.path.exists(parent))
    if isinstance(storage, LocalStorage) and not storage.temporary_dir.is_dir():
        return "unreachable"
    if not os.access(directory, os.W_OK | os.X_OK):
        return "not_writable"
    needed = settings.max_file_bytes + (0 if isinstance(storage, S3Storage) else settings.min_free_bytes)
    if shutil.disk_usage(directory).free < needed:
        return "full"
    return "unreachable" if isinstance(storage, S3Storage) and storage.problem() else "ok"
