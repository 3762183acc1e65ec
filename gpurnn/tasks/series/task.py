"""The task ``series``: from files to batches, a model and its scores."""

from dataclasses import replace

from ...data.dates import check_date_format
from ...data.moments import CALENDAR
from ...errors import check_choice, check_size
from ...files import check_room
from ..seen import look_up, remember
from ..task import WEIGHT_COST, Data, Task, check_numbers, check_strings, checksum
from .columns import choose_columns, open_rows, read_table
from .forecasts import advice, fit_margins, in_words, score, summary
from .intervals import IntervalLoss, saved_margins
from .models import Direct, Recursive
from .parts import choose_residual, fit_scaling, reach_back, residual_of, split_rows, window_ends
from .settings import LOSSES, SeriesSettings
from .windows import Windows

_COLUMN_COST, _VALUE_COST = 2000, 20  # for a column that is read besides its cells, and for a value in a batch


class SeriesTask(Task):
    """Train a model that forecasts a column of a CSV FILE with a header.

    The rows are in order of time. The naive forecasts (the last value; the value of the season before) are measured
    beside the model; 'gpurnn forecast' then forecasts what comes after the file's end.
    """

    name = "series"
    Settings = SeriesSettings
    examples = """
  gpurnn train series airline.csv --horizon 12 --log --interval 80,95
  gpurnn train series ETTh1.csv --target OT --horizon 96"""
    next = ("gpurnn forecast {run} --plot forecast.png --out forecast.csv",)

    def check_new(self, settings):
        settings.check_levels()

    def read(self, files, settings, facts=None, scratch=None):
        if len(files) != 1:
            raise ValueError(f"files: a series is one CSV file, got {len(files)}")
        rows = open_rows(files[0], settings)
        facts = facts or choose_columns(files[0], settings, rows)
        columns = 1 + len(facts["inputs"])
        column = _COLUMN_COST + WEIGHT_COST * settings.hidden + _VALUE_COST * settings.window * settings.batch
        check_room(files[0], column * columns, f"a model of {columns:,} columns")
        table = read_table(files[0], facts, settings, rows)
        del rows
        facts, parts, ends = fit_facts(table, facts, settings, files[0])
        facts = facts | {"trained_on": remember(_window_rows(table, ends["train"], settings), facts)}
        sources = {
            name: Windows(table, ends[name], settings, facts, training=name == "train")
            for name in ends
            if len(ends[name])
        }
        season = f"a season of {facts['season']} rows" if facts["season"] > 1 else "no season found"
        return Data(
            sources["train"],
            sources.get("valid"),
            facts=facts,
            fingerprint={"rows": len(table), "crc32": checksum(table.values)},
            summary=f"{len(table):,} rows of {facts['target']} ({' / '.join(f'{len(p):,}' for p in parts.values())} to "
            f"train on, validate, test), {season}",
            rest=(table, ends),
            notes=table.notes,
        )

    def build(self, settings, facts, backend=None):
        return (Recursive if settings.mode == "recursive" else Direct)(settings, facts, backend)

    def check_facts(self, settings, facts):
        check_strings("target, inputs and calendar", [facts["target"], *facts["inputs"], *facts["calendar"]])
        if not isinstance(facts["date"], (str, type(None))) or not set(facts["calendar"]) <= set(CALENDAR):
            raise ValueError(f"date and calendar: got {facts['date']!r}, {facts['calendar']!r}")
        columns = 1 + len(facts["inputs"])
        check_numbers("mean", facts["mean"], columns)
        check_numbers("std", facts["std"], columns, 0)
        check_numbers("deviation, seasonal_error", [facts["deviation"], facts["seasonal_error"]], 2, 0)
        check_size("season", facts["season"])
        if facts.get("decimal", ".") not in (".", ",") or not isinstance(facts.get("date_format", ""), str):
            raise ValueError(f"decimal and date_format: got {facts.get('decimal')!r}, {facts.get('date_format')!r}")
        check_choice("residual", residual_of(settings, facts), ("none", "last", "season"))
        if facts.get("date_format"):
            check_date_format(facts["date_format"])

    def sizes(self, settings, facts):
        return {} if settings.mode == "recursive" else {"horizon": settings.horizon}

    def loss(self, settings, facts):
        loss = LOSSES[settings.loss]
        return IntervalLoss(loss, settings.quantiles) if settings.levels else loss

    def finish(self, trained, data, history):
        table, ends = data.rest
        numbers, lines = {}, []
        if trained.settings.levels and len(ends["valid"]):
            numbers["margins"] = fit_margins(trained, table, ends["valid"])
            trained = replace(trained, result=numbers)
        for name in ("valid", "test"):
            if len(ends[name]):
                numbers[name] = score(trained, table, ends[name])
                lines.append(summary(numbers[name], "validation" if name == "valid" else name))
        if trained.settings.levels:
            lines.append(_on_calibration(trained))
        last = numbers.get("test") or numbers.get("valid")
        said = last and advice(last, trained.settings, trained.facts)
        if said:
            numbers["advice"] = said
            lines.append(said)
        return numbers, "\n".join(lines)

    def result_rows(self, result):
        parts = {"valid": "Validation", "test": "Test"}
        return {name: in_words(result[part]) for part, name in parts.items() if part in result}

    def evaluate(self, trained, files):
        """How good the forecasts are in another file, from every row that has enough rows before and after it."""
        if len(files) != 1:
            raise ValueError(f"files: a series is one CSV file, got {len(files)}")
        settings, facts = trained.settings, trained.facts
        table = read_table(files[0], facts, settings)
        reach = max(reach_back(settings, facts), facts["season"])
        ends = window_ends(range(len(table)), reach, settings.horizon)
        if not len(ends):
            raise ValueError(
                f"{files[0]}: too short: {len(table)} rows, at least {reach + settings.horizon} are needed"
            )
        numbers = score(trained, table, ends)
        lines = [*(f"Note        {note}" for note in table.notes), summary(numbers, "all")]
        if settings.levels:
            lines.append(_on_calibration(trained))
        seen = look_up(facts, _window_rows(table, ends, settings))
        if seen is not None:
            numbers["trained_on"], others = seen.count, ends[seen.judged & ~seen.mask]
            lines.append(f"{seen.sentence('windows')}.")
            if seen.count and len(others):
                numbers["others"] = score(trained, table, others)
                lines.append(summary(numbers["others"], f"other {len(others):,}"))
        return numbers | {"notes": table.notes}, "\n".join(lines)


