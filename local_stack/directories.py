"""Whether a directory can be made and written."""

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
