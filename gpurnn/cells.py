"""Cells: the equations of one timestep, forward and backward as mirrors, written once over ``xp``.

A cell is the only place that knows its gates, its states, its products and the equations of one timestep. It knows
nothing of time, lengths, layers or devices. Arrays of a timestep are feature-major, ``(rows, B)``: the hidden product
is ``W h`` as the books write it, every gate is a contiguous block of rows, and BLAS is faster in this order at small B.
Gradients are computed from activated values. ``Cell`` says what a cell declares. Its equations get:

    xp              NumPy or CuPy
    w               the ``HiddenWeights``
    ax              (G*H, B)  input pre-activations W_ih x + b, with every bias that may be added before the timestep
    old, new        the ``State`` before and after the timestep; ``forward`` writes into ``new``
    dstate          a ``State`` of gradients with respect to ``new``, which ``backward`` overwrites with those with
                    respect to ``old``
    scratch         the ``Scratch``, in which ``forward`` leaves what it saves and ``backward`` the gradients
    hook            a function, called once as ``hook(dh, dc)`` with the complete gradients of the new state

Equations and gate order are PyTorch's and cuDNN's. ``kernel`` names the struct of the same equations in kernels/cells.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from ._typing import Array


@dataclass(slots=True)
class Weights:
    """The parameters of one layer and direction: ih (G*H, I), hh (G*H, P), bias_ih and bias_hh (G*H,) or None, and hr
    (P, H) of a projection or None. Of gradients: the arrays to add to, None where a parameter is not trained.

    ready: for a backend, what it has made of these arrays for its calls, without copying them; None at first.
    """

    ih: Array | None
    hh: Array | None
    bias_ih: Array | None = None
    bias_hh: Array | None = None
    hr: Array | None = None
    ready: object = field(default=None, repr=False)


@dataclass(slots=True)
class HiddenWeights:
    """The weights inside the time loop: hh (G*H, P), bias_apart (H, 1) or None, hr (P, H) of the projection or None.

    bias_apart is the part of b_hh that cannot be added to ax, see ``Cell.apart``.
    """

    hh: Array
    bias_apart: Array | None = None
    hr: Array | None = None


class State(NamedTuple):
    """A state of one timestep, or the gradients with respect to one: h (P, B), and c (H, B) where the cell has it."""

    h: Array
    c: Array | None = None


class Scratch(NamedTuple):
    """Memory of one timestep.

    z: (K*H, B), in which ``forward`` leaves the blocks ``saved``; ``backward`` reads and destroys it. tmp: (H, B). d:
    (N*H, B), the gradients with respect to the N ``preactivations``, which ``backward`` writes.
    """

    z: Array
    tmp: Array
    d: Array | None = None


class Product(NamedTuple):
    """A product with rows of W_hh in each timestep.

    rows: the pre-activations that it makes or adds to, neighbors in ``Cell.preactivations``. reads: what the rows
    multiply: "h", or a block that ``forward`` saves and ``backward`` leaves alone.
    """

    rows: tuple[str, ...]
    reads: str = "h"


class Cell:
    """What every cell declares, and what follows from it. A block is H rows, one for each hidden unit.

    Attributes
    ----------
    kernel : str
        The struct in kernels/cells.
    gates : tuple of str
        The blocks of the weights, in their order.
    states : tuple of str
        "h", which is the output, then the others.
    saved : tuple of str
        The blocks that ``forward`` saves for ``backward``.
    shown : tuple of str
        Those of them that ``return_all`` shows.
    preactivations : tuple of str
        The blocks that ``backward`` makes: the gradients with respect to these.
    inputs : tuple of str
        For each gate the pre-activation to which W_ih x and b_ih are added.
    products : tuple of Product
        What the rows of W_hh multiply, in the order of the rows.
    projects : str or None
        The saved block that W_hr multiplies.
    may_project : bool
        Whether there is a form of the cell with a projection.
    remembers, writes : str or None
        The gate that preserves the old state, and the one that lets the new state in, where that is another.
    registers : tuple of int
        Of a thread of block_mma.cu besides the weights, in the forward and in the backward pass; found by compiling.
    """

    kernel: str
    gates: tuple[str, ...]
    states: tuple[str, ...] = ("h",)
    saved: tuple[str, ...] = ()
    shown: tuple[str, ...] = ()
    preactivations: tuple[str, ...]
    inputs: tuple[str, ...]
    products: tuple[Product, ...]
    projects: str | None = None
    may_project: bool = False
    remembers: str | None = None
    writes: str | None = None
    registers: tuple[int, int]

    @functools.cached_property
    def saved_blocks(self) -> int:
        """K, the blocks that an array needs for what ``forward`` saves, and later for what ``backward`` makes."""
        return max(len(self.saved), len(self.preactivations))

    @functools.cached_property
    def hidden(self) -> tuple[str, ...]:
        """For each gate the pre-activation to which W_hh's product and b_hh are added."""
        return tuple(name for product in self.products for name in product.rows)

    @functools.cached_property
    def apart(self) -> tuple[int, ...]:
        """The places of gates whose two products meet only after an equation, so that b_hh may not be added to b_ih."""
        pairs = zip(self.inputs, self.hidden, strict=True)
        return tuple(place for place, (of_input, of_hidden) in enumerate(pairs) if of_input != of_hidden)

    def columns(self, names: tuple[str, ...], H: int) -> slice:
        """The columns of some neighboring blocks, in the array that ``backward`` has filled."""
        blocks = self.preactivations + self.saved[len(self.preactivations) :]
        first = blocks.index(names[0])
        return slice(first * H, (first + len(names)) * H)


