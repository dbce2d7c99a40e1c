"""`guard watch`: how stdin is cut into chunks."""

import io

import pytest

from guard.cli.watch import chunks
from guard.errors import InvalidInput


class Dripping(io.BytesIO):
    """Gives a byte at a time, as a slow program does."""

    def read1(self, _size=-1):
        return super().read1(1)


@pytest.mark.parametrize(
    ("raw", "size", "expected"),
    [
        ("", None, []),
        ("", 3, []),
        ("one\ntwo\n", None, ["one\n", "two\n"]),
        ("one\n\nno end", None, ["one\n", "\n", "no end"]),
        ("abcdefg", 3, ["abc", "def", "g"]),
        ("朋友🙂x", 2, ["朋友", "🙂x"]),
    ],
)
@pytest.mark.parametrize("stream", [io.BytesIO, Dripping])
def test_chunks(raw, size, expected, stream):
    assert list(chunks(stream(raw.encode()), size)) == expected


def test_a_chunk_comes_as_soon_as_it_is_there():
    source = Dripping(b"abcdef")
    found = chunks(source, 2)
    assert next(found) == "ab"
    assert source.tell() == 2


@pytest.mark.parametrize(("raw", "size", "at"), [(b"ok\n\xffno", None, 3), (b"ok\xff", 2, 2), (b"ok\xe6\x9c", 2, 2)])
def test_bytes_that_are_not_utf8(raw, size, at):
    with pytest.raises(InvalidInput, match=f"stdin is not valid UTF-8: byte 0x{raw[at]:02x} at offset {at}"):
        list(chunks(io.BytesIO(raw), size))
