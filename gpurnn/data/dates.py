"""Dates: how files write them, whether they are in order, how they continue, where in the day and the year they are."""

import re
from collections import Counter
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from functools import cache

import numpy as np

CALENDAR = {  # feature -> its period and where in it a moment is
    "hour": (24, lambda d: d.hour + d.minute / 60),
    "weekday": (7, lambda d: d.weekday()),
    "month": (12, lambda d: d.month - 1),
}
_MONTHS = ("January", "February", "March", "April", "May", "June", "July", "August", "September", "October", "November",
           "December")  # fmt: skip
_NAMES = {name[:size].lower(): n for n, name in enumerate(_MONTHS, 1) for size in (3, 4, 9)}
_DIRECTIVES = {
    "Y": r"(?P<Y>\d{4})", "y": r"(?P<y>\d\d)", "m": r"(?P<m>\d{1,2})", "d": r"(?P<d>\d{1,2})",
    "b": r"(?P<b>[A-Za-z]{3,9})\.?", "H": r"(?P<H>\d{1,2})", "I": r"(?P<I>\d{1,2})", "M": r"(?P<M>\d\d)",
    "S": r"(?P<S>\d\d)", "f": r"(?P<f>\d{1,9})", "p": "(?P<p>[AaPp][Mm])",
    "z": r"(?P<z>Z|[+-]\d\d(?::?\d\d)?)", "q": "(?P<q>[1-4])",
}  # fmt: skip
# Forms that the same date may have (day or month first) are separate candidates. "%q" is the quarter.
_DAYS = (
    "%Y-%m-%d", "%Y/%m/%d", "%Y.%m.%d", "%d.%m.%Y", "%d/%m/%Y", "%m/%d/%Y", "%d-%m-%Y", "%m-%d-%Y", "%d.%m.%y",
    "%y.%m.%d", "%d/%m/%y", "%m/%d/%y", "%y/%m/%d", "%d-%m-%y", "%m-%d-%y", "%y-%m-%d", "%d %b %Y", "%d. %b %Y",
    "%d-%b-%Y", "%d-%b-%y", "%d/%b/%Y", "%b %d, %Y", "%b %d %Y", "%Y-%b-%d",
)  # fmt: skip
_TIMES = tuple(
    f"{gap}{clock}{zone}"
    for gap in (" ", "T")
    for clock in ("%H:%M:%S", "%H:%M", "%H:%M:%S.%f", "%I:%M:%S %p", "%I:%M %p", "%H")
    for zone in ("", "%z", " %z", " UTC")
    if clock != "%H" or not zone
)
_MONTHLY = (
    "%Y-%m", "%Y/%m", "%YM%m", "%m/%Y", "%m-%Y", "%b %Y", "%b-%Y", "%b-%y", "%Y %b", "%Y-%b",
    "%YQ%q", "%Y-Q%q", "%Y Q%q", "Q%q %Y", "Q%q/%Y", "Q%q-%Y",
)  # fmt: skip
# Plain numbers, which other columns hold, too: dates only if they increase or if the column's name says so
_WEAK = {
    "%Y": r"\d{4}", "%Y%m%d": r"[12]\d{7}", "%Y%m": r"[12]\d{3}(?:0[1-9]|1[0-2])", "%Y.%m": r"[12]\d{3}\.\d\d",
    "%m.%Y": r"\d\d?\.[12]\d{3}", "epoch": r"\d{9,10}(?:\.\d*)?", "epoch ms": r"\d{12,13}(?:\.0*)?",
}  # fmt: skip
_NAMED = re.compile(
    r"(?:.*[_ ])?(?:date|time|timestamp|datetime|day|month|quarter|year|period|week|ds|epoch|datum|jahr|monat|tag|zeit)"
    r"s?(?:[_ ].*)?",
    re.IGNORECASE,
)
_ISO = {"%Y-%m-%d": r"\d{4}-\d\d-\d\d"}  # forms that Python itself parses quickly
_ISO |= {f"%Y-%m-%d{gap}%H:%M": rf"{_ISO['%Y-%m-%d']}{gap}\d\d:\d\d" for gap in " T"}
_ISO |= {f"{form}:%S": rf"{cell}:\d\d" for form, cell in _ISO.items() if "H" in form}
_SAMPLE = 40  # cells that are looked at to find a form
_EPOCH = datetime(1970, 1, 1)


