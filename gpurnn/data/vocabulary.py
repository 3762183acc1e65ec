"""Text as numbers: vocabularies of characters and of words, and files of any size read as ids without holding them in
memory.
"""

import codecs
import collections
import os
import re
import sys
import tempfile

import numpy as np

from ..errors import FileError, check_number
from ..files import check_room, max_memory, naming, open_regular

IN_MEMORY = 64 << 20  # bytes of text up to which its ids stay in memory if they may; else they lie in a temporary file
_PIECE = 1 << 20  # bytes read at once
_BYTE_COST, _LINE_COST = 8, 400  # bytes of memory for a byte of a text or a table, and for a line of a table
_WORD_COST = 150  # bytes of memory for a different word that is counted
_LONGEST_WORD = 1 << 24  # characters; a longer piece without white space is cut
UNKNOWN = 0  # id of every character or word that is not in the vocabulary
_WORD = re.compile(r"<\w+>|\w+(?:['\u2019]\w+)*|\n|[^\w\s]")


class Vocabulary:
    """The characters of a text in code-point order, behind one entry (id 0) for every unknown character.

    characters: a string; order and repetition do not matter. ``Vocabulary(vocabulary.entries)`` is the same vocabulary
    again, so this one string is what a JSON file needs to hold.

    >>> vocabulary = Vocabulary("banana")
    >>> vocabulary.encode("nabx")
    array([3, 1, 2, 0], dtype=uint8)
    """

    def __init__(self, characters):
        self.entries = "".join(sorted(set(characters)))
        if not self.entries:
            raise ValueError("a vocabulary needs at least one character")
        points = _code_points(self.entries)
        self.dtype = np.min_scalar_type(len(points))
        self._ids = np.zeros(int(points[-1]) + 2, self.dtype)  # by code point; the last entry is for all beyond
        self._ids[points] = np.arange(1, len(points) + 1)
        self._points = np.concatenate([[ord("\N{REPLACEMENT CHARACTER}")], points]).astype("<u4")

    def __len__(self):
        return len(self._points)

    def encode(self, text):
        """Ids of ``text``, (len(text),), the smallest unsigned type that fits; unknown characters become 0."""
        return self._ids[np.minimum(_code_points(text), len(self._ids) - 1)]

    def decode(self, ids):
        """The text of ``ids``; id 0 becomes U+FFFD. Raises ValueError for an id outside the vocabulary."""
        ids = np.asarray(ids, dtype=np.int64).reshape(-1)
        if ids.size and not 0 <= ids.min() <= ids.max() < len(self):
            raise ValueError(f"ids should be from 0 to {len(self) - 1}, got {ids.min()} to {ids.max()}")
        return self._points[ids].tobytes().decode("utf-32-le", "surrogatepass")

    def unknown(self, text):
        """The different characters of ``text`` that this vocabulary does not have, sorted, as a string."""
        return "".join(sorted(set(text) - set(self.entries)))


def words(text):
    """The words, numbers, line ends and single punctuation marks of ``text`` in order; other white space parts them.

    An apostrophe inside a word belongs to it, and ``<unk>`` and its like are one word.

    >>> words("It's time,\\nMr. B.")
    ["It's", 'time', ',', '\\n', 'Mr', '.', 'B', '.']
    """
    return _WORD.findall(text)


class WordVocabulary:
    """Words and punctuation marks (see ``words``) behind one entry (id 0) for every unknown word.

    entries: a list of different words, what a JSON file needs to hold; ``count_words`` makes one from a text.

    >>> vocabulary = WordVocabulary(["the", "end", "."])
    >>> vocabulary.encode("the  end of it.")
    array([1, 2, 0, 0, 3], dtype=uint8)
    """

    def __init__(self, entries):
        self.entries = list(entries)
        if not self.entries:
            raise ValueError("a vocabulary needs at least one word")
        self.dtype = np.min_scalar_type(len(self.entries))
        self._ids = {word: number for number, word in enumerate(self.entries, 1)}
        self._ids["<unk>"] = UNKNOWN

    def __len__(self):
        return len(self.entries) + 1

    def encode(self, text):
        """Ids of the words of ``text``, (words,), the smallest unsigned type that fits; unknown words become 0."""
        return np.array([self._ids.get(word, UNKNOWN) for word in words(text)], self.dtype)

    def decode(self, ids):
        """Readable text of ``ids``: words parted by spaces, none before a comma or behind an opening bracket."""
        text, before, quoted = [], "\n", False
        for index in np.asarray(ids, dtype=np.int64).reshape(-1).tolist():
            word = self.entries[index - 1] if index else "<unk>"
            closes = word in ".,;:!?)]}%\u2026\u201d\u2019\n" or (word == '"' and quoted)
            opened = before in "([{$\u201c\u2018\n" or (before == '"' and quoted)
            text.append(word if closes or opened else " " + word)
            quoted ^= word == '"'
            before = word
        return "".join(text)

    def unknown(self, text):
        """The different words of ``text`` that this vocabulary does not have, sorted, as a string."""
        return " ".join(sorted(set(words(text)) - set(self._ids)))


def count_words(texts, size=None):
    """The different words of some texts, the commonest first (equal ones by code points), at most ``size`` of them."""
    counts = collections.Counter()
    for text in texts:
        counts.update(words(text))
        check_room("the text", _WORD_COST * len(counts), f"its {len(counts):,} different words")
    counts.pop("<unk>", None)
    return sorted(counts, key=lambda word: (-counts[word], word))[:size]


def vocabulary_of(entries):
    """The vocabulary that has these ``entries``: of characters for a string, of words for a list."""
    return Vocabulary(entries) if isinstance(entries, str) else WordVocabulary(entries)


