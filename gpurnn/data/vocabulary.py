"""Text as numbers: vocabularies of characters and of words, and files of any size read as ids, without all of the text
in memory.
"""

import collections
import itertools
import os
import re
import tempfile

import numpy as np

from ..errors import check_number
from ..files import check_room, max_memory, naming
from .encodings import BYTE_COST, text_pieces

IN_MEMORY = (
    64 << 20
)  # bytes of ids that stay in memory (if the limit allows it); more than this goes into a temporary file
_PIECE = 1 << 20  # bytes of text that are in memory at once
_WORD_COST = 150  # bytes of memory for each different word that is counted
_LONGEST_WORD = 1 << 24  # characters; a longer piece without white space is cut
UNKNOWN = 0  # id of every character or word that is not in the vocabulary
START_OF_TEXT = "\x02"  # ASCII's character of that name, which no text file has; one word, too
_WORD = re.compile(r"<\w+>|\w+(?:['\u2019]\w+)*|\n|[^\w\s]")


class Vocabulary:
    """The characters of a text in code-point order, after one entry (id 0) for all unknown characters.

    characters: a string; order and repetition do not matter. ``Vocabulary(vocabulary.entries)`` is the same vocabulary
    again, so this one string is what a JSON file needs to hold. begins: the character that stands before each document
    of a text; the attribute ``begins`` is its id, or None. Raises ValueError for one that the vocabulary does not have.

    >>> vocabulary = Vocabulary("banana")
    >>> vocabulary.encode("nabx")
    array([3, 1, 2, 0], dtype=uint8)
    """

    def __init__(self, characters, begins=None):
        self.entries = "".join(sorted(set(characters)))
        if not self.entries:
            raise ValueError("a vocabulary needs at least one character")
        points = _code_points(self.entries)
        self.dtype = np.min_scalar_type(len(points))
        self._ids = np.zeros(int(points[-1]) + 2, self.dtype)  # by code point; the last entry is for all beyond
        self._ids[points] = np.arange(1, len(points) + 1)
        self._points = np.concatenate([[ord("\N{REPLACEMENT CHARACTER}")], points]).astype("<u4")
        self.begins = _begins_id(self, begins)

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
    """The words, numbers, line ends and single punctuation marks of ``text`` in order, without other white space.

    An apostrophe inside a word belongs to it, and ``<unk>`` and its like are one word.

    >>> words("It's time,\\nMr. B.")
    ["It's", 'time', ',', '\\n', 'Mr', '.', 'B', '.']
    """
    return _WORD.findall(text)


class WordVocabulary:
    """Words and punctuation marks (see ``words``) after one entry (id 0) for all unknown words.

    entries: a list of different words, what a JSON file needs to hold; ``count_words`` makes one from a text. begins:
    as of ``Vocabulary``.

    >>> vocabulary = WordVocabulary(["the", "end", "."])
    >>> vocabulary.encode("the  end of it.")
    array([1, 2, 0, 0, 3], dtype=uint8)
    """

    def __init__(self, entries, begins=None):
        self.entries = list(entries)
        if not self.entries:
            raise ValueError("a vocabulary needs at least one word")
        self.dtype = np.min_scalar_type(len(self.entries))
        self._ids = {word: number for number, word in enumerate(self.entries, 1)}
        self._ids["<unk>"] = UNKNOWN
        self.begins = _begins_id(self, begins)

    def __len__(self):
        return len(self.entries) + 1

    def encode(self, text):
        """Ids of the words of ``text``, (words,), the smallest unsigned type that fits; unknown words become 0."""
        return np.array([self._ids.get(word, UNKNOWN) for word in words(text)], self.dtype)

    def decode(self, ids):
        """Readable text of ``ids``: words with spaces between them, none before a comma or after an opening bracket."""
        text, before, quoted = [], "\n", False
        for index in np.asarray(ids, dtype=np.int64).reshape(-1).tolist():
            word = self.entries[index - 1] if index else "<unk>"
            closes = word in ".,;:!?)]}%\u2026\u201d\u2019\n\x02" or (word == '"' and quoted)
            opened = before in "([{$\u201c\u2018\n\x02" or (before == '"' and quoted)
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


def vocabulary_of(saved):
    """The vocabulary that ``saved_vocabulary`` was given. Entries alone will do, too: a string of characters, or a list
    of words."""
    entries, begins = _entries_and_begins(saved)
    return (Vocabulary if isinstance(entries, str) else WordVocabulary)(entries, begins)