def fit_facts(table, facts, settings, name):
    """(facts with scaling, season and residual of the training part, unless they are there; the parts; the last rows of
    the windows of each). name: of the data, for messages. Raises ValueError where they are too short."""
    parts = split_rows(len(table), settings)
    if "mean" not in facts:
        facts = facts | fit_scaling(table, parts["train"].stop, settings, name)
        facts["residual"] = choose_residual(settings, facts["season"], table.values[: len(parts["train"]), 0])
    reach = reach_back(settings, facts)
    ends = {part: window_ends(rows, reach, settings.horizon) for part, rows in parts.items()}
    if not len(ends["train"]):
        raise ValueError(
            f"{name}: too short: {len(parts['train'])} rows to train on, a window of {settings.window} rows "
            f"and a horizon of {settings.horizon} need {reach + settings.horizon}"
        )
    for part in ("valid", "test"):
        if len(parts[part]) and not len(ends[part]):
            raise ValueError(
                f"{name}: too short: the {'validation' if part == 'valid' else 'test'} part has "
                f"{len(parts[part])} rows, a horizon of {settings.horizon} needs as many"
            )
    return facts, parts, ends


def _window_rows(table, ends, settings):
    """The target's values in each window that ends in one of the rows ``ends``, and its horizon, as bytes."""
    y = table.values[:, 0].tobytes()
    return (y[8 * (end + 1 - settings.window) : 8 * (end + 1 + settings.horizon)] for end in ends.tolist())


def _on_calibration(trained):
    if saved_margins(trained) is None:
        return "The intervals are not calibrated: there was no validation part, or the training was stopped."
    return "The intervals are calibrated on the validation part."


TASK = SeriesTask()