def check_vocabulary(level, entries):
    """Raise TypeError unless ``entries`` are those of a vocabulary of characters, or of words, as ``level`` says."""
    words = isinstance(entries, list) and all(isinstance(word, str) for word in entries)
    if not (words if level == "words" else isinstance(entries, str)):
        raise TypeError(f"vocabulary should be {'a list of strings' if level == 'words' else 'a string'}")


def _code_points(text):
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype="<u4")


def builtin_text():
    """About 400,000 characters of English that come with Python: the topics of its ``help()``.

    Without indentation, tables and underlines, so that a small model spends its minute on English.
    """
    from pydoc_data.topics import topics

    lines = "\n\n".join(topics[name] for name in sorted(topics)).splitlines()
    prose = [line.strip() for line in lines if not line.lstrip().startswith(("|", "+", "**", "==", "--", "~~"))]
    return "\n".join(prose) + "\n"


def read_text(files=(), vocabulary=None, folder=None, *, level="characters", size=None):
    """Ids and vocabulary of UTF-8 files joined in order, or of ``builtin_text()`` where there is none.

    vocabulary: the one to use; None makes one of all characters in the files, or with ``level="words"`` of their
    commonest ``size`` words (a second pass over them).
    folder: where the ids of more than ``IN_MEMORY`` bytes of text are put, or of as many as would take more memory than
    a file may, in a temporary file that goes away with the returned array; None is the system's folder for such files.

    Returns (ids, vocabulary); ids (characters,) or (words,), memory-mapped if large. A byte-order mark is dropped, line
    ends stay as they are. Raises ValueError for a file that is not UTF-8, with the place, OSError for one that cannot
    be read.
    """

    def pieces():
        if not files:
            yield builtin_text()
        for path in files:
            yield from _pieces(path)

    def texts():
        return _unbroken(pieces()) if level == "words" else pieces()

    bytes_in_all = sum(os.path.getsize(path) for path in files)
    if files:
        check_room(", ".join(map(str, files)), _BYTE_COST * min(bytes_in_all, _PIECE), "a piece of the text")
    if vocabulary is None:
        if level == "words":
            with naming(files):
                entries = count_words(texts(), size)
        else:
            seen = np.zeros(0x110000, dtype=bool)
            for piece in texts():
                seen[_code_points(piece)] = True
            entries = "".join(map(chr, np.flatnonzero(seen)))
        if not entries:
            raise ValueError(f"the text is empty: {', '.join(map(str, files))}")
        vocabulary = vocabulary_of(entries)
    if bytes_in_all <= min(IN_MEMORY, max_memory() / _BYTE_COST):
        ids = np.concatenate([np.zeros(0, vocabulary.dtype), *map(vocabulary.encode, texts())])
        return ids, vocabulary
    # Written, not mapped and filled: a full disk is then an OSError instead of a killed process.
    with tempfile.TemporaryFile(dir=folder) as file:
        for piece in texts():
            file.write(vocabulary.encode(piece).tobytes())
        file.flush()
        return np.memmap(file, vocabulary.dtype, mode="r"), vocabulary


def _unbroken(pieces):
    """The same text in pieces that end with a space or a line end, so that no word is cut."""
    rest = ""
    for piece in pieces:
        text = rest + piece
        cut = max(text.rfind(" "), text.rfind("\n")) + 1
        if not cut and len(text) > _LONGEST_WORD:
            cut = len(text)
        if cut:
            yield text[:cut]
        rest = text[cut:]
    if rest:
        yield rest


def read_lines(path):
    """The lines of a UTF-8 file without their ends (``\\n``, ``\\r\\n``), as a list; errors as of ``read_text``."""
    pieces, room = [], 0
    for piece in _pieces(path):
        room += _BYTE_COST * len(piece) + _LINE_COST * piece.count("\n")
        check_room(path, room, "its lines")
        pieces.append(piece)
    lines = "".join(pieces).split("\n")
    return [line.removesuffix("\r") for line in (lines if lines[-1] else lines[:-1])]


def input_lines(size):
    """The lines of the standard input without their ends, in lists of ``size``; None: in one list.

    Lines end at a line feed, with or without a carriage return before it, and nowhere else. Raises ValueError, with
    the line, for what is not UTF-8, and where one list would take more memory than one file may.
    """
    lines, room = [], 0
    for number, line in enumerate(sys.stdin.buffer, 1):
        room += _LINE_COST + _BYTE_COST * len(line)
        check_room("standard input", room)
        try:
            text = line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            raise FileError(f"standard input, line {number}: is not UTF-8 text ({error.reason})") from None
        lines.append(text.removesuffix("\n").removesuffix("\r"))
        if len(lines) == size:
            yield lines
            lines, room = [], 0
    if lines:
        yield lines


def _pieces(path):
    """The text of one UTF-8 file, about a megabyte at a time."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    with open_regular(path) as file:
        offset = len(codecs.BOM_UTF8) if file.read(len(codecs.BOM_UTF8)) == codecs.BOM_UTF8 else 0
        file.seek(offset)
        while True:
            data = file.read(_PIECE)
            waiting = len(decoder.getstate()[0])
            try:
                text = decoder.decode(data, final=not data)
            except UnicodeDecodeError as error:
                place = offset - waiting + error.start
                raise FileError(
                    f"{path}: is not UTF-8 text ({error.reason} at byte {place}). "
                    "Another encoding? Convert it: iconv -f latin1 -t utf-8"
                ) from None
            offset += len(data)
            if text:
                yield text
            if not data:
                return


def split(ids, fraction):
    """(training ids, validation ids): the last ``fraction`` of the text is for validation; views, no copies."""
    cut = len(ids) - round(len(ids) * check_number("valid", fraction, 0, 1, high_open=True))
    return ids[:cut], ids[cut:]
