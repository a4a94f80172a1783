"""JSON as it is defined: how deep it may be nested, and what Python's parser takes that is none.

Depth is counted level by level: code that recurses over deep values breaks at the interpreter's own limit.
"""

import json
import math
from collections.abc import Iterator
from typing import Any

MAX_JSON_DEPTH = 64
"""For request bodies and tool-call arguments; lines of a file have a limit of their own."""


def is_deeper(value: Any, levels: int) -> bool:
    """Whether parsed JSON has more than `levels` levels; a number or an empty list is one level."""
    level = [value]
    for _ in range(levels):
        level = [child for parent in level if isinstance(parent, dict | list) for child in (parent.values() if isinstance(parent, dict) else parent)]
    return bool(level)


def strictly_parsed(text: str) -> Any:
    """Raises ValueError, for NaN, Infinity and numbers beyond the range of a double too; RecursionError for very deep values."""
    return json.loads(text, parse_constant=_refuse_constant, parse_float=_finite)


def has_lone_surrogate(value: Any) -> bool:
    """Whether a string in parsed JSON holds half of a surrogate pair, which is no text."""
    return any(0xD800 <= ord(character) <= 0xDFFF for text in _strings(value) for character in text)


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text[:20]} is too large a number")
    return value


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, list):
        for item in value:
            yield from _strings(item)
    elif isinstance(value, dict):
        for key, item in value.items():
            yield key
            yield from _strings(item)
