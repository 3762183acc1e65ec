"""Time series: reading, season, scaling, windows, models, scores, and a run from a CSV file to a forecast."""

import csv
import json
import re
from dataclasses import replace
from datetime import datetime
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from helpers import DATA, assert_close
from optional import needs

from gpurnn.checkpoint import CheckpointError
from gpurnn.cli import main
from gpurnn.data.numerals import write_numbers
from gpurnn.errors import ShapeError
from gpurnn.losses import mse
from gpurnn.tasks.run import prepare
from gpurnn.tasks.series import (
    TASK,
    SeriesSettings,
    Table,
    Windows,
    calendar_features,
    choose_columns,
    continue_moments,
    forecast,
    forecast_intervals,
    guess_season,
    read_table,
    score,
    split_rows,
    window_ends,
)
from gpurnn.tasks.series.forecasts import summary
from gpurnn.tasks.series.intervals import IntervalLoss, bounds, calibrate, coverage, note_ends
from gpurnn.tasks.series.parts import choose_residual
from gpurnn.tasks.trained import load
from gpurnn.testing import check_gradients

SERIES = DATA / "time_series"


@pytest.fixture(autouse=True)
def undrawn(monkeypatch):
    monkeypatch.setattr("gpurnn.plots.plot_run", lambda folder: [])


def growing(rows=160, seed=0):
    """A season of 8 rows whose size and level grow: the season before is always too low, the last value out of step."""
    n = np.arange(rows)
    noise = np.random.default_rng(seed).standard_normal(rows)
    return (100 + n) * (1 + 0.3 * np.sin(2 * np.pi * n / 8)) + 0.5 * noise


def save(path, columns, dates=True, start=(1990, 1)):
    """A CSV file of monthly dates and ``columns``, name -> values."""
    rows = len(next(iter(columns.values())))
    months = [start[0] * 12 + start[1] - 1 + n for n in range(rows)]
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow([*(["month"] if dates else []), *columns])
        for n, month in enumerate(months):
            date = [f"{month // 12}-{month % 12 + 1:02}"] if dates else []
            writer.writerow([*date, *(values[n] for values in columns.values())])
    return path


# ---- reading


def test_columns_are_found(tmp_path):
    path = save(tmp_path / "a.csv", {"load": range(30), "place": ["x"] * 30, "wind": range(30), "heat": range(5, 35)})
    facts = choose_columns(path, SeriesSettings(inputs="all", calendar=True))
    assert (facts["target"], facts["inputs"], facts["date"]) == ("heat", ["load", "wind"], "month")
    assert facts["calendar"] == ["weekday", "month"]  # the first of a month is any day of the week; no hours
    facts = choose_columns(path, SeriesSettings(target="load", inputs="wind, heat"))
    found = {"target": "load", "inputs": ["wind", "heat"], "date": "month", "calendar": []}
    assert facts == found | {"decimal": ".", "date_format": "%Y-%m"}
    table = read_table(path, facts)
    assert np.array_equal(table.values, np.column_stack([np.arange(30), np.arange(30), np.arange(5, 35)]))
    assert table.moments[13] == datetime(1991, 2, 1) and str(table.form) == "%Y-%m"


@pytest.mark.parametrize(
    "text, date",
    [
        ("a,b\n2016-07-01 00:00:00,1\n", "a"),
        ("a;b\n19580329;1\n", "a"),
        ("\ufeffa\tb\n1700\t1\n", "a"),
        ("a,b\nnorth,1\n", None),
        ('"a","b"\n"1949-01",1\n\n', "a"),
        ("b\n1\n", None),
    ],
)
def test_dialects_and_dates(tmp_path, text, date):
    path = tmp_path / "a.csv"
    path.write_text(text, encoding="utf-8")
    facts = choose_columns(path, SeriesSettings())
    assert (facts["target"], facts["date"]) == ("b", date)
    assert read_table(path, facts).values.tolist() == [[1.0]]


