"""Whether an uploaded file or a checkpoint could be stored now."""

import os
import shutil
from typing import Literal

from core.settings import Settings

StorageCondition = Literal["ok", "not_writable", "full"]


def storage_condition(settings: Settings) -> StorageCondition:
    """`full`: the disk has less free space than the largest file that may be uploaded. Asks the local directory that holds the objects,
    or the directory in which it will be made."""
    directory = next(parent for parent in (settings.storage_dir, *settings.storage_dir.parents) if os.path.exists(parent))
    if not os.access(directory, os.W_OK | os.X_OK):
        return "not_writable"
    return "ok" if shutil.disk_usage(directory).free >= settings.max_file_bytes else "full"
