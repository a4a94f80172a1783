"""What users wrote, as messages repeat it: never at length, for a name or a value may be megabytes large."""

import reprlib
from typing import Any

MAX_QUOTED_CHARACTERS = 100

_REPR = reprlib.Repr()
_REPR.maxstring = MAX_QUOTED_CHARACTERS


def shortened(text: str) -> str:
    """The text, cut off after `MAX_QUOTED_CHARACTERS`."""
    return text if len(text) <= MAX_QUOTED_CHARACTERS else text[:MAX_QUOTED_CHARACTERS] + "…"


def quoted(value: Any) -> str:
    """The value as Python writes it, cut off likewise. Values nested deeply are cut before they are written."""
    return shortened(_REPR.repr(value))
