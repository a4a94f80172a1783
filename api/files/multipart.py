"""A multipart/form-data body as it streams: parts go to a receiver piece by piece, nothing is kept or written here."""

from typing import Protocol

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from core.errors import BadRequest

MAX_PARTS = 32


class PartReceiver(Protocol):
    def begin_part(self, name: str, filename: str | None) -> None: ...

    def part_data(self, data: bytes) -> None: ...

    def end_part(self) -> None: ...


class MultipartReader:
    """Feed it the body. Raises BadRequest where that is malformed; the receiver's own errors pass through."""

    def __init__(self, content_type: str | None, receiver: PartReceiver) -> None:
        kind, options = parse_options_header(content_type)
        if kind != b"multipart/form-data" or not options.get(b"boundary"):
            raise BadRequest("send the file as multipart/form-data, with the parts file and purpose", code="invalid_content_type")
        self._receiver = receiver
        self._headers: dict[bytes, bytes] = {}
        self._header_name = b""
        self._header_value = b""
        self._parts = 0
        self._ended = False
        try:
            self._parser = MultipartParser(
                options[b"boundary"],
                {
                    "on_header_field": self._header_field,
                    "on_header_value": self._header_text,
                    "on_header_end": self._header_end,
                    "on_headers_finished": self._headers_finished,
                    "on_part_data": self._part_data,
                    "on_part_end": receiver.end_part,
                    "on_end": self._end,
                },
            )
        except FormParserError as error:
            raise BadRequest(f"the multipart boundary can't be used: {error}", code="invalid_multipart") from error

    def feed(self, chunk: bytes) -> None:
        try:
            self._parser.write(chunk)
        except FormParserError as error:
            raise BadRequest(f"the multipart body is malformed: {error}", code="invalid_multipart") from error

    def finish(self) -> None:
        if not self._ended:
            raise BadRequest("the multipart body ends before its closing boundary", code="invalid_multipart")

    def _header_field(self, data: bytes, start: int, end: int) -> None:
        self._header_name += data[start:end]

    def _header_text(self, data: bytes, start: int, end: int) -> None:
        self._header_value += data[start:end]

    def _header_end(self) -> None:
        self._headers[self._header_name.lower()] = self._header_value
        self._header_name = self._header_value = b""

    def _headers_finished(self) -> None:
        self._parts += 1
        if self._parts > MAX_PARTS:
            raise BadRequest(f"the form has more than {MAX_PARTS} parts", code="invalid_multipart")
        _, options = parse_options_header(self._headers.get(b"content-disposition", b""))
        self._headers = {}
        if b"name" not in options:
            raise BadRequest("a part of the form has no name", code="invalid_multipart")
        filename = options.get(b"filename")
        self._receiver.begin_part(options[b"name"].decode(errors="replace"), None if filename is None else filename.decode(errors="replace"))

    def _part_data(self, data: bytes, start: int, end: int) -> None:
        self._receiver.part_data(data if start == 0 and end == len(data) else data[start:end])

    def _end(self) -> None:
        self._ended = True
