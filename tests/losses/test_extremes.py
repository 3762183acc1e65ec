"""Losses and optimisers where numbers are huge, infinite, zero or tiny: what torch gives, or what is right where torch
gives NaN, in array code, compiled code and kernels alike."""

import itertools

import numpy as np
import pytest
from helpers import BACKENDS, assert_close, backend_of, host
from optional import optional

import gpurnn
from gpurnn import losses

torch = optional("torch")

HUGE = [1e18, 1e19, 2e19, -1e20, 1e30, -1e30, 1e38, -3.4e38, np.inf, -np.inf, np.nan]
ORDINARY = [0, 1e-30, -1e-20, 1, -3]
FAR = [1e100, 1e150, 1e154, -2e154, 1e200, 1e308]
GRADIENTS = {"float32": ORDINARY + HUGE + [1e-40, -1e-38], "float64": ORDINARY + HUGE + FAR + [1e-310]}
OPTIMIZERS = {
    "SGD": ("SGD", {}),
    "SGD, momentum": ("SGD", {"momentum": 0.9, "nesterov": True, "weight_decay": 0.01}),
    "SGD, dampening": ("SGD", {"momentum": 0.9, "dampening": 0.5}),
    "RMSprop": ("RMSprop", {}),
    "RMSprop, centered": ("RMSprop", {"centered": True}),
    "RMSprop, all": ("RMSprop", {"centered": True, "momentum": 0.9, "weight_decay": 0.01}),
    "Adam": ("Adam", {}),
    "Adam, amsgrad": ("Adam", {"amsgrad": True, "weight_decay": 0.01}),
    "AdamW": ("AdamW", {}),
}


@pytest.mark.parametrize("dtype", GRADIENTS)
@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_optimisers_at_extremes(backend, name, dtype):
    kind, options = OPTIMIZERS[name]
    ops, first = backend_of(backend), np.array(GRADIENTS[dtype]).astype(dtype)
    for start, later in itertools.product((1.0, 0.0, 1e-30), (0.0, 1.0, 1e-30, None)):
        layer = gpurnn.Linear(1, first.size, bias=False, backend=ops, dtype=dtype)
        layer.params["weight"] = start
        ours = getattr(gpurnn, kind)(layer, lr=0.1, **options)
        parameter = torch.nn.Parameter(torch.full((first.size,), start, dtype=getattr(torch, dtype)))
        theirs = getattr(torch.optim, kind)([parameter], lr=0.1, **options)
        for step in range(3):
            grads = first if step == 0 or later is None else np.full_like(first, later)
            layer.grads["weight"][...] = layer.xp.asarray(grads[:, None])
            parameter.grad = torch.from_numpy(grads.copy())
            ours.step()
            theirs.step()
            got, expected = host(layer.params["weight"])[:, 0], parameter.detach().numpy()
            # at most 16 operations make an update: Adam's two averages, the corrections, root, quotient, decay
            assert_close(got, expected, 16 * (step + 1), f"start {start}, later {later}, step {step}", dtype, each=True)


