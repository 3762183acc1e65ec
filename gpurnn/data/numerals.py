"""Numbers as tables write them: decimal point or comma, thousands in groups, missing values.

What the cells leave open is not guessed: "2.007" may be two or two thousand.
"""

import math
import re
from dataclasses import dataclass

import numpy as np

MISSING = ("", "na", "n/a", "#n/a", "<na>", "nan", "nat", "null", "none", "?", "-", "--", "\u2013", "\u2014")
_SPACES, _QUOTES = " \u00a0\u2009\u202f", "'\u2019"
_GROUPS = {" ": f"[{_SPACES}]", "'": f"[{_QUOTES}]", ".": r"\.", ",": ","}  # a mark of thousands -> what it matches
_SIGN, _POWER = "[+-]?", r"(?:[eE][+-]?\d+)?"
_OTHER = f"[{_SPACES}{_QUOTES}]"
_NUMBER = rf"{_SIGN}(?:\d+(?:[.,{_SPACES}{_QUOTES}]\d{{3}})*|(?=[.,]\d))(?:[.,]\d*)?{_POWER}"
_MISSING_CELL = "|".join(sorted(map(re.escape, MISSING), key=len, reverse=True))
_IS_NUMBER = re.compile(rf"^{_NUMBER}$", re.MULTILINE)
_IS_MISSING = re.compile(rf"^(?:{_MISSING_CELL})$", re.MULTILINE | re.IGNORECASE)


def _evidence(mark, other):
    """Patterns of cells in which ``mark`` is the decimal mark for certain, in which it may be, and in which it
    separates thousands for certain."""
    m, o = re.escape(mark), re.escape(other)
    unsure = rf"{_SIGN}[1-9]\d{{0,2}}{m}\d{{3}}"
    sure = (
        rf"(?!{unsure}$){_SIGN}\d*{m}\d*{_POWER}|{_SIGN}\d{{1,3}}(?:{o}\d{{3}})+{m}\d*{_POWER}"
        rf"|{_SIGN}\d{{1,3}}(?:{o}\d{{3}}){{2,}}|{_SIGN}\d{{1,3}}(?:{_OTHER}\d{{3}})+{m}\d*"
    )
    return tuple(re.compile(rf"^(?:{pattern})$", re.MULTILINE) for pattern in (sure, unsure))


_CERTAIN, _AMBIGUOUS = (
    {".": point, ",": comma} for point, comma in zip(_evidence(".", ","), _evidence(",", "."), strict=True)
)
_PARTED = {mark: re.compile(rf"^{_SIGN}\d{{1,3}}(?:{_GROUPS[mark]}\d{{3}})+", re.MULTILINE) for mark in (" ", "'")}
_OTHER_MARK = {".": ",", ",": "."}


class Undecided(ValueError):
    """The cells leave open how numbers are written, or contradict one another.

    row: of the cell that shows it; other: of an earlier one that says otherwise, or None; mark: the one that is open
    where there is no other.
    """

    def __init__(self, text, row, other=None, mark=None):
        super().__init__(text)
        self.row, self.other, self.mark = row, other, mark


@dataclass(frozen=True)
class Marks:
    """decimal: "." or ","; thousands: the separator between groups of three digits: "", ".", ",", " " or "'"."""

    decimal: str = "."
    thousands: str = ""

    def number(self, cell):
        """The number in a cell, nan for a missing one, None for anything else."""
        if cell.lower() in MISSING:
            return math.nan
        group = _GROUPS.get(self.thousands)
        whole = rf"(?:\d{{1,3}}(?:{group}\d{{3}})+|\d+)" if group else r"\d+"
        point = re.escape(self.decimal)
        if not re.fullmatch(rf"{_SIGN}(?:{whole}(?:{point}\d*)?|{point}\d+){_POWER}", cell):
            return None
        value = float((re.sub(group, "", cell) if group else cell).replace(self.decimal, "."))
        return value if math.isfinite(value) else None

    def numbers(self, cells):
        """(N,) float64 of N cells, nan for missing ones; and the place of the first that is neither, or None."""
        values = None
        if self == Marks() and "_" not in "".join(cells):
            try:
                values = np.array(list(map(float, cells)))
            except ValueError:
                values = None
        if values is None or not np.isfinite(values).all():
            values = np.empty(len(cells))
            for row, cell in enumerate(cells):
                value = self.number(cell)
                if value is None:
                    return None, row
                values[row] = value
        return values, None


