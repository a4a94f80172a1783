"""Whom a request comes from, once the authentication has let it in."""

from dataclasses import dataclass

from starlette.types import Scope


@dataclass(frozen=True)
class Caller:
    """A key, as the database had it within the last seconds."""

    key_id: str
    project_id: str
    scopes: frozenset[str]


def remember_caller(scope: Scope, caller: Caller) -> None:
    scope.setdefault("state", {})["caller"] = caller


def caller_of(scope: Scope) -> Caller | None:
    """None on the routes that need no key, and on what is no HTTP request."""
    caller: Caller | None = scope.get("state", {}).get("caller")
    return caller
