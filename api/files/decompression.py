"""gzip, decompressed as it streams, with bounds on what may come out of it."""

import zlib
from collections.abc import Iterator

from core.errors import InvalidFile, RequestTooLarge

PIECE_BYTES = 1 << 20
MAX_RATIO = 200
"""Decompressed to compressed size; text rarely exceeds 20."""
RATIO_FREE_BYTES = 8 << 20
"""Decompressed size from which on the ratio counts: short repetitive files are no bomb."""
MAX_MEMBERS = 1000
"""gzip streams one after another, of which each costs something even if it is empty."""


class Gunzip:
    """Feed it compressed bytes, at most `max_bytes`. Yields pieces of at most PIECE_BYTES, so that a bomb is noticed before it fills
    memory; never an empty one."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._members = 1
        self._inflater = zlib.decompressobj(wbits=31)
        self._in_bytes = 0
        self._out_bytes = 0

    def feed(self, data: bytes) -> Iterator[bytes]:
        self._in_bytes += len(data)
        if self._in_bytes > self._max_bytes:
            raise RequestTooLarge(f"the compressed file is larger than {self._max_bytes:,} bytes", code="file_too_large", param="file")
        while data:
            if self._inflater.eof:
                data = data.lstrip(b"\x00")  # padding between and after members
                if not data:
                    return
                self._members += 1
                if self._members > MAX_MEMBERS:
                    raise InvalidFile(f"the file has more than {MAX_MEMBERS:,} gzip members", code="invalid_gzip", param="file")
                self._inflater = zlib.decompressobj(wbits=31)
            try:
                piece = self._inflater.decompress(data, PIECE_BYTES)
            except zlib.error as error:
                raise InvalidFile(f"the file is named .gz but is not valid gzip: {error}", code="invalid_gzip", param="file") from error
            self._out_bytes += len(piece)
            if self._out_bytes > RATIO_FREE_BYTES and self._out_bytes > MAX_RATIO * self._in_bytes:
                raise InvalidFile(f"the file decompresses to more than {MAX_RATIO} times its size", code="compression_ratio", param="file")
            if piece:
                yield piece
            data = self._inflater.unused_data if self._inflater.eof else self._inflater.unconsumed_tail

    def finish(self) -> None:
        """Raises InvalidFile where the stream is cut off."""
        if self._in_bytes and not self._inflater.eof:
            raise InvalidFile("the file is named .gz but its gzip stream is cut off", code="invalid_gzip", param="file")
