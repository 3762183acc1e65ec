"""Text files as text: encodings, and files that are compressed."""

import codecs
import zlib

from ..errors import FileError, one_line
from ..files import check_room, read_bytes

_BOMS = (  # the longer first: that of UTF-32 begins as that of UTF-16 does
    (codecs.BOM_UTF32_LE, "utf-32"), (codecs.BOM_UTF32_BE, "utf-32"), (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"), (codecs.BOM_UTF8, "utf-8-sig"),
)  # fmt: skip
_GZIP, _ZIP = b"\x1f\x8b", b"PK\x03\x04"
_PIECE = 1 << 20  # bytes unpacked at once


def read_text(path, encoding=None, *, factor=1, what="its text"):
    """The text of a file that is UTF-8, begins with a byte order mark or is in the ``encoding`` named; of a .gz file
    what it holds.

    factor: how many times its size what is done with it takes in memory, see ``check_room``. Raises FileError that
    names the file, and the line where it is not of the encoding; ValueError for an encoding that there is not; OSError.
    """
    if encoding is not None:
        check_encoding(encoding)
    data = read_bytes(path, factor=factor, what=what)
    if data.startswith(_GZIP):
        data = _unpack(path, data, factor, what)
    if data.startswith(_ZIP):
        raise FileError(f"{path}: is a zip archive, as .xlsx and .ods files are: save the table as CSV")
    found = next((name for mark, name in _BOMS if data.startswith(mark)), None)
    if found is None and encoding is None and b"\0" in data[:2] and len(data) > 3:
        raise FileError(f"{path}: is UTF-16 without a byte order mark, it seems: say --encoding utf-16-le or utf-16-be")
    name = found or encoding or "utf-8"
    try:
        return data.decode(name)
    except UnicodeDecodeError as error:
        line, byte = data.count(b"\n", 0, error.start) + 1, data[error.start]
        cure = (
            "" if encoding else ". Of Windows or Excel? --encoding cp1252; of another system: its name, such as latin-1"
        )
        raise FileError(
            f"{path}: line {line} is not {name.upper()}: byte {error.start} is {byte:#04x}{cure}"
        ) from error
    except UnicodeError as error:
        raise FileError(f"{path}: is not {name.upper()}: {one_line(error)}") from error


def check_encoding(name):
    """Raise ValueError unless Python knows a text encoding of this name."""
    try:
        "".encode(name)
    except (LookupError, UnicodeError, ValueError) as error:
        raise ValueError(f"encoding should be a name such as utf-8, cp1252 or utf-16, got {name!r}") from error


def _unpack(path, data, factor, what):
    """What a gzip file holds; its size is looked at while it grows."""
    pieces, size = [], 0
    try:
        while data:
            stream = zlib.decompressobj(wbits=31)
            while not stream.eof:
                piece = stream.decompress(data, _PIECE)
                data = stream.unconsumed_tail
                if not piece and not data and not stream.eof:
                    raise FileError(f"{path}: is a gzip file that is cut off")
                size += len(piece)
                check_room(path, factor * size, what)
                pieces.append(piece)
            data = stream.unused_data.lstrip(b"\0")
    except zlib.error as error:
        raise FileError(f"{path}: is a gzip file that is damaged: {one_line(error)}") from error
    return b"".join(pieces)
