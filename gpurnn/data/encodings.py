"""Text files as people have them: every text that a task reads is opened here.

UTF-8 with or without a byte-order mark, UTF-16 and UTF-32 with one, any encoding that Python knows where it is named,
and each of these compressed by gzip. What is not text is refused, and its kind is named: a Word document, a PDF, a zip
archive.
"""

import codecs
import contextlib
import gzip
import re
import sys
import zlib
from pathlib import Path

import numpy as np

from ..errors import FileError, one_line, show_size
from ..files import check_room, max_memory, open_regular

BYTE_COST, LINE_COST = 8, 400  # bytes of memory for a byte of a text or a table, and for a line of a table
_PIECE = 1 << 20  # bytes read at once
_HEAD = 512  # first bytes, which show what kind of file it is; a tar archive shows it after byte 257
_GZIP = b"\x1f\x8b"
_MARKS = (  # byte-order marks; that of UTF-32 begins like that of UTF-16
    (codecs.BOM_UTF8, "utf-8"), (codecs.BOM_UTF32_LE, "utf-32-le"), (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"), (codecs.BOM_UTF16_BE, "utf-16-be"),
)  # fmt: skip
_ZIPPED = {
    ".docx": "a Word document", ".odt": "an OpenDocument text", ".xlsx": "an Excel workbook",
    ".ods": "an OpenDocument spreadsheet", ".epub": "an e-book", ".pptx": "a PowerPoint presentation",
}  # fmt: skip
_KINDS = (  # how a file begins, what it is then, and what to do
    (rb"%PDF-", "a PDF", "save its text as a .txt file"),
    (rb"\{\\rtf", "a rich-text document", "save it as plain text"),
    (rb"\xd0\xcf\x11\xe0", "a Word or Excel document of the old format", "save it as plain text, or as CSV"),
    (rb"BZh[1-9]1AY&SY", "compressed by bzip2", "decompress it, or use gzip"),
    (rb"\xfd7zXZ\0", "compressed by xz", "decompress it, or use gzip"),
    (rb"\x28\xb5\x2f\xfd", "compressed by zstd", "decompress it, or use gzip"),
    (rb"7z\xbc\xaf\x27\x1c", "a 7-Zip archive", "unpack it first"),
    (rb"(?s).{257}ustar", "a tar archive", "unpack it first"),
    (rb"\x89PNG|\xff\xd8\xff|GIF8[79]a", "a picture", "expected text"),
    (rb"(?s)RIFF.{4}WAVE|ID3[\x02-\x04]|OggS\0|fLaC\0", "a sound file", "expected text"),
    (rb"MThd\0", "a MIDI file", "expected text"),
    (rb"PAR1", "a Parquet table", "save it as CSV"),
    (rb"SQLite format 3\0", "an SQLite database", "save its table as CSV"),
    (_GZIP, "compressed by gzip twice", "decompress it first"),
)
_BINARY = re.compile(rb"[\x00-\x06\x0e-\x1a\x1c-\x1f]")  # control characters that no text has; escape is not one


def check_encoding(name, value):
    """Return ``value``, the name of an encoding of text; raise ValueError if Python knows no encoding of that name."""
    try:
        "".encode(value)
        codecs.getincrementaldecoder(value)
    except (LookupError, ValueError):
        raise ValueError(f"{name} should be an encoding such as utf-8, latin-1 or cp1252, got {value!r}") from None
    return value


def text_pieces(path, encoding=None):
    """The text of one file, about a megabyte at a time, without its byte-order mark; line ends stay as they are.

    encoding: that of a file without a byte-order mark; a mark takes precedence. None is UTF-8. A file compressed by
    gzip is decompressed, up to ``max_memory()`` bytes. Raises FileError that names the file, and the place where there
    is one, for what is not text in this encoding; OSError where the file cannot be read.
    """
    with _opened(path) as file:
        head = file.read(_HEAD)
        _refuse_other_kinds(path, head)
        marked, used = next(((name, len(mark)) for mark, name in _MARKS if head.startswith(mark)), (None, 0))
        if not (marked or encoding):
            _refuse_utf16_without_mark(path, head)
        file.seek(used)
        yield from _decoded(path, file, marked or encoding or "utf-8", used)


def read_lines(path, encoding=None):
    """The lines of a text file without their ends (``\\n``, ``\\r\\n``), as a list; errors as of ``text_pieces``."""
    return lines_of(whole_text(path, encoding))


def lines_of(text):
    """The lines of a text without their ends, which are ``\\n`` and ``\\r\\n``, as a list."""
    lines = text.split("\n")
    return [line.removesuffix("\r") for line in (lines if lines[-1] else lines[:-1])]


def whole_text(path, encoding=None, *, cost=BYTE_COST, line_cost=LINE_COST, what="its lines"):
    """The text of a file as one string; errors as of ``text_pieces``.

    cost, line_cost: bytes of memory that what is made of it takes for each character and each line; FileError, which
    calls it ``what``, where that is more than one file may take.
    """
    pieces, room = [], 0
    for piece in text_pieces(path, encoding):
        room += cost * len(piece) + line_cost * piece.count("\n")
        check_room(path, room, what)
        pieces.append(piece)
    return "".join(pieces)


def input_lines(size, encoding=None):
    """The lines of the standard input without their ends, in lists of ``size``; None: in one list.

    Lines end at a line feed, with or without a carriage return before it, and nowhere else. Raises FileError, with
    the line, for what is not text in this encoding (None: UTF-8), and where one list would take more memory than one
    file may.
    """
    encoding = check_encoding("encoding", encoding or "utf-8")
    lines, room = [], 0
    for number, line in enumerate(sys.stdin.buffer, 1):
        room += LINE_COST + BYTE_COST * len(line)
        check_room("standard input", room)
        try:
            text = line.decode(encoding)
        except UnicodeError as error:
            reason = getattr(error, "reason", str(error))
            name = f"standard input, line {number}"
            raise FileError(f"{name}: is not {_shown(encoding)} text ({reason}). {_ADVICE}") from None
        if number == 1:
            text = text.removeprefix("\ufeff")
        lines.append(text.removesuffix("\n").removesuffix("\r"))
        if len(lines) == size:
            yield lines
            lines, room = [], 0
    if lines:
        yield lines


def text_files(paths, endings=(".txt",)):
    """These files as ``Path``, and for each folder among them the files in it that end with one of ``endings``, in
    order; ``.gz`` after an ending does not matter. Raises FileError for a folder that holds none."""
    return [file for path in map(Path, paths) for file in (_inside(path, endings) if path.is_dir() else [path])]


def ending(path):
    """The ending of a file's name, without the ``.gz`` of a compressed one, in lower case: ".csv" of "A.CSV.gz"."""
    path = Path(path)
    return Path(path.stem if path.suffix.lower() == ".gz" else path.name).suffix.lower()


def _inside(folder, endings):
    files = sorted(file for file in folder.iterdir() if ending(file) in endings and file.name[0] != ".")
    if not files:
        *others, last = endings
        shown = f"{', '.join(others)} or {last}" if others else last
        raise FileError(f"{folder}: holds no {shown} files")
    return files


# ---- opening


@contextlib.contextmanager
def _opened(path):
    """The bytes of a file, decompressed where gzip made them."""
    with open_regular(path) as file:
        compressed = file.read(len(_GZIP)) == _GZIP
        file.seek(0)
        if not compressed:
            yield file
            return
        with gzip.GzipFile(fileobj=file) as inside:
            yield _Decompressed(path, inside)


class _Decompressed:
    """Reads a file that gzip made, and no more bytes of it than one file may take."""

    def __init__(self, path, file):
        self.path, self.file = path, file

    def read(self, size):
        try:
            data = self.file.read(size)
        except (EOFError, OSError, zlib.error) as error:
            raise FileError(f"{self.path}: cannot be decompressed: {one_line(error)}") from error
        if self.file.tell() > max_memory():
            raise FileError(
                f"{self.path}: decompresses to more than {show_size(max_memory())}, the limit of one file. If it is "
                "right, allow more: --max-memory 4G, for instance; or decompress it first"
            )
        return data

    def seek(self, offset):
        self.file.seek(offset)


def _refuse_other_kinds(path, head):
    """Raise FileError if the first bytes are those of a file that is not text."""
    if head.startswith((b"PK\x03\x04", b"PK\x05\x06")):
        kind = _ZIPPED.get(ending(path))
        kind, cure = (kind, "save it as plain text, or as CSV") if kind else ("a zip archive", "unpack it first")
        raise FileError(f"{path}: is {kind}, not text: {cure}")
    for begins, kind, cure in _KINDS:
        if re.match(begins, head):
            raise FileError(f"{path}: is {kind}, not text: {cure}")


def _refuse_utf16_without_mark(path, head):
    """Raise FileError where every other byte is zero: as UTF-8 that would be a text of zeros and letters."""
    zeros = np.frombuffer(head[: len(head) // 2 * 2], np.uint8).reshape(-1, 2) == 0
    if len(zeros) < 4:
        return
    first, second = zeros.mean(axis=0)
    for name, few, many in (("utf-16-le", first, second), ("utf-16-be", second, first)):
        if few < 0.1 and many > 0.5:
            raise FileError(f"{path}: looks like UTF-16 without a byte-order mark: if it is, add --encoding {name}")


# ---- decoding


_ADVICE = "Save it as UTF-8, or name its encoding: --encoding latin-1 (or cp1252, cp1251, gb18030, shift_jis, ...)"


def _decoded(path, file, encoding, offset):
    decoder, foreign, line = codecs.getincrementaldecoder(encoding)(), False, 1
    while True:
        data = file.read(_PIECE)
        waiting = len(decoder.getstate()[0])
        try:
            text = decoder.decode(data, final=not data)
        except UnicodeError as error:
            raise FileError(f"{path}: {_complaint(encoding, error, offset - waiting, line, foreign)}") from None
        offset += len(data)
        foreign, line = foreign or not text.isascii(), line + text.count("\n")
        if text:
            yield text
        if not data:
            return


def _complaint(encoding, error, offset, line, foreign):
    """What is wrong with bytes that do not decode, and what to do.

    offset, line: place in the file of the bytes that were decoded. foreign: whether characters before these were not
    ASCII.
    """
    if not isinstance(error, UnicodeDecodeError):  # UTF-16 that should begin with a mark
        return f"is not {_shown(encoding)} text ({error}). Without a byte-order mark the order is named: utf-16-le"
    place, reason = offset + error.start, error.reason
    data = error.object
    line += data.count(b"\n", 0, error.start)
    text = f"is not {_shown(encoding)} text ({reason} in line {line}, at byte {place})"
    if _BINARY.search(data[: error.start + 256]):
        return f"{text}, but a binary file: expected text"
    if encoding != "utf-8":
        return f"{text}. Is that its encoding? Without --encoding it is read as UTF-8"
    before = data[: error.start].decode("utf-8", "ignore")
    if foreign or not before.isascii():
        return f"{text}. What comes before is UTF-8: the file is damaged there, or cut off"
    return f"{text}. {_ADVICE}"


def _shown(encoding):
    return encoding.upper().removesuffix("-LE").removesuffix("-BE") if encoding.startswith("utf") else encoding
