"""A step that is not finite leaves nothing half-changed, and its message says what helps."""

import numpy as np
import pytest
from helpers import BACKENDS, backend_of, host, values
from optional import needs

import gpurnn
from gpurnn import Batch, TrainingError, fit


class Steps:
    """Ten batches, of which one is bad."""

    def __init__(self, bad=None, place="inputs", ragged=False, size=1.0):
        self.bad, self.place, self.ragged, self.size = bad, place, ragged, size

    def __len__(self):
        return 10

    def batch(self, epoch, index):
        rng = np.random.default_rng(index)
        x, y = (rng.normal(size=(6, 4, 3)).astype("float32") for _ in range(2))
        lengths = np.array([6, 2, 5, 6]) if self.ragged else None
        if self.ragged:
            x[4:, 1] = np.nan
        if index == self.bad:
            (x if self.place == "inputs" else y)[0, 0, 0] = np.nan if self.place != "large" else 1
            if self.place == "large":
                y *= np.float32(1e38)
        return Batch(x, y, lengths)


def model():
    return gpurnn.Sequential(
        gpurnn.Linear(3, 5, backend="cpu", seed=1),
        gpurnn.BatchNorm(5, backend="cpu", seed=4),
        gpurnn.Dropout(0.2, backend="cpu", seed=2),
        gpurnn.GRU(5, 3, backend="cpu", seed=3),
    )


def train(net, source, **options):
    with np.errstate(all="ignore"):
        return fit(net, gpurnn.mse, source, optimizer=gpurnn.SGD(net, 0.1), epochs=1, progress=False, **options)


@pytest.mark.parametrize("place", ["inputs", "targets", "large"])
@pytest.mark.parametrize("accumulate", [1, 3])
def test_the_model_is_as_before_the_step(place, accumulate):
    """Weights, running statistics and the counters of random draws."""
    bad, good = 6, model()
    with pytest.raises(TrainingError):
        train(good, Steps(bad, place), accumulate=accumulate)
    twin = model()

    class Short(Steps):
        def __len__(self):
            return bad

    train(twin, Short(), accumulate=accumulate)
    state, expected = good.state_dict(), twin.state_dict()
    for name, value in expected.items():
        np.testing.assert_array_equal(state[name], value, err_msg=name)
    assert good.random_state() == twin.random_state()


def two_recurrent(backend, dtype, nested=False):
    o = {"backend": backend_of(backend), "dtype": dtype}
    first = gpurnn.LSTM(3, 4, seed=1, **o)
    layers = gpurnn.Linear(4, 4, seed=2, **o), gpurnn.GRU(4, 5, seed=3, **o), gpurnn.Linear(5, 2, seed=4, **o)
    return gpurnn.Sequential(gpurnn.Sequential(first) if nested else first, *layers)


@pytest.mark.parametrize("retain", [False, True])
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("dtype", ["float16", pytest.param("bfloat16", marks=needs("ml_dtypes")), "float32", "float64"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_wrong_inner_dstate_changes_nothing(backend, dtype, nested, retain):
    model = two_recurrent(backend, dtype, nested)
    x = model.xp.asarray(values((6, 2, 3))).astype(model.dtype)
    y, (first, second), backward = model.forward(x, retain=retain)
    dy = y.copy()
    h, c = first[0] if nested else first
    for wrong, error, message in (
        ((h[:, :1], c), gpurnn.ShapeError, r"dstate\[0\](\[0\])? h: expected shape \(1, 2, 4\), got \(1, 1, 4\)"),
        ((h, c[0]), gpurnn.ShapeError, r"dstate\[0\](\[0\])? c: expected shape"),
        ((h.astype("int32"), c), gpurnn.DtypeError, r"dstate\[0\](\[0\])? h: dtype"),
        (h, gpurnn.ShapeError, r"dstate\[0\](\[0\])?: expected a pair"),
    ):
        with pytest.raises(error, match=message):
            backward(dy, (((wrong,) if nested else wrong), second))
        assert not host(model.flat_grads).any()
    dx, _ = backward(dy, (first, second))
    assert host(model.flat_grads).any() and np.isfinite(host(dx).astype("float64")).all()


def test_a_flow_that_cannot_be_recorded_changes_nothing():
    layers = gpurnn.LSTM(3, 4, 2, wavefront=2, backend="cpu", seed=1), gpurnn.Linear(4, 2, backend="cpu", seed=2)
    model = gpurnn.Sequential(*layers)
    y, _, backward = model.forward(values((6, 2, 3)))
    with gpurnn.record_gradient_flow(), pytest.raises(RuntimeError, match="ran as a wavefront"):
        backward(y)
    assert not model.flat_grads.any()
    backward(y)
    assert model.flat_grads.any()


@pytest.mark.parametrize("where", ["mean", "variance"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_running_statistics_take_no_nan(backend, where):
    """In a loop of one's own, too: all features or none."""
    layer = gpurnn.BatchNorm(3, backend=backend_of(backend))
    x = values((5, 4, 3))
    layer.forward(layer.xp.asarray(x))
    before = {name: host(buffer).copy() for name, buffer in layer.buffers.items()}
    assert before["num_batches_tracked"] == 1
    x[0, 0, 1] = np.nan if where == "mean" else 1e30
    with np.errstate(all="ignore"):
        layer.forward(layer.xp.asarray(x))
    for name, buffer in layer.buffers.items():
        np.testing.assert_array_equal(host(buffer), before[name], err_msg=name)
    layer.forward(layer.xp.asarray(values((5, 4, 3))))
    assert host(layer.buffers["num_batches_tracked"]) == 2
    assert (host(layer.buffers["running_mean"]) != before["running_mean"]).all()


@pytest.mark.parametrize(
    "source, options, words, never",
    [
        (Steps(4), {}, "data hold values that are not finite: take them out", "clip_norm"),
        (Steps(4, "targets"), {}, "data hold values that are not finite", "clip_norm"),
        (Steps(4, ragged=True), {}, "data hold values that are not finite", "clip_norm"),
        (Steps(4, "large"), {}, r"rate below 0.1 usually helps; so does a limit .*\(clip_norm\)", "data hold"),
        (Steps(4, "large"), {"clip_norm": 2.5}, "rate below 0.1 usually helps; .*already, to a norm of 2.5", "so does"),
        (Steps(0, "large"), {}, "first step: look at the scale of the data", "data hold"),
    ],
)  # fmt: skip
def test_the_message_says_what_helps(source, options, words, never):
    with pytest.raises(TrainingError, match=words) as caught:
        train(model(), source, **options)
    assert never not in str(caught.value)
    assert "weights" in str(caught.value) and "running statistics" in str(caught.value)


@needs("ml_dtypes")
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
@pytest.mark.parametrize("place", ["inputs", "targets"])
def test_data_of_any_dtype_are_looked_at(dtype, place):
    dtype = gpurnn.dtypes.check_dtype(dtype)

    class Narrow(Steps):
        def batch(self, epoch, index):
            batch = super().batch(epoch, index)
            return Batch(batch.inputs.astype(dtype), batch.targets.astype(dtype))

    with pytest.raises(TrainingError, match="data hold values that are not finite: take them out"):
        train(gpurnn.Linear(3, 3, backend="cpu", dtype=dtype), Narrow(4, place), loss_scaler=None)


def test_padding_that_is_nan_is_no_fault():
    assert np.isfinite(train(model(), Steps(ragged=True))[-1]["train_loss"])
