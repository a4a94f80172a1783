"""The settings that the environment and the command line give; wrong and unknown ones are named as the user wrote them."""

import difflib
import os
import re
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from pydantic_settings import SettingsError

from core.settings import Settings
from local_stack.errors import StackError

PREFIX = "SDFT_"
CLIENT_VARIABLES = ("SDFT_BASE_URL", "SDFT_API_KEY")
"""What the `sdft` command reads as a client: no settings, but no mistakes either."""


def load_settings(data_dir: Path | None, host: str | None, port: int | None, inference: str | None = None) -> Settings:
    """The environment's settings under the command line's. Raises StackError that names each wrong setting."""
    given: dict[str, Any] = {"data_dir": data_dir, "host": host, "port": port, "inference": inference}
    try:
        settings = Settings(**{name: value for name, value in given.items() if value is not None})
    except ValidationError as error:
        problems = [_named(problem["loc"], problem["msg"].removeprefix("Value error, ")) for problem in error.errors()]
        raise StackError("; ".join(problems)) from error
    except SettingsError as error:  # a JSON setting that is no JSON
        wrong = [variable_of(name) for name in Settings.model_fields if f'"{name}"' in str(error)]
        raise StackError(f"{', '.join(wrong)}: it has to be JSON" if wrong else str(error)) from error
    if not settings.base_models:
        raise StackError("SDFT_BASE_MODELS is empty: the catalogue needs at least one base model")
    return settings


def variable_of(field: str) -> str:
    return PREFIX + field.upper()


def unknown_variables() -> dict[str, str | None]:
    """Variables with our prefix that nothing reads, each with the known one that it resembles."""
    known = [*(variable_of(field) for field in Settings.model_fields), *CLIENT_VARIABLES]
    unknown = sorted(name for name in os.environ if name.upper().startswith(PREFIX) and name.upper() not in known)
    return {name: _nearest(name.upper(), known) for name in unknown}


def _nearest(name: str, known: list[str]) -> str | None:
    """Compared without the prefix, which would make all names alike."""
    close = difflib.get_close_matches(name.removeprefix(PREFIX), [other.removeprefix(PREFIX) for other in known], n=1)
    return PREFIX + close[0] if close else None


def _named(place: tuple[int | str, ...], message: str) -> str:
    """A problem with its variable; one that concerns several settings names them in its text."""
    if place:
        return f"{'.'.join([variable_of(str(place[0])), *map(str, place[1:])])}: {message}"
    return re.sub(r"\w+", lambda word: variable_of(word[0]) if word[0] in Settings.model_fields else word[0], message)
