"""How deep JSON may be nested. Counted level by level: code that recurses over deep values breaks at the interpreter's own limit."""

from typing import Any

MAX_JSON_DEPTH = 64
"""For request bodies and tool-call arguments; lines of a file have a limit of their own."""


def is_deeper(value: Any, levels: int) -> bool:
    """Whether parsed JSON has more than `levels` levels; a number or an empty list is one level."""
    level = [value]
    for _ in range(levels):
        level = [child for parent in level if isinstance(parent, dict | list) for child in (parent.values() if isinstance(parent, dict) else parent)]
    return bool(level)
