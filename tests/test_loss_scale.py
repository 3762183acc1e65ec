"""The loss scale of float16: gradients that would be zero arrive, those that overflow skip the update, runs resume."""

import json
import math

import numpy as np
import pytest
from helpers import TEXT_IDS
from optional import needs

import gpurnn
from gpurnn import LossScaler, TextBatches, fit
from gpurnn.checkpoint import load_checkpoint, save_checkpoint

# ---- the rule


def test_the_rule_is_that_of_torch():
    """Doubled after so many good steps in a row, halved at a bad one."""
    torch = pytest.importorskip("torch")
    scaler = LossScaler(init_scale=4.0, growth_interval=3)
    theirs = torch.amp.GradScaler("cpu", init_scale=4.0, growth_interval=3)
    assert LossScaler().scale == 2.0**16 and LossScaler().growth_interval == 2000
    parameter = torch.nn.Parameter(torch.zeros(2))
    sgd = torch.optim.SGD([parameter], lr=0.0)
    rng = np.random.default_rng(0)
    for good in [True] * 7 + [False] * 2 + list(rng.random(60) < 0.8):
        parameter.grad = torch.tensor([1.0, 1.0 if good else math.inf])
        theirs.scale(torch.ones(1))
        theirs.step(sgd)
        theirs.update()
        assert scaler.update(good) == good
        assert scaler.scale == theirs.get_scale()
    assert scaler.skipped > 5


def test_unscaled_gradients_are_the_gradients():
    model = gpurnn.Linear(3, 2, backend="numpy", dtype="float16", seed=1)
    scaler = LossScaler()
    model.flat_grads[...] = np.arange(model.flat_grads.size) * 65536.0
    scaler.unscale(model)
    np.testing.assert_array_equal(model.flat_grads, np.arange(model.flat_grads.size))


@pytest.mark.parametrize(
    "options, error, words",
    [
        ({"init_scale": 0}, ValueError, "init_scale"),
        ({"init_scale": "big"}, TypeError, "init_scale"),
        ({"growth_factor": 1}, ValueError, "growth_factor"),
        ({"backoff_factor": 1}, ValueError, "backoff_factor"),
        ({"growth_interval": 0}, ValueError, "growth_interval"),
    ],
)
def test_bad_scalers(options, error, words):
    with pytest.raises(error, match=words):
        LossScaler(**options)


def test_a_state_comes_back_and_a_wrong_one_changes_nothing():
    scaler = LossScaler(growth_interval=3)
    for good in (True, False, True, True):
        scaler.update(good)
    state = json.loads(json.dumps(scaler.state_dict()))
    other = LossScaler()
    other.load_state_dict(state)
    assert other.state_dict() == state and repr(other) == repr(scaler)
    for wrong in ({}, {**state, "scale": -1}, {**state, "good": "many"}, {**state, "more": 1}, 7):
        with pytest.raises((KeyError, ValueError, TypeError)):
            other.load_state_dict(wrong)
        assert other.state_dict() == state


# ---- gradients


def one_step(dtype, scaler=None):
    """The bias gradient of a large vocabulary over many steps."""
    model = gpurnn.Linear(4, 2048, backend="cpu", dtype=dtype, seed=1)
    rng = np.random.default_rng(1)
    x, targets = rng.normal(size=(128, 64, 4)), rng.integers(0, 2048, (128, 64))
    logits, backward = model.forward(x.astype(model.dtype))
    _, dloss = gpurnn.cross_entropy(logits, targets)
    share = 0.125  # of eight batches that make one step
    dlogits = dloss(share if scaler is None else share * scaler.scale)
    backward(dlogits)
    if scaler is not None:
        scaler.unscale(model)
    return model.grads["bias"].astype(np.float64), float((dlogits == 0).mean())


@pytest.mark.slow
def test_gradients_of_a_large_vocabulary_arrive():
    exact, _ = one_step("float64")
    bare, zeros = one_step("float16")
    scaled, fewer = one_step("float16", LossScaler())
    off, still_off = (np.abs(grads - exact).sum() / np.abs(exact).sum() for grads in (bare, scaled))
    assert zeros > 0.9 and off > 0.3
    assert fewer < 1e-3 and still_off < 2e-3


# ---- in fit


def text_model(dtype="float16", bad=None):
    options = {"backend": "cpu", "dtype": dtype}
    layers = {
        "embedding": gpurnn.Embedding(11, 6, seed=1, **options),
        "rnn": gpurnn.GRU(6, 8, num_layers=2, dropout=0.25, seed=2, **options),
        "norm": gpurnn.BatchNorm(8, **options),
        "output": gpurnn.Linear(8, 11, seed=3, **options),
    }
    return gpurnn.Sequential(layers)


def train(out=None, epochs=2, dtype="float16", seen=None, **options):
    model = text_model(dtype)
    adam = gpurnn.Adam(model, lr=1e-2)
    if seen is not None:
        step = adam.step
        adam.step = lambda: (seen.append(model.flat_params.copy()), step())
    defaults = dict(progress=False, clip_norm=1.0, out=out)
    history = fit(
        model,
        gpurnn.cross_entropy,
        TextBatches(TEXT_IDS[:2400], 2, 10),
        optimizer=adam,
        epochs=epochs,
        **defaults | options,
    )
    return model, adam, history


