import gzip
import tracemalloc

import pytest
from hypothesis import given
from hypothesis import strategies as st

from api.files.decompression import MAX_MEMBERS, PIECE_BYTES, Gunzip
from core.errors import InvalidFile, RequestTooLarge

MAX_BYTES = 64 << 20


def gunzip(compressed: bytes, chunk_bytes: int = 65_536) -> bytes:
    stream = Gunzip(MAX_BYTES)
    found = b"".join(piece for start in range(0, len(compressed), chunk_bytes) for piece in stream.feed(compressed[start : start + chunk_bytes]))
    stream.finish()
    return found


@given(contents=st.lists(st.binary(max_size=200), min_size=1, max_size=4), chunk_bytes=st.integers(1, 50), padding=st.integers(0, 5))
def test_members_and_padding(contents: list[bytes], chunk_bytes: int, padding: int) -> None:
    compressed = b"".join(gzip.compress(content) for content in contents) + b"\x00" * padding
    assert gunzip(compressed, chunk_bytes) == b"".join(contents)


@pytest.mark.parametrize("extra", [-1, 0, 1])
def test_pieces_that_end_at_the_limit(extra: int) -> None:
    content = bytes(range(256)) * (2 * PIECE_BYTES // 256) + b"x" * (1 + extra)
    assert gunzip(gzip.compress(content)) == content


def test_nothing_is_nothing() -> None:
    assert gunzip(b"") == b""


@pytest.mark.parametrize(
    "compressed",
    [b"not gzip", gzip.compress(b"some text")[:-1], gzip.compress(b"text" * 1000)[:20], gzip.compress(b"x") + b"junk"],
    ids=["not gzip", "last byte missing", "cut off", "junk behind"],
)
def test_damaged(compressed: bytes) -> None:
    with pytest.raises(InvalidFile) as caught:
        gunzip(compressed)
    assert caught.value.code == "invalid_gzip"


def test_bomb_is_noticed_before_it_fills_memory() -> None:
    bomb = gzip.compress(b"\x00" * (64 << 20))
    sizes: list[int] = []
    tracemalloc.start()
    with pytest.raises(InvalidFile) as caught:
        sizes.extend(len(piece) for piece in Gunzip(MAX_BYTES).feed(bomb))
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert caught.value.code == "compression_ratio"
    assert max(sizes, default=0) <= PIECE_BYTES
    assert peak_bytes < 8 << 20


def test_short_repetitive_files_are_no_bomb() -> None:
    content = b'{"messages": []}\n' * 200_000
    assert len(content) / len(gzip.compress(content)) > 100
    assert gunzip(gzip.compress(content)) == content


def test_empty_members_yield_nothing_and_are_counted() -> None:
    empty = gzip.compress(b"")
    stream = Gunzip(MAX_BYTES)
    assert list(stream.feed(empty * MAX_MEMBERS)) == []
    with pytest.raises(InvalidFile, match="members"):
        list(stream.feed(empty))


def test_input_that_yields_nothing_has_a_limit_too() -> None:
    stream = Gunzip(1000)
    assert list(stream.feed(gzip.compress(b"x"))) == [b"x"]
    with pytest.raises(RequestTooLarge):
        list(stream.feed(b"\x00" * 1000))  # padding
