"""The parts of a series, its season, and what is fitted to the training part."""

import math

import numpy as np

_LONGEST = 10_000  # rows of a season


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
    """Rows of a season of ``y`` (N,), by autocorrelation up to a third of N and 10,000 rows; 1 for none.

    It is the lag whose autocorrelation, without a linear trend, stands highest above the lowest before it; where none
    stands out, that of the highest peak in the series of differences. To stand out it takes 8 / sqrt(N), or 0.7: the
    autocorrelations of independent values have a deviation of 1 / sqrt(N), and there are many of them. The more there
    are, the further the largest and the smallest are apart: by 2 sqrt(2 ln N) deviations. Of a season that comes less
    than ten times, the values must come again, too: see ``_recurs``.
    """
    for values, below in ((y, np.minimum.accumulate), (np.diff(y), np.zeros_like)):
        N = len(values)
        if N < 9:
            continue
        n = np.arange(N)
        rest = values - np.polyval(np.polyfit(n, values, 1), n)
        if np.abs(rest).max() <= 1e-9 * np.abs(values).max():  # a straight line
            continue
        a = np.fft.irfft(np.abs(np.fft.rfft(rest, 2 * N)) ** 2)[: min(N // 3, _LONGEST) + 1]
        a = a / a[0]
        height, least = a - below(a), min(0.7, max(8, 2 * math.sqrt(2 * math.log(N)) + 2) / math.sqrt(N))
        peaks = [k for k in range(2, len(a) - 1) if a[k - 1] <= a[k] > a[k + 1] and height[k] > least]
        peaks = [k for k in peaks if 10 * k < N or _recurs(rest, k)]
        if peaks:
            return max(peaks, key=lambda k: height[k])
    return 1


def _recurs(y, k):
    """Whether the series comes back after k rows: the mean squared difference of rows k apart is less than half of the
    largest one of rows a quarter, a half or three quarters of k apart, and that of rows 2 k apart is less than three
    quarters of it. A random walk has chance peaks at long lags, but does not come back."""

    def difference(lag):
        return np.square(y[lag:] - y[:-lag]).mean()

    between = max(difference(max(1, k * part // 4)) for part in (1, 2, 3))
    return difference(k) < 0.5 * between and difference(2 * k) < 0.75 * between


def fit_scaling(table, rows, settings, path):
    """What is fitted to the first ``rows`` rows: the mean and std of each column (of its logarithm, if that is taken)
    and the season; also the deviation of the raw target, and the error of seasonal-naive forecasts, see ``score``."""
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


def choose_residual(settings, season, y):
    """What is learned. If the settings leave it open: the difference from the naive forecast that is better in the
    training part ``y`` (N,), that of the last value or that of the season before, if it has room for some windows."""
    if settings.residual != "auto":
        return settings.residual
    if season == 1 or settings.window + 2 * season + settings.horizon > len(y):
        return "last"
    errors = {"last": 0.0, "season": 0.0}
    for ahead in range(1, settings.horizon + 1):
        for name, lag in (("last", ahead), ("season", season * -(-ahead // season))):
            errors[name] += np.abs(y[lag:] - y[:-lag]).mean() if lag < len(y) else math.inf
    return min(errors, key=errors.get)


def residual_of(settings, facts):
    """What is learned: "none", "last" or "season", also if the settings say "auto"."""
    return facts.get("residual", settings.residual)


def reach_back(settings, facts):
    """Rows that a forecast needs, its own last one included."""
    if residual_of(settings, facts) != "season":
        return settings.window
    return settings.window + facts["season"]


def window_ends(part, reach, horizon):
    """The last rows of all windows for which the ``horizon`` rows that follow lie in ``part``."""
    return np.arange(max(part.start, reach) - 1, part.stop - horizon)