def saved_vocabulary(vocabulary):
    """What a JSON file needs to hold of a vocabulary: its entries, with the one that begins a document where one does.

    >>> saved_vocabulary(Vocabulary("ab\\n")), saved_vocabulary(Vocabulary("ab\\n", begins="\\n"))
    ('\\nab', {'entries': '\\nab', 'begins': '\\n'})
    """
    if vocabulary.begins is None:
        return vocabulary.entries
    return {"entries": vocabulary.entries, "begins": vocabulary.entries[vocabulary.begins - 1]}


def check_vocabulary(level, saved, begins=None):
    """Raise TypeError unless ``saved`` can be that of a vocabulary of the ``level``, characters or words; ValueError
    unless ``begins`` begins a document in it."""
    entries, found = _entries_and_begins(saved)
    words = isinstance(entries, list) and all(isinstance(word, str) for word in entries)
    if not (words if level == "words" else isinstance(entries, str)):
        raise TypeError(f"vocabulary should be {'a list of strings' if level == 'words' else 'a string'}")
    if found != begins or (begins is not None and begins not in entries):
        raise ValueError(f"vocabulary should have {begins!r} before each document, and has {found!r}")


def _entries_and_begins(saved):
    return (saved["entries"], saved["begins"]) if isinstance(saved, dict) else (saved, None)


def _begins_id(vocabulary, begins):
    """The id of the entry ``begins``; None for None."""
    if begins is None:
        return None
    ids = vocabulary.encode(begins).tolist()
    if len(ids) != 1 or ids[0] == UNKNOWN:
        raise ValueError(f"begins: expected an entry of the vocabulary, got {begins!r}")
    return ids[0]


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


def read_text(files=(), vocabulary=None, folder=None, *, level="characters", size=None, encoding=None, begins=None):
    """Ids and vocabulary of text files joined in order, or of ``builtin_text()`` where there is none.

    vocabulary: the one to use; None makes one of all characters in the files, or with ``level="words"`` of their
    commonest ``size`` words (a second pass over them). encoding: as of ``text_pieces``. begins: a character that begins
    a document, where no vocabulary is given, which has its own. It is put before each file unless the file before ends
    with it, so that every document has it.
    folder: where ids that take more than ``IN_MEMORY`` bytes are put, or more than a file may take, in a temporary
    file that goes away with the returned array; None is the system's folder for such files.

    Returns (ids, vocabulary); ids (characters,) or (words,), memory-mapped if large. Raises what ``text_pieces``
    raises, ValueError where there is no text.
    """

    if vocabulary is not None:
        begins = None if vocabulary.begins is None else vocabulary.entries[vocabulary.begins - 1]

    def pieces():
        last = None
        for one in [text_pieces(path, encoding) for path in files] or [[builtin_text()]]:
            if begins not in (None, last):
                yield (last := begins)
            for piece in one:
                yield piece
                last = piece[-1]

    def texts():
        return _unbroken(pieces()) if level == "words" else pieces()

    if files:
        bytes_in_all = sum(os.path.getsize(path) for path in files)
        check_room(", ".join(map(str, files)), BYTE_COST * min(bytes_in_all, _PIECE), "a piece of the text")
    if vocabulary is None:
        if level == "words":
            with naming(files):
                entries = count_words(texts(), size)
            if begins is not None and begins not in entries:
                entries[-1] = begins  # it is rarer than ``size`` words
        else:
            seen = np.zeros(0x110000, dtype=bool)
            for piece in texts():
                seen[_code_points(piece)] = True
            entries = "".join(map(chr, np.flatnonzero(seen)))
        if not entries:
            raise ValueError(f"the text is empty: {', '.join(map(str, files))}")
        vocabulary = (WordVocabulary if level == "words" else Vocabulary)(entries, begins)
    return _joined(map(vocabulary.encode, texts()), vocabulary.dtype, folder), vocabulary


def _joined(arrays, dtype, folder):
    """One array of many: in memory, or memory-mapped where it is large."""
    most = min(IN_MEMORY, max_memory() / BYTE_COST)
    held, size = [np.zeros(0, dtype)], 0
    for array in arrays:
        held.append(array)
        size += array.nbytes
        if size > most:
            break
    else:
        return np.concatenate(held)
    # Written, not mapped and filled: a full disk is then an OSError instead of a killed process.
    with tempfile.TemporaryFile(dir=folder) as file:
        for array in itertools.chain(held, arrays):
            file.write(array)
        file.flush()
        return np.memmap(file, dtype, mode="r")


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


def split(ids, fraction):
    """(training ids, validation ids): the last ``fraction`` of the text is for validation; views, no copies."""
    cut = len(ids) - round(len(ids) * check_number("valid", fraction, 0, 1, high_open=True))
    return ids[:cut], ids[cut:]
