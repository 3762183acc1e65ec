"""Time series: read a CSV file, learn to forecast a column, forecast. ``gpurnn train series`` on the shell.

>>> from pathlib import Path
>>> from gpurnn.tasks.run import prepare
>>> from gpurnn.tasks.trained import load
>>> text = "month,passengers\\n" + "".join(f"{n},{100 + n % 12}\\n" for n in range(240))
>>> Path("airline.csv").write_text(text, encoding="utf-8") > 0
True
>>> run = prepare("series", ["airline.csv"], "runs/airline", window=24, horizon=12, residual="season", epochs=1)
>>> history = run.train()
>>> trained = load("runs/airline")
>>> from gpurnn.tasks.series import forecast, read_table
>>> forecast(trained, read_table("airline.csv", trained.facts)).shape                          # in the file's units
(12,)

A window of W rows is read, and the H rows after it are forecast, in one of three ways (``mode``). direct, many-to-one:
the last state of the window gives all H values. every, many-to-many: every state of the window gives the H values after
it, so there is more to learn from; the forecast is that of the last state. recursive, one-to-many: the state goes to a
second network, a decoder, that makes one value at a time and reads its own output. What is learned is by default the
difference from a naive forecast, so that a series that drifts stays within what was seen in training: from the last
value or from that of the season before, whichever is better in the training part; see ``residual``. With ``interval``
the quantiles at the ends of prediction intervals are learned as well (intervals.py).

Everything fitted to the data (mean, deviation, season) is fitted to the training part, the first rows. A part is
defined by the rows that are forecast; its windows may begin before it, as they do in use.
"""

from ...data.moments import calendar_features, continue_moments
from ...data.tables import csv_text
from .columns import Table, choose_columns, read_table
from .forecasts import forecast, forecast_intervals, score
from .intervals import name_level, note_ends
from .models import Direct, Recursive
from .parts import fit_scaling, guess_season, reach_back, split_rows, window_ends
from .settings import SeriesSettings
from .task import TASK, SeriesTask
from .windows import Windows

__all__ = [
    "TASK", "SeriesSettings", "SeriesTask",
    "Table", "calendar_features", "choose_columns", "continue_moments", "csv_text", "read_table",
    "name_level", "note_ends",
    "Direct", "Recursive", "Windows",
    "fit_scaling", "forecast", "forecast_intervals", "guess_season", "reach_back", "score", "split_rows", "window_ends",
]  # fmt: skip
