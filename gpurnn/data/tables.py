"""Tables: CSV files, read and written."""

import csv
import io
import re
import unicodedata
from array import array
from dataclasses import dataclass, field

from ..errors import FileError
from ..files import check_room
from .dates import date_share
from .encodings import whole_text
from .numerals import MISSING, count_numbers

_BYTE_COST, _ROW_COST, _CELL_COST = 6, 200, 80  # bytes of memory for a byte of a table, a row of it and a cell
_DELIMITERS = ";\t|,"  # the comma last, as numbers may contain it
_SAMPLE = 50  # rows that are looked at to find the delimiter
# what a formula begins with in a spreadsheet, in normal and in full-width characters
_FORMULA = ("=", "+", "-", "@", "\uff1d", "\uff0b", "\uff0d", "\uff20")
_TOTALS = {
    "total", "totals", "grand total", "subtotal", "sum", "average", "avg", "mean", "median", "min", "max", "minimum",
    "maximum", "count", "summe", "gesamt", "insgesamt", "zwischensumme", "mittelwert", "durchschnitt", "anzahl",
    "somme", "moyenne", "totale", "totaal", "suma",
}  # fmt: skip
_LETTER = re.compile(r"[^\W\d_]")
_SEPARATOR = re.compile(r'"?sep=([^\n"])"?[ \t]*\n', re.IGNORECASE)  # with which Excel begins a file


@dataclass
class Rows:
    """The cells of a table. header: names; columns: for each a list of N cells; lines: the number of each row's line;
    delimiter: the separator between cells; notes: what a user should know about how the file was read."""

    path: str
    header: list
    columns: list
    lines: array
    delimiter: str
    notes: list = field(default_factory=list)

    def __post_init__(self):
        self.places = {name: n for n, name in enumerate(self.header)}

    def __len__(self):
        return len(self.lines)

    def column(self, name):
        """The cells of a column. Raises ValueError for a name that the file does not have."""
        if name not in self.places:
            raise ValueError(f"{self.path}: has no column {name!r}: expected one of {', '.join(self.header)}")
        return self.columns[self.places[name]]

    def numeric(self):
        """The names of the columns most of whose cells are numbers, however these are written."""
        found = []
        for name, cells in zip(self.header, self.columns, strict=True):
            numbers, filled = count_numbers(cells)
            if numbers and 2 * numbers >= filled:
                found.append(name)
        return found


def read_rows(path, delimiter=None, encoding=None):
    """The ``Rows`` of a CSV file with a header.

    delimiter: the separator between cells; None finds it in the first rows: comma, semicolon, tab or "|". Rows without
    a value are left out, and so are lines that begin with #. Raises FileError and ValueError that name file and line.
    """
    text = whole_text(path, encoding, cost=_BYTE_COST, line_cost=0, what="its text")
    if "\r" in text:
        text = text.replace("\r\n", "\n").replace("\r", "\n")
    if said := _SEPARATOR.match(text):
        delimiter, text = delimiter or said[1], text[said.end() - 1 :]
    comments, start = [], 1
    delimiter = delimiter or _find_delimiter(text)
    reader = csv.reader(_lines(text, comments), delimiter=delimiter)
    columns, lines, header = [], array("q"), None
    try:
        for cells in reader:
            start = reader.line_num + 1
            if cells == [] or not any(map(str.strip, cells)):
                continue
            cells = [cell.strip() if "\n" not in cell else " ".join(cell.split()) for cell in cells]
            if header is None:
                header, cells = _header(path, cells, comments, delimiter)
                columns, room = [[] for _ in header], 0
                if cells is None:
                    continue
            cells = _fitted(cells, header, path, reader.line_num)
            for column, cell in zip(columns, cells, strict=True):
                column.append(cell)
            lines.append(reader.line_num)
            room += _ROW_COST + _CELL_COST * len(cells)
            check_room(path, room, "its table")
    except csv.Error as error:
        raise FileError(
            f"{path}: line {start}: a cell begins here that is too long: is a quote not closed? ({error})"
        ) from error
    if not lines:
        raise ValueError(f"{path}: {'is empty' if header is None else 'has a header but no rows'}{_on_comments(text)}")
    rows = Rows(str(path), *_without_empty(header, columns), lines, delimiter)
    if len(set(rows.header)) < len(rows.header):
        raise ValueError(f"{path}: two columns have the same name: {', '.join(rows.header)}")
    _take_currency(rows)
    _refuse_total(rows)
    return rows


def _lines(text, comments):
    """The lines of a text, empty in place of those that begin with #; the first of these go to ``comments``. A # within
    quotes begins no comment."""
    start, quoted = 0, False
    while start < len(text):
        end = text.find("\n", start) + 1 or len(text)
        line = text[start:end]
        start = end
        if line.startswith("#") and not quoted:
            if len(comments) < _SAMPLE:
                comments.append(line)
            line = "\n"
        quoted ^= line.count('"') % 2
        yield line


def _on_comments(text):
    """What an error adds where lines of a text were left out as comments."""
    count = len(re.findall("^#", text, re.MULTILINE))
    return f": {count:,} lines begin with # and are comments: quote a first cell that begins with #" if count else ""


