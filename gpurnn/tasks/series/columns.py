"""The columns of a file that make up a series: which they are, their values, their dates and the order of the dates."""

import math
import re
import unicodedata
from dataclasses import dataclass, field
from datetime import timedelta
from operator import ne

import numpy as np

from ...data.dates import DateForm, UnreadDates, date_share, has_date_name, read_dates
from ...data.moments import CALENDAR, find_disorder, is_even, uneven_steps
from ...data.numerals import Undecided, count_numbers, find_marks
from ...data.tables import read_rows
from .settings import SeriesSettings

_TRIED = 100  # columns of text that are tried for dates
_SIGNED = 20  # cells that are looked at to find a column of numbers with signs
_DATE_NAMES = {"date", "datetime", "ds", "time", "timestamp", "day", "month", "quarter", "year", "week"}


@dataclass
class Table:
    """Rows of a file in order of time. values: (N, 1 + number of inputs), float64, the target first; moments: N
    datetimes, or None where there are no dates; form: how the file writes them, a ``DateForm``; notes: what a user
    should know about how it was read, a sentence each; delimiter, decimal: how the file separates cells, and the
    decimals of a number."""

    values: np.ndarray
    moments: list | None
    form: DateForm | None
    notes: list = field(default_factory=list)
    delimiter: str = ","
    decimal: str = "."

    def __len__(self):
        return len(self.values)


def open_rows(path, settings):
    """The ``Rows`` of a file, split into cells and decoded as ``settings`` say."""
    return read_rows(path, settings.cell_delimiter, settings.encoding)


# ---- which columns


def choose_columns(path, settings, rows=None):
    """Which columns of a file are which: {"target": name, "inputs": [names], "date": name or None, "calendar": [...]}.

    rows: of the file, where they were read already. Also in it: how numbers and dates are written, "decimal" and
    "date_format". Raises ValueError for a name that the file does not have.
    """
    rows = rows or open_rows(path, settings)
    numeric = rows.numeric()
    asked = [name.strip() for name in (settings.inputs or "").split(",") if name.strip()]
    named = [settings.target, *(() if asked == ["all"] else asked)]
    for name in named:
        if name is not None:
            rows.column(name)
    date = _find_date(rows, settings, numeric, named)
    known = set(numeric)
    numbers = [name for name in rows.header if name != date and (name in known or _has_signs(rows.column(name)))]
    target = settings.target or (numbers or rows.header)[-1]
    if not settings.target and target != rows.header[-1]:
        rows.notes.append(f"the last column with numbers is forecast, {target!r}")
    if asked == ["all"]:
        asked = [name for name in numeric if name not in (date, target)]
        read = {target, date, *asked}
        left = [name for name in rows.header if name not in read]
        if left:
            rows.notes.append(f"columns that hold no numbers are left out: {', '.join(left[:5])}")
    if target in asked or len(set(asked)) < len(asked):
        raise ValueError(f"inputs: expected each column once and not the target {target!r}, got {', '.join(asked)}")
    facts = {"target": target, "inputs": asked, "date": date, "calendar": []}
    marks, shown = _marks(rows, facts, settings)
    facts["decimal"] = marks.decimal
    if shown and not marks.thousands:
        whole = shown.replace(".", "")
        rows.notes.append(f"{shown!r} is read as a decimal number: if it is {whole}, --thousands . says so")
    moments = None
    if date:
        moments, form = _read_dates(rows, facts, settings)
        facts["date_format"] = str(form)
    if settings.calendar:
        if moments is None:
            raise ValueError(f"{path}: calendar needs a column of dates, such as 2016-07-01 00:00, got none")
        facts["calendar"] = [
            name for name, (_, place) in CALENDAR.items() if len({place(moment) for moment in moments}) > 1
        ]
    return facts


def _find_date(rows, settings, numeric, taken):
    """The name of the column of dates, or None; adds a note if a column looks like dates but cannot be read."""
    if settings.date == "none" and "none" not in rows.header:
        return None
    if settings.date is not None:
        rows.column(settings.date)
        return settings.date
    named = set(taken)
    free = [name for name in rows.header if name not in named]
    numbers = set(numeric)
    texts = [name for name in free if name not in numbers]
    dated = [name for name in texts[:_TRIED] if date_share(rows.column(name)) > 0.5]
    if dated:
        years = [name for name in free if name in numbers and _is_named_date(name)]
        return _choose_date(rows, dated + [name for name in years if _rising(rows.column(name)) < 2])
    first = rows.header[0]
    for name in free:
        others = len(numeric) > 1 or any(taken)
        weak = name in numbers and others and (name == first or has_date_name(name))
        if weak and date_share(rows.column(name), weak=True) > 0.5:
            if has_date_name(name) or _rising(rows.column(name)) < 3:
                return name
            rows.notes.append(f"the numbers of the first column, {name!r}, are in no order: not read as dates")
            return None
    if first in free and (has_date_name(first) or (first in texts and any(map(_looks_dated, rows.column(first)[:3])))):
        example = rows.column(first)[0]
        rows.notes.append(
            f"the first column, {first!r}, was not read as dates (such as {example!r}; --date-format says how they are "
            "written): the rows are taken as they stand, oldest first"
        )
    return None