@pytest.mark.parametrize(
    "data, words",
    [
        (b"", "is empty"),
        (b"a,b\n", "has a header but no rows"),
        (b"1,2\n3,4\n", "the first line should name the columns"),
        (b"a,a\n3,4\n", "two columns have the same name"),
        (b"a,b\n1,2\n1,2,3\n", "line 3: expected 2 columns, as the header has, got 3"),
        (b"a,b\n1,2\n2,\n", "line 3, column 'b': the value is missing: --fill previous, linear"),
        (b"a,b\n1,2\n3,x\n", "line 3, column 'b': expected a number, got 'x'"),
        (b"a,b\nu,x\nv,y\n", "column 'b': expected a number, got 'x'. No column of this file holds numbers"),
        (
            "a;b\n2020-01-01;\u20ac5.00\n2020-01-02;$6.25\n".encode(),
            "got '\u20ac5.00'. Take the currency sign '\u20ac' out",
        ),
        (b"month;b\n01.2020;5 %\n02.2020;6 %\n", "column 'b': expected a number, got '5 %'. Take the sign '%' out"),
        (b"a,b,c\n2020-01-01,1,$5\n2020-01-02,2,\xc2\xa36\n", "column 'c': expected a number, got ..5.. Take the"),
        (b"a,b\n2020-01-01,5\n2020-01-02,(1.5)\n", "got '.1.5.'. Write a negative number as -1.5"),
        (b"a,b\n2020-01-01,5%\n2020-01-02,6%\n", "got '5%'. Take the sign '%' out of the column"),
        (b"a,b\n1,2\n3,inf\n", "line 3, column 'b': expected a number, got 'inf'"),
        (b"a,b\n1,NA\n3,4\n", "line 2, column 'b': the value is missing"),
        ("a,b\n1,2 \xb0\n".encode("latin-1"), "is not UTF-8 text .* in line 2, at byte 8"),
        (b"a,b\n1,1\n2,\x002\n", "line"),
        (
            b"a,b\n1,2\n" + b"3,4\n" * 20,
            "too short: 17 rows to train on, a window of 20 rows and a horizon of 3 need 23",
        ),
    ],
)
def test_bad_files_are_named(tmp_path, data, words):
    path = tmp_path / "bad.csv"
    path.write_bytes(data)
    with pytest.raises(ValueError, match=words) as caught:
        prepare("series", [path], tmp_path / "run", window=20, horizon=3)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    "options, words",
    [
        ({"target": "cold"}, "has no column 'cold': expected one of month, heat, wind"),
        ({"inputs": "wind,rain"}, "has no column 'rain'"),
        ({"date": "day"}, "has no column 'day'"),
        ({"inputs": "wind,heat", "target": "heat"}, "not the target 'heat'"),
        ({"date": "wind", "calendar": True}, "line 2, column 'wind': expected dates, got '-3': --date-format"),
        ({"date": "none", "calendar": True}, "calendar needs a column of dates"),
        ({"split": "10/10"}, "three numbers of rows"),
        ({"split": "100/20/20"}, "are 140 rows, the file has 60"),
        ({"split": "40/3/17"}, "validation part has 3 rows, a horizon of 4 needs"),
        ({"season": 60}, "a season is 60"),
        ({"log": True, "target": "wind"}, "row 1: log needs a target above 0, got -3"),
        ({"valid": 0.5, "test": 0.5}, "nothing is left for training"),
        ({"split": "0/30/30"}, "too short: 0 rows to train on"),
    ],
)
def test_bad_settings_are_named(tmp_path, options, words):
    path = save(tmp_path / "a.csv", {"heat": np.arange(60), "wind": np.arange(60) - 3})
    with pytest.raises(ValueError, match=words):
        prepare("series", [path], tmp_path / "run", **{"window": 6, "horizon": 4, **options})
    with pytest.raises(ValueError, match="one CSV file, got 2"):
        prepare("series", [path, path], tmp_path / "run")


@pytest.mark.parametrize(
    "fill, expected",
    [
        ("previous", [2, 2, 2, 7, 7]),
        ("linear", [2, 3, 4, 7, 7]),  # by time: the rows are of the days 2, 3, 4, 7, 8
        ("drop", [2, 7]),
        (True, [2, 2, 2, 7, 7]),
    ],
)
def test_missing_values_are_filled(tmp_path, fill, expected):
    path = tmp_path / "a.csv"
    days = [1, 2, 3, 4, 7, 8]
    cells = ["", "2", "", "NaN", "7", "-"]
    path.write_text("day,b\n" + "".join(f"2020-01-0{day},{cell}\n" for day, cell in zip(days, cells, strict=True)))
    settings = SeriesSettings(fill=fill)
    table = read_table(path, choose_columns(path, settings), settings)
    assert table.values[:, 0].tolist() == expected and [m.day for m in table.moments] == [
        day for day, cell in zip(days, cells, strict=True) if day > 1 and (fill != "drop" or cell in "27" and cell)
    ]
    assert any("line 2" in note for note in table.notes) or any("line 3" in note for note in table.notes)
    with pytest.raises(ValueError, match="line 2, column 'b': the value is missing"):
        read_table(path, choose_columns(path, SeriesSettings()))


# ---- dates, season, parts


def test_dates_go_on():
    def after(form, *texts):
        coming = continue_moments([datetime.strptime(text, form) for text in texts], 3)
        return coming and [moment.strftime(form) for moment in coming]

    assert after("%Y-%m", "2019-10", "2019-11", "2019-12") == ["2020-01", "2020-02", "2020-03"]
    assert after("%Y", "2006", "2007", "2008") == ["2009", "2010", "2011"]
    assert after("%Y-%m-%d", "2020-02-26", "2020-02-27", "2020-02-28") == ["2020-02-29", "2020-03-01", "2020-03-02"]
    assert after("%Y-%m-%d %H", "2020-01-31 22", "2020-01-31 23") == ["2020-02-01 00", "2020-02-01 01", "2020-02-01 02"]
    assert after("%Y-%m", "2019-01", "2019-04", "2019-07") == ["2019-10", "2020-01", "2020-04"]
    assert after("%Y-%m-%d", "2020-01-01", "2020-01-02", "2020-01-05") is None
    assert after("%Y-%m-%d", "2020-01-01") is None


def test_calendar_features_go_round():
    moments = [datetime(2016, 7, 1, hour) for hour in (0, 6, 12, 18)]
    features = calendar_features(moments, ["hour"], 5)
    assert_close(features, [[0, 1], [1, 0], [0, -1], [-1, 0], [0, 0]], 4)
    assert calendar_features(None, [], 4).shape == (4, 0)


@pytest.mark.parametrize("season", [4, 7, 24, 100])
@pytest.mark.parametrize("trend", [0, 0.5])
def test_a_season_is_guessed(season, trend):
    n = np.arange(8 * season)
    noise = np.random.default_rng(1).standard_normal(len(n))
    assert guess_season(np.sin(2 * np.pi * n / season) + 0.1 * noise + trend * n) == season


@pytest.mark.parametrize("rows", [1000, 3000, 10_000, 50_000])
def test_nonsense_has_no_season(rows):
    """Neither many independent numbers, whose largest chance is high, nor random walks, which wander far."""
    for seed in range(8 if rows < 10_000 else 2):
        draw = np.random.default_rng(seed).standard_normal(rows)
        assert guess_season(draw) == 1 and guess_season(np.cumsum(draw)) == 1


