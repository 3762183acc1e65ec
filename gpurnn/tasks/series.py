"""Time series: read a CSV file, learn to forecast a column, forecast. ``gpurnn train series`` on the shell.

>>> from gpurnn.tasks.run import prepare
>>> text = "month,passengers\\n" + "".join(f"{n},{100 + n % 12}\\n" for n in range(240))
>>> Path("airline.csv").write_text(text, encoding="utf-8") > 0
True
>>> run = prepare("series", ["airline.csv"], "runs/airline", window=24, horizon=12, residual="season", epochs=1)
>>> history = run.train()
>>> trained = load("runs/airline")
>>> forecast(trained, read_table("airline.csv", trained.facts)).shape                          # in the file's units
(12,)

A window of W rows is read, the H rows behind it are forecast. Three ways (``mode``): the last state of the window
gives all H values (direct, many-to-one); every state of the window gives the H values behind it (every, many-to-many:
more to learn from; the forecast is the last one's); or the state goes on to a second network, a decoder, that makes one
value at a time and reads its own (recursive, one-to-many). What is learnt is the value itself, or with ``residual`` its
distance from the last value ("last") or from that of the season before ("season"), so that a series that drifts stays
within what was seen in training.

Everything fitted to the data (mean, deviation, season) is fitted to the training part, the first rows. The parts are
told by the rows that are forecast; windows may begin before them, as they do in use.
"""

import csv
import io
import math
import re
from dataclasses import dataclass
from datetime import datetime, timedelta
from functools import partial

import numpy as np

from .. import rng
from ..data import Batch
from ..dtypes import check_dtype
from ..errors import DivergedError, FileError, check_size
from ..files import check_room, read_bytes
from ..layers import Dropout, Linear, Pooling, Sequential
from ..losses import mae, mse
from ..module import Module
from .settings import Settings, changed, recurrent, setting
from .task import WEIGHT_COST, Data, Task, check_numbers, check_strings, checksum

_LOSSES = {"mse": mse, "mae": mae}
_CALENDAR = {  # feature -> its period and where in it a moment is
    "hour": (24, lambda d: d.hour + d.minute / 60),
    "weekday": (7, lambda d: d.weekday()),
    "month": (12, lambda d: d.month - 1),
}
_DATE_FORMS = (
    "%Y-%m-%d %H:%M:%S", "%Y-%m-%d %H:%M", "%Y-%m-%dT%H:%M:%S", "%Y-%m-%dT%H:%M", "%Y-%m-%d", "%Y-%m",
    "%Y/%m/%d %H:%M:%S", "%Y/%m/%d %H:%M", "%Y/%m/%d", "%Y%m%d", "%Y",
)  # fmt: skip
_BYTE_COST, _ROW_COST, _CELL_COST = 6, 200, 80  # bytes of memory for a byte of a table, a row of it and a cell
_COLUMN_COST, _VALUE_COST = 2000, 20  # for a column that is read besides its cells, and for a value in a batch
# what a formula begins with in a spreadsheet, in both widths
_FORMULA = ("=", "+", "-", "@", "\uff1d", "\uff0b", "\uff0d", "\uff20")
_MISSING = ("", "na", "n/a", "nan", "null", "none", "?")


