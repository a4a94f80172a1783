"""One `sdft up` for each data directory."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from local_stack.errors import StackError

LOCK_NAME = "up.lock"


@contextmanager
def data_directory_lock(data_dir: Path) -> Iterator[None]:
    """Hold the directory. The kernel lets go of it when this process ends, however it ends.

    Raises StackError where another process holds it.
    """
    descriptor = os.open(data_dir / LOCK_NAME, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(descriptor, 32, 0).decode(errors="replace").strip() or "unknown"
            raise StackError(
                f"another `sdft up` (pid {holder}) already runs on {data_dir}; stop it with `kill {holder}`, or choose another --data-dir"
            ) from None
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
        yield
    finally:
        os.close(descriptor)


def is_held(data_dir: Path) -> bool:
    """Whether some `sdft up` runs on this directory now."""
    path = data_dir / LOCK_NAME
    if not path.exists():
        return False
    descriptor = os.open(path, os.O_RDWR)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False