@pytest.mark.long
@pytest.mark.parametrize(
    "make", [gpurnn.Adam, lambda m: gpurnn.AdamW(m, amsgrad=True), lambda m: gpurnn.RMSprop(m, centered=True)]
)
@pytest.mark.parametrize("dtype", ["float32", "float16"])  # the norm of float64 overflows first, and that ends a run
@pytest.mark.parametrize("backend", ["numpy", "cpu"])
def test_a_run_goes_on_from_infinite_squares(tmp_path, backend, dtype, make):
    """With equal bits, as a run that was not stopped."""
    x = np.random.default_rng(0).normal(size=(20, 4, 3)).astype(dtype)

    class Data:
        def __len__(self):
            return 5

        def batch(self, epoch, index):
            return gpurnn.Batch(x[4 * index : 4 * index + 4], x[4 * index : 4 * index + 4])

    class Spoiled(gpurnn.Linear):
        def forward(self, x, **options):
            y, inner = super().forward(x, **options)

            def backward(dy):
                dx = inner(dy)
                calls.append(1)
                if len(calls) == 3:
                    self.grads["bias"][0] = 1e30
                return dx

            return y, backward

    def run(out, epochs, resume=False):
        model = Spoiled(3, 3, backend=backend, dtype=dtype, seed=1)
        optimizer = make(model)
        options = dict(optimizer=optimizer, out=out, epochs=epochs, resume=resume, progress=False, loss_scaler=None)
        gpurnn.fit(model, gpurnn.mse, Data(), **options)
        return model, optimizer

    calls = []
    whole, expected = run(tmp_path / "whole", 2)
    assert np.isfinite(whole.flat_params).all()
    state = expected.state_dict()
    assert any(np.isinf(array).any() for array in state["arrays"].values())
    calls.clear()
    run(tmp_path / "parts", 1)
    model, optimizer = run(tmp_path / "parts", 2, resume=True)
    np.testing.assert_array_equal(model.flat_params, whole.flat_params)
    other = make(whole)
    other.load_state_dict(state)
    for name, array in state["arrays"].items():
        np.testing.assert_array_equal(optimizer.state_dict()["arrays"][name], array)
        np.testing.assert_array_equal(other.state_dict()["arrays"][name], array)


def test_a_huge_gradient_makes_no_step_of_rmsprop():
    """It was NaN: the square of the mean overflowed, and infinity less infinity is none."""
    for backend in ("numpy", "cpu"):
        layer = gpurnn.Linear(1, 1, bias=False, backend=backend)
        layer.params["weight"], layer.grads["weight"] = 0.56, 1e30
        gpurnn.RMSprop(layer, centered=True).step()
        assert layer.params["weight"] == np.float32(0.56)


# ---- losses

NUMBERS = {"float32": [*ORDINARY, *HUGE, 88, -88, 104, -750, 1e-45], "float64": [*ORDINARY, *HUGE, *FAR, -750, 1e-310]}


def against_torch(ours, theirs, x, *others, right=None, **options):
    """Loss and derivative of each element; right: the loss where torch has NaN and there is a right one."""
    loss, backward = ours(x, *others, reduction="none", **options)
    tensor = torch.tensor(x, requires_grad=True)
    expected = theirs(tensor, *map(torch.tensor, others), reduction="none", **options)
    expected.sum().backward()
    expected, slope = expected.detach().numpy(), tensor.grad.numpy()
    if right is not None:
        expected = np.where(np.isnan(right), expected, right)
    # at most 3 classes: a maximum, 3 exponentials, 2 sums, a logarithm and a difference, or a quotient
    assert_close(loss, expected, 8, dtype=x.dtype.name, each=True)
    assert_close(backward(), slope, 8, dtype=x.dtype.name, each=True)
    for reduction in ("mean", "sum"):
        mean, backward = ours(x, *others, reduction=reduction, **options)
        assert backward().dtype == x.dtype and (np.isfinite(mean) or not np.isfinite(expected).all() or x.max() > 1e30)


@pytest.mark.parametrize("dtype", NUMBERS)
def test_binary_cross_entropy_at_extremes(dtype):
    x, y = np.array(list(itertools.product(NUMBERS[dtype], (0, 1, 0.3)))).astype(dtype).T.copy()
    right = np.full(x.shape, np.nan)
    right[np.isinf(x)] = np.inf
    right[np.isinf(x) & (y == (x > 0))] = 0
    against_torch(
        gpurnn.binary_cross_entropy_with_logits,
        torch.nn.functional.binary_cross_entropy_with_logits,
        x, y, right=right,
    )  # fmt: skip