def test_a_season_that_comes_three_times_is_found():
    n = np.arange(170)
    noise = np.random.default_rng(1).standard_normal(len(n))
    assert guess_season(5 * np.sin(2 * np.pi * n / 52) + noise) in range(49, 56)


def test_no_season():
    for rows in (30, 300, 3000):
        draw = np.random.default_rng(rows).standard_normal(rows)
        assert guess_season(draw) == 1 and guess_season(draw + 0.1 * np.arange(rows)) == 1
    assert guess_season(np.full(50, 3.0)) == 1 and guess_season(np.zeros(50)) == 1
    assert guess_season(np.arange(40.0)) == 1 and guess_season(np.array([1.0, 5.0, 2.0])) == 1


@pytest.mark.skipif(not SERIES.is_dir(), reason="needs the shared data: set GPURNN_DATA")
@pytest.mark.parametrize(
    "file, rows, season", [("airline_passengers", 96, 12), ("sunspots_yearly", 225, 11), ("ETTh1", 8640, 24)]
)
def test_seasons_of_real_series(file, rows, season):
    path = SERIES / f"{file}.csv"
    assert guess_season(read_table(path, choose_columns(path, SeriesSettings())).values[:rows, 0]) == season


def test_parts_tell_the_rows_that_are_forecast():
    assert split_rows(50, SeriesSettings(valid=0.1, test=0.2)) == {
        "train": range(35), "valid": range(35, 40), "test": range(40, 50)
    }  # fmt: skip
    assert split_rows(50, SeriesSettings(split="20/10/5"))["test"] == range(30, 35)
    ends = window_ends(range(35), 6, 4)
    assert ends[0] == 5 and ends[-1] + 4 == 34  # a whole window first, the last row of the part last
    ends = window_ends(range(35, 40), 6, 4)
    assert ends.tolist() == [34, 35]


def test_nothing_is_fitted_to_what_is_kept(tmp_path):
    y = growing()
    facts = []
    for name in ("a.csv", "b.csv"):
        path = save(tmp_path / name, {"y": y})
        data = TASK.read([str(path)], SeriesSettings(seed=0, window=10, horizon=4))
        facts.append(data.facts)
        y[128:] *= 5  # validation and test
    assert facts[0] == facts[1] and facts[0]["season"] == 8
    assert facts[0]["mean"] == [pytest.approx(growing()[:128].mean())]


# ---- windows


FACTS = {
    "target": "y",
    "inputs": ["a"],
    "date": "d",
    "calendar": ["month"],
    "season": 5,
    "mean": [2.0, 1.0],
    "std": [3.0, 0.5],
}


