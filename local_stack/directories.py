"""Whether a directory can be made and written, and on what kind of file system."""

import os
from pathlib import Path


def nearest_existing(path: Path) -> Path:
    return next(parent for parent in (path, *path.parents) if os.path.exists(parent))  # Path.exists raises where a parent is closed to us


def directory_problem(path: Path) -> str | None:
    """Why `path` can't be made or written; None where it can."""
    existing = nearest_existing(path)
    subject = "it" if existing == path else existing
    if not existing.is_dir():
        return f"{subject} is not a directory"
    return None if os.access(existing, os.W_OK | os.X_OK) else f"{subject} is not writable"


def filesystem_of(path: Path, mounts: Path = Path("/proc/mounts")) -> str | None:
    """The type of the file system that holds `path`, or will hold it, as the kernel names it; None where it doesn't tell."""
    try:
        lines = mounts.read_text().splitlines()
    except OSError:
        return None
    place = nearest_existing(path).resolve()
    kinds = {Path(fields[1].encode().decode("unicode_escape")): fields[2] for line in lines if len(fields := line.split()) > 2}
    return next((kinds[parent] for parent in (place, *place.parents) if parent in kinds), None)
