"""Watching a function without changing what it does."""

from collections.abc import Callable
from typing import Any


def watched(function: Callable[..., Any], remember: Callable[..., object]) -> Callable[..., Any]:
    """`function` in all respects, but `remember` is given its arguments first."""

    def call(*arguments: Any, **options: Any) -> Any:
        remember(*arguments, **options)
        return function(*arguments, **options)

    return call
