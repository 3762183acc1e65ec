"""Plots: real PNG files from records and runs, and the errors of those who lack something."""

import json
import sys
import warnings

import numpy as np
import pytest

import gpurnn
from gpurnn import fonts, plots
from gpurnn.gradients import StepNorms
from gpurnn.plots import plot_attention, plot_confusion, plot_forecast, plot_gradient_flow, plot_history, plot_run

EPOCH = {"kind": "epoch", "train_loss": 2.0, "validation_loss": 2.1, "lr": 1e-3, "grad_norm": 0.5, "seconds": 1.0}
STEP = {"kind": "step", "epoch": 1, "lr": 1e-3, "grad_norm": 0.7}
RECORDS = [STEP | {"step": 10, "loss": 2.5}, EPOCH | {"epoch": 1, "step": 20}]


def is_png(path):
    return path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n" and path.stat().st_size > 3000


@pytest.mark.parametrize(
    "records",
    [
        RECORDS,
        RECORDS[:1],
        [EPOCH | {"epoch": 1, "step": 20, "validation_loss": None}],
        [EPOCH | {"epoch": n, "step": 20 * n, "validation_accuracy": 0.1 * n} for n in (1, 2)],
    ],
)
def test_history(tmp_path, records):
    plot_history(records, tmp_path / "new" / "a.png")
    assert is_png(tmp_path / "new" / "a.png")


@pytest.mark.long
def test_gradient_flow_with_zeros_and_missing_c(tmp_path):
    flow = gpurnn.GradientFlow(
        l0=StepNorms(np.geomspace(1e-30, 1, 40)[:, None]), l1=StepNorms(np.zeros((40, 2)), {"c": np.ones((40, 2))})
    )
    plot_gradient_flow(flow, tmp_path / "flow.png")
    assert is_png(tmp_path / "flow.png")


@pytest.mark.long
def test_run(tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no run"):
        plot_run(tmp_path)
    lines = "".join(json.dumps(record) + "\n" for record in RECORDS)
    (tmp_path / "history.jsonl").write_text(lines + '{"kind": "st')  # the last line is still being written
    assert [p.name for p in plot_run(tmp_path)] == ["history.png"]
    flow = {"epoch": 1, "step": 1, "layers": {"l0": {"dh": [0.1, 0.2], "dc": None}}}
    (tmp_path / "gradient_flow.jsonl").write_text(json.dumps(flow) + "\n")
    assert [p.name for p in plot_run(tmp_path)] == ["history.png", "gradient_flow.png"]
    assert is_png(tmp_path / "gradient_flow.png")


@pytest.mark.long
def test_the_gradient_flow_of_a_run_is_named(tmp_path, drawn):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "history.jsonl").write_text(json.dumps(RECORDS[1]) + "\n")
    flow = {"epoch": 1, "step": 1, "layers": {"l0": {"dh": [0.1, 0.2], "dc": None}}}
    (tmp_path / "run" / "gradient_flow.jsonl").write_text(json.dumps(flow) + "\n")
    plot_run(tmp_path / "run")
    assert [figure.get_suptitle() for figure in drawn] == ["run", "run"]