@dataclass
class SeriesSettings(Settings):
    """window, horizon: W and H, rows read and rows forecast."""

    hidden: int = changed(Settings, "hidden", 32)
    dropout: float = changed(Settings, "dropout", 0.0, "Share of the activations behind each recurrent layer dropped.")
    lr: float = changed(Settings, "lr", 3e-3)
    epochs: int = changed(Settings, "epochs", 30)
    valid: float = changed(Settings, "valid", 0.1, "Share of the rows, before the test part, kept for validation.")
    test: float = setting(0.1, "Share of the rows, at the end, kept for the test.", low=0, high=1, high_open=True)
    split: str | None = setting(None, "Rows of training, validation and test, such as 8640/2880/2880.")
    target: str | None = setting(None, "Column to forecast.", shown="the last")
    inputs: str | None = setting(None, "Further columns to read, such as 'a,b'; 'all' for all that hold numbers.")
    date: str | None = setting(None, "Column of the date.", shown="the first, if it holds dates")
    calendar: bool = setting(False, "Read hour, weekday and month too, as sine and cosine.")
    fill: bool = setting(False, "Fill a missing value with the one before.")
    window: int = setting(48, "Rows that are read for a forecast.")
    horizon: int = setting(12, "Rows that are forecast.")
    mode: str = setting(
        "direct",
        "How: all from the last state, from every state, or one after another by a decoder.",
        choices=("direct", "every", "recursive"),
    )
    residual: str = setting(
        "none",
        "What is learnt: the value, its distance from the last, or from the season before.",
        choices=("none", "last", "season"),
    )
    log: bool = setting(False, "Take the logarithm of the target: for growth in per cent.")
    season: int | None = setting(None, "Rows of a season.", shown="guessed by autocorrelation")
    loss: str = setting("mse", "What training lowers.", choices=tuple(_LOSSES))

    def __post_init__(self):
        super().__post_init__()
        if self.valid + self.test >= 1:
            raise ValueError(f"valid and test: nothing is left for training, got {self.valid:g} and {self.test:g}")


class SeriesTask(Task):
    """Train a model that forecasts a column of a CSV FILE with a header.

    The rows are in order of time. The naive forecasts (the last value; the value of the season before) are measured
    beside the model; 'gpurnn forecast' then forecasts what comes behind the file's end.
    """

    name = "series"
    Settings = SeriesSettings
    examples = """
  gpurnn train series airline.csv --horizon 12 --residual season --log
  gpurnn train series ETTh1.csv --target OT --horizon 96"""
    next = ("gpurnn forecast {run} --plot forecast.png --out forecast.csv",)

    def read(self, files, settings, facts=None, scratch=None):
        if len(files) != 1:
            raise ValueError(f"files: a series is one CSV file, got {len(files)}")
        facts = facts or choose_columns(files[0], settings)
        columns = 1 + len(facts["inputs"])
        column = _COLUMN_COST + WEIGHT_COST * settings.hidden + _VALUE_COST * settings.window * settings.batch
        check_room(files[0], column * columns, f"a model of {columns:,} columns")
        table = read_table(files[0], facts, settings.fill)
        parts = split_rows(len(table), settings)
        if "mean" not in facts:
            facts = facts | fit_scaling(table, parts["train"].stop, settings, files[0])
        reach = reach_back(settings, facts)
        ends = {name: window_ends(part, reach, settings.horizon) for name, part in parts.items()}
        if not len(ends["train"]):
            raise ValueError(
                f"{files[0]}: too short: {len(parts['train'])} rows to train on, a window of {settings.window} rows "
                f"and a horizon of {settings.horizon} need {reach + settings.horizon}"
            )
        for name in ("valid", "test"):
            if len(parts[name]) and not len(ends[name]):
                raise ValueError(
                    f"{files[0]}: too short: the {'validation' if name == 'valid' else 'test'} part has "
                    f"{len(parts[name])} rows, a horizon of {settings.horizon} needs as many"
                )
        sources = {
            name: Windows(table, ends[name], settings, facts, training=name == "train")
            for name in ends
            if len(ends[name])
        }
        season = f"a season of {facts['season']} rows" if facts["season"] > 1 else "no season"
        return Data(
            sources["train"],
            sources.get("valid"),
            facts=facts,
            fingerprint={"rows": len(table), "crc32": checksum(table.values)},
            summary=f"{len(table):,} rows of {facts['target']} ({' / '.join(f'{len(p):,}' for p in parts.values())} to "
            f"train on, validate, test), {season}",
            rest=(table, ends),
        )

    def build(self, settings, facts, backend=None):
        return (Recursive if settings.mode == "recursive" else Direct)(settings, facts, backend)

    def check_facts(self, settings, facts):
        check_strings("target, inputs and calendar", [facts["target"], *facts["inputs"], *facts["calendar"]])
        if not isinstance(facts["date"], (str, type(None))) or not set(facts["calendar"]) <= set(_CALENDAR):
            raise ValueError(f"date and calendar: got {facts['date']!r}, {facts['calendar']!r}")
        columns = 1 + len(facts["inputs"])
        check_numbers("mean", facts["mean"], columns)
        check_numbers("std", facts["std"], columns, 0)
        check_numbers("deviation, seasonal_error", [facts["deviation"], facts["seasonal_error"]], 2, 0)
        check_size("season", facts["season"])

    def sizes(self, settings, facts):
        return {} if settings.mode == "recursive" else {"horizon": settings.horizon}

    def loss(self, settings, facts):
        return _LOSSES[settings.loss]

    def finish(self, trained, data, history):
        table, ends = data.rest
        numbers, lines = {}, []
        for name in ("valid", "test"):
            if len(ends[name]):
                numbers[name] = score(trained, table, ends[name])
                lines.append(_summary(numbers[name], "validation" if name == "valid" else name))
        return numbers, "\n".join(lines)

    def evaluate(self, trained, files):
        """How good the forecasts are in another file, from every row of it that has enough before and behind it."""
        if len(files) != 1:
            raise ValueError(f"files: a series is one CSV file, got {len(files)}")
        settings, facts = trained.settings, trained.facts
        table = read_table(files[0], facts, settings.fill)
        reach = max(reach_back(settings, facts), facts["season"])
        ends = window_ends(range(len(table)), reach, settings.horizon)
        if not len(ends):
            raise ValueError(
                f"{files[0]}: too short: {len(table)} rows, at least {reach + settings.horizon} are needed"
            )
        numbers = score(trained, table, ends)
        return numbers, _summary(numbers, "all")


