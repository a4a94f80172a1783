"""Files that a power cut leaves whole or absent, never half written under their final name."""

import errno
import os
from pathlib import Path

DISK_IS_AWAY = (errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.ENOTCONN, errno.EHOSTDOWN, errno.EHOSTUNREACH, errno.ENODEV, errno.ENXIO)


def rename_durably(temporary: Path, path: Path) -> None:
    """Give a complete file, or a flat directory of files, its final name on the same file system.

    Its bytes are on the disk before the name is, and the name is when this returns.
    """
    for part in (*(temporary.iterdir() if temporary.is_dir() else ()), temporary):
        _sync(part)
    temporary.replace(path)
    _sync(path.parent)


def make_directory_durably(path: Path) -> None:
    """Also its parents, as far as they are not there."""
    if not path.is_dir():
        make_directory_durably(path.parent)
        path.mkdir(exist_ok=True)
        _sync(path.parent)


def is_disk_away(error: BaseException) -> bool:
    """Whether the system can't reach the disk at the moment, or fails to read it: one of another machine's, say."""
    return isinstance(error, OSError) and error.errno in DISK_IS_AWAY


def is_disk_full(error: BaseException) -> bool:
    """Whether the system refused a write for want of space, or of the user's quota."""
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
