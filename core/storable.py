"""JSON that every database takes."""

from typing import Any


def without_nul(value: Any) -> Any:
    """The same value, any NUL replaced: Postgres stores none, and what can't be told must not keep a job from its end."""
    if isinstance(value, str):
        return value.replace("\x00", "\ufffd")
    if isinstance(value, dict):
        return {without_nul(key): without_nul(item) for key, item in value.items()}
    return [without_nul(item) for item in value] if isinstance(value, list) else value