def _find_delimiter(text):
    """The separator by which most of the first rows have as many cells as the header."""
    best, most = ",", (0, 0)
    for delimiter in _DELIMITERS:
        rows = []
        try:
            for cells in csv.reader(_lines(text, []), delimiter=delimiter):
                if any(map(str.strip, cells)):
                    rows.append(len(cells))
                if len(rows) > _SAMPLE:
                    break
        except csv.Error:
            pass  # the error comes when the file is read
        fitting = sum(size == rows[0] for size in rows) if rows and rows[0] > 1 else 0
        if (fitting, rows[0] if rows else 0) > most and fitting:
            best, most = delimiter, (fitting, rows[0])
    return best


def _header(path, cells, comments, delimiter):
    """(names, the row that they were taken for, or None): where the first row holds numbers, the names may stand in a
    comment before it, as "# date,sales"."""
    if not any(count_numbers([cell])[0] for cell in cells) and not date_share(cells[:1]):
        return cells, None
    for line in reversed(comments):
        names = [name.strip() for name in next(csv.reader([line.lstrip("# ")], delimiter=delimiter), [])]
        if len(names) == len(cells) and len(cells) > 1 and not any(count_numbers([name])[0] for name in names):
            return names, cells
    raise ValueError(
        f"{path}: the first line should name the columns, got {', '.join(cells)}: write their names above it, "
        f"separated by {delimiter!r}"
    )


def _fitted(cells, header, path, line):
    """A row's cells, as many as the header has names."""
    if len(cells) > len(header) and not any(cells[len(header) :]):
        return cells[: len(header)]
    if len(cells) != len(header):
        raise ValueError(
            f"{path}: line {line}: expected {len(header)} columns, as the header has, got {len(cells)}. A title or a "
            "remark? Delete it, or put # before it. Another separator? --delimiter"
        )
    return cells


def _without_empty(header, columns):
    """Header and columns without those at the end that have neither name nor value."""
    size = len(header)
    while size > 1 and not header[size - 1] and not any(columns[size - 1]):
        size -= 1
    return header[:size], columns[:size]


def _take_currency(rows):
    """Take a currency sign out of the columns in which each cell that is not missing is a number with that sign."""
    found = {}
    for name, cells in zip(rows.header, rows.columns, strict=True):
        first = next((cell for cell in cells if cell.lower() not in MISSING), "")
        sign = next((mark for mark in first if unicodedata.category(mark) == "Sc"), None)
        if sign is None or not all(cell.count(sign) == 1 or cell.lower() in MISSING for cell in cells):
            continue
        end = rf"^([+-]?)\s*{re.escape(sign)}\s*|\s*{re.escape(sign)}$"
        bare = [re.sub(end, r"\1", cell) for cell in cells]
        numbers, others = count_numbers(bare)
        if numbers == others:
            cells[:] = bare
            found.setdefault(sign, []).append(name)
    for sign, names in found.items():
        rows.notes.append(f"the sign {sign!r} is left out of the numbers in {', '.join(names)}")


def _refuse_total(rows):
    """Raise ValueError where a row is the sum of others, by its name: one of the last, or any by the first column of
    text; or where it has none in a column of names."""
    numeric = set(rows.numeric())
    names = next((name for name in rows.header if name not in numeric), None)
    for name, cells in zip(rows.header, rows.columns, strict=True):
        last = range(max(0, len(rows) - 3), len(rows))
        totals = [row for row in (range(len(rows)) if name == names else last) if _is_total(cells[row])]
        if name != names:
            totals = [row for row in totals if cells.count(cells[row]) == 1]
        elif len(totals) == len(cells) - cells.count(""):  # what a row is: there is nothing that it would be the sum of
            continue
        if totals:
            _refuse_row(rows, totals[0], f"{cells[totals[0]]!r} is no row of the series")
    cells = rows.columns[0]
    if names == rows.header[0] and 0 < 4 * cells.count("") < len(cells) and not any(map(date_share, rows.columns)):
        _refuse_row(rows, cells.index(""), f"a row that has no name in column {names!r}, as a total has none")


def _is_total(cell):
    return _LETTER.search(cell) is not None and " ".join(re.findall(r"[^\W\d_]+", cell.casefold())) in _TOTALS


def _refuse_row(rows, row, what):
    raise ValueError(f"{rows.path}: line {rows.lines[row]}: {what}: delete the line, or put # before it")


def csv_text(rows, escape=True, delimiter=","):
    """Rows of strings as CSV, whose lines end with a line feed; delimiter: the separator between cells.

    escape: text that a spreadsheet would take for a formula gets a ' in front: a cell, and what begins one where the
    spreadsheet's separator is another or no quote counts.
    """
    lines = []
    for row in rows:
        line = io.StringIO()
        csv.writer(line, delimiter=delimiter).writerow(
            list(map(_inert, row)) if escape else row
        )  # by its \r\n it quotes either of them
        lines.append(line.getvalue().removesuffix("\r\n") + "\n")
    return "".join(lines)


def _inert(cell):
    cell = re.sub(rf"([;\t\r\n]\s*)(?=[{''.join(map(re.escape, _FORMULA))}])", r"\1'", cell)
    if not cell.lstrip().startswith(_FORMULA) and not cell.startswith(("\t", "\r")):
        return cell
    return cell if re.fullmatch(r"[+-]?(\d+[.,]?\d*|[.,]\d+)([eE][+-]?\d+)?", cell) else "'" + cell