def _summary(numbers, part):
    lines = [f"{part.capitalize():<15} {'MAE':>11} {'RMSE':>11} {'MASE':>8}   {numbers['windows']:,} forecasts"]
    for name in ("model", "seasonal_naive", "naive"):
        n = numbers[name]
        mase = "-" if n["mase"] is None else f"{n['mase']:.4f}"
        lines.append(f"{name.replace('_', '-'):<15} {n['mae']:11.5g} {n['rmse']:11.5g} {mase:>8}")
    n = numbers["model"]
    lines.append(f"{'':<15} standardised: MSE {n['mse_standardised']:.4f}, MAE {n['mae_standardised']:.4f}")
    return "\n".join(lines)


# ---- reading


@dataclass
class Table:
    """Rows of a file. values: (N, 1 + number of inputs), float64, the target first; moments: N datetimes, or None where
    there are no dates; form: how the file writes them, for ``strftime``."""

    values: np.ndarray
    moments: list | None
    form: str | None

    def __len__(self):
        return len(self.values)


def _rows(path):
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
    if any(math.isfinite(_number(cell) or math.nan) for cell in header):
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


def _number(cell):
    """The number in a cell, nan for a missing one, None for text."""
    if cell.lower() in _MISSING:
        return math.nan
    try:
        value = float(cell)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def choose_columns(path, settings):
    """Which columns of a file are which: {"target": name, "inputs": [names], "date": name or None, "calendar": [...]}.

    Raises ValueError for a name that the file does not have.
    """
    header, rows = _rows(path)
    places = {name: n for n, name in enumerate(header)}
    target = settings.target or header[-1]
    asked = [name.strip() for name in (settings.inputs or "").split(",") if name.strip()]
    for name in (target, settings.date, *(() if asked == ["all"] else asked)):
        if name is not None and name not in places:
            raise ValueError(f"{path}: has no column {name!r}: expected one of {', '.join(header)}")
    date = settings.date or (header[0] if header[0] not in (target, *asked) else None)
    moments = _moments([cells[places[date]] for _, cells in rows])[0] if date else None
    if moments is None and settings.date is None:
        date = None  # the first column holds something else
    if asked == ["all"]:
        texts = {n for n in range(len(header)) if any(_number(cells[n]) is None for _, cells in rows)}
        asked = [name for n, name in enumerate(header) if name not in (target, date) and n not in texts]
    if target in asked or len(set(asked)) < len(asked):
        raise ValueError(f"inputs: expected each column once and not the target {target!r}, got {', '.join(asked)}")
    calendar = []
    if settings.calendar:
        if moments is None:
            raise ValueError(f"{path}: calendar needs a column of dates, such as 2016-07-01 00:00, got none")
        calendar = [name for name, (_, place) in _CALENDAR.items() if len({place(moment) for moment in moments}) > 1]
    return {"target": target, "inputs": asked, "date": date, "calendar": calendar}


