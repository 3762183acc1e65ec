"""Traced cells on the schedules of backend ``cuda``: any number of states, own parameters, random masks, products with some
gates, a second product or none, means over the units. Executed on the CPU as test_cuda_layers.py does it, and compared with
NumPy to the same tolerance."""

import numpy as np
import pytest
from helpers import THREAD_ORDERS, cuda_ops

import gpurnn
from gpurnn import cells
from gpurnn.backends.cuda import schedules
from gpurnn.check import Batch
from gpurnn.dtypes import ITEMSIZE
from gpurnn.testing.allowed import worst_error

pytestmark = pytest.mark.emulated


@gpurnn.cell(gates="a b c", states="h s", parameters="u v", remembers="a")
def mixed(ax, ah, s, p):
    """Gates whose two products meet after an equation, and one without a product."""
    a = cells.sigmoid(ax.a + ah.a + p.u * s.s)
    b = cells.tanh(ax.b + a * ah.b)
    slow = s.s + cells.softplus(ax.c) * (b - s.s) * 0.1
    return a * s.h + (1 - a) * cells.tanh(slow + p.v), slow


@gpurnn.cell(gates="r n", states="h s", parameters="u", remembers="r")
def inner_drawn(ax, ah, s, p):
    """A second product of what an own parameter, another state and a mask make."""
    r = cells.sigmoid(ax.r + ah.r + p.u * s.s)
    n = cells.tanh(ax.n + ah.n(cells.dropout(r * s.h, 0.25) + s.s))
    return n + r * (s.h - n), 0.5 * s.s + 0.5 * n * p.u


def of(cell):
    """A function that makes a layer of a cell."""
    return lambda *sizes, **more: gpurnn.Recurrent(cell, *sizes, **more)


def option(kind, **options):
    """A function that makes a layer with options."""
    return lambda *sizes, **more: kind(*sizes, **options, **more)


DRAWN = {"recurrent_dropout": 0.3, "zoneout": (0.2, 0.1)}
LAYERS = {
    "peephole": of(cells.peephole),
    "four states": of(cells.slstm),
    "zoneout and dropout": option(gpurnn.LSTM, **DRAWN),
    "dropout of a sequence": option(gpurnn.GRU, recurrent_dropout=0.3, recurrent_dropout_each="sequence"),
    "mixed": of(mixed),
    "two coupled states": of(cells.cornn()),
    "clips": option(gpurnn.LSTM, cell_clip=0.5, gradient_clip=0.1, peephole=True, coupled=True),
}
NO_PRODUCT = {"indrnn": of(cells.indrnn), "mingru": of(cells.mingru)}
TWO_PRODUCTS = {"mgu": of(cells.mgu), "mut1": of(cells.mut1), "inner drawn": of(inner_drawn)}
MEANS = {
    "lstm normalized": option(gpurnn.LSTM, layer_norm=True),
    "gru normalized": option(gpurnn.GRU, layer_norm=True),
    "rnn normalized": option(gpurnn.RNN, layer_norm=True),
    "everything": option(gpurnn.LSTM, layer_norm=True, peephole=True, **DRAWN),
}
POINTWISE = LAYERS | NO_PRODUCT
EVERY = POINTWISE | TWO_PRODUCTS | MEANS


def compare(make, ops, dtype, T, B, H, ragged, schedule, I=3, **options):
    """Every result of a training call and the output of inference, within twice the error of NumPy's."""
    first = make(I, H, backend=ops, dtype=dtype, seed=1, schedule=schedule, **options)
    like = "float16" if options.pop("precision", None) == "tf32" else dtype
    plain, exact = (make(I, H, backend="numpy", dtype=kind, seed=1, **options) for kind in (like, "float64"))
    for other in (plain, exact):
        other.load_state_dict(first.state_dict())
    worst = []
    for seed in (T + 31 * B, 1, 2):
        batch = Batch(exact, T, B, ragged, seed=seed)
        got, plain_got, expected = (batch.run(layer) for layer in (first, plain, exact))
        for layer, results in ((first, got), (plain, plain_got), (exact, expected)):
            layer.eval()
            output, state = layer(
                layer.xp.asarray(batch.x.astype(np.float32)).astype(layer.dtype), lengths=batch.lengths
            )
            layer.train()
            states = state if isinstance(state, tuple) else (state,)
            for k, array in enumerate((output, *states)):
                results[f"inference {k}"] = np.asarray(layer.ops.to_numpy(array), np.float64)
        terms = T * (B + 2 * H + 4) if dtype == "float64" else None
        worst.append(worst_error(got, plain_got, expected, like, terms))
        if worst[-1][0] <= 1:  # NumPy may have been exact by luck: the middle one of three draws counts
            return
    error, detail = sorted(worst)[1]
    assert error <= 1, detail


SIZES = [  # T, B, H, ragged, both directions
    (1, 1, 1, False, False), (5, 3, 7, True, True), (1, 5, 33, True, False),
]  # fmt: skip


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16"])
@pytest.mark.parametrize("kind", EVERY)
def test_step(kind, dtype):
    ops = cuda_ops(**THREAD_ORDERS["random" if dtype == "float64" else "ascending"])
    for T, B, H, ragged, both in SIZES:
        compare(EVERY[kind], ops, dtype, T, B, H, ragged, "step", bidirectional=both)