def write_numbers(values, decimal="."):
    """Numbers as strings, all with as many decimals as give the largest of them 7 digits, which is what float32 holds.

    >>> write_numbers([1234.5678901, 0.5])
    ['1234.568', '0.500']
    """
    most = float(np.abs(values).max())
    places = 6 - math.floor(math.log10(most)) if most else 0
    form = f".{max(places, 0)}f" if -9 <= places <= 20 else ".7g"  # beyond, a power of ten is shorter
    return [format(value, form).replace(".", decimal) for value in values]


def count_numbers(cells):
    """(how many cells hold a number however it is written, how many hold something)."""
    try:
        if math.isfinite(sum(map(float, cells))):  # the common case, quickly
            return len(cells), len(cells)
    except ValueError:
        pass
    text = "\n".join(cells)
    missing = sum(1 for _ in _IS_MISSING.finditer(text)) if cells else 0
    return sum(1 for _ in _IS_NUMBER.finditer(text)), len(cells) - missing


def find_marks(columns, *, decimal=None, thousands=None, before=None, trust_points=True):
    """(``Marks`` of the numbers in ``columns``, lists of cells; a cell that shows how thousands are separated, or that
    a point was trusted, or None).

    decimal, thousands: what is known. before: the decimal mark of a file of the same kind, for cells that decide
    nothing. trust_points: whether "2.007" is 2.007 in a column in which all numbers have a point. Raises ``Undecided``.
    """
    asked = decimal or before or thousands is not None
    text, rows = "\n".join("\n".join(cells) for cells in columns), max(1, len(columns[0]))
    if decimal is None and thousands in _OTHER_MARK:
        decimal = _OTHER_MARK[thousands]
    trust_points = thousands == "" or (trust_points and all(map(_has_no_whole, columns)))
    decimal = decimal or _decimal(text, rows, before, trust_points)
    against = _OTHER_MARK[decimal]
    if thousands is None:
        shown = _first(text, rows, _AMBIGUOUS[against], against) or _first(text, rows, _CERTAIN[decimal], against)
        if shown:
            return Marks(decimal, against), shown[1]
        for mark, marks in ((" ", _SPACES), ("'", _QUOTES)):
            if any(one in text for one in marks) and (shown := _first(text, rows, _PARTED[mark])):
                return Marks(decimal, mark), shown[1]
    if not asked and decimal == "." and not _first(text, rows, _CERTAIN["."]):
        trusted = _first(text, rows, _AMBIGUOUS["."])
        return Marks(), trusted and trusted[1]
    return Marks(decimal, thousands or ""), None


def _has_no_whole(cells):
    """Whether a column that has points has one in each number."""
    return not any("." in cell for cell in cells) or not any(cell.lstrip("+-").isdigit() for cell in cells)


def _decimal(text, rows, before, trust_points):
    marked = [mark for mark in _CERTAIN if mark in text]
    if not marked:
        return before or "."
    sure = {mark: found for mark in _CERTAIN if (found := _first(text, rows, _CERTAIN[mark]))}
    if len(sure) == 1:
        return next(iter(sure))
    found = sure or {mark: found for mark in marked if (found := _first(text, rows, _AMBIGUOUS[mark]))}
    if len(found) == 2:
        (other, one), (row, cell) = sorted(found.values())
        raise Undecided(f"{cell!r} has another decimal mark than {one!r}", row, other)
    for mark, (row, cell) in found.items():
        if not before and not (mark == "." and trust_points):
            plain = cell.replace(mark, ".")
            raise Undecided(f"{cell!r} may be {plain} or {cell.replace(mark, '')}", row, mark=mark)
    return before or "."


def _first(text, rows, pattern, needed=""):
    """(row, cell) of the first match of a pattern in columns of ``rows`` cells, one below the other in ``text``, that
    holds ``needed``; None where there is none."""
    if needed not in text:
        return None
    match = next((match for match in pattern.finditer(text) if needed in match[0]), None)
    if match is None:
        return None
    end = text.find("\n", match.end())
    return text.count("\n", 0, match.start()) % rows, text[match.start() : end if end >= 0 else len(text)]
