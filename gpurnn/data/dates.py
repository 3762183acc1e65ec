"""Dates: how files write them."""

import re
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from functools import cache

from .moments import is_even

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

    unpadded: the directives of "mdHI" whose numbers below 10 have one digit; digits: how many a fraction has at least
    and at most; zone: how one of them is written; long: whether months have their whole names.
    """

    pattern: str
    unpadded: str = ""
    digits: tuple = (0, 0)
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
            unit = timedelta(milliseconds=1) if self.pattern == "epoch ms" else timedelta(seconds=1)
            whole, rest = divmod(moment - _EPOCH, unit)
            return f"{whole}.{self._fraction(rest / unit)}".removesuffix(".")
        if not _is_ours(self.pattern):
            return moment.strftime(self.pattern)
        return re.sub("%(.)", lambda found: self._part(found[1], moment), self.pattern)

    def _fraction(self, share):
        """The digits of a part of a second, without zeros at the end that the file does not write."""
        least, most = self.digits
        return f"{round(share * 1e6):06}000"[:most].rstrip("0").ljust(least, "0")

    def _part(self, directive, moment):
        number = {"Y": (moment.year, 4), "y": (moment.year % 100, 2), "m": (moment.month, 2), "d": (moment.day, 2),
                  "H": (moment.hour, 2), "I": (moment.hour % 12 or 12, 2), "M": (moment.minute, 2),
                  "S": (moment.second, 2), "q": ((moment.month + 2) // 3, 1)}  # fmt: skip
        if directive in number:
            value, size = number[directive]
            return f"{value:0{1 if directive in self.unpadded else size}}"
        if directive == "f":
            return self._fraction(moment.microsecond / 1e6)
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
    if pattern in _ISO and not re.search(rf"^(?!{_ISO[pattern]}$)", "\n".join(cells), re.MULTILINE):
        try:
            return list(map(datetime.fromisoformat, cells)), DateForm(pattern)
        except ValueError:
            pass  # the loop below finds which cell
    form, moments = _detailed(cells, pattern), []
    for row, cell in enumerate(cells):
        try:
            moments.append(_parse(form, cell))
        except (ValueError, OverflowError) as error:
            other = next((c for c in cells if c != cell and _fits(pattern, c)), None)
            as_what = f"a date as {other!r} is" if other else f"a date of the form {pattern}"
            raise UnreadDates(f"expected {as_what}, got {cell!r}", row) from error
    return moments, form


def _detailed(cells, pattern):
    """The ``DateForm`` of cells by a pattern: how they write its parts."""
    if pattern.startswith("epoch"):
        written = {"f": {cell.partition(".")[2] for cell in cells}}
    elif _is_ours(pattern):
        found = [match.groupdict() for match in map(_regex(pattern).fullmatch, cells) if match]
        written = {name: {parts[name] for parts in found} for name in (found[0] if found else ())}
    else:
        return DateForm(pattern)
    sizes = set(map(len, written.get("f", ()))) or {0}
    long = any(month in _MONTHS and month != "May" for month in written.get("b", ()))
    return DateForm(pattern, _unpadded(written, pattern), (min(sizes), max(sizes)), min(written.get("z", [""])), long)


def _unpadded(written, pattern):
    """The directives of "mdHI" that are written without a zero in front. Where no number below 10 shows it, the day is
    as the month and the month as the day, an hour as they are, and they as the hour where the year is not first."""
    found = ""
    for name in "mdHI":
        for names in (name, "md", "" if pattern.startswith("%Y") else "HI"):
            small = [text for each in names for text in written.get(each, ()) if len(text) == 1 or text[0] == "0"]
            if small:
                found += name * (min(map(len, small)) == 1)
                break
    return found