def table(rows=40, seed=3):
    rng = np.random.default_rng(seed)
    moments = [datetime(1990 + n // 12, n % 12 + 1, 1) for n in range(rows)]
    return Table(np.column_stack([rng.uniform(1, 9, rows), rng.standard_normal(rows)]), moments, "%Y-%m")


@pytest.mark.parametrize("residual", ["none", "last", "season"])
@pytest.mark.parametrize("mode", ["direct", "every", "recursive"])
@pytest.mark.parametrize("log", [False, True])
def test_windows_say_what_they_should(mode, residual, log):
    """Against the definitions, written out value by value; and outputs that are the targets give the truth."""
    settings = SeriesSettings(mode=mode, residual=residual, log=log, window=6, horizon=7, dtype="float64", seed=0)
    data = table()
    facts = FACTS | ({"mean": [1.0, 1.0], "std": [0.5, 0.5]} if log else {})
    y = np.log(data.values[:, 0]) if log else data.values[:, 0]
    z, a = (y - facts["mean"][0]) / facts["std"][0], (data.values[:, 1] - 1.0) / 0.5
    ends = np.array([20, 11, 32])
    source = Windows(data, ends, settings, facts, training=True)
    batch = source.collate(ends)
    inputs, known = batch.inputs if mode == "recursive" else (batch.inputs, None)
    assert inputs.shape == (6, 3, 1 + (residual == "season") + 1 + 2) and batch.weight == 3

    def base(end, k):
        if residual == "none":
            return 0.0
        row = end + k
        while residual == "season" and row > end:
            row -= 5
        return z[end if residual == "last" else row]

    for b, end in enumerate(ends):
        first = end - 5
        anchor = 0.0 if residual == "none" else z[first if mode == "every" else end]
        for t in range(6):
            row = first + t
            angle = 2 * np.pi * (row % 12) / 12
            lag = [z[row] - z[row - 5]] if residual == "season" else []
            expected = [z[row] - anchor, *lag, a[row], np.sin(angle), np.cos(angle)]
            assert_close(inputs[t, b], expected, 64)
            if mode == "every":
                expected = [z[row + k] - base(row, k) for k in range(1, 8)]
                assert_close(batch.targets[t, b], expected, 64)
        if mode != "every":
            expected = [z[end + k] - base(end, k) for k in range(1, 8)]
            assert_close(batch.targets[b], expected, 64)
        if mode == "recursive":
            for k in range(1, 8):
                angle = 2 * np.pi * ((end + k) % 12) / 12
                lag = [base(end, k) - anchor] if residual == "season" else []
                assert_close(known[k - 1, b], [np.sin(angle), np.cos(angle), *lag], 64)

    valid = Windows(data, ends, settings, facts).collate(ends)  # outside training only the last state speaks
    truth = data.values[:, 0][ends[:, None] + np.arange(1, 8)]
    np.testing.assert_allclose(source.restore(valid.targets, ends), truth, rtol=1e-12)


def test_an_epoch_sees_every_window_once():
    settings = SeriesSettings(window=6, horizon=2, batch=7, seed=1, residual="none")
    facts = FACTS | {"calendar": []}
    ends = np.arange(5, 30)
    orders = []
    for epoch in (0, 1):
        source = Windows(table(), ends, settings, facts, training=True)
        batches = [source.batch(epoch, index) for index in range(len(source))]
        assert [batch.weight for batch in batches] == [7, 7, 7, 4]
        last = np.concatenate([batch.inputs[-1, :, 0] for batch in batches])
        np.testing.assert_allclose(np.sort(last), np.sort(source.z[ends]), rtol=1e-6)
        orders.append(last)
    assert not np.array_equal(*orders)


# ---- models


@pytest.mark.parametrize("mode", ["direct", "every", "recursive"])
@pytest.mark.parametrize("cell, layers, interval", [("lstm", 2, None), ("gru", 1, None), ("gru", 1, "50,80")])
def test_finite_differences(mode, cell, layers, interval):
    """Through the window's reader, the decoder's own outputs and the head, along a random direction, in float64."""
    settings = SeriesSettings(
        mode=mode, cell=cell, layers=layers, hidden=5, window=6, horizon=4, residual="season", dtype="float64", seed=2,
        interval=interval,
    )  # fmt: skip
    model = TASK.build(settings, FACTS, "cpu")
    batch = Windows(table(), np.array([14, 20, 31]), settings, FACTS, training=True).batch(0, 0)
    loss = TASK.loss(settings, FACTS)

    def value():
        return float(loss(model.forward(batch.inputs)[0], batch.targets)[0])

    outputs, backward = model.forward(batch.inputs)
    assert outputs.shape == (*batch.targets.shape, *([5] if interval else []))
    model.zero_grad()
    backward(loss(outputs, batch.targets)[1]())
    rng = np.random.default_rng(0)
    for name, grad in model.grads.items():
        direction = rng.standard_normal(grad.shape)
        view, eps = model.params[name], 1e-5
        kept = view.copy()
        view[...] = kept + eps * direction
        high = value()
        view[...] = kept - eps * direction
        low = value()
        view[...] = kept
        slope = float((grad * direction).sum())
        assert abs(slope) > 1e-8, name
        assert abs((high - low) / (2 * eps) - slope) < 1e-6 * max(abs(slope), 1e-3), name
    said = model.eval()(batch.inputs)
    np.testing.assert_allclose(said, outputs[-1] if mode == "every" else outputs, rtol=1e-12)


@pytest.mark.parametrize("mode", ["direct", "every", "recursive"])
def test_a_refused_backward_leaves_the_gradients(mode):
    settings = SeriesSettings(mode=mode, hidden=5, window=6, horizon=4, dtype="float64", seed=2)
    model = TASK.build(settings, FACTS, "cpu")
    inputs = Windows(table(), np.array([14, 20, 31]), settings, FACTS, training=True).batch(0, 0).inputs

    outputs, backward = model.forward(inputs, retain=True)
    found = []
    for _ in range(2):
        model.zero_grad()
        backward(np.ones_like(outputs))
        found.append(model.flat_grads.copy())
    np.testing.assert_array_equal(*found)

    outputs, backward = model.forward(inputs)
    with pytest.raises(ShapeError, match="doutputs"):
        backward(np.ones_like(outputs)[..., 1:])
    backward(np.ones_like(outputs))  # what was refused spent nothing
    after = model.flat_grads.copy()
    with pytest.raises(RuntimeError, match="backward ran already"):
        backward(np.ones_like(outputs))
    outputs, backward = model.forward(inputs)
    model.params["encoder.weight_hh_l0"] *= 2
    with pytest.raises(RuntimeError, match="encoder.weight_hh_l0 was changed"):
        backward(np.ones_like(outputs))
    np.testing.assert_array_equal(model.flat_grads, after)


def trained(mode="direct", residual="none", facts=None, **more):
    from gpurnn.tasks.trained import Trained

    facts = (facts or FACTS) | {"deviation": 2.5, "seasonal_error": 1.5}
    settings = SeriesSettings(
        mode=mode, residual=residual, window=6, horizon=7, hidden=4, seed=5, dtype="float64", **more
    )
    return Trained(Path("."), TASK, settings, facts, TASK.build(settings, facts, "cpu").eval())


def test_a_decoder_goes_on_and_the_others_do_not():
    data = table()
    one = trained("recursive", "season")
    long, short = forecast(one, data, 12), forecast(one, data)
    assert long.shape == (12,) and short.shape == (7,)
    np.testing.assert_allclose(long[:7], short, rtol=1e-12)
    assert not np.allclose(long[7:], long[2:7])
    direct = trained()
    np.testing.assert_allclose(forecast(direct, data, 3), forecast(direct, data)[:3], rtol=1e-12)
    with pytest.raises(
        ValueError, match="at most 7, the horizon of this model, got 8. For more train one with --horizon 8"
    ):
        forecast(direct, data, 8)
    with pytest.raises(ValueError, match="too short: 5 rows to read, at least 6"):
        forecast(direct, table(5))
    together = forecast(direct, data, ends=np.array([39, 20]))
    np.testing.assert_allclose(together[0], forecast(direct, data), rtol=1e-12)
    earlier = Table(data.values[:21], data.moments[:21], data.form)
    np.testing.assert_allclose(together[1], forecast(direct, earlier), rtol=1e-12)  # nothing behind its end is read


def test_score_against_the_definitions():
    data, ends = table(), np.array([12, 17, 30])
    y = data.values[:, 0]
    one = trained()
    numbers = score(one, data, ends)
    errors = {"naive": [], "seasonal_naive": [], "model": []}
    for end in ends:
        said = forecast(one, Table(data.values[: end + 1], data.moments[: end + 1], data.form))
        for k in range(1, 8):
            errors["naive"].append(y[end] - y[end + k])
            errors["seasonal_naive"].append(y[end + k - (5 if k <= 5 else 10)] - y[end + k])
            errors["model"].append(said[k - 1] - y[end + k])
    for name, e in errors.items():
        e, n = np.array(e), numbers[name]
        assert n["mae"] == pytest.approx(np.abs(e).mean()) and n["rmse"] == pytest.approx(np.sqrt((e**2).mean()))
        assert n["mase"] == pytest.approx(np.abs(e).mean() / 1.5)
        assert n["mse_standardised"] == pytest.approx((e**2).mean() / 2.5**2)
        assert n["mae_standardised"] == pytest.approx(np.abs(e).mean() / 2.5)
    assert numbers["windows"] == 3


# ---- intervals


def test_the_loss_of_intervals_against_its_definition():
    """The forecast's own loss, and the pinball losses of all quantiles, each a mean over the targets."""
    rng = np.random.default_rng(0)
    y, made, quantiles = rng.standard_normal((4, 5)), rng.standard_normal((4, 5, 3)), [0.1, 0.9]
    above = y[..., None] - made[..., 1:]
    expected = np.square(made[..., 0] - y).mean()
    expected += sum((np.where(above[..., n] > 0, q, q - 1) * above[..., n]).mean() for n, q in enumerate(quantiles))
    assert_close(IntervalLoss(mse, quantiles)(made, y)[0], expected, 64)
    check_gradients(lambda x: IntervalLoss(mse, quantiles)(x, y), made)


def test_bounds_never_cross():
    rng = np.random.default_rng(1)
    outputs = rng.standard_normal((50, 4, 5))  # quantiles in any order, the forecast anywhere
    for margins in (None, [0.0, 0.0], [2.0, 0.1]):
        (low80, high80), (low95, high95) = bounds(outputs, margins)
        assert (low95 <= low80).all() and (low80 <= outputs[..., 0]).all()
        assert (outputs[..., 0] <= high80).all() and (high80 <= high95).all()
    tidy = np.array([[5.0, 1, 3, 7, 10]])
    assert bounds(tidy).tolist() == [[[3], [7]], [[1], [10]]]
    assert bounds(tidy, [0.5, 1.0]).tolist() == [[[1], [9]], [[-8], [19]]]


def test_calibrated_intervals_cover_what_they_should():
    """Intervals that are far too narrow, or too long, cover, after calibration, their share of what was calibrated on,
    and of other draws of the same kind within four standard deviations of a share of 4,000."""
    for scale in (1, 100):
        check_calibration(scale * np.array([0, -0.2, -0.1, 0.1, 0.2]))
    assert calibrate(np.zeros((9, 1, 3)) + [0, -1, 1], np.zeros((9, 1)), [0.8]) == [-0.5]


def check_calibration(outputs):
    rng = np.random.default_rng(2)
    outputs, truth = np.zeros((8000, 1, 5)) + outputs, rng.standard_normal((8000, 1))
    margins = calibrate(outputs[:4000], truth[:4000], [0.8, 0.95])
    for part, slack in ((slice(4000), 0), (slice(4000, 8000), 4)):
        found = coverage(bounds(outputs[part], margins), truth[part], [0.8, 0.95])
        for level, name in ((0.8, "80"), (0.95, "95")):
            least = level - slack * np.sqrt(2 * level * (1 - level) / 4000)
            most = level + (slack or 1) * np.sqrt(2 * level * (1 - level) / 4000) + 2 / 4000
            assert least <= found[name]["coverage"] <= most


def test_intervals_of_a_model():
    data, ends = table(), np.array([12, 17, 30])
    for mode in ("direct", "recursive"):
        one = trained(mode, "season", interval="80,95")
        made = forecast_intervals(one, data)
        assert made.shape == (2, 2, 7)
        together = forecast_intervals(one, data, ends=np.array([39, 20]))
        np.testing.assert_allclose(together[:, :, 0], made, rtol=1e-12)
        assert (made[:, 0] <= forecast(one, data)).all() and (forecast(one, data) <= made[:, 1]).all()
        numbers = score(one, data, ends)
        truth = data.values[:, 0][ends[:, None] + np.arange(1, 8)]
        low, high = forecast_intervals(one, data, ends=ends)[1]
        assert numbers["intervals"]["95"]["coverage"] == pytest.approx(((low <= truth) & (truth <= high)).mean())
        assert numbers["intervals"]["95"]["extent"] == pytest.approx((high - low).mean())
        assert numbers["calibrated"] is False
        moved = replace(one, result={"margins": [0.0, 3.0]})
        assert (np.diff(forecast_intervals(moved, data)[1], axis=0) > np.diff(made[1], axis=0)).all()
        for margins in ([1.0], [1.0, -0.6], "ab", [1.0, None]):
            with pytest.raises(CheckpointError, match="margins"):
                forecast_intervals(replace(one, result={"margins": margins}), data)
    assert forecast_intervals(trained("recursive", "season", interval="80"), data, 12).shape == (1, 2, 12)
    with pytest.raises(ValueError, match="has learned none"):
        forecast_intervals(trained(), data)


@pytest.mark.parametrize("interval", ["", "0", "100", "80;95", "-5,80", "eighty"])
def test_bad_intervals_are_refused(interval):
    with pytest.raises(ValueError, match="interval should be per cents"):
        SeriesSettings(interval=interval)


@pytest.mark.parametrize(
    "interval, words",
    [
        ("0.8", "above 1, got '0.8': 0.8 is a share: write 80 for 80 %"),
        ("0.95,80%", "above 1, got '0.95,80%': 0.95 is a share: write 95"),
        ("1", "above 1, such as 80, got '1'"),
        ("80,80%", "that differ from one another, got '80,80%'"),
    ],
)
def test_an_interval_of_shares_is_refused_for_a_new_run(tmp_path, interval, words):
    """An old run may have one, so it is no damage."""
    path = save(tmp_path / "a.csv", {"y": growing(60)})
    with pytest.raises(ValueError, match=re.escape(f"interval should be per cents {words}")) as raised:
        prepare("series", [path], tmp_path / "run", interval=interval)
    assert "a.csv" not in str(raised.value)  # which is not at fault
    assert SeriesSettings(interval=interval).levels


def test_a_note_where_an_interval_ends_at_the_forecast():
    outputs = np.array([[5.0, 4, 6], [5, 6, 7], [5, 3, 4]])  # forecast and two quantiles of three steps
    ends = bounds(outputs)
    assert ends[0, :, 1:].tolist() == [[5, 3], [7, 5]]
    (note,) = note_ends(outputs[:, 0], ends)
    assert note.startswith("an interval ends at the forecast itself at 2 of 3 steps")
    assert note_ends(outputs[:1, 0], ends[..., :1]) == [] == note_ends(outputs[:, 0], np.empty((0, 2, 3)))


def test_levels_and_quantiles():
    settings = SeriesSettings(interval="95, 80 %")
    assert settings.levels == [0.8, 0.95]
    assert settings.quantiles == pytest.approx([0.025, 0.1, 0.9, 0.975])
    assert SeriesSettings().quantiles == []


# ---- whole runs


@pytest.mark.long
@needs("matplotlib")
@pytest.mark.parametrize("mode", ["direct", "every", "recursive"])
def test_intervals_from_csv_to_forecast(tmp_path, mode):
    path, run = save(tmp_path / "a.csv", {"y": growing(200)}), str(tmp_path / "run")
    options = [
        "--horizon",
        "4",
        "--window",
        "8",
        "--interval",
        "50,90",
        "--mode",
        mode,
        "--hidden",
        "6",
        "--epochs",
        "3",
    ]
    options += ["--seed", "2", "--backend", "cpu", "--no-progress", "--json", "--split", "120/50/30"]
    done = CliRunner().invoke(main, ["train", "series", str(path), "--out", run, *options])
    assert done.exit_code == 0, done.output
    result = json.loads(done.stdout)
    assert set(result["test"]["intervals"]) == {"50", "90"} and len(result["margins"]) == 2
    assert result["valid"]["intervals"]["90"]["coverage"] >= 0.9 and result["test"]["calibrated"]
    out, png = tmp_path / "f.csv", tmp_path / "f.png"
    made = CliRunner().invoke(main, ["forecast", run, "--out", str(out), "--plot", str(png), "--json"])
    assert made.exit_code == 0, made.output
    said = json.loads(made.stdout)
    rows = list(csv.reader(out.read_text(encoding="utf-8").splitlines()))
    assert rows[0] == ["month", "y", "y_low_50", "y_high_50", "y_low_90", "y_high_90"]
    for k, row in enumerate(rows[1:]):
        value, low50, high50, low90, high90 = map(float, row[1:])
        assert low90 <= low50 <= value <= high50 <= high90
        exact = [said["intervals"]["90"][side][k] for side in ("low", "high")]
        assert [low90, high90] == pytest.approx(exact, abs=0.5e-6 * max(map(float, rows[-1][1:])))  # 7 digits of it
    text = CliRunner().invoke(main, ["forecast", run]).output
    assert text.count("90 %:") == 4
    evaluated = CliRunner().invoke(main, ["evaluate", run, str(path)])
    assert "90 % interval: covers" in evaluated.output and "calibrated on the validation part" in evaluated.output


@pytest.mark.long
@pytest.mark.parametrize("backend", ["numpy", "cpu"])
@pytest.mark.parametrize("dtype", ["float32", "float64", "float16", pytest.param("bfloat16", marks=needs("ml_dtypes"))])
@pytest.mark.parametrize("mode", ["every", "recursive"])
def test_intervals_are_learned_in_each_dtype(tmp_path, backend, dtype, mode):
    path = save(tmp_path / "a.csv", {"y": growing(100)})
    same = dict(window=6, horizon=3, hidden=4, epochs=2, seed=1, interval="80", mode=mode, lr=0.01)
    run = prepare("series", [path], tmp_path / "run", backend=backend, dtype=dtype, **same)
    history = run.train(progress=False)
    assert history.epochs[1]["train_loss"] < history.epochs[0]["train_loss"]
    low, high = forecast_intervals(load(tmp_path / "run", backend), read_table(path, run.data.facts))[0]
    assert (low < high).all()


@pytest.mark.long
def test_the_plain_command_beats_the_seasonal_naive_forecast(tmp_path):
    """And where a choice makes the model worse, it is said with what to try."""
    path = save(tmp_path / "a.csv", {"y": growing(200)})
    same = dict(backend="cpu", seed=1, window=16, horizon=8, hidden=12, lr=0.01)
    run = prepare("series", [path], tmp_path / "auto", epochs=20, **same)
    assert run.data.facts["residual"] == "season"
    numbers, text = run.finish(run.train(progress=False))
    assert numbers["test"]["model"]["mae"] < numbers["test"]["seasonal_naive"]["mae"] and "worse" not in text
    run = prepare("series", [path], tmp_path / "none", epochs=1, residual="none", **same)
    numbers, text = run.finish(run.train(progress=False))
    assert numbers["test"]["model"]["mae"] > numbers["test"]["seasonal_naive"]["mae"]
    assert "worse than the seasonal-naive forecast" in text and "--residual season" in text
    assert numbers["advice"].startswith("The model is worse")


def test_what_is_learned_is_chosen():
    n = np.arange(200)
    wave, walk = np.sin(2 * np.pi * n / 12), np.cumsum(np.random.default_rng(0).standard_normal(200))
    settings = SeriesSettings(window=20, horizon=12)
    assert choose_residual(settings, 12, wave) == "season" and choose_residual(settings, 12, walk) == "last"
    assert choose_residual(settings, 12, wave[:50]) == choose_residual(settings, 1, wave) == "last"
    assert choose_residual(SeriesSettings(residual="none"), 12, wave) == "none"


def test_runs_of_before_load(tmp_path):
    """Their settings and facts lack what came later, and fill was a flag: that has the old meaning."""
    path = save(tmp_path / "a.csv", {"y": growing(80)})
    run = prepare("series", [path], tmp_path / "run", window=6, horizon=2, hidden=4, epochs=1, residual="none", seed=1)
    run.finish(run.train(progress=False))
    now = forecast(load(tmp_path / "run"), read_table(path, run.data.facts))
    config = tmp_path / "run" / "config.json"
    document = json.loads(config.read_text())
    later = ["date_format", "sort", "delimiter", "decimal", "thousands", "encoding", "interval"]
    for name in later:
        del document["settings"][name]
    for name in ("decimal", "date_format", "residual"):
        del document["facts"][name]
    document["settings"]["fill"] = True
    del document["sha256"]
    config.write_text(json.dumps(document))
    old = load(tmp_path / "run")
    assert old.settings.fill == "previous" and old.settings.sort is False
    assert np.array_equal(forecast(old, read_table(path, old.facts, old.settings)), now)
    prepare("series", [], tmp_path / "run", epochs=2, resume=True).train(progress=False)
    (tmp_path / "b.csv").write_text("month,y\nspring,1\nsummer,2\n")  # was read before, not as dates
    unread = read_table(tmp_path / "b.csv", old.facts)
    assert unread.moments is None and "the dates were not read" in unread.notes[0]


@pytest.mark.parametrize("order", ["newest first", "shuffled"])
def test_forecast_and_evaluate_look_at_the_order(tmp_path, order):
    y = growing(90)
    good, path = save(tmp_path / "a.csv", {"y": y}), tmp_path / "b.csv"
    run = prepare("series", [good], tmp_path / "run", window=6, horizon=2, hidden=4, epochs=1, seed=1)
    run.train(progress=False)
    header, *rows = good.read_text().splitlines()
    rows = rows[::-1] if order == "newest first" else [*rows[50:], *rows[:50]]
    path.write_text("\n".join([header, *rows]))
    for command in ("forecast", "evaluate"):
        expected = CliRunner().invoke(main, [command, str(tmp_path / "run"), str(good)])
        done = CliRunner().invoke(main, [command, str(tmp_path / "run"), str(path)])
        if order == "shuffled":
            assert done.exit_code != 0 and "b.csv: line 42, column 'month'" in done.output and "--sort" in done.output
        else:
            assert done.stdout.splitlines()[-4:] == expected.stdout.splitlines()[-4:]
            assert "the rows were newest first: reversed" in done.output


@pytest.mark.long
@needs("matplotlib")
def test_from_csv_to_forecast(tmp_path):
    """The command line on a generated series: better than both naive forecasts, drawn, written, continued."""
    y = growing(200)
    path, run = save(tmp_path / "a.csv", {"y": y[:190]}), str(tmp_path / "run")
    options = ["--horizon", "8", "--window", "12", "--split", "140/25/25", "--residual", "season", "--hidden", "12"]
    options += ["--epochs", "12", "--lr", "0.01", "--seed", "2", "--backend", "cpu", "--no-progress", "--json"]
    done = CliRunner().invoke(main, ["train", "series", str(path), "--out", run, *options])
    assert done.exit_code == 0, done.output
    result = json.loads(done.stdout)
    test = result["test"]
    assert result["data"].endswith("a season of 8 rows") and test["windows"] == 18
    assert test["model"]["mae"] < 0.6 * min(test["seasonal_naive"]["mae"], test["naive"]["mae"])
    out, png = tmp_path / "f.csv", tmp_path / "f.png"
    made = CliRunner().invoke(main, ["forecast", run, "--out", str(out), "--plot", str(png), "--json"])
    assert made.exit_code == 0, made.output
    said = json.loads(made.stdout)
    assert said["at"][:2] == ["2005-11", "2005-12"] and png.stat().st_size > 5000
    rows = list(csv.reader(out.read_text(encoding="utf-8").splitlines()))
    assert rows[0] == ["month", "y"] and [row[1] for row in rows[1:]] == [f"{value:.4f}" for value in said["forecast"]]
    assert np.abs(np.array(said["forecast"]) - growing(198)[190:]).mean() < 10  # the season before misses by 16
    newer = save(tmp_path / "b.csv", {"y": y})
    measured = CliRunner().invoke(main, ["evaluate", run, str(newer), "--json"])
    assert json.loads(measured.stdout)["windows"] == 200 - 20 - 8 + 1
    other = CliRunner().invoke(main, ["forecast", run, str(newer), "--steps", "9"])
    assert other.exit_code == 2 and "--steps should be at most 8" in other.output
    for out, words in [
        ("f.xlsx", "--out: f.xlsx would hold CSV: name the file f.csv"),
        ("no/f.csv", "the folder no does not"),
    ]:
        refused = CliRunner().invoke(main, ["forecast", run, "--out", out])
        assert refused.exit_code != 0 and words in refused.output
    text = CliRunner().invoke(main, ["forecast", run, str(newer), "--steps", "2"])
    assert [line.split()[0] for line in text.output.splitlines()] == ["2006-09", "2006-10"]


@pytest.mark.parametrize("mode", ["every", "recursive"])
def test_resumed_equals_uninterrupted(tmp_path, mode):
    path = save(tmp_path / "a.csv", {"x": growing(60, 1), "y": growing(60)})
    same = dict(backend="cpu", seed=4, hidden=5, window=9, horizon=3, mode=mode, residual="last", inputs="x")
    same |= dict(calendar=True, dropout=0.2, schedule="constant", weight_noise=0.05)
    for folder, epochs in (("whole", 3), ("parts", 1)):
        prepare("series", [path], tmp_path / folder, epochs=epochs, **same).train(progress=False)
    prepare("series", [], tmp_path / "parts", epochs=3, resume=True).train(progress=False)
    whole, parts = (load(tmp_path / folder, "cpu").model.state_dict() for folder in ("whole", "parts"))
    assert len(whole) >= 6 and all(np.array_equal(whole[name], parts[name]) for name in whole)


def test_a_run_that_names_no_file_needs_one(tmp_path):
    (tmp_path / "a.csv").write_text("x\n" + "\n".join(str(n % 7) for n in range(60)))
    sizes = "--window", "6", "--horizon", "2", "--epochs", "1", "--hidden", "4", "--no-progress"
    out = str(tmp_path / "run")
    assert CliRunner().invoke(main, ["train", "series", str(tmp_path / "a.csv"), "--out", out, *sizes]).exit_code == 0
    path = tmp_path / "run" / "config.json"
    document = json.loads(path.read_text())
    document["files"] = []
    del document["sha256"]
    path.write_text(json.dumps(document))
    done = CliRunner().invoke(main, ["forecast", out])
    assert done.exit_code != 0 and "config.json: names no file" in done.output
    assert CliRunner().invoke(main, ["forecast", out, str(tmp_path / "a.csv")]).exit_code == 0


@pytest.mark.parametrize(
    "delimiter, form, quote", [(";", "%d.%m.%Y", ""), ("\t", "%m/%d/%Y", ""), (",", "%Y-%m-%d", '"')]
)
def test_a_forecast_is_written_as_the_file_is(tmp_path, delimiter, form, quote):
    """The delimiter, the decimal comma, the form of dates: below the file's own rows it continues the file."""
    days = (np.datetime64("2020-01-01") + np.arange(61)).tolist()
    values = [f"{quote}{value:.2f}{quote}".replace(".", ",") for value in np.random.default_rng(1).normal(size=61)]
    path, out = tmp_path / "a.csv", tmp_path / "f.csv"
    rows = [f"{day:{form}}{delimiter}{value}" for day, value in zip(days, values, strict=True)]
    path.write_text("\n".join([f"date{delimiter}sales", *rows, ""]))
    settings = {"hidden": 4, "epochs": 1, "window": 6, "horizon": 2, "season": 1, "backend": "cpu"}
    run = prepare("series", [path], tmp_path / "run", seed=1, **settings)
    run.train(progress=False)
    before = read_table(path, run.data.facts, run.settings)
    coming = forecast(load(tmp_path / "run"), before)
    done = CliRunner().invoke(main, ["forecast", str(tmp_path / "run"), "--out", str(out)])
    assert done.exit_code == 0, done.output
    header, *made = out.read_text().splitlines(keepends=True)
    assert header == f"date{delimiter}sales\n"
    path.write_text(path.read_text() + "".join(made))
    after = read_table(path, run.data.facts, run.settings)
    assert after.moments == [*before.moments, *continue_moments(before.moments, 2)]
    np.testing.assert_allclose(after.values[-2:, 0], coming, rtol=0, atol=0.501e-6)  # 7 digits of what is below 10


def test_numbers_have_seven_digits():
    assert write_numbers([1234.5678901, -0.5], ",") == ["1234,568", "-0,500"]
    assert write_numbers([0.0, 0.0]) == ["0", "0"] and write_numbers([123456789.4]) == ["123456789"]
    assert write_numbers([1e-30, 0]) == ["1e-30", "0"] and write_numbers([-1.5e300]) == ["-1.5e+300"]


@pytest.mark.parametrize("season", [1, 7])
def test_the_table_of_scores_fits_into_45_columns(season):
    """In columns, one below the other; without a season its naive forecast is the other one, and named once."""
    row = {"mae": 1.23456e5, "rmse": 2.34567e-7, "mase": 123.456, "mse_standardised": 0.5, "mae_standardised": 0.25}
    numbers = {"windows": 9, "season": season, "model": row, "seasonal_naive": row, "naive": row | {"mase": None}}
    table = summary(numbers, "validation").splitlines()[:-1]
    assert [line.split()[0] for line in table[1:]] == ["model", *["seasonal-naive"] * (season > 1), "naive"]
    assert {len(line) for line in table} == {45}
    for end, name, value in ((25, "MAE", "1.2346e+05"), (36, "RMSE", "2.3457e-07")):
        assert table[0][:end].endswith(f" {name}") and all(line[:end].endswith(f" {value}") for line in table[1:])