def sigmoid_(xp, z):
    """z <- 1 / (1 + exp(-z)) in place, with an error of at most 4 units in the last place however small the result is.
    Where exp overflows the result is 0; the caller silences NumPy's warning."""
    xp.negative(z, out=z)
    xp.exp(z, out=z)
    xp.add(z, 1, out=z)
    xp.divide(1, z, out=z)


class RNNStep(Cell):
    """Elman cell: h' = act(ax + W_hh h), act = tanh or relu (Elman 1990). Saves nothing, because h' is enough."""

    gates = preactivations = inputs = ("z",)
    products = (Product(("z",)),)
    registers = 92, 84

    def __init__(self, nonlinearity="tanh"):
        self.nonlinearity = nonlinearity
        self.kernel = {"tanh": "RnnTanh", "relu": "RnnRelu"}[nonlinearity]

    def forward(self, xp, w, ax, old, new, scratch):
        """One timestep; the module says what the arguments are."""
        z = scratch.z
        xp.matmul(w.hh, old.h, out=z)
        xp.add(z, ax, out=z)
        if self.nonlinearity == "tanh":
            xp.tanh(z, out=new.h)
        else:
            xp.maximum(z, 0, out=new.h)

    def backward(self, xp, w, old, new, dstate, scratch, hook):
        """The gradients of one timestep; the module says what the arguments are."""
        h_new, dh, (_, tmp, d) = new.h, dstate.h, scratch
        hook(dh, None)
        if self.nonlinearity == "tanh":
            xp.multiply(h_new, h_new, out=tmp)  # dz = dh (1 - h'^2)
            xp.multiply(tmp, dh, out=tmp)
            xp.subtract(dh, tmp, out=d)
        else:
            xp.multiply(dh, h_new > 0, out=d)
            xp.copyto(d, h_new, where=h_new != h_new)  # NaN: so is the derivative
        xp.matmul(w.hh.T, d, out=dh)


