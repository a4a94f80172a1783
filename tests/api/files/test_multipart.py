import pytest
from hypothesis import given
from hypothesis import strategies as st

from api.files.multipart import MAX_PARTS, MultipartReader
from core.errors import BadRequest

CONTENT_TYPE = "multipart/form-data; boundary=edge"


class Collected:
    def __init__(self) -> None:
        self.parts: list[tuple[str, str | None, bytes]] = []
        self.ended = 0

    def begin_part(self, name: str, filename: str | None) -> None:
        self.parts.append((name, filename, b""))

    def part_data(self, data: bytes) -> None:
        name, filename, content = self.parts[-1]
        self.parts[-1] = (name, filename, content + data)

    def end_part(self) -> None:
        self.ended += 1


def part(disposition: str, content: bytes) -> bytes:
    return b"--edge\r\nContent-Disposition: form-data; " + disposition.encode() + b"\r\n\r\n" + content + b"\r\n"


def read(body: bytes, chunk_bytes: int = 1 << 20, content_type: str = CONTENT_TYPE) -> Collected:
    collected = Collected()
    reader = MultipartReader(content_type, collected)
    for start in range(0, len(body), chunk_bytes):
        reader.feed(body[start : start + chunk_bytes])
    reader.finish()
    return collected


@given(chunk_bytes=st.integers(1, 60), content=st.binary(max_size=80) | st.sampled_from([b"\r\n--edg", b"\r\n--edge", b"\r\n", b"--edge--"]))
def test_chunks_may_end_anywhere(chunk_bytes: int, content: bytes) -> None:
    if b"\r\n--edge" in content:
        content = content.replace(b"\r\n--edge", b"")
    body = part('name="purpose"', b"evals") + part('name="file"; filename="a b.bin"', content) + b"--edge--\r\n"
    collected = read(body, chunk_bytes)
    assert collected.parts == [("purpose", None, b"evals"), ("file", "a b.bin", content)]
    assert collected.ended == 2


def test_names_are_utf8() -> None:
    assert read(part('name="file"; filename="Grüße ✓.jsonl"', b"") + b"--edge--").parts[0][1] == "Grüße ✓.jsonl"
    latin1 = b'--edge\r\nContent-Disposition: form-data; name="file"; filename="\xe9"\r\n\r\n\r\n--edge--'
    assert read(latin1).parts[0][1] == "�"


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"--edge",
        b"--other\r\n",
        part('name="file"', b"x"),
        part('name="file"', b"x") + b"--edge",
        part('filename="x"', b"x") + b"--edge--",
        b"--edge\r\n\r\nx\r\n--edge--",
        b"--edge\r\nContent-Disposition: form-data; name=" + b"x" * 100_000,
        b"".join(part(f'name="{n}"', b"") for n in range(MAX_PARTS + 1)) + b"--edge--",
    ],
)
def test_malformed_body(body: bytes) -> None:
    with pytest.raises(BadRequest) as caught:
        read(body, 1000)
    assert caught.value.code == "invalid_multipart"


@pytest.mark.parametrize("content_type", [None, "", "application/json", "multipart/form-data", "multipart/mixed; boundary=edge"])
def test_other_content_types(content_type: str | None) -> None:
    with pytest.raises(BadRequest) as caught:
        MultipartReader(content_type, Collected())
    assert caught.value.code == "invalid_content_type"


def test_boundary_that_is_too_long() -> None:
    with pytest.raises(BadRequest):
        MultipartReader("multipart/form-data; boundary=" + "x" * 1000, Collected())
