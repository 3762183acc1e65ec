"""Traced cells for the schedules of backend ``cuda``: one of each kind, and layers of them; results against NumPy's."""

import numpy as np

import gpurnn
from gpurnn import cells
from gpurnn.check import Batch
from gpurnn.check.recurrent import middle
from gpurnn.testing.allowed import worst_error


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


@gpurnn.cell(gates="z", states="h")
def centered(ax, ah, s):
    """One mean, and nothing that multiplies h."""
    return cells.tanh(ax.z + s.h - cells.mean(s.h * ax.z))


@gpurnn.cell(gates="z g", states="h s")
def both_states(ax, ah, s):
    """A product of what both states make, in a way that is not linear."""
    mixed = cells.tanh(s.h) * s.s + s.h
    z = cells.sigmoid(ax.z + ah.z(mixed))
    new = z * s.s + (1 - z) * cells.tanh(ax.g + ah.g(mixed))
    return cells.tanh(new), new


@gpurnn.cell(gates="z")
def drawn_each(ax, ah, s):
    """One product of what a mask of the timestep makes: it is not known before."""
    return cells.tanh(ax.z + ah.z(cells.dropout(s.h, 0.25)))


@gpurnn.cell(gates="z", parameters="u")
def weighted(ax, ah, s, p):
    """One product whose vector has a gradient besides that of the state."""
    return cells.tanh(ax.z + ah.z(p.u * s.h))


class LeakyStep(cells.Cell):
    """h' = h + leak (n - h), n = tanh(ax + ah): a cell that nothing else knows, written by hand as one record and one
    struct."""

    name, gates, inputs, saved = "leaky", ("z",), ("z",), ("n",)
    products, parameters = (cells.Product(("z",)),), (cells.Parameter("leak", initial=0.5),)
    preactivations = ("z", *parameters[0].blocks)
    struct = """
        template <typename real>
        struct leaky : PointwiseCell {
            static constexpr int gates = 1, states = 1, saved = 1, preactivations = 2, first_product = 1, products = 1;
            static constexpr int parameters = 1;

            DEVICE static void forward(const ForwardIn<leaky, real>& in, ForwardOut<leaky, real>& out) {
                const real n = out.saved[0] = tanh(in.ax[0] + in.ah[0]);
                out.state[0] = in.state[0] + in.p[0] * (n - in.state[0]);
            }

            DEVICE static void backward(const BackwardIn<leaky, real>& in, BackwardOut<leaky, real>& out) {
                out.d[0] = in.dstate[0] * in.p[0] * dtanh(in.saved[0]);
                out.d[1] = in.dstate[0] * (in.saved[0] - in.state[0]);
                out.dstate[0] = in.dstate[0] * (real(1) - in.p[0]);
            }
        };
    """

    def forward(self, xp, w, ax, old, new, scratch):
        n = scratch.z[: len(ax)]
        n[...] = xp.tanh(w.hh @ old[0] + ax)
        new[0][...] = old[0] + w.own[0] * (n - old[0])

    def backward(self, xp, w, old, new, dstate, scratch, hook):
        (h,), (dh,), H = old, dstate, len(old[0])
        hook(dh)
        n, d = scratch.z[:H], scratch.d
        d[:H] = dh * w.own[0] * (1 - n * n)
        d[H:] = dh * (n - h)
        dh[...] = w.hh.T @ d[:H] + dh * (1 - w.own[0])


def with_dtypes(kinds):
    """Each kind of cell in float32, and in float64 or float16 by turns: its struct is one text for all of them, and
    what they differ in is the same for all structs."""
    return [
        (kind, dtype) for number, kind in enumerate(kinds) for dtype in ("float32", ("float64", "float16")[number % 2])
    ]


def of(cell):
    """A function that makes a layer of a cell."""
    return lambda *sizes, **more: gpurnn.Recurrent(cell, *sizes, **more)


def option(kind, **options):
    """A function that makes a layer with options."""
    return lambda *sizes, **more: kind(*sizes, **options, **more)


DRAWN = {"recurrent_dropout": 0.3, "zoneout": (0.2, 0.1)}
LAYERS = {
    "by hand": of(LeakyStep()),
    "peephole": of(cells.peephole),
    "four states": of(cells.slstm),
    "zoneout and dropout": option(gpurnn.LSTM, **DRAWN),
    "mixed": of(mixed),
    "clips": option(gpurnn.LSTM, cell_clip=0.5, gradient_clip=0.1, peephole=True, coupled=True),
}
NO_PRODUCT = {"indrnn": of(cells.indrnn), "mingru": of(cells.mingru)}
EACH = {"recurrent_dropout": 0.3, "recurrent_dropout_each": "sequence"}
INNER_FIRST = {  # one product, of what the cell makes of h
    "dropout of a sequence": option(gpurnn.GRU, **EACH),
    "with masks of timesteps": option(gpurnn.LSTM, zoneout=(0.2, 0.1), **EACH),
    "of both states": of(both_states),
}
TWO_PRODUCTS = {
    "mgu": of(cells.mgu),
    "two coupled states": of(cells.cornn()),
    "mut1": of(cells.mut1),
    "inner drawn": of(inner_drawn),
    "drawn each": of(drawn_each),
    "weighted": of(weighted),
}
MEANS = {
    "lstm normalized": option(gpurnn.LSTM, layer_norm=True),
    "gru normalized": option(gpurnn.GRU, layer_norm=True),
    "rnn normalized": option(gpurnn.RNN, layer_norm=True),
    "everything": option(gpurnn.LSTM, layer_norm=True, peephole=True, **DRAWN),
}
POINTWISE = LAYERS | NO_PRODUCT
FUSABLE = POINTWISE | INNER_FIRST | MEANS | {"centered": of(centered)}
EVERY = FUSABLE | TWO_PRODUCTS


def compare(make, ops, dtype, T, B, H, ragged, schedule, I=3, **options):
    """Every result of a training call and the output of inference, within twice the error of NumPy's."""
    first = make(I, H, backend=ops, dtype=dtype, seed=1, schedule=schedule, **options)
    like = "float16" if options.pop("precision", None) == "tf32" else dtype
    plain, exact = (make(I, H, backend="numpy", dtype=kind, seed=1, **options) for kind in (like, "float64"))
    for other in (plain, exact):
        other.load_state_dict(first.state_dict())

    def once(seed):
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
        return worst_error(got, plain_got, expected, like, terms)

    error, detail = middle(once, (T + 31 * B, 1, 2))
    assert error <= 1, detail