class LSTMStep(Cell):
    """Long short-term memory (Hochreiter & Schmidhuber 1997, forget gate Gers 2000), gates i f g o:

        i, f, o = sigmoid(z_i, z_f, z_o), g = tanh(z_g), z = ax + W_hh h
        c' = f c + i g,   m = o tanh(c'),   h' = m, or W_hr m with a projection (Sak 2014)

    Saves i f g o; with a projection also m, which ``backward`` does not overwrite.
    """

    kernel, states = "LstmCell", ("h", "c")
    gates = saved = shown = preactivations = inputs = ("i", "f", "g", "o")
    products = (Product(("i", "f", "g", "o")),)
    may_project, remembers, writes, registers = True, "f", "i", (120, 84)

    def __init__(self, projection=False):
        if projection:
            self.saved, self.projects = (*self.gates, "m"), "m"

    def forward(self, xp, w, ax, old, new, scratch):
        """One timestep; the module says what the arguments are."""
        (h, c), (h_new, c_new), (z, tmp, _) = old, new, scratch
        H = len(c)
        z4 = z[: 4 * H]
        xp.matmul(w.hh, h, out=z4)
        xp.add(z4, ax, out=z4)
        i_f, i, f, g, o = z[: 2 * H], z[:H], z[H : 2 * H], z[2 * H : 3 * H], z[3 * H : 4 * H]
        sigmoid_(xp, i_f)
        xp.tanh(g, out=g)
        sigmoid_(xp, o)
        xp.multiply(i, g, out=tmp)
        xp.multiply(f, c, out=c_new)
        xp.add(c_new, tmp, out=c_new)
        xp.tanh(c_new, out=tmp)
        if self.projects:
            m = z[4 * H :]
            xp.multiply(o, tmp, out=m)
            xp.matmul(w.hr, m, out=h_new)
        else:
            xp.multiply(o, tmp, out=h_new)

    def backward(self, xp, w, old, new, dstate, scratch, hook):
        """The gradients of one timestep; the module says what the arguments are."""
        c, (h_new, c_new), (dh, dc), (z, tmp, d) = old.c, new, dstate, scratch
        H = len(c)
        i_f, i, f, g, o = z[: 2 * H], z[:H], z[H : 2 * H], z[2 * H : 3 * H], z[3 * H : 4 * H]
        d_i, d_f, d_g, d_o = d[:H], d[H : 2 * H], d[2 * H : 3 * H], d[3 * H :]
        m = z[4 * H :] if self.projects else h_new
        dm = xp.matmul(w.hr.T, dh, out=d_i) if self.projects else dh
        xp.tanh(c_new, out=tmp)
        xp.multiply(dm, tmp, out=d_o)  # with respect to o: dm tanh(c')
        xp.multiply(m, tmp, out=tmp)  # with respect to c': dm o (1 - tanh(c')^2) = dm (o - m tanh(c'))
        xp.subtract(o, tmp, out=tmp)
        xp.multiply(tmp, dm, out=tmp)
        xp.add(dc, tmp, out=dc)
        hook(dh, dc)
        xp.multiply(dc, g, out=d_i)
        xp.multiply(dc, c, out=d_f)
        xp.multiply(dc, i, out=d_g)
        xp.multiply(dc, f, out=dc)
        xp.multiply(g, g, out=tmp)  # through tanh: d (1 - g^2)
        xp.multiply(tmp, d_g, out=tmp)
        xp.subtract(d_g, tmp, out=d_g)
        for gate, d_gate in ((i_f, d[: 2 * H]), (o, d_o)):  # through sigmoid: d s (1 - s); from here on z is destroyed
            xp.multiply(d_gate, gate, out=d_gate)
            xp.subtract(1, gate, out=gate)
            xp.multiply(d_gate, gate, out=d_gate)
        xp.matmul(w.hh.T, d, out=dh)


