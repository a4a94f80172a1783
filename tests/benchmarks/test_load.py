"""benchmarks.load: what counts as an error, what fails the program, and the page. The rows themselves run for a moment on a real service."""

import asyncio
import itertools
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest

from benchmarks import load
from benchmarks.load_parts import report
from benchmarks.load_parts.client import Request, closed_loop, wire_of
from benchmarks.load_parts.results import Measured, in_milliseconds, percentile
from benchmarks.load_parts.rows import at_least
from benchmarks.load_parts.streams import Reading, errors_of, take

ROW = Measured("polls", "sqlite", "500/s", {"p50": 20.0, "p95": 30.0, "p99": 40.0}, {}, [("at least 400/s", True)], [("a ratio: 0.50 (at least 0.2)", True)])


class Answers(BaseHTTPRequestHandler):
    """200 with a body in one piece or in chunks, an error, or no answer at all."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        if self.path == "/silent":
            self.close_connection = True
            return
        self.send_response(503 if self.path == "/busy" else 200)
        if self.path == "/chunked":
            self.send_header("transfer-encoding", "chunked")
            self.end_headers()
            self.wfile.write(b"5\r\nright\r\n2\r\n!!\r\n0\r\n\r\n")
            return
        self.send_header("content-length", "7")
        self.end_headers()
        self.wfile.write(b"right!!")

    def log_message(self, format: str, *arguments: object) -> None:
        """Silent."""


@pytest.fixture
def address() -> Iterator[tuple[str, int]]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Answers)
    thread = Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    yield "127.0.0.1", server.server_address[1]
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.mark.parametrize(
    ("path", "content", "errors"),
    [
        ("/whole", b"right!!", set()),
        ("/chunked", b"right!!", set()),
        ("/whole", b"wrong", {"another answer"}),
        ("/busy", b"", {"status 503"}),
        ("/silent", b"", {"IncompleteReadError"}),
    ],
)
def test_only_right_answers_count(address: tuple[str, int], path: str, content: bytes, errors: set[str]) -> None:
    requests = [Request(wire_of("GET", path, "key"), content)] * 5
    tally = asyncio.run(closed_loop(address, 2, 30, lambda _: iter(requests)))
    assert len(tally.seconds) == (0 if errors else 10)
    assert set(tally.errors) == errors
    assert tally.errors.total() == (10 if errors else 0)
    assert tally.per_second == len(tally.seconds) / tally.wall_seconds


def test_a_closed_loop_ends_in_time(address: tuple[str, int]) -> None:
    request = Request(wire_of("GET", "/whole", "key"))
    tally = asyncio.run(closed_loop(address, 2, 0.3, lambda _: itertools.repeat(request)))
    assert 0.3 <= tally.wall_seconds < 5
    assert tally.seconds
    assert not tally.errors


def test_nobody_listening_is_an_error() -> None:
    tally = asyncio.run(closed_loop(("127.0.0.1", 1), 1, 30, lambda _: iter([Request(wire_of("GET", "/", "key"))])))
    assert tally.errors == {"ConnectionRefusedError": 1}


def test_percentiles_are_values_that_were_measured() -> None:
    values = [float(value) for value in range(1, 101)]
    assert [percentile(values, percent) for percent in (50, 95, 99)] == [50, 95, 99]
    assert percentile([3.0], 99) == 3.0
    assert in_milliseconds([0.001, 0.003]) == {"p50": 1.0, "p95": 3.0, "p99": 3.0}


def test_a_stream_has_to_bring_every_event_once_and_in_order() -> None:
    events = {"job": ["a", "b"]}

    def reading(ids: str, end: str = "[DONE]") -> Reading:
        return Reading("job", [(event_id, 0.0) for event_id in ids], 1.0, end)

    assert errors_of([reading("ab")], events) == Counter()
    for wrong in ("a", "aab", "ba", "abc"):
        assert errors_of([reading(wrong)], events) == {"a stream has other events than its job": 1}
    assert errors_of([reading("ab", "no end"), reading("", "status 503")], events) == {"a stream ended with no end": 1, "a stream ended with status 503": 1}


def test_frames_are_taken_apart() -> None:
    reading = Reading("job")
    take(reading, b'data: {"id": "a"}\nid: a\n\nid: b\ndata: {"id": "b"}\n\n', 5.0)
    assert reading.received == [("a", 5.0), ("b", 5.0)]
    take(reading, b": keep-alive\n\n", 6.0)
    take(reading, b"data: [DONE]\n\n", 7.0)
    assert (len(reading.received), reading.end) == (2, "[DONE]")
    take(reading, b'data: {"error": {"message": "stopping"}}\n\n', 8.0)
    assert "stopping" in reading.end


def test_errors_and_gates_fail_and_aims_do_not() -> None:
    assert ROW.passed
    assert replace(ROW, aims=[("at least 400/s", False)]).passed
    assert not replace(ROW, errors={"status 503": 1}).passed
    assert not replace(ROW, gates=[("a ratio", False)]).passed
    assert at_least("a ratio", 1, 4, 0.25) == ("a ratio: 0.25 (at least 0.25)", True)
    assert at_least("a ratio", 1, 5, 0.25)[1] is False
    assert at_least("a ratio", 1, 0, 0.25)[1] is False


def test_a_row_replaces_its_own_and_no_other(tmp_path: Path) -> None:
    report.write(ROW, "a machine", tmp_path)
    report.write(replace(ROW, database="postgres", errors={"status 503": 2}, aims=[("at least 400/s", False)]), "a machine", tmp_path)
    report.write(replace(ROW, row="creates", gates=[("a ratio: 0.10 (at least 0.2)", False)]), "a machine", tmp_path)
    report.write(replace(ROW, figure="600/s"), "another machine", tmp_path)
    page = (tmp_path / "load.md").read_text()
    assert "| polls | 600/s | 20.0 | 30.0 | 40.0 | 0 | at least 400/s: met |" in page
    assert "| polls | 500/s | 20.0 | 30.0 | 40.0 | 2 x status 503 | at least 400/s: missed |" in page
    assert "- **creates**: a ratio: 0.10 (at least 0.2): MISSED." in page
    assert page.index("## SQLite") < page.index("**creates**") < page.index("## Postgres")
    assert page.endswith("another machine.\n")
    assert len(json.loads((tmp_path / "load.json").read_text())["rows"]) == 3


@pytest.mark.parametrize("arguments", [["--only", "dishes"], ["--seconds", "0"], ["--streams", "-1"]])
def test_what_can_t_be_measured_is_refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        load.main(arguments)
    assert arguments[0] in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("database", "only"), [("sqlite", []), ("postgres", ["polls", "creates", "starts"])], ids=["sqlite", "postgres"]
)  # the rest has little to do with the database
def test_the_rows_run(database: str, only: list[str], tmp_path: Path, real_model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For a moment, without what depends on the machine: no gate, but no error either, and every row on the page."""
    monkeypatch.setattr(Measured, "passed", property(lambda measured: not measured.errors))
    sizes = ["--seconds", "2", "--streams", "20", "--upload-mib", "20", "--starts", "3", "--cancels", "1", "--pairs", "2"]
    assert load.main(["--database", database, "--out", str(tmp_path), *sizes, *(["--only", *only] if only else [])]) == 0
    page = (tmp_path / "load.md").read_text()
    titles = {"polls": "polls", "creates": "creates", "starts": "queued to running", "upload": "upload", "streams": "event streams"}
    for row in only or (*titles, "cancel", "first-token"):
        assert f"| {titles.get(row, row.replace('-', ' '))} | " in page
