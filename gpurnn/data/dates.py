"""Dates: how files write them, how they go on, and where in the day, the week and the year they are."""

from datetime import datetime, timedelta

import numpy as np

CALENDAR = {  # feature -> its period and where in it a moment is
    "hour": (24, lambda d: d.hour + d.minute / 60),
    "weekday": (7, lambda d: d.weekday()),
    "month": (12, lambda d: d.month - 1),
}
_DATE_FORMS = (
    "%Y-%m-%d %H:%M:%S", "%Y-%m-%d %H:%M", "%Y-%m-%dT%H:%M:%S", "%Y-%m-%dT%H:%M", "%Y-%m-%d", "%Y-%m",
    "%Y/%m/%d %H:%M:%S", "%Y/%m/%d %H:%M", "%Y/%m/%d", "%Y%m%d", "%Y",
)  # fmt: skip


def read_moments(cells):
    """Strings as datetimes, all of one form, and that form; (None, None) where they are no dates."""
    for form in _DATE_FORMS:
        try:
            return [datetime.strptime(cell, form) for cell in cells], form
        except ValueError:
            pass
    return None, None


def continue_moments(moments, count):
    """``count`` datetimes that go on as the last of ``moments`` do, by whole months or by equal times; None where these
    do neither, or the calendar ends."""
    tail = moments[-4:]
    pairs = list(zip(tail, tail[1:], strict=False))
    months = {12 * (b.year - a.year) + b.month - a.month for a, b in pairs}
    last, month = tail[-1], 12 * tail[-1].year + tail[-1].month - 1
    if (
        len(months) == 1
        and min(months) > 0
        and len({m.replace(year=2000, month=1) for m in tail}) == 1
        and last.day < 29
    ):
        places = [month + min(months) * k for k in range(1, count + 1)]
        if places and places[-1] // 12 > datetime.max.year:
            return None
        return [last.replace(year=place // 12, month=place % 12 + 1) for place in places]
    times = {b - a for a, b in pairs}
    if len(times) == 1 and min(times) > timedelta(0) and (datetime.max - last) // min(times) >= count:
        return [last + min(times) * k for k in range(1, count + 1)]
    return None


def calendar_features(moments, names, rows):
    """(rows, 2 len(names)): sine and cosine of the place in the day, the week, the year."""
    columns = [np.zeros((rows, 0))]
    for name in names:
        period, place = CALENDAR[name]
        angle = 2 * np.pi / period * np.array([place(moment) for moment in moments])
        columns.append(np.pad(np.stack([np.sin(angle), np.cos(angle)], axis=1), ((0, rows - len(angle)), (0, 0))))
    return np.concatenate(columns, axis=1)
