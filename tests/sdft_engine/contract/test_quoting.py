from typing import Any

import pytest

from sdft_engine.contract.quoting import quoted, shortened


@pytest.mark.parametrize("value", ["user", "it's", 3, 0.5, None, True, ["user"], {"a": [1]}])
def test_short_values_are_quoted_as_they_are(value: Any) -> None:
    assert quoted(value) == repr(value)


def nested(levels: int) -> Any:
    value: Any = {}
    for _ in range(levels):
        value = {"a": [value]}
    return value


@pytest.mark.parametrize("value", ["x" * 900_000, ["x" * 900_000] * 9, {"x" * 900_000: 1}, list(range(100_000)), nested(20_000)])
def test_no_value_is_quoted_at_length(value: Any) -> None:
    assert len(quoted(value)) <= 101


def test_texts_are_cut_after_a_hundred_characters() -> None:
    assert shortened("x" * 100) == "x" * 100
    assert shortened("x" * 101) == "x" * 100 + "…"
