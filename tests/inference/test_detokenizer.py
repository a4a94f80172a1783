import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from inference.detokenizer import StopStrings, TextDecoder, TokenTable, byte_alphabet

MULTIBYTE = "héllo 🤖🏽 日本語 — naïve\n\tx\u200d👩‍🚀 done"


@pytest.fixture(scope="module")
def byte_level() -> Tokenizer:
    """One token per byte: every character beyond ASCII is cut into pieces."""
    vocabulary = {character: index for index, character in enumerate(byte_alphabet())}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|end|>"])
    return tokenizer


@pytest.fixture(scope="module")
def byte_fallback() -> Tokenizer:
    """As SentencePiece models have it: words with a leading mark, unknown characters as <0xNN>, a stripped first space."""
    pieces = ["<unk>", "▁", "▁hello", "▁world", *(f"<0x{byte:02X}>" for byte in range(256))]
    tokenizer = Tokenizer(models.BPE(vocab={piece: index for index, piece in enumerate(pieces)}, merges=[], unk_token="<unk>", byte_fallback=True))
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(steps)
    return tokenizer


def pieces(tokenizer: Tokenizer, token_ids: list[int]) -> list[str]:
    decoder = TextDecoder(tokenizer)
    return [*(decoder.feed(token_id) for token_id in token_ids), decoder.finish()]


def test_pieces_are_whole_characters_and_join_to_the_text(byte_level: Tokenizer) -> None:
    ids = byte_level.encode(MULTIBYTE).ids
    assert len(ids) == len(MULTIBYTE.encode())
    shown = pieces(byte_level, ids)
    assert "".join(shown) == MULTIBYTE
    assert not any("\ufffd" in piece for piece in shown)
    assert [len(piece) for piece in shown[:-1]].count(0) == len(ids) - len(MULTIBYTE)


@given(st.lists(st.integers(0, 256), max_size=40))
def test_any_bytes_join_to_what_the_tokenizer_decodes(byte_level: Tokenizer, token_ids: list[int]) -> None:
    assert "".join(pieces(byte_level, token_ids)) == byte_level.decode(token_ids)


def test_an_unfinished_character_shows_up_at_the_end_only(byte_level: Tokenizer) -> None:
    ids = byte_level.encode("a🤖").ids[:-1]
    assert pieces(byte_level, ids) == ["a", "", "", "", "\ufffd"]


def test_special_tokens_are_no_text_unless_asked_for(byte_level: Tokenizer) -> None:
    ids = byte_level.encode("a<|end|>b").ids
    assert "".join(pieces(byte_level, ids)) == "ab"
    decoder = TextDecoder(byte_level, skip_special_tokens=False)
    assert "".join([*map(decoder.feed, ids), decoder.finish()]) == "a<|end|>b"


def test_spaces_and_bytes_of_sentencepiece_survive(byte_fallback: Tokenizer) -> None:
    ids = [byte_fallback.token_to_id(piece) for piece in ("▁hello", "▁world", "▁", "<0xE2>", "<0x82>", "<0xAC>", "▁world")]
    assert pieces(byte_fallback, ids) == ["hello", " world", " ", "", "", "€", " world", ""]


def first_stop(text: str, stops: tuple[str, ...]) -> tuple[str, str | None]:
    """Brute force: the text before the stop string that is complete first."""
    for end in range(1, len(text) + 1):
        ending = [stop for stop in stops if text[:end].endswith(stop)]
        if ending:
            longest = max(ending, key=len)
            return text[: end - len(longest)], longest
    return text, None


@given(st.text("ab", max_size=30), st.lists(st.text("ab", min_size=1, max_size=4), max_size=3, unique=True), st.data())
def test_stop_strings_never_leak_however_the_text_is_cut(text: str, stops: list[str], data: st.DataObject) -> None:
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=8)))
    filter_ = StopStrings(tuple(stops))
    shown = [filter_.feed(text[start:end]) for start, end in itertools.pairwise([0, *cuts, len(text)])]
    shown.append(filter_.finish())
    assert ("".join(shown), filter_.found) == first_stop(text, tuple(stops))


def test_only_a_possible_beginning_is_held_back() -> None:
    filter_ = StopStrings(("END",))
    assert filter_.feed("text E") == "text "
    assert filter_.feed("N") == ""
    assert filter_.feed("ough") == "ENough"
    assert StopStrings(()).feed("anything") == "anything"


def test_single_tokens_have_their_own_bytes(byte_level: Tokenizer, byte_fallback: Tokenizer) -> None:
    table = TokenTable(byte_level)
    assert b"".join(map(table.bytes_of, byte_level.encode(MULTIBYTE).ids)) == MULTIBYTE.encode()
    assert table.text_of(byte_level.encode("🤖").ids[0]) == "\ufffd"
    assert table.bytes_of(byte_level.token_to_id("<|end|>")) == b"<|end|>"
    assert table.bytes_of(10_000) == b""
    table = TokenTable(byte_fallback)
    assert table.bytes_of(byte_fallback.token_to_id("<0xE2>")) == b"\xe2"
    assert table.text_of(byte_fallback.token_to_id("▁world")) == " world"
