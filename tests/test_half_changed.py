"""A step that is not finite leaves nothing half-changed, and its message says what helps."""

import numpy as np
import pytest
from test_arrays import BACKENDS, backend_of, host, values

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


def test_padding_that_is_nan_is_no_fault():
    assert np.isfinite(train(model(), Steps(ragged=True))[-1]["train_loss"])
