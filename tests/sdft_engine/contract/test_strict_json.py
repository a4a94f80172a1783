import pytest

from sdft_engine.contract.strict_json import has_lone_surrogate, is_deeper, strictly_parsed


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


@pytest.mark.parametrize("text", ["NaN", "[-Infinity]", '{"a": 1e400}', "[-1e999]", "{"])
def test_what_is_no_json_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"is not JSON|too large|Expecting"):
        strictly_parsed(text)


def test_json_is_parsed() -> None:
    assert strictly_parsed('{"a": [1e308, -0.5, 10]}') == {"a": [1e308, -0.5, 10]}


@pytest.mark.parametrize(("value", "expected"), [("\ud800", True), ([{"a": ["\udfff"]}], True), ({"\ud800": 1}, True), ({"a": ["\U0001f4a1"]}, False)])
def test_half_pairs_are_found_wherever_they_are(value: object, expected: bool) -> None:
    assert has_lone_surrogate(value) is expected
