import pytest

from sdft_engine.contract.json_depth import is_deeper


@pytest.mark.parametrize(("value", "depth"), [(3, 1), ([], 1), ({}, 1), ([3], 2), ({"a": [], "b": [{"c": 1}]}, 4), ([[], [[]], []], 3), ("[[", 1)])
def test_depth_counts_from_one(value: object, depth: int) -> None:
    assert is_deeper(value, depth - 1)
    assert not is_deeper(value, depth)


def test_values_deeper_than_the_interpreters_stack() -> None:
    value: object = 1
    for _ in range(100_000):
        value = [value]
    assert is_deeper(value, 64)
    assert is_deeper(value, 100_000)
    assert not is_deeper(value, 100_001)
