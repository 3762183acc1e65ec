"""fit(resume=True) with other arguments: what is refused, what may change, and what older checkpoints lack."""

import numpy as np
import pytest

import gpurnn
from gpurnn import CheckpointError, fit
from gpurnn.checkpoint import load_checkpoint, save_checkpoint

pytestmark = pytest.mark.long  # each trains twice

SHARED = {"backend": "numpy", "seed": 1}


def pairs(seed):
    rng = np.random.default_rng(seed)
    return [(rng.standard_normal((5, 4, 3)).astype("float32"), rng.integers(0, 4, (5, 4))) for _ in range(3)]


def train(out, epochs=2, **options):
    model = gpurnn.Sequential(gpurnn.GRU(3, 6, **SHARED), gpurnn.Linear(6, 4, **SHARED))
    usual = dict(
        optimizer="adam", lr=0.01, validation=pairs(1), metrics={"acc": gpurnn.accuracy}, progress=False, out=out
    )
    history = fit(model, gpurnn.cross_entropy, pairs(0), epochs=epochs, **usual | options)
    return model.flat_params.copy(), history


def decay(optimizer):
    return gpurnn.StepSchedule(optimizer, 5)


@pytest.mark.parametrize(
    "before, after, words",
    [
        ({"watch": ("acc", "max")}, {}, r"watch=\['acc', 'max'\], this run has watch=\['loss', 'min'\]"),
        ({}, {"watch": ("loss", "max")}, r"watch=\['loss', 'min'\], this run has watch=\['loss', 'max'\]"),
        ({}, {"clip_norm": 1}, "clip_norm=None, this run has clip_norm=1.0"),
        ({"clip_norm": 1}, {"clip_norm": 2}, "clip_norm=1.0, this run has clip_norm=2.0"),
        ({"clip_value": 0.5}, {}, "clip_value=0.5, this run has clip_value=None"),
        ({"weight_noise": 0.1}, {}, "weight_noise=0.1, this run has weight_noise=0.0"),
        ({}, {"lr": 0.001}, "lr=0.01, this run has lr=0.001"),
        ({}, {"lr": None}, "lr=0.01, this run has lr=0.001"),
        ({"validation": None, "metrics": None}, {}, "validation=False, this run has validation=True"),
        ({"schedule": decay}, {"schedule": decay, "schedule_every": "step"}, "schedule_every='epoch', .*'step'"),
        ({"accumulate": 2}, {}, "'accumulate': 2.*, this run has .*'accumulate': 1"),
        ({"schedule": decay}, {"schedule": gpurnn.ConstantSchedule}, "kind"),
        ({}, {"clip_norm": 1, "clip_value": 2}, "clip_norm=None, clip_value=None, .* clip_norm=1.0, clip_value=2.0"),
    ],
)
def test_what_differs_is_refused_and_changes_nothing(tmp_path, before, after, words):
    train(tmp_path, epochs=1, **before)
    files = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(CheckpointError, match=f"does not fit this run: .*{words}"):
        train(tmp_path, resume=True, **after)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == files


def test_a_run_without_validation_watches_its_loss_whatever_it_was_told(tmp_path, monkeypatch):
    """Older runs of tasks have the name of a metric there."""
    alone = {"validation": None, "metrics": None}
    with monkeypatch.context() as patch:
        patch.setattr("gpurnn.train.settings.FitSettings._check_watch", lambda settings: None)
        train(tmp_path, epochs=1, watch=("acc", "max"), **alone)
    assert np.array_equal(train(tmp_path, resume=True, **alone)[0], train(None, **alone)[0])


def test_what_may_change(tmp_path):
    """How long training goes on, and what is written; an optimizer of one's own has the checkpoint's rate."""
    whole, _ = train(None)
    train(tmp_path, epochs=1)
    weights, history = train(tmp_path, resume=True, patience=1, checkpoint_every=2, flow=True, metrics={})
    assert np.array_equal(weights, whole) and len(history.epochs) == 2
    model = gpurnn.Sequential(gpurnn.GRU(3, 6, **SHARED), gpurnn.Linear(6, 4, **SHARED))
    adam = gpurnn.Adam(model, lr=0.5)
    fit(model, gpurnn.cross_entropy, pairs(0), optimizer=adam, epochs=3, validation=pairs(1), progress=False,
        out=tmp_path, resume=True)  # fmt: skip
    assert adam.lr == 0.01 and np.array_equal(model.flat_params, train(None, epochs=3)[0])


def test_a_schedule_changes_no_rate_that_is_compared(tmp_path):
    """What is compared is the rate that the run began with, not the one that it has come to."""
    cosine = lambda adam: gpurnn.CosineSchedule(adam, total=4)  # noqa: E731
    whole, _ = train(None, schedule=cosine)
    train(tmp_path, epochs=1, schedule=cosine)
    assert np.array_equal(train(tmp_path, resume=True, schedule=cosine)[0], whole)


def test_an_older_checkpoint_has_no_settings(tmp_path):
    whole, _ = train(None)
    train(tmp_path, epochs=1)
    arrays, document = load_checkpoint(tmp_path / "last.json")
    del document["settings"]
    save_checkpoint(tmp_path / "last.json", arrays, document)
    assert np.array_equal(train(tmp_path, resume=True, clip_norm=1e9)[0], whole)
