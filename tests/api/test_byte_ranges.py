import pytest

from api.byte_ranges import requested_range
from core.errors import RangeNotSatisfiable


@pytest.mark.parametrize(
    ("header", "expected"),
    [
        (None, None),
        ("", None),
        ("bytes=0-0", (0, 1)),
        ("bytes=0-9", (0, 10)),
        ("bytes=2-4", (2, 5)),
        ("bytes=5-", (5, 10)),
        ("bytes=5-99", (5, 10)),
        ("bytes=-3", (7, 10)),
        ("bytes=-99", (0, 10)),
        ("bytes = 2-4", (2, 5)),
        ("bytes=-", None),
        ("bytes=4-2", None),
        ("bytes=a-b", None),
        ("bytes=0-1,3-4", None),
        ("lines=0-1", None),
        ("bytes=" + "9" * 5000 + "-", None),
    ],
)
def test_requested_range(header: str | None, expected: tuple[int, int] | None) -> None:
    assert requested_range(header, 10) == expected


@pytest.mark.parametrize("header", ["bytes=10-", "bytes=99-100", "bytes=-0"])
def test_range_outside_the_object(header: str) -> None:
    with pytest.raises(RangeNotSatisfiable) as caught:
        requested_range(header, 10)
    assert caught.value.headers["content-range"] == "bytes */10"


def test_empty_object_has_no_range() -> None:
    assert requested_range(None, 0) is None
    with pytest.raises(RangeNotSatisfiable):
        requested_range("bytes=0-", 0)
