"""The columns of a file that a series is made of."""

import math
from dataclasses import dataclass

import numpy as np

from ...data.dates import CALENDAR, read_moments
from ...data.tables import number, read_rows


@dataclass
class Table:
    """Rows of a file. values: (N, 1 + number of inputs), float64, the target first; moments: N datetimes, or None where
    there are no dates; form: how the file writes them, for ``strftime``."""

    values: np.ndarray
    moments: list | None
    form: str | None

    def __len__(self):
        return len(self.values)


def choose_columns(path, settings):
    """Which columns of a file are which: {"target": name, "inputs": [names], "date": name or None, "calendar": [...]}.

    Raises ValueError for a name that the file does not have.
    """
    header, rows = read_rows(path)
    places = {name: n for n, name in enumerate(header)}
    target = settings.target or header[-1]
    asked = [name.strip() for name in (settings.inputs or "").split(",") if name.strip()]
    for name in (target, settings.date, *(() if asked == ["all"] else asked)):
        if name is not None and name not in places:
            raise ValueError(f"{path}: has no column {name!r}: expected one of {', '.join(header)}")
    date = settings.date or (header[0] if header[0] not in (target, *asked) else None)
    moments = read_moments([cells[places[date]] for _, cells in rows])[0] if date else None
    if moments is None and settings.date is None:
        date = None  # the first column holds something else
    if asked == ["all"]:
        texts = {n for n in range(len(header)) if any(number(cells[n]) is None for _, cells in rows)}
        asked = [name for n, name in enumerate(header) if name not in (target, date) and n not in texts]
    if target in asked or len(set(asked)) < len(asked):
        raise ValueError(f"inputs: expected each column once and not the target {target!r}, got {', '.join(asked)}")
    calendar = []
    if settings.calendar:
        if moments is None:
            raise ValueError(f"{path}: calendar needs a column of dates, such as 2016-07-01 00:00, got none")
        calendar = [name for name, (_, place) in CALENDAR.items() if len({place(moment) for moment in moments}) > 1]
    return {"target": target, "inputs": asked, "date": date, "calendar": calendar}


def read_table(path, facts, fill=False):
    """The ``Table`` of a CSV file's columns that ``facts`` name; fill: missing values become the ones before.

    Raises ValueError naming file, line and column for what is no number, is missing, or does not fit the header.
    """
    header, rows = read_rows(path)
    places = {name: n for n, name in enumerate(header)}
    names = [facts["target"], *facts["inputs"]]
    wanted = [*names, facts["date"]] if facts["date"] else names
    for name in wanted:
        if name not in places:
            raise ValueError(f"{path}: has no column {name!r}: expected one of {', '.join(header)}")
    values = np.empty((len(rows), len(names)))
    for n, name in enumerate(names):
        column = places[name]
        for row, (line, cells) in enumerate(rows):
            value = number(cells[column])
            if value is None:
                raise ValueError(f"{path}: line {line}, column {name!r}: expected a number, got {cells[column]!r}")
            if math.isnan(value):
                if not fill or row == 0:
                    why = "fill takes the one before" if not fill else "there is none before to fill in"
                    raise ValueError(f"{path}: line {line}, column {name!r}: the value is missing; {why}")
                value = values[row - 1, n]
            values[row, n] = value
    moments, form = None, None
    if facts["date"]:
        moments, form = read_moments([cells[places[facts["date"]]] for _, cells in rows])
    if facts["calendar"] and moments is None:
        raise ValueError(f"{path}: column {facts['date']!r}: expected dates, such as 2016-07-01 00:00")
    return Table(values, moments, form)
