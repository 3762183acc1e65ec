"""Tables of texts: CSV with any usual delimiter, tab-separated values, JSON lines."""

import collections
import contextlib
import csv
import functools
import io
import json
import re
import sys
from dataclasses import dataclass, field

from ..errors import FileError, one_line
from ..files import JSON_FACTOR, check_room, parse_json
from .encodings import ending, whole_text

_CELL_COST = 64  # bytes of memory for a cell besides its characters
_DELIMITER_NAMES = {",": "comma", ";": "semicolon", "\t": "tab", "|": "vertical bar"}
_DELIMITERS = "".join(_DELIMITER_NAMES)
_SNIFFED = 1 << 16  # characters by which a delimiter is chosen
_SHOWN, _LONGEST = 3, 60  # lines of a file, and characters of each, that a message shows
_FIELDS = 1000  # names that the objects of JSON lines may have together


@dataclass
class Rows:
    """The rows of a table.

    delimiter: None for JSON lines. names: of the columns, where each row has them with it. rows: (number of the line,
    cells as strings), blank ones left out. bad: (number of the line, what is wrong) of those that are no row. blank:
    numbers of the lines of rows that have cells, and nothing in them.
    """

    path: object
    delimiter: str | None
    names: list | None
    rows: list
    bad: list = field(default_factory=list)
    blank: list = field(default_factory=list)

    @functools.cached_property
    def width(self):
        """Columns of most of those rows that have more than one; the fewest where two widths are as common."""
        counts = collections.Counter(len(cells) for _, cells in self.rows)
        return min(counts, key=lambda width: (width < 2, -counts[width], width), default=0)


def named_width(names):
    """How many columns a header has, those without a name at its end left out."""
    return max((n for n, name in enumerate(names, 1) if name.strip()), default=0)


def fitted(cells, width):
    """The cells of a row of ``width`` columns, without blank ones past them; None where it has more or fewer."""
    return cells[:width] if len(cells) >= width and not any(map(str.strip, cells[width:])) else None


def misfit(cells, width, delimiter):
    """What a message adds on a row that it shows: "" where it has ``width`` cells, as it should, or one alone."""
    if fitted(cells, width) is not None or len(cells) == 1:
        return ""
    cure = f": a {_DELIMITER_NAMES[delimiter]} inside a cell needs quotes around it" if len(cells) > width else ""
    return f" (its cells: {len(cells)}, expected {width}{cure})"


def read_rows(path, text, is_header=lambda cells: False, *, tabs=False):
    """The ``Rows`` of the file ``path``, which holds ``text``; None where it is no table, but lines of text.

    A table is a file whose name ends with .csv, .jsonl or .ndjson (and .gz), whose first line has a tab or is a JSON
    object, or whose first line, cut at commas or semicolons, is a header by ``is_header``; also one of .tsv of whose
    lines most have a tab. tabs: whether a tab anywhere is enough. Raises FileError for a CSV file with a quote that is
    not closed, and for one that would take too much memory.
    """
    first = next((line for line in io.StringIO(text) if line.strip()), "").strip("\r\n")
    if ending(path) in (".jsonl", ".ndjson") or _is_object(first):
        return _json_lines(path, text)
    if ending(path) == ".csv":
        delimiter = _sniffed(text)
    elif "\t" in first or (tabs and "\t" in text) or (ending(path) == ".tsv" and _has_tabs(text)):
        delimiter = "\t"
    else:
        delimiter = next((d for d in _DELIMITERS if is_header(first.split(d))), None)
    if delimiter is None:
        return None
    check_room(path, _CELL_COST * text.count(delimiter), "its cells")
    if delimiter == "\t" and ending(path) != ".csv":
        blank = [n for n, line in enumerate(text.split("\n"), 1) if "\t" in line and not line.strip()]
        return Rows(path, delimiter, None, _tab_separated(text), blank=blank)
    found = _separated(path, text, delimiter)
    rows = [(line, cells) for line, cells in found if _has_value(cells)]
    return Rows(path, delimiter, None, rows, blank=[n for n, cells in found if not _has_value(cells)])


def skip_or_refuse(path, wrong, good, strict, expected):
    """A sentence about the bad rows of a file, None where there are none.

    wrong: (number of the line, what is wrong, ``misfit`` or "") of each. good: number of the others. Raises FileError,
    with the first of them, where ``strict``, and where most of the rows are bad: the file is of another kind then.
    """
    if not wrong:
        return None
    line, what, cause = min(wrong)
    if strict or len(wrong) > good:
        many = f". {len(wrong):,} of {len(wrong) + good:,} rows are like that" if len(wrong) > 1 else ""
        raise FileError(f"{path}: line {line} {what}{cause}{many}")
    rows = f"{len(wrong):,} row{'s' * (len(wrong) > 1)}"
    lacking = "" if cause else f" without {expected}"
    return f"{path.name}: {rows}{lacking} skipped, the first in line {line}{cause}"


