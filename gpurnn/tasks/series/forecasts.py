"""Forecasts of a trained model, and how good they are."""

import math

import numpy as np

from ...errors import DivergedError, check_size
from .columns import Table
from .intervals import bounds, calibrate, coverage, saved_margins
from .parts import reach_back, residual_of
from .windows import Windows, season_before


def forecast(trained, table, steps=None, ends=None):
    """Forecasts of a ``Trained`` model, in the units of the target: float64 (steps,), of what comes after ``table``.

    steps: the horizon of the settings; a recursive model can forecast more. ends: instead of the table's last, the
    last rows that may be read, (W,); the result is then (W, steps). Raises ValueError for too few rows or too many
    steps, DivergedError for a forecast that is NaN or infinite.
    """
    source, z = _outputs(trained, table, steps, ends)
    made = _finite(source.unscale(z[..., 0]))
    return made[0] if ends is None else made


def forecast_intervals(trained, table, steps=None, ends=None):
    """Prediction intervals of a model that has learned them: their low and high ends, float64 (L, 2, steps), the L
    levels of the settings ascending.

    steps, ends: as of ``forecast``; with ends the result is (L, 2, W, steps). They are calibrated where the training
    had a validation part. Raises ValueError for a model without intervals, and what ``forecast`` raises.
    """
    if not trained.settings.levels:
        raise ValueError("intervals: this model has learned none: train it with interval='80,95'")
    source, z = _outputs(trained, table, steps, ends)
    made = _finite(source.unscale(bounds(z, saved_margins(trained))))
    return made[:, :, 0] if ends is None else made


def fit_margins(trained, table, ends):
    """The margins that calibrate a model's intervals on forecasts from the rows ``ends``, which it was not trained on;
    see ``calibrate``."""
    source, z = _outputs(trained, table, None, ends)
    truth = source.z[ends[:, None] + np.arange(1, trained.settings.horizon + 1)]
    return calibrate(_finite(z), truth, trained.settings.levels)


def _outputs(trained, table, steps, ends):
    """(the ``Windows``, the model's outputs on its own scale, float64 (W, steps, 1 + Q))."""
    if not isinstance(table, Table):
        raise TypeError(f"table: expected what read_table(path, trained.facts) returns, got {type(table).__name__}")
    settings = trained.settings
    steps = settings.horizon if steps is None else check_size("steps", steps)
    if steps > settings.horizon and settings.mode != "recursive":
        raise ValueError(
            f"steps should be at most {settings.horizon}, the horizon of this model, got {steps}. For more train one "
            f"with --horizon {steps}, or with --mode recursive"
        )
    rows = np.array([len(table) - 1]) if ends is None else np.asarray(ends)
    reach = reach_back(settings, trained.facts)
    if rows.min() < reach - 1:
        raise ValueError(f"too short: {rows.min() + 1} rows to read, at least {reach} are needed")
    source, model = Windows(table, rows, settings, trained.facts, steps=steps), trained.model
    made = []
    for start in range(0, len(rows), settings.batch):
        inputs = source.collate(rows[start : start + settings.batch]).inputs
        inputs = tuple(map(model.xp.asarray, inputs)) if isinstance(inputs, tuple) else model.xp.asarray(inputs)
        outputs = model.ops.to_numpy(model(inputs)).astype(np.float64)
        made.append(outputs.reshape(*outputs.shape[:2], -1)[:, :steps])
    return source, np.concatenate(made) + source.base(rows)[..., None]


def _finite(made):
    if not np.isfinite(made).all():
        wrong = made[~np.isfinite(made)][0]
        raise DivergedError(f"forecast: expected finite numbers, got {wrong}. The model has diverged: train it anew")
    return made


def score(trained, table, ends):
    """How good the forecasts from the rows ``ends`` are, beside the naive ones: {"windows", "season", and for "model",
    "naive", "seasonal_naive" a dict of numbers}.

    mae, rmse: in the units of the target, over all windows and steps. mase: mae over that of seasonal-naive forecasts
    of one season ahead in the training part (Hyndman and Koehler, Int. J. Forecasting 22, 2006). mse_standardised,
    mae_standardised: of values divided by the deviation of the training part, as papers give them. Where the model has
    learned intervals, "intervals" says what each covers, see ``coverage``; "calibrated" whether they were.
    """
    y, facts = table.values[:, 0], trained.facts
    ahead = np.arange(1, trained.settings.horizon + 1)
    truth = y[ends[:, None] + ahead]
    made = {
        "model": forecast(trained, table, ends=ends),
        "seasonal_naive": y[season_before(ends, ahead, facts["season"])],
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
    levels = trained.settings.levels
    if levels:
        numbers["intervals"] = coverage(forecast_intervals(trained, table, ends=ends), truth, levels)
        numbers["calibrated"] = saved_margins(trained) is not None
    return numbers


def summary(numbers, part):
    """What ``score`` returns, as lines for people; the table fits into 45 columns."""
    lines = [f"{part.capitalize():<14} {'MAE':>10} {'RMSE':>10} {'MASE':>8}"]
    for name in ("model", "seasonal_naive", "naive"):
        n = numbers[name]
        mase = "-" if n["mase"] is None else f"{n['mase']:.4g}"
        if name != "seasonal_naive" or numbers["season"] > 1:  # of one row it is the naive one
            lines.append(f"{name.replace('_', '-'):<14} {n['mae']:10.5g} {n['rmse']:10.5g} {mase:>8}")
    n = numbers["model"]
    standardized = f"MSE {n['mse_standardised']:.4g}, MAE {n['mae_standardised']:.4g}"
    lines.append(f"{numbers['windows']:,} forecasts; standardized: {standardized}")
    return "\n".join([*lines, *_on_intervals(numbers)])


def _on_intervals(numbers):
    return [
        f"{name} % interval: covers {100 * found['coverage']:.1f} %, mean width {found['extent']:.5g}"
        for name, found in numbers.get("intervals", {}).items()
    ]


def in_words(numbers):
    """What ``score`` returns, in one line: the model, the MAE of the naive forecasts, the intervals."""
    model = numbers["model"]
    mase = [] if model["mase"] is None else [f"MASE {model['mase']:.4g}"]
    errors = ", ".join([f"MAE {model['mae']:.5g}", f"RMSE {model['rmse']:.5g}", *mase])
    naive = [
        f"{name.replace('_', '-')} MAE {numbers[name]['mae']:.5g}"
        for name in ("seasonal_naive", "naive")
        if name == "naive" or numbers["season"] > 1
    ]
    return "; ".join([f"{numbers['windows']:,} forecasts, {errors}", ", ".join(naive), *_on_intervals(numbers)])


def advice(numbers, settings, facts):
    """A line about a model that is not better than a naive forecast, with what to try; None for a better one."""
    model = numbers["model"]["mae"]
    best = min(("seasonal_naive", "naive"), key=lambda name: numbers[name]["mae"])
    if model < numbers[best]["mae"]:
        return None
    residual, season = residual_of(settings, facts), facts["season"]
    tries = []
    if best == "seasonal_naive" and season > 1 and residual != "season":
        tries.append("--residual season")
    elif best == "naive" and residual != "last":
        tries.append("--residual last")
    tries += ["more --epochs", "another --window" if season <= settings.window else f"--window {2 * season}"]
    if season == 1:
        tries.append("--season, if you know of one")
    if not settings.log:
        tries.append("--log, where it grows in per cent")
    return (
        f"The model is worse than the {best.replace('_', '-')} forecast ({model:.4g}, {numbers[best]['mae']:.4g}). "
        f"Try {'; '.join(tries[:3])}."
    )
