"""Forecasts of a trained model, and how good they are."""

import math

import numpy as np

from ...errors import DivergedError, check_size
from .parts import reach_back
from .windows import Windows, season_before


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
    return numbers


def summary(numbers, part):
    lines = [f"{part.capitalize():<15} {'MAE':>11} {'RMSE':>11} {'MASE':>8}   {numbers['windows']:,} forecasts"]
    for name in ("model", "seasonal_naive", "naive"):
        n = numbers[name]
        mase = "-" if n["mase"] is None else f"{n['mase']:.4f}"
        lines.append(f"{name.replace('_', '-'):<15} {n['mae']:11.5g} {n['rmse']:11.5g} {mase:>8}")
    n = numbers["model"]
    lines.append(f"{'':<15} standardised: MSE {n['mse_standardised']:.4f}, MAE {n['mae_standardised']:.4f}")
    return "\n".join(lines)
