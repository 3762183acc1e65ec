"""Moments: whether they are in order and evenly spaced, how they continue, where in the day and the year they are."""

from collections import Counter
from datetime import datetime, timedelta

import numpy as np

CALENDAR = {  # feature -> its period and where in it a moment is
    "hour": (24, lambda d: d.hour + d.minute / 60),
    "weekday": (7, lambda d: d.weekday()),
    "month": (12, lambda d: d.month - 1),
}


def find_disorder(moments):
    """("descending", None) where rows are newest first, ("doubled" or "disordered", row) of the first such row, else
    (None, None); a row is doubled where another has the same date."""
    pairs = list(zip(moments, moments[1:], strict=False))
    wrong = next((row for row, (a, b) in enumerate(pairs, 1) if b <= a), None)
    if wrong is None:
        return None, None
    if all(b < a for a, b in pairs):
        return "descending", None
    seen = set()
    for row, moment in enumerate(moments):
        if moment in seen:
            return "doubled", row
        seen.add(moment)
    return "disordered", wrong


def months_between(a, b):
    return 12 * (b.year - a.year) + b.month - a.month


def _is_month_end(moment):
    return (moment.replace(tzinfo=None) + timedelta(days=1)).day == 1 if moment.year < 9999 else False


def _by_months(moments):
    """Whether moments are at the same time of the same day of their months, or all on the last."""
    same_time = len({(m.time(), m.tzinfo) for m in moments}) == 1
    return same_time and (len({m.day for m in moments}) == 1 or all(map(_is_month_end, moments)))


def uneven_steps(moments):
    """(the commonest step, how many rows have another, the first such row) where the steps of increasing moments
    differ, else None. Months and years count as even; so do working days."""
    if _by_months(moments) and len({months_between(a, b) for a, b in zip(moments, moments[1:], strict=False)}) == 1:
        return None
    steps = [b - a for a, b in zip(moments, moments[1:], strict=False)]
    counts = Counter(steps).most_common()
    if len(counts) < 2 or (_on_working_days(moments) and set(steps) == {timedelta(days=1), timedelta(days=3)}):
        return None
    step, count = counts[0]
    return step, len(steps) - count, next(row for row, other in enumerate(steps, 1) if other != step)


def is_even(moments):
    """Whether moments increase in equal steps, or by whole months."""
    return len(moments) > 1 and find_disorder(moments)[0] is None and uneven_steps(moments) is None


def _on_working_days(moments):
    """Whether moments are days from Monday to Friday, one after another for the most part, with weekends between."""
    steps = Counter(b - a for a, b in zip(moments, moments[1:], strict=False))
    day, weekend = timedelta(days=1), timedelta(days=3)
    return weekend in steps and steps.most_common(1)[0][0] == day and all(moment.weekday() < 5 for moment in moments)


def continue_moments(moments, count):
    """``count`` datetimes that continue the last of ``moments``, by whole months, working days or equal times; None
    where these do neither, or the calendar ends."""
    tail = moments[-4:]
    pairs = list(zip(tail, tail[1:], strict=False))
    months = {months_between(a, b) for a, b in pairs}
    last, month = tail[-1], 12 * tail[-1].year + tail[-1].month - 1
    ends = all(map(_is_month_end, tail))
    if len(months) == 1 and min(months) > 0 and _by_months(tail) and (last.day < 29 or ends):
        places = [month + min(months) * k for k in range(1, count + 1)]
        if places and places[-1] // 12 >= datetime.max.year:
            return None
        return [_in_month(last, place, ends) for place in places]
    if _on_working_days(moments[-30:]):
        try:
            return _next_working_days(last, count)
        except OverflowError:
            return None
    times = {b - a for a, b in pairs}
    room = datetime.max.replace(tzinfo=last.tzinfo) - last
    if len(times) == 1 and min(times) > timedelta(0) and room // min(times) > count:
        return [last + min(times) * k for k in range(1, count + 1)]
    return None


def _in_month(moment, place, end):
    year, month = place // 12, place % 12 + 1
    if not end:
        return moment.replace(year=year, month=month)
    following = datetime(year + month // 12, month % 12 + 1, 1) - timedelta(days=1)
    return moment.replace(year=year, month=month, day=following.day)


def _next_working_days(last, count):
    days = []
    while len(days) < count:
        last += timedelta(days=1 if last.weekday() < 4 else 7 - last.weekday())
        days.append(last)
    return days


def calendar_features(moments, names, rows):
    """(rows, 2 len(names)): sine and cosine of the place in the day, the week, the year."""
    columns = [np.zeros((rows, 0))]
    for name in names:
        period, place = CALENDAR[name]
        angle = 2 * np.pi / period * np.array([place(moment) for moment in moments])
        columns.append(np.pad(np.stack([np.sin(angle), np.cos(angle)], axis=1), ((0, rows - len(angle)), (0, 0))))
    return np.concatenate(columns, axis=1)