@dataclass(frozen=True)
class DateForm:
    """How dates are written. pattern: as of ``strptime``, with %q for a quarter; or "epoch", "epoch ms".

    padded: whether days, months and hours have two digits; digits: of a fraction; zone: how one of them is written;
    long: whether months have their whole names.
    """

    pattern: str
    padded: bool = True
    digits: int = 6
    zone: str = ""
    long: bool = False

    def __str__(self):
        return self.pattern

    def parse(self, cell):
        """The datetime of a cell. Raises ValueError."""
        if self.pattern.startswith("epoch"):
            return _EPOCH + timedelta(seconds=float(cell) / (1000 if self.pattern == "epoch ms" else 1))
        if not _is_ours(self.pattern):
            return datetime.strptime(cell, self.pattern)
        found = _regex(self.pattern).fullmatch(cell)
        if not found:
            raise ValueError(f"{cell!r} is not {self.pattern}")
        return _moment(found.groupdict())

    def write(self, moment):
        """A datetime as the file would write it."""
        if self.pattern.startswith("epoch"):
            milliseconds = (moment - _EPOCH) // timedelta(milliseconds=1)
            return str(milliseconds if self.pattern == "epoch ms" else milliseconds // 1000)
        if not _is_ours(self.pattern):
            return moment.strftime(self.pattern)
        return re.sub("%(.)", lambda found: self._part(found[1], moment), self.pattern)

    def _part(self, directive, moment):
        one = 2 if self.padded else 1  # digits at least
        number = {"Y": (moment.year, 4), "y": (moment.year % 100, 2), "m": (moment.month, one), "d": (moment.day, one),
                  "H": (moment.hour, one), "I": (moment.hour % 12 or 12, one), "M": (moment.minute, 2),
                  "S": (moment.second, 2), "q": ((moment.month + 2) // 3, 1)}  # fmt: skip
        if directive in number:
            value, size = number[directive]
            return f"{value:0{size}}"
        if directive == "f":
            return f"{moment.microsecond:06}"[: self.digits].ljust(self.digits, "0")
        if directive == "p":
            return "AM" if moment.hour < 12 else "PM"
        if directive == "b":
            return _MONTHS[moment.month - 1][: None if self.long else 3]
        offset = moment.strftime("%z")
        if self.zone == "Z" and offset == "+0000":
            return "Z"
        return f"{offset[:3]}:{offset[3:]}" if ":" in self.zone or self.zone == "Z" else offset


def _is_ours(pattern):
    return set(re.findall("%(.)", pattern)) <= set(_DIRECTIVES)


@cache
def _regex(pattern):
    text = re.sub("%(.)", lambda found: _DIRECTIVES[found[1]], re.escape(pattern))
    if re.search("%.%", pattern):  # nothing separates the numbers
        text = text.replace("{1,2}", "{2}")
    return re.compile(text)


def check_date_format(pattern):
    """Raise ValueError unless ``pattern`` is one for ``DateForm``."""
    try:
        if not re.search("%[A-Za-z]", pattern):
            raise ValueError("it has no directive")
        if _is_ours(pattern):
            _regex(pattern)
        else:
            datetime(2000, 1, 1).strptime(datetime(2000, 1, 1).strftime(pattern), pattern)
    except (ValueError, re.error) as error:
        if pattern not in ("epoch", "epoch ms"):
            raise ValueError(f"date_format should be like '%d.%m.%Y', or epoch, got {pattern!r}: {error}") from error


def _moment(part):
    """The datetime of what the directives matched."""
    year = int(part["Y"]) if part.get("Y") else int(part.get("y") or 1900)
    if part.get("y"):
        year += 2000 if year < 69 else 1900
    month = int(part.get("m") or 1)
    if part.get("b"):
        month = _NAMES.get(part["b"].lower())
        if month is None:
            raise ValueError(f"{part['b']} is no month")
    if part.get("q"):
        month = 3 * int(part["q"]) - 2
    hour = int(part.get("H") or 0)
    if part.get("I"):
        hour = int(part["I"]) % 12 + 12 * (part["p"] or "am").lower().startswith("p")
    fraction = int((part.get("f") or "0")[:6].ljust(6, "0"))
    zone = None
    if part.get("z"):
        digits = part["z"].replace(":", "")
        minutes = 0 if digits == "Z" else int(digits[1:3]) * 60 + int(digits[3:] or 0)
        zone = timezone(timedelta(minutes=-minutes if digits[0] == "-" else minutes))
    times = (int(part.get("M") or 0), int(part.get("S") or 0), fraction, zone)
    return datetime(year, month, int(part.get("d") or 1), hour, *times)


# ---- which form


class UnreadDates(ValueError):
    """A column that holds dates cannot be read. row: of the cell that shows it, or None."""

    def __init__(self, text, row=None):
        super().__init__(text)
        self.row = row


def has_date_name(name):
    """Whether a column's name says that it holds dates."""
    return bool(_NAMED.fullmatch(name.strip()))


def date_share(cells, weak=False):
    """Which share of some of the cells could be dates; weak: such that are numbers, years and seconds since 1970."""
    counts, size = _candidates(cells, _WEAK if weak else ())
    return max(counts.values(), default=0) / size


def read_dates(cells, pattern=None, before=None):
    """([datetime], ``DateForm``, [other forms that fit as well]) of a column of dates.

    pattern: as the user says it. before: that of a file of the same kind, taken if it fits. Raises ``UnreadDates``
    with the row of a cell that is not a date like the others, or where day and month cannot be told apart.
    """
    if pattern:
        return *_read(cells, pattern), []
    if before:
        try:
            return *_read(cells, before), []
        except UnreadDates:
            pass
    counts, size = _candidates(cells, _WEAK)
    counts |= _candidates(cells)[0]
    most = max(counts.values(), default=0)
    if 2 * most <= size:
        raise UnreadDates(f"expected dates, got {cells[0]!r}", 0)
    answers, refusals = [], []
    for form in (form for form, count in counts.items() if count == most):
        try:
            answers.append(_read(cells, form))
        except UnreadDates as error:
            refusals.append(error)
    if not answers:  # the form that gets furthest is meant
        raise max(refusals, key=lambda error: error.row)
    if len(answers) == 1:
        return *answers[0], []
    even = [answer for answer in answers if is_even(answer[0]) or is_even(answer[0][::-1])]  # 01/02/2020
    if len(even) != 1 or len(cells) < 3:
        forms = " or ".join(str(form) for _, form in answers)
        raise UnreadDates(f"{cells[0]!r} may be {forms}, and nothing in the column decides it", 0)
    return *even[0], [str(form) for _, form in answers if form != even[0][1]]


def _candidates(cells, forms=()):
    """({form: how many of some cells fit it}, how many these are), of forms that fit one of three; without ``forms`` of
    all that are not weak."""
    sample = cells[:: max(1, len(cells) // _SAMPLE)]
    few = {cell for cell in (sample[0], sample[len(sample) // 2], sample[-1]) if re.search(r"\d", cell)}
    forms = {form: None for cell in few for form in forms or _possible(cell) if _fits(form, cell)}
    return {form: sum(_fits(form, cell) for cell in sample) for form in forms}, len(sample)


def _possible(cell):
    """The forms that a cell could have by how it begins."""
    for day in _DAYS:
        found = _regex(day).match(cell)
        if found:
            yield from (day,) if found.end() == len(cell) else (day + time for time in _TIMES)
    yield from _MONTHLY


def _fits(pattern, cell):
    try:
        _parse(DateForm(pattern), cell)
    except (ValueError, OverflowError):
        return False
    return True


def _parse(form, cell):
    if form.pattern in _WEAK and not re.fullmatch(_WEAK[form.pattern], cell):
        raise ValueError(f"{cell!r} is not {form}")
    return form.parse(cell)


def _read(cells, pattern):
    """Cells by a pattern, the common ones quickly."""
    text = "\n".join(cells)
    form, moments = DateForm(pattern, *_details(text, pattern)), []
    if pattern in _ISO and not re.search(rf"^(?!{_ISO[pattern]}$)", text, re.MULTILINE):
        try:
            return list(map(datetime.fromisoformat, cells)), form
        except ValueError:
            pass  # the loop below finds which cell
    for row, cell in enumerate(cells):
        try:
            moments.append(_parse(form, cell))
        except (ValueError, OverflowError) as error:
            other = next((c for c in cells if c != cell and _fits(pattern, c)), None)
            as_what = f"a date as {other!r} is" if other else f"a date of the form {pattern}"
            raise UnreadDates(f"expected {as_what}, got {cell!r}", row) from error
    return moments, form


def _details(text, pattern):
    """(padded, digits, zone, long) of a ``DateForm``."""
    bare = re.search(r"(?<!\d)\d(?!\d)", text) if "%q" not in pattern else None
    long = "%b" in pattern and any(month in text for month in _MONTHS if month != "May")
    digits = re.search(r":\d\d\.(\d+)", text) if "%f" in pattern else None
    zone = re.search(r"(Z|[+-]\d\d:?(?:\d\d)?)$", text, re.MULTILINE) if "%z" in pattern else None
    return not bare, min(6, len(digits[1])) if digits else 6, zone[1] if zone else "", long


# ---- order


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
