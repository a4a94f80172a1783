"""An uploaded file's bytes on their way into storage: counted, hashed, and for training files checked line by line."""

from collections.abc import Callable
from typing import Protocol

from api.files.decompression import Gunzip
from core.errors import InvalidFile, RequestTooLarge
from core.settings import Settings
from core.storage import ObjectWriter, StoredObject
from sdft_engine.contract.dataset import DatasetLimits, DatasetReader, summarise_problems

LOOK_AT_SPACE_BYTES = 8 * 1024**2


class Contents(Protocol):
    @property
    def example_count(self) -> int | None: ...

    def write(self, data: bytes) -> None: ...

    def commit(self) -> StoredObject:
        """Make the object visible under its key. Raises InvalidFile where the bytes are not what they have to be."""
        ...

    def abort(self) -> None:
        """Idempotent; does nothing after a commit."""
        ...


class AnyContents:
    """Bytes that are only counted. Raises RequestTooLarge beyond `max_bytes`, and what `require_space` raises, which is asked again and
    again: other uploads fill the disk too."""

    example_count: int | None = None

    def __init__(self, writer: ObjectWriter, max_bytes: int, require_space: Callable[[], None]) -> None:
        self._writer = writer
        self._max_bytes = max_bytes
        self._require_space = require_space
        self._look_at = LOOK_AT_SPACE_BYTES

    def write(self, data: bytes) -> None:
        if self._writer.size_bytes + len(data) > self._max_bytes:
            raise RequestTooLarge(f"the file is larger than {self._max_bytes:,} bytes", code="file_too_large", param="file")
        if self._writer.size_bytes + len(data) > self._look_at:
            self._require_space()
            self._look_at = self._writer.size_bytes + len(data) + LOOK_AT_SPACE_BYTES
        self._writer.write(data)

    def commit(self) -> StoredObject:
        return self._writer.commit()

    def abort(self) -> None:
        self._writer.abort()


class TrainingContents(AnyContents):
    """Training lines, decompressed where `compressed`; the object holds them as plain text."""

    example_count: int

    def __init__(self, writer: ObjectWriter, settings: Settings, require_space: Callable[[], None], *, compressed: bool) -> None:
        super().__init__(writer, settings.max_file_bytes, require_space)
        self._gunzip = Gunzip(settings.max_file_bytes) if compressed else None
        self._reader = DatasetReader(DatasetLimits(max_line_bytes=settings.max_line_bytes, max_lines=settings.max_lines))
        self._unfinished_line = bytearray()  # grows in place: pieces may be of a byte each
        self.example_count = 0

    def write(self, data: bytes) -> None:
        for piece in self._gunzip.feed(data) if self._gunzip else (data,):
            super().write(piece)
            end, newline, following = piece.partition(b"\n")
            if newline:
                self._read_line(bytes(self._unfinished_line) + end)
                self._unfinished_line.clear()
                *lines, end = following.split(b"\n")
                for line in lines:
                    self._read_line(line)
            room = self._reader.limits.max_line_bytes + 1 - len(self._unfinished_line)  # enough to know that it is too long
            self._unfinished_line += end[:room]

    def commit(self) -> StoredObject:
        if self._gunzip:
            self._gunzip.finish()
        if self._unfinished_line:
            self._read_line(bytes(self._unfinished_line))
        self._refuse_problems()
        return super().commit()

    def _read_line(self, line: bytes) -> None:
        self.example_count += self._reader.feed(line) is not None
        if self._reader.line_count > self._reader.limits.max_lines:
            self._refuse_problems()  # now: what follows changes nothing, and may be millions of lines

    def _refuse_problems(self) -> None:
        problems = self._reader.problems
        if problems:
            raise InvalidFile(
                f"the file can't be used for training: {summarise_problems(problems, self._reader.problem_count)}",
                code=problems[0].code,
                param="file",
                extra={"problems": [{"line": each.line, "code": each.code, "message": each.message} for each in problems]},
            )
        if self.example_count == 0:
            raise InvalidFile("the file is empty: a training file has one example a line", code="invalid_n_examples", param="file")
