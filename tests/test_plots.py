"""Plots: real PNG files from records and runs, and the errors of those who lack something."""

import json
import sys

import numpy as np
import pytest

import gpurnn
from gpurnn.gradients import StepNorms
from gpurnn.plots import plot_gradient_flow, plot_history, plot_run

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
        l0=StepNorms(np.geomspace(1e-30, 1, 40)[:, None]), l1=StepNorms(np.zeros((40, 2)), np.ones((40, 2)))
    )
    plot_gradient_flow(flow, tmp_path / "flow.png")
    assert is_png(tmp_path / "flow.png")


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


def test_nothing_to_draw(tmp_path):
    with pytest.raises(ValueError, match="history is empty"):
        plot_history([], tmp_path / "a.png")
    with pytest.raises(ValueError, match="no gradient flow"):
        plot_gradient_flow(gpurnn.GradientFlow(), tmp_path / "a.png")
    assert not list(tmp_path.iterdir())


def test_without_matplotlib(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"pip install 'gpurnn\[plot\]'"):
        plot_history(RECORDS, tmp_path / "a.png")