def read_table(path, facts, fill=False):
    """The ``Table`` of a CSV file's columns that ``facts`` name; fill: missing values become the ones before.

    Raises ValueError naming file, line and column for what is no number, is missing, or does not fit the header.
    """
    header, rows = _rows(path)
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
            value = _number(cells[column])
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
        moments, form = _moments([cells[places[facts["date"]]] for _, cells in rows])
    if facts["calendar"] and moments is None:
        raise ValueError(f"{path}: column {facts['date']!r}: expected dates, such as 2016-07-01 00:00")
    return Table(values, moments, form)


def _moments(cells):
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


# ---- parts, season, scaling


def split_rows(N, settings):
    """{"train", "valid", "test": range of rows}. Raises ValueError where ``split`` does not fit."""
    if settings.split is None:
        sizes = [0, round(settings.valid * N), round(settings.test * N)]
        sizes[0] = N - sizes[1] - sizes[2]
    else:
        try:
            sizes = [int(part) for part in settings.split.split("/")]
        except ValueError:
            sizes = []
        if len(sizes) != 3 or min(sizes) < 0:
            raise ValueError(f"split should be three numbers of rows, such as 8640/2880/2880, got {settings.split!r}")
        if sum(sizes) > N:
            raise ValueError(f"split: {settings.split} are {sum(sizes)} rows, the file has {N}")
    train, valid, test = np.cumsum(sizes).tolist()
    return {"train": range(train), "valid": range(train, valid), "test": range(valid, test)}


