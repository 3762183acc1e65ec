"""Pairs of sentences: the source and the target of a translation in each row."""

from dataclasses import dataclass, field
from pathlib import Path

from ..errors import FileError
from .encodings import whole_text
from .rows import first_lines, fitted, misfit, named_width, read_rows, skip_or_refuse

_SOURCES, _TARGETS = {"source", "src"}, {"target", "tgt", "trg"}
_LANGUAGES = (  # as a first row names them
    "english french german spanish italian portuguese dutch polish russian ukrainian turkish greek chinese japanese "
    "korean arabic hebrew hindi swedish danish norwegian finnish czech hungarian romanian vietnamese latin esperanto "
    "en fr de es it pt nl pl ru uk tr el zh ja ko ar he hi sv da no fi cs hu ro vi la eo"
)


@dataclass
class Pairs:
    """(source, target) pairs in order, how many rows were skipped, and what a user should know, a sentence each."""

    pairs: list
    skipped: int = 0
    notes: list = field(default_factory=list)


def read_pairs(path, reverse=False, encoding=None, strict=False):
    """The ``Pairs`` of a file of lines ``source<TAB>target``, or of a CSV file; reverse: (target, source) pairs.

    Of three columns or more the first two are read that are not numbers: Tatoeba's files have sentence numbers before
    the sentences, or the authors after them. Spaces around a side are dropped. A row without a source or a target is
    skipped, or with ``strict`` refused. encoding: as of ``whole_text``. Raises FileError that names the file, and the
    line, for a file without pairs or with mostly bad rows, and what ``whole_text`` raises.
    """
    path = Path(path)
    text = whole_text(path, encoding)
    if not text.strip():
        raise FileError(f"{path}: is empty: expected lines of source and target with a tab between them")
    table = read_rows(path, text, tabs=True)
    if table is None or table.width < 2:
        raise FileError(
            f"{path}: expected source and target with a tab between them in each line. It begins with "
            f"{first_lines(path, encoding)}"
        )
    header = not table.names and _is_header(table.rows[0][1])
    width = named_width(table.rows[0][1]) if header else table.width
    rows, wrong, pairs = table.rows[header:], [(*bad, "") for bad in table.bad], []
    whole = [row for _, cells in rows if (row := fitted(cells, width)) is not None]
    columns = _columns(table.names or table.rows[0][1], whole)
    for line, cells in rows:
        row = fitted(cells, width)
        sides = tuple(row[n].strip() for n in columns) if row else ()
        if not sides or not all(sides):
            shown, more = "\t".join(cells)[:60], misfit(cells, width, table.delimiter)
            wrong.append((line, f"should be a source and a target with a tab between them, got {shown!r}", more))
        else:
            pairs.append(sides[::-1] if reverse else sides)
    note = skip_or_refuse(path, wrong, len(pairs), strict, "a source and a target")
    notes = [note] if note else []
    if width > 2:
        first, second = (n + 1 for n in columns)
        notes.append(f"{path.name}: columns {first} and {second} of {width} are read")
    return Pairs(pairs, len(wrong), notes)


def _is_header(cells):
    names = {cell.strip().strip('"').casefold() for cell in cells}
    return bool(names & _SOURCES and names & _TARGETS) or len(names & set(_LANGUAGES.split())) > 1


def _columns(first, rows):
    """The columns of source and target: those with these names, else the first two that are not all numbers."""
    names = [name.strip().strip('"').casefold() for name in first]
    named = [next((n for n, name in enumerate(names) if name in known), None) for known in (_SOURCES, _TARGETS)]
    if None not in named:
        return named
    numbers = [bool(rows) and all(cells[n].strip().isdigit() for cells in rows) for n in range(len(first))]
    texts = [n for n in range(len(first)) if len(first) > 2 and not numbers[n]]
    return texts[:2] if len(texts) >= 2 else [0, 1]
