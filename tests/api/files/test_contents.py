import gzip
import itertools
import json
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from api.files.contents import TrainingContents
from core.errors import InvalidFile
from core.settings import Settings
from core.storage import LocalStorage

MakeSettings = Callable[..., Settings]
LONGEST = 100
GOOD = json.dumps({"prompt": "a", "completion": "b"}).encode()
LINES = [GOOD, GOOD.ljust(LONGEST), GOOD.ljust(LONGEST + 1), GOOD.ljust(3 * LONGEST), b"", b"  ", b"{", b"\xff"]


def open_contents(make_settings: MakeSettings, tmp_path: Path, *, compressed: bool = False, **overrides: int) -> TrainingContents:
    writer = LocalStorage(tmp_path / "storage").open_writer("files/x")
    return TrainingContents(writer, make_settings(max_line_bytes=LONGEST, **overrides), lambda: None, compressed=compressed)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(lines=st.lists(st.sampled_from(LINES), min_size=1, max_size=6), cuts=st.lists(st.integers(0, 600), max_size=6), newline_at_end=st.booleans())
def test_chunks_may_end_anywhere(make_settings: MakeSettings, tmp_path: Path, lines: list[bytes], cuts: list[int], newline_at_end: bool) -> None:
    content = b"\n".join(lines) + b"\n" * newline_at_end
    contents = open_contents(make_settings, tmp_path)
    edges = [0, *sorted(min(cut, len(content)) for cut in cuts), len(content)]
    for start, end in itertools.pairwise(edges):
        contents.write(content[start:end])
    expected = {number: line for number, line in enumerate(lines, 1) if (line.strip() and line.rstrip() != GOOD) or len(line) > LONGEST}
    usable = sum(line.rstrip() == GOOD and len(line) <= LONGEST for line in lines)
    if expected:
        with pytest.raises(InvalidFile) as caught:
            contents.commit()
        assert [problem["line"] for problem in caught.value.extra["problems"]] == sorted(expected)
    elif usable:
        assert contents.commit().size_bytes == len(content)
        assert contents.example_count == usable
    else:
        with pytest.raises(InvalidFile, match="empty"):
            contents.commit()


def test_line_that_is_one_byte_too_long_and_ends_with_its_chunk(make_settings: MakeSettings, tmp_path: Path) -> None:
    contents = open_contents(make_settings, tmp_path)
    contents.write(GOOD.ljust(LONGEST + 1))
    contents.write(b"\n")
    with pytest.raises(InvalidFile) as caught:
        contents.commit()
    assert caught.value.code == "line_too_long"


def test_endless_line_is_not_kept_in_memory(make_settings: MakeSettings, tmp_path: Path) -> None:
    contents = open_contents(make_settings, tmp_path)
    for _ in range(100):
        contents.write(b"x" * 100_000)
    assert len(contents._unfinished_line) <= LONGEST + 1
    contents.abort()


def test_nothing_is_read_beyond_the_last_line_allowed(make_settings: MakeSettings, tmp_path: Path) -> None:
    contents = open_contents(make_settings, tmp_path, compressed=True, max_lines=50)
    with pytest.raises(InvalidFile, match="line 51: the file has more than 50 lines") as caught:
        contents.write(gzip.compress(b"\n" * 4_000_000))
    assert caught.value.code == "too_many_lines"
    assert contents._reader.line_count == 51


def test_as_many_lines_as_are_allowed(make_settings: MakeSettings, tmp_path: Path) -> None:
    contents = open_contents(make_settings, tmp_path, max_lines=50)
    contents.write((GOOD + b"\n") * 50)
    contents.commit()
    assert contents.example_count == 50


def test_small_pieces_of_a_long_line_are_not_joined_again_and_again(make_settings: MakeSettings, tmp_path: Path) -> None:
    """Of 1 MB, for each of 200,000 pieces: minutes. A form's carriage returns split a chunk into as many."""
    writer = LocalStorage(tmp_path / "storage").open_writer("files/x")
    contents = TrainingContents(writer, make_settings(), lambda: None, compressed=False)
    contents.write(b"x" * 1_000_000)
    started = time.process_time()
    for _ in range(200_000):
        contents.write(b"\r")
    assert time.process_time() - started < 8
    contents.abort()