@pytest.mark.long
def test_float16_is_scaled_unless_asked_otherwise():
    for dtype, options, scaled in (
        ("float16", {}, True), ("float32", {}, False), ("float16", {"loss_scaler": None}, False),
        ("float32", {"loss_scaler": LossScaler()}, True),
    ):  # fmt: skip
        _, _, history = train(epochs=1, dtype=dtype, **options)
        assert all(("loss_scale" in record) == scaled for record in history)
        assert all(("skipped" in record) == scaled for record in history)
    if "bfloat16" in gpurnn.dtypes.DTYPES:
        pytest.importorskip("ml_dtypes")
        _, _, history = train(epochs=1, dtype="bfloat16")
        assert "loss_scale" not in history[-1]


@pytest.mark.long
def test_gradients_that_overflow_skip_the_update_and_are_counted():
    scaler = LossScaler(init_scale=2.0**30)
    seen = []
    model, adam, history = train(epochs=1, loss_scaler=scaler, seen=seen)
    assert scaler.skipped == history[-1]["skipped"] > 5
    assert history[-1]["loss_scale"] == scaler.scale < 2.0**30
    assert adam.steps == len(seen) == history[-1]["step"] - scaler.skipped
    assert np.array_equal(seen[0], text_model().flat_params)
    assert np.isfinite(model.flat_params).all() and history[-1]["train_loss"] < math.log(11)
    assert all(np.isfinite(buffer).all() for buffer in model["norm"].buffers.values())


def test_a_scale_changes_nothing_but_rounding():
    weights = [train(epochs=1, dtype="float32", loss_scaler=s)[0].flat_params for s in (None, LossScaler())]
    np.testing.assert_array_equal(*weights)


@pytest.mark.long
@needs("matplotlib")
def test_a_run_whose_first_steps_are_skipped_is_recorded(tmp_path):
    """No gradient norm is known by then."""
    train(tmp_path, epochs=1, loss_scaler=LossScaler(init_scale=2.0**60), checkpoint_every=1)
    lines = [json.loads(line) for line in (tmp_path / "history.jsonl").read_text().splitlines()]
    assert lines[0]["grad_norm"] is None and lines[0]["skipped"] == 10
    assert (tmp_path / "history.png").exists()


def test_a_gradient_that_is_never_finite_ends_the_run():
    def broken(outputs, targets):
        loss, backward = gpurnn.cross_entropy(outputs, targets)
        return loss, lambda share: backward(share) * np.float16(np.nan)

    model = text_model()
    before = model.flat_params.copy()
    with pytest.raises(gpurnn.TrainingError, match=r"gradient norm nan.*at a loss scale of 1"):
        fit(
            model,
            broken,
            TextBatches(TEXT_IDS[:2400], 2, 10),
            optimizer=gpurnn.SGD(model, 1.0),
            epochs=1,
            progress=False,
        )
    assert np.array_equal(model.flat_params, before)


class Stop(Exception):
    pass


@pytest.mark.slow
@pytest.mark.parametrize("after", [3, 17, 60, 130])
def test_a_killed_run_ends_in_the_same_bits(tmp_path, monkeypatch, after):
    options = {"epochs": 2, "checkpoint_every": 3}

    def scaler():
        return LossScaler(init_scale=2.0**26, growth_interval=7)

    whole, _, expected = train(loss_scaler=scaler(), **options)
    source, count = TextBatches.batch, [0]

    def batch(self, epoch, index):
        count[0] += 1
        if count[0] > after:
            raise Stop
        return source(self, epoch, index)

    monkeypatch.setattr(TextBatches, "batch", batch)
    with pytest.raises(Stop):
        train(tmp_path, loss_scaler=scaler(), **options)
    monkeypatch.undo()
    again = scaler()
    model, _, history = train(tmp_path, resume=True, loss_scaler=again, **options)
    assert np.array_equal(model.flat_params, whole.flat_params)
    wanted = ("loss_scale", "skipped", "train_loss", "grad_norm")
    assert [{k: r.get(k) for k in wanted} for r in history] == [{k: r.get(k) for k in wanted} for r in expected]
    assert expected[-1]["skipped"] > 3


@pytest.mark.long
def test_checkpoints_from_before_there_was_a_scale_load(tmp_path):
    train(tmp_path, epochs=1)
    arrays, document = load_checkpoint(tmp_path / "last.json")
    assert document.pop("scaler")["scale"] > 1
    save_checkpoint(tmp_path / "last.json", arrays, document)
    scaler = LossScaler()
    _, _, history = train(tmp_path, epochs=2, resume=True, loss_scaler=scaler)
    assert len(history.epochs) == 2 and history[-1]["loss_scale"] == scaler.scale


@pytest.mark.long
def test_a_run_is_resumed_with_what_it_had(tmp_path):
    train(tmp_path, epochs=1)
    with pytest.raises(gpurnn.CheckpointError, match="does not fit this run: it was made with a loss scale"):
        train(tmp_path, epochs=2, resume=True, loss_scaler=None)
    train(tmp_path, epochs=1, overwrite=True, loss_scaler=None)
    with pytest.raises(gpurnn.CheckpointError, match="does not fit this run: it was made without a loss scale"):
        train(tmp_path, epochs=2, resume=True)


@pytest.mark.parametrize("wrong", [True, "float16", 65536.0])
def test_what_is_no_scaler_is_refused(wrong):
    with pytest.raises(TypeError, match="^loss_scaler should be a LossScaler, None or 'auto', got"):
        train(loss_scaler=wrong)


def test_the_scale_stays_a_number_that_can_be_resumed():
    """As torch's, which grows only to a finite scale."""
    for finite in (True, False):
        scaler = LossScaler(growth_interval=1)
        for _ in range(2200):
            scaler.update(finite)
        assert 0.0 < scaler.scale < float("inf")
        LossScaler().load_state_dict(scaler.state_dict())
        before = scaler.scale
        scaler.update(not finite)
        assert scaler.scale != before
