"""From token ids to text while they arrive: valid UTF-8 only, and nothing of a stop string.

Concatenated pieces equal the whole answer's text: the same path makes both.
"""

import re
from functools import lru_cache

from tokenizers import Tokenizer

REPLACEMENT = "\ufffd"
BYTE_PIECE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class TextDecoder:
    """Decodes one answer piece by piece.

    A tokenizer's decoder is not local (bytes of one character lie in several tokens, leading spaces are stripped), so
    each piece is the difference between two decodings of a short window that starts at a clean boundary.
    """

    def __init__(self, tokenizer: Tokenizer, *, skip_special_tokens: bool = True) -> None:
        self._tokenizer = tokenizer
        self._skip = skip_special_tokens
        self._window: list[int] = []
        self._decoded = 0  # how many ids of the window have been turned into text

    def feed(self, token_id: int) -> str:
        """The text that this token completes; empty where it ends inside a character."""
        self._window.append(token_id)
        text = self._new_text()
        return "" if text.endswith(REPLACEMENT) else self._commit(text)

    def finish(self) -> str:
        """What is left: bytes that never became a character, as replacement characters."""
        return self._commit(self._new_text())

    def _new_text(self) -> str:
        before = self._decode(self._window[: self._decoded])
        return self._decode(self._window)[len(before) :]

    def _commit(self, text: str) -> str:
        if text:  # a special token that decodes to nothing must not become the whole context of the next one
            self._window = self._window[self._decoded :]
        self._decoded = len(self._window)
        return text

    def _decode(self, token_ids: list[int]) -> str:
        return str(self._tokenizer.decode(token_ids, skip_special_tokens=self._skip))


class StopStrings:
    """Lets text through up to the first stop string, holding back whatever may turn out to be the start of one."""

    def __init__(self, stops: tuple[str, ...]) -> None:
        self._stops = stops
        self._held = ""
        self.found: str | None = None

    def feed(self, text: str) -> str:
        """The text that is safe to show. After a stop string was `found`, always empty."""
        if self.found is not None:
            return ""
        self._held += text
        matches = [(position + len(stop), position, stop) for stop in self._stops if (position := self._held.find(stop)) >= 0]
        if matches:
            _, position, self.found = min(matches)  # the first to be complete, however the text was cut into tokens
            return self._held[:position]
        return self._release(len(self._held) - self._longest_start())

    def finish(self) -> str:
        return self._release(len(self._held))

    def _longest_start(self) -> int:
        longest = max((len(stop) for stop in self._stops), default=1) - 1
        for length in range(min(longest, len(self._held)), 0, -1):
            if any(stop.startswith(self._held[-length:]) for stop in self._stops):
                return length
        return 0

    def _release(self, length: int) -> str:
        text, self._held = self._held[:length], self._held[length:]
        return text if self.found is None else ""


class TokenTable:
    """Single tokens as bytes and as text, for log-probabilities."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._added = frozenset(tokenizer.get_added_tokens_decoder())
        self._byte_level = "ByteLevel" in repr(tokenizer.decoder)

    def bytes_of(self, token_id: int) -> bytes:
        """The token's own bytes, which need not be valid UTF-8. Empty for ids that the tokenizer doesn't know."""
        piece = self._tokenizer.id_to_token(token_id)
        if piece is None:
            return b""
        if token_id in self._added:
            return piece.encode()
        if self._byte_level:
            alphabet = byte_alphabet()
            if all(character in alphabet for character in piece):
                return bytes(alphabet[character] for character in piece)
        if byte := BYTE_PIECE.fullmatch(piece):
            return bytes([int(byte[1], 16)])
        return piece.replace("\u2581", " ").encode()

    def text_of(self, token_id: int) -> str:
        return self.bytes_of(token_id).decode("utf-8", errors="replace")


@lru_cache
def byte_alphabet() -> dict[str, int]:
    """The characters that byte-level BPE writes bytes with: printable ones stand for themselves, others follow from 256."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + index): byte for index, byte in enumerate(others)}