@pytest.fixture
def drawn(monkeypatch):
    """The figures that are saved, and warnings that are errors: Matplotlib warns of each glyph that it lacks."""
    figures, save = [], plots.save_figure
    monkeypatch.setattr(plots, "save_figure", lambda figure, path: (figures.append(figure), save(figure, path)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield figures


def labels_of(axis):
    return [[label.get_text() for label in labels] for labels in (axis.get_xticklabels(), axis.get_yticklabels())]


LACKING = chr(0x10FFFD)  # of a private plane: no font has it


@pytest.mark.long
def test_attention(tmp_path, drawn):
    weights = np.full((2, 3), 1 / 3)
    source, written = ["caf\u00e9", "$x$", LACKING], ["\u0431", "(end)"]
    plot_attention([(weights, source, written)] * 2, tmp_path / "a.png", "Run mine: what each word read")
    (figure,) = drawn
    assert figure.get_suptitle() == "Run mine: what each word read"
    for axis in figure.axes[:2]:
        assert labels_of(axis) == [["caf\u00e9", r"\$x\$", r"\U0010fffd"], written]
    assert is_png(tmp_path / "a.png")
    with pytest.raises(gpurnn.ShapeError, match="alignments"):
        plot_attention([(weights, source, ["one"])], tmp_path / "a.png")


def test_confusion(tmp_path, drawn):
    plot_confusion(np.array([[3, 1], [0, 0]]), ["pos", LACKING + "neg"], tmp_path / "a.png", "Run mine")
    (figure,) = drawn
    axis, bar = figure.axes
    assert axis.get_title() == "Run mine" and labels_of(axis) == [["pos", r"\U0010fffdneg"]] * 2
    assert [text.get_text() for text in axis.texts] == ["3", "1"]
    np.testing.assert_array_equal(axis.images[0].get_array(), [[0.75, 0.25], [0, 0]])
    assert "share of the row" in bar.get_ylabel() and is_png(tmp_path / "a.png")
    with pytest.raises(gpurnn.ShapeError, match="confusion"):
        plot_confusion(np.eye(3), ["a", "b"], tmp_path / "a.png")


@pytest.mark.parametrize("classes, rotation", [(["neg", "pos"], 0), ([f"rather long name {n}" for n in range(4)], 90)])
def test_the_names_of_classes_are_horizontal_where_they_fit(tmp_path, drawn, classes, rotation):
    plot_confusion(np.eye(len(classes), dtype=int), classes, tmp_path / "a.png")
    assert {label.get_rotation() for label in drawn[0].axes[0].get_xticklabels()} == {rotation}


@pytest.mark.parametrize("unit, year", [("h", True), ("D", False)])
def test_a_forecast_goes_on_from_the_last_true_value(tmp_path, drawn, unit, year):
    truth, ahead = np.arange(30.0), np.array([30.5, 31.5])
    moments = np.datetime64("2021-03-01", unit) + np.arange(32)
    intervals = {"80": (ahead - 1, ahead + 1)}
    plot_forecast(truth, ahead, tmp_path / "a.png", [(20, truth[20:25])], 5, moments, "sales", intervals=intervals)
    (axis,) = drawn[0].axes
    assert axis.get_title("left") == "sales: forecast of the next 2 rows"
    assert [text.get_text() for text in axis.get_legend().get_texts()] == [
        "truth", "forecast earlier", "its first row", "forecast", "80 % interval",
    ]  # fmt: skip
    (line,) = (line for line in axis.lines if line.get_label() == "forecast")
    assert list(line.get_ydata()) == [29, 30.5, 31.5] and line.get_markevery() == slice(1, None)
    first, *others = [label.get_text() for label in axis.get_xticklabels()]
    assert (
        "2021" in first and (first.endswith("\n2021") is year) and any("2021" in other for other in others) is not year
    )


@pytest.mark.long
def test_confusion_of_many_classes_is_of_bounded_size(tmp_path, drawn):
    plot_confusion(np.eye(200, dtype=int), [f"class {n}" for n in range(200)], tmp_path / "a.png")
    assert max(drawn[0].get_size_inches()) < 30


def test_fonts_that_have_the_characters():
    """Another installed font where Matplotlib's own lacks a character; an escape where all do."""
    from matplotlib.font_manager import FontProperties, findfont, fontManager, get_font

    own = findfont(FontProperties())
    assert fonts.families("caf\u00e9") == [get_font(own).family_name] == fonts.families("")
    has = set(get_font(own).get_charmap())
    for entry in fontManager.ttflist:
        if fonts._is_plain(entry):
            more = [
                chr(point) for point in fonts._code_points(entry.fname).tolist() if point not in has and point > 0xFF
            ]
            if more:
                break
    found = fonts.families("a" + more[0] + LACKING)
    assert len(found) == 2 and fonts.drawable(more[0] + LACKING) == more[0] + r"\U0010fffd"
    assert not any(name.startswith("Last Resort") for name in found)  # boxes for everything
    path = findfont(FontProperties(family=found[1]))
    assert ord(more[0]) in fonts._code_points(path)
    assert fonts.drawable("a\tb\u00a0c\u200dd") == "a b cd"
    assert fonts._code_points(__file__).size == 0  # no font


def test_escapes_in_pictures_are_said_once(caplog):
    fonts._say_missing.cache_clear()
    assert fonts.drawable("plain") == "plain" and not caplog.records
    fonts.drawable(LACKING), fonts.drawable(f"a{LACKING}")
    (said,) = caplog.records
    assert "it shows escapes such as" in said.getMessage()


def test_nothing_to_draw(tmp_path):
    with pytest.raises(ValueError, match="history is empty"):
        plot_history([], tmp_path / "a.png")
    with pytest.raises(ValueError, match="no gradient flow"):
        plot_gradient_flow(gpurnn.GradientFlow(), tmp_path / "a.png")
    assert not list(tmp_path.iterdir())


def test_without_matplotlib(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r'pip install "gpurnn\[plot\]"'):
        plot_confusion(np.eye(2), ["a", "b"], tmp_path / "a.png")
    with pytest.raises(ImportError, match=r'pip install "gpurnn\[plot\]"'):
        plot_history(RECORDS, tmp_path / "a.png")