@pytest.mark.parametrize("dtype", NUMBERS)
def test_squares_and_distances_at_extremes(dtype):
    x, y = np.array(list(itertools.product(NUMBERS[dtype], repeat=2))).astype(dtype).T.copy()
    against_torch(gpurnn.mse, torch.nn.functional.mse_loss, x, y)
    with np.errstate(all="ignore"):
        known = ~np.isnan(x - y)  # torch's derivative of a loss that is NaN is 0
    against_torch(gpurnn.mae, torch.nn.functional.l1_loss, x[known], y[known])


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("dtype", NUMBERS)
@pytest.mark.parametrize("backend", ["numpy", "cpu"])
def test_cross_entropy_at_extremes(backend, dtype, smoothing, monkeypatch):
    monkeypatch.setattr(losses.common, "array_ops", lambda *arrays: gpurnn.get_backend(backend))
    rows = list(itertools.product(NUMBERS[dtype], (0, 1e30, 5, np.inf, -np.inf), (1, -np.inf)))
    logits = np.array(rows).astype(dtype)
    for target in range(3):
        labels = np.full(len(logits), target)
        against_torch(
            gpurnn.cross_entropy, torch.nn.functional.cross_entropy, logits, labels, label_smoothing=smoothing
        )


@pytest.mark.parametrize("value", [0, -750, 1e4, 1e30, -3e38, np.inf, -np.inf, np.nan])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_ctc_at_extremes(dtype, value):
    for place in ((0, 0), (1, 1), (2, 2), (1, 0)):
        logits = np.random.default_rng(0).normal(size=(4, 1, 3)).astype(dtype)
        logits[place[0], 0, place[1]] = value
        loss, backward = gpurnn.ctc_loss(logits, [[1, 2]], reduction="sum")
        tensor = torch.tensor(logits, requires_grad=True)
        expected = torch.nn.functional.ctc_loss(
            tensor.log_softmax(2), torch.tensor([[1, 2]]), [4], [2], reduction="sum"
        )
        expected.backward()
        slope, got = tensor.grad.numpy(), backward()
        if value == -np.inf:  # torch's is NaN; a class that cannot be has no derivative
            got, slope = (np.where(np.isnan(slope), 0, a) for a in (got, slope))
        # 8 operations make the log-probabilities of 3 classes, 8 a step of the recursion over at most 3 predecessors
        assert_close(loss, expected.detach().numpy(), 8 + 4 * 8, dtype=dtype)
        assert_close(got, slope, 8 + 2 * 4 * 8, dtype=dtype)  # forward and backward in time


# ---- relu


@pytest.mark.parametrize("kind", ["layer", "reverse", "cell", "lengths"])
@pytest.mark.parametrize("dtype", ["float32", "float64", "float16", "bfloat16"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_the_derivative_of_relu_at_nan_is_nan(backend, dtype, kind):
    """A pre-activation of NaN in the step that the loss reads: without this its gradients would be 0, as of a unit
    that is off, and a layer that has broken would train on without a word. Other sequences, and NaN past a sequence's
    end, do not see it."""
    T, B, I, H = 4, 3, 2, 19
    options = {"nonlinearity": "relu", "backend": backend_of(backend), "dtype": dtype, "seed": 1}
    random = np.random.default_rng(0)
    last = 0 if kind == "reverse" else T - 1
    if kind == "cell":
        layer = gpurnn.RNNCell(I, H, **options)
        x = random.standard_normal((B, I)).astype(layer.dtype)
        x[1] = np.nan
        h, backward = layer.forward(layer.xp.asarray(x))
    else:
        layer = gpurnn.RNN(I, H, reverse=kind == "reverse", **options)
        x = random.standard_normal((T, B, I)).astype(layer.dtype)
        x[last, 1] = np.nan
        lengths = [T, T - 1, T] if kind == "lengths" else None
        h, _, backward = layer.forward(layer.xp.asarray(x), lengths=lengths)
    dx = host(backward(layer.xp.ones(h.shape, layer.dtype))[0]).astype(np.float64)
    seen = np.isnan(dx).any(axis=-1)
    expected = np.zeros(seen.shape, bool)
    if kind != "lengths":
        expected[..., 1] = True  # through time to every step before
    np.testing.assert_array_equal(seen, expected)
    for name, grad in layer.grads.items():
        assert np.isnan(host(grad)).any() == (kind != "lengths"), name