def _choose_date(rows, names):
    """One of the columns that hold dates: by its name, else the one that increases most evenly; a note says so."""
    if len(names) == 1:
        return names[0]
    chosen = min(names, key=lambda name: (not _is_named_date(name), _rising(rows.column(name))))
    others = ", ".join(repr(name) for name in names if name != chosen)
    rows.notes.append(f"several columns hold dates: {chosen!r} is taken, not {others}; --date NAME takes another")
    return chosen


def _looks_dated(cell):
    return sum(map(str.isdigit, cell)) > 2 and not cell.isdigit()


def _is_named_date(name):
    return name.strip().casefold() in _DATE_NAMES


def _rising(cells):
    """How well cells serve as the dates of rows: 0 for such that increase evenly, 1 for others that increase, 2 for
    such that fall, 3 for anything else."""
    try:
        moments = read_dates(cells)[0]
    except UnreadDates:
        return 3
    disorder = find_disorder(moments)[0]
    return {None: 0 if is_even(moments) else 1, "descending": 2}.get(disorder, 3)


# ---- what is in them


def read_table(path, facts, settings=None, rows=None):
    """The ``Table`` of a CSV file's columns that ``facts`` name.

    settings: how the file is written, whether rows are sorted, and what becomes of missing values, see
    ``SeriesSettings``. rows: of the file, where they were read already. Rows that are newest first are reversed.
    Raises ValueError naming file, line and column for what is no number, is missing, or does not fit the header, and
    for dates that are doubled or, without ``sort``, in no order.
    """
    settings = settings or SeriesSettings(seed=0)
    rows = rows or open_rows(path, settings)
    names = [facts["target"], *facts["inputs"]]
    for name in (*names, facts["date"]):
        if name is not None:
            rows.column(name)
    notes = rows.notes
    marks, shown = _marks(rows, facts, settings)
    values = np.empty((len(rows), len(names)))
    for n, name in enumerate(names):
        cells = rows.column(name)
        numbers, wrong = marks.numbers(cells)
        if wrong is not None:
            raise ValueError(
                f"{path}: line {rows.lines[wrong]}, column {name!r}: expected a number, got {cells[wrong]!r}"
                f"{_number_cure(rows, cells[wrong])}"
            )
        values[:, n] = numbers
    _refuse_sum(rows, values[:, 0], facts)
    if shown and marks.thousands:  # a number, as all cells are by now
        notes.append(f"thousands are separated by {marks.thousands!r}: {shown!r} is read as {marks.number(shown):g}")
    lines, (moments, form) = np.array(rows.lines), _dates(rows, facts, settings)
    if moments is not None:
        order = _order(rows, facts, settings, moments)
        if order is not None:
            values, lines, moments = values[order], lines[order], [moments[row] for row in order]
    if np.isnan(values).any():
        values, moments, lines = _without_gaps(rows, names, settings, values, moments, lines)
    uneven = uneven_steps(moments) if moments and len(moments) > 1 else None
    if uneven:
        step, count, row = uneven
        notes.append(
            f"the steps between dates differ: mostly {_span(step)}, {count:,} other{'s' * (count > 1)}, the first "
            f"at line {lines[row]}"
        )
    return Table(values, moments, form, notes, rows.delimiter, marks.decimal)


def _refuse_sum(rows, y, facts):
    """Raise ValueError where rows without dates end with the sum of those before, in the target column ``y``."""
    above = np.nansum(y[:-1])
    if facts["date"] is None and len(y) > 3 and above and math.isclose(y[-1], above, rel_tol=1e-9):
        raise ValueError(
            f"{rows.path}: line {rows.lines[-1]}, column {facts['target']!r}: {y[-1]:g} is the sum of the rows above "
            "and no row of the series: delete the line, or put # before it"
        )


def _is_sign(mark):
    return mark == "%" or unicodedata.category(mark) == "Sc"


def _has_signs(cells):
    """Whether the first cells are numbers, but for a currency sign or a per-cent sign that each of them has."""
    first = [cell for cell in cells[:_SIGNED] if cell]
    bare = ["".join(mark for mark in cell if not _is_sign(mark)).strip() for cell in first]
    return bool(first) and all(map(ne, first, bare)) and count_numbers(bare)[0] == len(bare)


def _number_cure(rows, cell):
    """What to do about a cell that is no number, as a sentence after a point, or nothing."""
    signs = [mark for mark in cell if _is_sign(mark)]
    if signs:
        return f". Take the {'currency ' if signs[0] != '%' else ''}sign {signs[0]!r} out of the column"
    if re.fullmatch(r"\([\d.,]+\)", cell):
        return f". Write a negative number as -{cell[1:-1]}"
    if not rows.numeric():
        return ". No column of this file holds numbers, which a series is made of"
    return ". How are numbers written? --decimal, --thousands" if set(cell) & set(".,' ") else ""


