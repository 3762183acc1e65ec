"""Tables: CSV files, read and written."""

import csv
import io
import math
import re

from ..errors import FileError
from ..files import check_room, read_bytes

_BYTE_COST, _ROW_COST, _CELL_COST = 6, 200, 80  # bytes of memory for a byte of a table, a row of it and a cell
# what a formula begins with in a spreadsheet, in both widths
_FORMULA = ("=", "+", "-", "@", "\uff1d", "\uff0b", "\uff0d", "\uff20")
_MISSING = ("", "na", "n/a", "nan", "null", "none", "?")


def read_rows(path):
    """(header, [(number of the line, cells)]) of a CSV file; separated by comma, semicolon or tab."""
    data = read_bytes(path, factor=_BYTE_COST, what="its text")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise FileError(f"{path}: is not UTF-8: byte {error.start} is {data[error.start]:#04x}") from error
    first = text.partition("\n")[0]
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=max(",;\t", key=first.count))
    rows, room = [], 0
    try:
        for cells in reader:
            if cells != []:
                rows.append((reader.line_num, [cell.strip() for cell in cells]))
                room += _ROW_COST + _CELL_COST * len(cells)
                check_room(path, room, "its table")
    except csv.Error as error:
        raise FileError(f"{path}: line {reader.line_num}: {error}") from error
    if not rows:
        raise ValueError(f"{path}: is empty")
    (_, header), *rows = rows
    if any(math.isfinite(number(cell) or math.nan) for cell in header):
        raise ValueError(f"{path}: the first line should name the columns, got {', '.join(header)}")
    if len(set(header)) < len(header):
        raise ValueError(f"{path}: two columns have the same name: {', '.join(header)}")
    if not rows:
        raise ValueError(f"{path}: has a header but no rows")
    for line, cells in rows:
        if len(cells) != len(header):
            raise ValueError(
                f"{path}: line {line}: expected {len(header)} columns, as the header has, got {len(cells)}"
            )
    return header, rows


def number(cell):
    """The number in a cell, nan for a missing one, None for text."""
    if cell.lower() in _MISSING:
        return math.nan
    try:
        value = float(cell)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def csv_text(rows, escape=True):
    """Rows of strings as CSV, whose lines end with a line feed.

    escape: text that a spreadsheet would take for a formula gets a ' in front: a cell, and what begins one where the
    spreadsheet's separator is another or no quote counts.
    """
    lines = []
    for row in rows:
        line = io.StringIO()
        csv.writer(line).writerow(list(map(_inert, row)) if escape else row)  # by its \r\n it quotes either of them
        lines.append(line.getvalue().removesuffix("\r\n") + "\n")
    return "".join(lines)


def _inert(cell):
    cell = re.sub(rf"([;\t\r\n]\s*)(?=[{''.join(map(re.escape, _FORMULA))}])", r"\1'", cell)
    if not cell.lstrip().startswith(_FORMULA) and not cell.startswith(("\t", "\r")):
        return cell
    return cell if re.fullmatch(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", cell) else "'" + cell