class GRUStep(Cell):
    """Gated recurrent unit, gates r z n:

        r, z = sigmoid(ax_r + W_r h), sigmoid(ax_z + W_z h)
        n = tanh(ax_n + r (W_n h + b_hn))       reset_after=True: cuDNN's and PyTorch's form (Cho 2014, version 1)
        n = tanh(ax_n + W_n (r h) + b_hn)       reset_after=False: the original form (Cho 2014, version 3)
        h' = (1 - z) n + z h

    With reset_after it saves r z q n, where q = W_n h + b_hn: r multiplies q before ax_n is added, so W_hh's rows of n
    belong to q, and ax_n to n. The original form saves r z n p, where p = r h is what the rows of n multiply.
    """

    gates = inputs = ("r", "z", "n")
    remembers, registers = "z", (84, 72)

    def __init__(self, reset_after=True):
        self.reset_after = reset_after
        if reset_after:
            self.kernel = "GruCell"
            self.saved = self.shown = self.preactivations = ("r", "z", "q", "n")
            self.products = (Product(("r", "z", "q")),)
        else:
            self.kernel = "GruOriginal"
            self.saved = self.shown = ("r", "z", "n", "p")
            self.preactivations = self.gates
            self.products = Product(("r", "z")), Product(("n",), "p")

    def forward(self, xp, w, ax, old, new, scratch):
        """One timestep; the module says what the arguments are."""
        h, h_new, (z, tmp, _) = old.h, new.h, scratch
        H = len(h)
        r_z, r, u = z[: 2 * H], z[:H], z[H : 2 * H]  # u is the gate z of the equations
        if self.reset_after:
            q, n = z[2 * H : 3 * H], z[3 * H :]
            xp.matmul(w.hh, h, out=z[: 3 * H])
            if w.bias_apart is not None:
                xp.add(q, w.bias_apart, out=q)
            xp.add(r_z, ax[: 2 * H], out=r_z)
            sigmoid_(xp, r_z)
            xp.multiply(r, q, out=n)
        else:
            n, p = z[2 * H : 3 * H], z[3 * H :]
            xp.matmul(w.hh[: 2 * H], h, out=r_z)
            xp.add(r_z, ax[: 2 * H], out=r_z)
            sigmoid_(xp, r_z)
            xp.multiply(r, h, out=p)
            xp.matmul(w.hh[2 * H :], p, out=n)
        xp.add(n, ax[2 * H :], out=n)
        xp.tanh(n, out=n)
        xp.subtract(h, n, out=tmp)  # h' = n + z (h - n)
        xp.multiply(tmp, u, out=tmp)
        xp.add(n, tmp, out=h_new)

    def backward(self, xp, w, old, new, dstate, scratch, hook):
        """The gradients of one timestep; the module says what the arguments are."""
        h, dh, (z, tmp, d) = old.h, dstate.h, scratch
        hook(dh, None)
        H = len(h)
        r, u = z[:H], z[H : 2 * H]
        d_r, d_u = d[:H], d[H : 2 * H]
        n, d_n = (z[3 * H :], d[3 * H :]) if self.reset_after else (z[2 * H : 3 * H], d[2 * H : 3 * H])
        xp.subtract(h, n, out=d_u)  # with respect to z: dh (h - n) z (1 - z)
        xp.multiply(dh, u, out=tmp)
        xp.subtract(dh, tmp, out=d_n)  # with respect to n: dh (1 - z)
        xp.multiply(d_n, u, out=dh)
        xp.multiply(d_u, dh, out=d_u)
        xp.multiply(n, n, out=n)  # through tanh: 1 - n^2, which overwrites n
        xp.subtract(1, n, out=n)
        xp.multiply(d_n, n, out=d_n)
        # tmp = dh z, the direct path to h; dh becomes the gradient with respect to h
        if self.reset_after:
            q, d_q = z[2 * H : 3 * H], d[2 * H : 3 * H]
            xp.multiply(d_n, r, out=d_q)
            xp.multiply(d_q, q, out=d_r)  # d_n q r, then (1 - r)
            xp.subtract(1, r, out=r)
            xp.multiply(d_r, r, out=d_r)
            xp.matmul(w.hh.T, d[: 3 * H], out=dh)
        else:
            d_p = xp.matmul(w.hh[2 * H :].T, d_n, out=z[3 * H :])
            xp.multiply(d_p, r, out=d_p)
            xp.add(tmp, d_p, out=tmp)
            xp.multiply(d_p, h, out=d_r)  # d_p h r, then (1 - r)
            xp.subtract(1, r, out=r)
            xp.multiply(d_r, r, out=d_r)
            xp.matmul(w.hh[: 2 * H].T, d[: 2 * H], out=dh)
        xp.add(dh, tmp, out=dh)


# kernel -> its cell; of the LSTM the one without a projection
CELLS = {cell.kernel: cell for cell in (RNNStep("tanh"), RNNStep("relu"), LSTMStep(), GRUStep(), GRUStep(False))}


def init_orthogonal(normal):
    """An orthogonal matrix (orthonormal rows or columns) from normal draws (rows, columns) (Saxe 2014)."""
    rows, columns = normal.shape
    q, r = np.linalg.qr(normal if rows >= columns else normal.T)
    q = q * np.where(np.diag(r) < 0, -1.0, 1.0)
    return q if rows >= columns else q.T