def guess_season(y):
    """Rows of a season of ``y`` (N,), by autocorrelation up to a third of N; 1 for none.

    It is the lag whose autocorrelation, without a linear trend, stands highest above the lowest before it; where none
    stands out, that of the highest peak in the series of differences. To stand out it takes 8 / sqrt(N), or 0.7: the
    autocorrelations of independent values have a deviation of 1 / sqrt(N), and there are many of them.
    """
    for values, below in ((y, np.minimum.accumulate), (np.diff(y), np.zeros_like)):
        N = len(values)
        if N < 9:
            continue
        n = np.arange(N)
        rest = values - np.polyval(np.polyfit(n, values, 1), n)
        if np.abs(rest).max() <= 1e-9 * np.abs(values).max():  # a straight line
            continue
        a = np.fft.irfft(np.abs(np.fft.rfft(rest, 2 * N)) ** 2)[: N // 3 + 1]
        a = a / a[0]
        height, least = a - below(a), min(0.7, 8 / math.sqrt(N))
        peaks = [k for k in range(2, len(a) - 1) if a[k - 1] <= a[k] > a[k + 1] and height[k] > least]
        if peaks:
            return max(peaks, key=lambda k: height[k])
    return 1


def fit_scaling(table, rows, settings, path):
    """What is fitted to the first ``rows`` rows: the mean and std of each column (of the logarithm, where it is
    taken), season; and of the raw target its deviation, and the error of seasonal-naive forecasts, see ``score``."""
    if settings.log and table.values[:, 0].min() <= 0:
        line = int(np.argmax(table.values[:, 0] <= 0)) + 1
        raise ValueError(f"{path}: row {line}: log needs a target above 0, got {table.values[line - 1, 0]:g}")
    train = table.values[:rows]
    if len(train) < 2:
        raise ValueError(f"{path}: too short: {len(train)} rows to train on")
    season = settings.season or guess_season(train[:, 0])
    if season >= len(train):
        raise ValueError(f"{path}: too short: {len(train)} rows to train on, a season is {season}")
    raw = train[:, 0].copy()
    if settings.log:
        train = np.column_stack([np.log(train[:, 0]), train[:, 1:]])
    std = train.std(axis=0)
    return {
        "mean": train.mean(axis=0).tolist(),
        "std": np.where(std > 0, std, 1.0).tolist(),
        "season": int(season),
        "deviation": float(raw.std()),
        "seasonal_error": float(np.abs(raw[season:] - raw[:-season]).mean()),
    }


def reach_back(settings, facts):
    """Rows that a forecast needs, its own last one included."""
    if settings.residual != "season":
        return settings.window
    return settings.window + facts["season"]


def window_ends(part, reach, horizon):
    """The last rows of all windows whose ``horizon`` rows behind them lie in ``part``."""
    return np.arange(max(part.start, reach) - 1, part.stop - horizon)


# ---- windows


class Windows:
    """A batch source: windows of a table, and what comes behind them, for a model of ``SeriesTask``.

    ends: the last row of each window. Inputs (T, B, F), targets (B, H), or (T, B, H) for training in the mode "every";
    for "recursive" the inputs are a pair, with what is known of the rows to come, (H, B, K). training: the windows are
    mixed anew in every epoch, keyed by (seed, epoch). steps: instead of the horizon of the settings.
    """

    def __init__(self, table, ends, settings, facts, *, training=False, steps=None):
        self.ends, self.settings, self.facts, self.training = ends, settings, facts, training
        self.steps = steps or settings.horizon
        self.dtype = check_dtype(settings.dtype)
        values = table.values
        if settings.log:
            with np.errstate(invalid="ignore", divide="ignore"):
                values = np.column_stack([np.log(values[:, 0]), values[:, 1:]])
            if not np.isfinite(values[:, 0]).all():
                raise ValueError("log needs a target above 0")
        scaled = (values - np.array(facts["mean"])) / np.array(facts["std"])
        self.z, self.inputs = scaled[:, 0], scaled[:, 1:]
        moments = table.moments
        if facts["calendar"]:
            ahead = int(ends.max()) + self.steps + 1 - len(table)
            if ahead > 0:
                coming = continue_moments(moments, ahead)
                if coming is None:
                    raise ValueError("the dates do not go on evenly at the end: no calendar for the rows to come")
                moments = moments + coming
        self.calendar = calendar_features(moments, facts["calendar"], len(table) + self.steps)
        self.z = np.concatenate([self.z, np.zeros(self.steps)])  # what is not known yet: targets that nobody reads

    def __len__(self):
        return -(-len(self.ends) // self.settings.batch)

    def batch(self, epoch, index):
        order = np.arange(len(self.ends))
        if self.training:
            order = np.argsort(rng.words(len(order), self.settings.seed, rng.name_key("windows"), epoch), kind="stable")
        chosen = order[index * self.settings.batch : (index + 1) * self.settings.batch]
        return self.collate(self.ends[chosen])

    def collate(self, ends):
        """The Batch of the windows that end with these rows, (B,)."""
        settings, season = self.settings, self.facts["season"]
        rows = ends + np.arange(1 - settings.window, 1)[:, None]  # (T, B)
        anchor = 0.0
        if settings.residual != "none":  # a level that the network knows at the time it speaks
            anchor = self.z[rows[0] if settings.mode == "every" else ends]
        columns = [self.z[rows] - anchor]
        if settings.residual == "season":
            columns.append(self.z[rows] - self.z[rows - season])
        inputs = np.stack(columns, axis=2)
        inputs = np.concatenate([inputs, self.inputs[rows], self.calendar[rows]], axis=2).astype(self.dtype)
        at = rows if settings.mode == "every" and self.training else ends
        targets = (self.z[at[..., None] + np.arange(1, self.steps + 1)] - self.base(at)).astype(self.dtype)
        if settings.mode == "recursive":
            coming = ends + np.arange(1, self.steps + 1)[:, None]  # (H, B)
            known = [self.calendar[coming]]
            if settings.residual == "season":
                known.append((self.base(ends).T - anchor)[:, :, None])
            inputs = inputs, np.concatenate(known, axis=2).astype(self.dtype)
        return Batch(inputs, targets, loss_options={}, weight=len(ends))

    def base(self, ends):
        """What the model's output is added to, (..., H) for ``ends`` (...)."""
        ahead = np.arange(1, self.steps + 1)
        if self.settings.residual == "none":
            return np.zeros(self.steps)
        if self.settings.residual == "last":
            return np.repeat(self.z[ends][..., None], self.steps, axis=-1)
        return self.z[_season_before(ends, ahead, self.facts["season"])]

    def restore(self, outputs, ends):
        """Outputs (B, H) of the model, float64, as values of the target."""
        z = outputs + self.base(ends)
        values = z * self.facts["std"][0] + self.facts["mean"][0]
        return np.exp(values) if self.settings.log else values


def _season_before(ends, ahead, season):
    """The rows with which a seasonal-naive forecast made at ``ends`` (...) answers ``ahead`` (H,): (..., H)."""
    return np.asarray(ends)[..., None] + ahead - season * -(-ahead // season)


def calendar_features(moments, names, rows):
    """(rows, 2 len(names)): sine and cosine of the place in the day, the week, the year."""
    columns = [np.zeros((rows, 0))]
    for name in names:
        period, place = _CALENDAR[name]
        angle = 2 * np.pi / period * np.array([place(moment) for moment in moments])
        columns.append(np.pad(np.stack([np.sin(angle), np.cos(angle)], axis=1), ((0, rows - len(angle)), (0, 0))))
    return np.concatenate(columns, axis=1)


# ---- models


class _Forecaster(Module):
    """What both models have: a recurrent stack that reads the window, and a head (dropout, linear layer)."""

    def __init__(self, settings, facts, backend, outputs):
        season, calendar = settings.residual == "season", 2 * len(facts["calendar"])
        seeds = settings.seeds()
        shared = {"backend": backend, "dtype": settings.dtype}
        encoder = recurrent(settings, 1 + season + len(facts["inputs"]) + calendar, next(seeds), backend)
        if settings.mode == "recursive":
            second = {"decoder": recurrent(settings, 1 + calendar + season, next(seeds), backend)}
        else:
            second = {"last": Pooling(settings.hidden, "last", **shared)}
        head = {
            "dropout": Dropout(settings.dropout, seed=next(seeds), **shared),
            "linear": Linear(settings.hidden, outputs, seed=next(seeds), **shared),
        }
        if not settings.dropout:
            del head["dropout"]
        super().__init__(encoder.ops, settings.dtype, settings.seed)
        self._adopt({"encoder": encoder, **second, "head": Sequential(head)})


class Direct(_Forecaster):
    """A window (T, B, F) -> all values of the horizon from its last state (B, H); in training with the mode "every"
    from each state (T, B, H)."""

    def __init__(self, settings, facts, backend=None):
        super().__init__(settings, facts, backend, settings.horizon)
        self.every = settings.mode == "every"

    def __call__(self, window):
        states, _ = self.children["encoder"](window)
        return self.children["head"](self.children["last"](states))

    def forward(self, window, *, retain=False):
        states, _, encoder_backward = self.children["encoder"].forward(window, retain=retain)
        every = self.every
        if not every:
            states, last_backward = self.children["last"].forward(states)
        outputs, head_backward = self.children["head"].forward(states)

        def backward(doutputs):
            dstates = head_backward(doutputs)
            return encoder_backward(dstates if every else last_backward(dstates))[0]

        return outputs, self._guarded(backward, "doutputs", outputs, retain)


class Recursive(_Forecaster):
    """An encoder and a decoder: (window (T, B, F), what is known of the rows to come (H, B, K)) -> (B, H).

    The decoder begins with the encoder's last state; at each step it reads its own output of the step before (0 at
    first) and what is known of the row that it is to say. It learns as it is used, from its own outputs: the derivative
    goes back through them.
    """

    def __init__(self, settings, facts, backend=None):
        super().__init__(settings, facts, backend, 1)

    def __call__(self, inputs):
        return self._run(inputs, self.children["encoder"], self.children["decoder"], self.children["head"])[0]

    def forward(self, inputs, *, retain=False):
        parts = (partial(self.children[name].forward, retain=retain) for name in ("encoder", "decoder", "head"))
        outputs, encoder_backward, steps = self._run(inputs, *parts)

        def backward(doutputs):
            dsaid, dstate = 0, None
            for k in reversed(range(len(steps))):
                decoder_backward, head_backward = steps[k]
                dh = head_backward((doutputs[:, k] + dsaid)[None, :, None])
                dx, dstate = decoder_backward(dh, dstate)
                dsaid = dx[0, :, 0]
            return encoder_backward(None, dstate)[0]

        return outputs, self._guarded(backward, "doutputs", outputs, retain)

    def _run(self, inputs, encoder, decoder, head):
        """Outputs (B, H), and the backwards that the three calls return, if they do: the encoder's, and (decoder's,
        head's) of each step."""
        window, known = inputs
        _, state, *encoder_backward = encoder(window)
        said, outputs, steps = self.xp.zeros((1, *window.shape[1:2], 1), self.dtype), [], []
        for k in range(len(known)):
            h, state, *back = decoder(self.xp.concatenate([said, known[k : k + 1]], axis=2), state)
            said = head(h)
            if back:
                said, head_backward = said
                steps.append((*back, head_backward))
            outputs.append(said[0])
        return self.xp.concatenate(outputs, axis=1), *encoder_backward, steps


# ---- forecasts


def forecast(trained, table, steps=None, ends=None):
    """Forecasts of a ``Trained`` model, in the units of the target: float64 (steps,), of what comes behind ``table``.

    steps: the horizon of the settings; a recursive model can go on beyond it. ends: instead of the table's last, the
    last rows that may be read, (W,); the result is then (W, steps). Raises ValueError for too few rows or too many
    steps, DivergedError for a forecast that is NaN or infinite.
    """
    settings = trained.settings
    steps = settings.horizon if steps is None else check_size("steps", steps)
    if steps > settings.horizon and settings.mode != "recursive":
        raise ValueError(
            f"steps: the mode {settings.mode!r} forecasts at most its horizon of {settings.horizon} rows, got {steps}"
        )
    rows = np.array([len(table) - 1]) if ends is None else np.asarray(ends)
    reach = reach_back(settings, trained.facts)
    if rows.min() < reach - 1:
        raise ValueError(f"too short: {rows.min() + 1} rows to read, at least {reach} are needed")
    source, model = Windows(table, rows, settings, trained.facts, steps=steps), trained.model
    made = []
    for start in range(0, len(rows), settings.batch):
        some = rows[start : start + settings.batch]
        inputs = source.collate(some).inputs
        inputs = tuple(map(model.xp.asarray, inputs)) if isinstance(inputs, tuple) else model.xp.asarray(inputs)
        outputs = model.ops.to_numpy(model(inputs)).astype(np.float64)[:, :steps]
        made.append(source.restore(outputs, some))
    made = np.concatenate(made)
    if not np.isfinite(made).all():
        wrong = made[~np.isfinite(made)][0]
        raise DivergedError(f"forecast: expected finite numbers, got {wrong}. The model has diverged: train it anew")
    return made[0] if ends is None else made


def score(trained, table, ends):
    """How good the forecasts from the rows ``ends`` are, beside the naive ones: {"windows", "season", and for "model",
    "naive", "seasonal_naive" a dict of numbers}.

    mae, rmse: in the units of the target, over all windows and steps. mase: mae over that of seasonal-naive forecasts
    of one season ahead in the training part (Hyndman and Koehler, Int. J. Forecasting 22, 2006). mse_standardised,
    mae_standardised: of values divided by the deviation of the training part, as papers give them.
    """
    y, facts = table.values[:, 0], trained.facts
    ahead = np.arange(1, trained.settings.horizon + 1)
    truth = y[ends[:, None] + ahead]
    made = {
        "model": forecast(trained, table, ends=ends),
        "seasonal_naive": y[_season_before(ends, ahead, facts["season"])],
        "naive": np.repeat(y[ends][:, None], len(ahead), axis=1),
    }
    numbers = {"windows": len(ends), "season": facts["season"]}
    std = facts["deviation"] or 1.0
    for name, values in made.items():
        absolute, squared = float(np.abs(values - truth).mean()), float(np.square(values - truth).mean())
        numbers[name] = {
            "mae": absolute,
            "rmse": math.sqrt(squared),
            "mase": absolute / facts["seasonal_error"] if facts["seasonal_error"] else None,
            "mse_standardised": squared / std**2,
            "mae_standardised": absolute / std,
        }
    return numbers


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


TASK = SeriesTask()