def _marks(rows, facts, settings):
    """What ``find_marks`` returns for the columns that are read."""
    given = {"decimal": settings.decimal, "thousands": settings.thousands_mark, "before": facts.get("decimal")}
    given["trust_points"] = rows.delimiter == ","
    try:
        return find_marks([rows.column(name) for name in (facts["target"], *facts["inputs"])], **given)
    except Undecided as error:
        other, cure = "", f"--decimal {error.mark} or --thousands {error.mark}"
        if error.other is not None:
            other, cure = f" in line {rows.lines[error.other]}", "--decimal . or --decimal ,"
        raise ValueError(
            f"{rows.path}: line {rows.lines[error.row]}: {error}{other}: {cure} says which is meant"
        ) from error


def _dates(rows, facts, settings):
    """(moments, form) of the column of dates; (None, None) where there is none, or an older run did not read it."""
    if facts["date"] is None:
        return None, None
    if "date_format" in facts or facts["calendar"]:
        return _read_dates(rows, facts, settings)
    try:
        return _read_dates(rows, facts, settings)
    except ValueError as error:
        rows.notes.append(f"the dates were not read: {error}")
        return None, None


def _read_dates(rows, facts, settings):
    name = facts["date"]
    try:
        moments, form, others = read_dates(rows.column(name), settings.date_format, facts.get("date_format"))
    except UnreadDates as error:
        cure = "--date-format says how dates are written"
        if error.row:
            cure = f"delete the line or put # before it, or {cure}"
        raise ValueError(f"{rows.path}: line {rows.lines[error.row]}, column {name!r}: {error}: {cure}") from error
    if others:
        rows.notes.append(f"dates are read as {form}, by which they are evenly spaced; {others[0]} fits, too")
    return moments, form


def _order(rows, facts, settings, moments):
    """The order in which the rows increase in time, or None where they do. Raises ValueError where they should not be
    sorted."""
    wrong, row = find_disorder(moments)
    if wrong is None:
        return None
    if wrong == "descending":
        rows.notes.append("the rows were newest first: reversed")
        return np.arange(len(rows))[::-1]
    cells = rows.column(facts["date"])
    place = f"{rows.path}: line {rows.lines[row]}, column {facts['date']!r}: {cells[row]!r}"
    if wrong == "doubled":
        first = moments.index(moments[row])
        raise ValueError(
            f"{place} is the date of line {rows.lines[first]}, too: leave one row for each date, one series in a "
            "file. Was a clock set back? Add the offset, as in 02:00+01:00. Or --date none takes the rows as they stand"
        )
    if not settings.sort:
        raise ValueError(
            f"{place} comes after {cells[row - 1]!r}: the rows should be in order of time. Training with --sort sorts "
            "them; --date none takes them as they stand"
        )
    rows.notes.append(f"the rows were in no order of time (line {rows.lines[row]}): sorted")
    return np.array(sorted(range(len(rows)), key=moments.__getitem__))


def _span(step):
    """A timedelta in words."""
    for unit, size in (("day", 86400), ("hour", 3600), ("minute", 60), ("second", 1)):
        count = step / timedelta(seconds=size)
        if count >= 1 and count == int(count):
            return f"{int(count)} {unit}{'s' * (count > 1)}"
    return str(step)


# ---- gaps


def _without_gaps(rows, names, settings, values, moments, lines):
    """Values, moments and lines, with missing values replaced as ``fill`` says. Raises ValueError for "none"."""
    missing = np.isnan(values)
    row, column = np.argwhere(missing)[0]
    if settings.fill == "none":
        raise ValueError(
            f"{rows.path}: line {lines[row]}, column {names[column]!r}: the value is missing: --fill previous, linear "
            "or drop says what to take"
        )
    empty = missing.all(axis=0)
    if empty.any():
        raise ValueError(f"{rows.path}: column {names[int(np.argmax(empty))]!r} holds no value")
    if settings.fill == "drop":
        whole = ~missing.any(axis=1)
        if not whole.any():
            raise ValueError(f"{rows.path}: fill drop: no row has all values")
        rows.notes.append(f"{(~whole).sum():,} rows with a missing value are left out, the first in line {lines[row]}")
        return values[whole], moments and [m for m, ok in zip(moments, whole, strict=True) if ok], lines[whole]
    first = int((~missing).argmax(axis=0).max())
    if first:
        rows.notes.append(f"the first rows are left out: values begin in line {lines[first]}")
        values, moments, lines = values[first:], moments and moments[first:], lines[first:]
        missing = missing[first:]
    if missing.any():
        row = int(missing.any(axis=1).argmax())
        rows.notes.append(f"{missing.sum():,} missing values filled ({settings.fill}), the first in line {lines[row]}")
    x = np.arange(len(values), dtype=float)
    if moments and settings.fill == "linear":
        x = np.array([(moment - moments[0]).total_seconds() for moment in moments])
    values = values.copy()
    for column in range(values.shape[1]):
        known = np.flatnonzero(~missing[:, column])
        if settings.fill == "linear":
            values[:, column] = np.interp(x, x[known], values[known, column])
        else:
            values[:, column] = values[known[np.searchsorted(known, np.arange(len(x)), side="right") - 1], column]
    return values, moments, lines
