"""``gpurnn forecast``: what comes after the end of a series."""

from functools import partial
from pathlib import Path

import click
import numpy as np

from .. import run_folder
from ..data.numerals import Marks, write_numbers
from ..data.tables import read_rows
from ..errors import FileError
from ..files import naming, write_text_atomic
from ..tasks.series import (
    continue_moments,
    csv_text,
    forecast,
    forecast_intervals,
    name_level,
    note_ends,
    reach_back,
    read_table,
    split_rows,
)
from ..tasks.trained import load, read_run
from . import options

_ENDS = ("low", "high")


@click.command(
    "forecast",
    epilog="""\b
Examples:
  gpurnn forecast runs/series-1 --out forecast.csv --plot forecast.png
  gpurnn forecast runs/series-1 newer.csv --json""",
)
@options.run
@click.argument("file", metavar="[CSV]", required=False, type=click.Path(exists=True, dir_okay=False))
@click.option("--steps", type=int, help="Rows to forecast  [default: the horizon; more with --mode recursive only]")
@click.option(
    "--out",
    type=click.Path(dir_okay=False),
    help="CSV file to write, in the form of the one that was read; - writes to standard output.",
)
@click.option(
    "--plot", "png", type=click.Path(dir_okay=False), help="PNG file to draw: the truth, earlier forecasts, this one."
)
@click.option("--escape/--no-escape", default=True,
              help="In --out: put ' before text that a spreadsheet would take for a formula.")  # fmt: skip
@options.overwrite
@options.backend
@options.max_memory
@options.as_json
def command(run, file, steps, out, png, escape, overwrite, backend, as_json):
    """Forecast what comes after the end of a series, with the model in RUN.

    CSV has the columns of the file that the model was trained on; without CSV, that file itself is read. The picture
    also shows earlier forecasts beside the truth; for the training file, only those of its test part. A model that was
    trained with --interval also gives, and draws, the bounds within which the values should lie.
    """
    trained, document = load(run, backend, "series"), read_run(run)[1]
    settings, facts = trained.settings, trained.facts
    if not (file or document["files"]):
        raise FileError(f"{Path(run) / 'config.json'}: names no file that the model was trained on: give a CSV")
    path = file or document["files"][0]
    if out == "-" and as_json:
        raise click.UsageError("--out - and --json would both be standard output: give one of them.")
    if out and Path(out).suffix.lower() in (".xlsx", ".xls", ".ods"):
        raise ValueError(f"out: {out} would hold CSV: name the file {Path(out).stem}.csv, which spreadsheets open")
    names = list(map(name_level, settings.levels))
    head = facts["date"] or "row", facts["target"], *(f"{facts['target']}_{end}_{n}" for n in names for end in _ENDS)
    reads, ours = [path, *document["files"]], partial(_is_forecast, head, max(settings.horizon, steps or 0))
    run_folder.check_outputs(run, reads, overwrite, ours, out=None if out == "-" else out, plot=png)
    with naming([path]):
        table = read_table(path, facts, settings)
        values = forecast(trained, table, steps)
    ends = forecast_intervals(trained, table, steps) if settings.levels else np.empty((0, 2, len(values)))
    table.notes += note_ends(values, ends)
    coming = continue_moments(table.moments, len(values)) if table.moments else None
    if coming is None:
        labels = [f"+{k}" for k in range(1, len(values) + 1)]
    else:
        labels = [table.form.write(moment) for moment in coming]
    if png:
        drawn = {"moments": coming and [*table.moments, *coming], "intervals": dict(zip(names, ends, strict=True))}
        _draw(trained, table, values, png, drawn, file is None)
    numbers = np.array([values, *ends.reshape(-1, len(values))])
    cells = np.reshape(write_numbers(numbers.ravel(), table.decimal), numbers.shape)
    if out:
        rows = [head, *zip(labels, *cells.tolist(), strict=True)]
        text = csv_text(rows, escape, table.delimiter)
        click.echo(text.encode(), nl=False) if out == "-" else write_text_atomic(out, text)
    if as_json:
        said = {"target": facts["target"], "at": labels, "forecast": values.tolist(), "rows": len(table)}
        if names:
            said["intervals"] = {
                name: {"low": low.tolist(), "high": high.tolist()}
                for name, (low, high) in zip(names, ends, strict=True)
            }
        options.print_json(said | {"notes": table.notes})
        return
    for note in table.notes:
        options.say(options.row("Note", note), err=True)
    if out == "-":
        return
    size = max(map(len, cells.ravel()))
    for label, value, *within in zip(labels, *cells.tolist(), strict=True):
        bounds = zip(names, within[::2], within[1::2], strict=True)
        line = [
            f"{label}  {value:>{size}}",
            *(f"{name} %: {low:>{size}} to {high:>{size}}" for name, low, high in bounds),
        ]
        options.say(options.joined(line))
    for made in filter(None, (out, png)):
        options.say(made)


def _is_forecast(head, most, path):
    """Whether a file is a forecast that this command wrote: by its header, by its rows, at most ``most``, and by how
    its numbers are written. A series of the user's own may have the same header."""
    try:
        rows = read_rows(path)
        cells = [cell for column in rows.columns[1:] for cell in column]
        decimal = "," if any("," in cell for cell in cells) else "."
        numbers, wrong = Marks(decimal).numbers(cells)
        if wrong is not None or len(rows) > most or cells != write_numbers(numbers, decimal):
            return False
    except (ValueError, OSError):
        return False
    return csv_text([rows.header]) == csv_text([head])


def _draw(trained, table, values, png, more, unseen):
    """The picture of a forecast; unseen: whether earlier forecasts are of the test part only."""
    from ..plots import plot_forecast

    settings, N = trained.settings, len(table)
    first = reach_back(settings, trained.facts)
    if unseen:
        first = max(first, split_rows(N, settings)["test"].start)
    ends = np.arange(N - 1 - settings.horizon, first - 2, -settings.horizon)[:5][::-1]
    earlier = []
    if len(ends):
        earlier = [(end + 1, row) for end, row in zip(ends, forecast(trained, table, ends=ends), strict=True)]
    start = max(0, (int(ends[0]) if len(ends) else N - 1) - 2 * settings.horizon)
    plot_forecast(table.values[:, 0], values, png, earlier, start, name=trained.facts["target"], **more)