def first_lines(path, encoding=None):
    """How a file begins, for a message: its first lines as Python writes them, cut to one line of the terminal."""
    lines = [line for line in io.StringIO(whole_text(path, encoding)) if line.strip()][:_SHOWN]
    cut = (line.rstrip("\r\n") for line in lines)
    return ", ".join(repr(line if len(line) <= _LONGEST else line[: _LONGEST - 3] + "...") for line in cut)


def _has_tabs(text):
    """Whether most lines have a tab, or the first one begins a cell in quotes that may end in a later line."""
    lines = [line for line in text.split("\n") if line.strip()]
    return "\t" in text and (lines[0].startswith('"') or 2 * sum("\t" in line for line in lines) > len(lines))


def _is_object(line):
    """Whether a line begins as a JSON object; it is not parsed yet, as that may take much memory."""
    return re.match(r'\s*\{\s*("[^"]*"\s*:|\}\s*$)', line) is not None


# ---- cells between delimiters


def _sniffed(text):
    """The delimiter by which most of the first rows get the same number of cells, at least two; else the comma."""
    head, shares = text[:_SNIFFED], {}
    for delimiter in _DELIMITERS:
        with contextlib.suppress(csv.Error):  # a cell longer than the csv module takes
            widths = collections.Counter(map(len, csv.reader(io.StringIO(head, newline=""), delimiter=delimiter)))
            shares[delimiter] = max((count for width, count in widths.items() if width > 1), default=0) / widths.total()
    return max(shares, key=shares.get, default=",")


def _tab_separated(text):
    """Rows between tabs. Quotes are characters like any other, unless only with them rows get the same width, or every
    row has them."""
    lines = text.split("\n")
    raw = [(n, line.removesuffix("\r").split("\t")) for n, line in enumerate(lines, 1) if line.strip()]
    quoted = sum(any(len(cell) > 1 and cell[0] == cell[-1] == '"' for cell in cells) for _, cells in raw)
    same_width = len({len(cells) for _, cells in raw}) == 1
    if '"' in text and (quoted == len(raw) or not same_width):
        with contextlib.suppress(csv.Error):
            found = [(n, cells) for n, cells in _parsed(text, delimiter="\t", strict=True) if _has_value(cells)]
            if quoted == len(raw) or len({len(cells) for _, cells in found}) == 1:
                return found
    return raw


def _separated(path, text, delimiter):
    """Rows of a CSV file, whose quotes are doubled inside a cell, or have a backslash before them."""
    try:
        return list(_parsed(text, delimiter=delimiter, strict=True))
    except csv.Error as error:
        if '\\"' in text:
            with contextlib.suppress(csv.Error):
                return list(_parsed(text, delimiter=delimiter, strict=True, doublequote=False, escapechar="\\"))
        line = re.match(r"line \d+", str(error))[0]
        raise FileError(
            f"{path}: {line}: a cell begins with a quote that is not closed where the cell ends ({one_line(error)}). "
            'A quote inside a cell is written twice, as in "a ""good"" film"'
        ) from None


def _has_value(cells):
    return any(cell.strip() for cell in cells)


def _parsed(text, **how):
    """(number of its first line, cells) of each row. Raises csv.Error that names the line where a row begins."""
    reader, begin = csv.reader(io.StringIO(text, newline=""), **how), 1
    with _any_length():
        while True:
            try:
                cells = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                raise csv.Error(f"line {begin}: {error}") from None
            if _has_value(cells) or len(cells) > 1 or cells == [""]:  # a line of nothing, or of spaces, is no row
                yield begin, cells
            begin = reader.line_num + 1


@contextlib.contextmanager
def _any_length():
    """Inside, a cell may be as long as its file, which is within limits; the csv module takes 131,072 characters."""
    before = csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    try:
        yield
    finally:
        csv.field_size_limit(before)


# ---- JSON lines


def _json_lines(path, text):
    """Rows of one JSON object in each line; a field that an object lacks is an empty cell."""
    found, bad, names = [], [], {}
    lines = text.split("\n")
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            check_room(path, JSON_FACTOR * len(line), f"line {number}")
            document = parse_json(line, f"line {number}")
            if not isinstance(document, dict):
                raise FileError(f"line {number}: is not a JSON object, but {one_line(line, 40)}")
        except FileError as error:
            bad.append((number, str(error).partition(": ")[2]))
            continue
        names |= dict.fromkeys(document)
        if len(names) > _FIELDS:
            raise FileError(f"{path}: line {number}: its objects have more than {_FIELDS} different fields")
        check_room(path, _CELL_COST * len(names) * number, "its cells")
        found.append((number, {name: _cell(value) for name, value in document.items()}))
    return Rows(path, None, list(names), [(n, [cells.get(name, "") for name in names]) for n, cells in found], bad)


def _cell(value):
    """A value of JSON as text: "" for null, and for lists and objects, which are neither a text nor a label."""
    if isinstance(value, str):
        return value
    return "" if value is None or isinstance(value, (list, dict)) else json.dumps(value)
