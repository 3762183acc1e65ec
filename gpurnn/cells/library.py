"""Cells from the literature, traced. Each is for ``gpurnn.Recurrent``: ``gpurnn.Recurrent(gpurnn.cells.mgu, 10, 20)``.

Where papers and public code differ, the docstring says what is followed here. ``b`` stands for both biases of a gate;
``W x`` for the rows of its gate in W_ih, ``U h`` for those in W_hh. Products without U are of two numbers.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from ..errors import check_number
from .functions import ACTIVATIONS, check_activation, log_sigmoid
from .symbols import exp, maximum, minimum, relu, sigmoid, softplus, tanh, where
from .traced import TracedCell, cell


@cell(gates="i f g o", states="h c", parameters="p_i p_f p_o", remembers="f", writes="i")
def peephole(ax, ah, s, p):
    """LSTM with peepholes (Gers & Schmidhuber 2000), gates i f g o.

        i = sigmoid(W x + U h + b + p_i c), f = sigmoid(W x + U h + b + p_f c), g = tanh(W x + U h + b)
        c' = f c + i g
        o = sigmoid(W x + U h + b + p_o c')
        h' = o tanh(c')

    i and f read the old c, o the new one, as in Gers, Schraudolph & Schmidhuber 2002 and in Graves 2013.
    """
    i = sigmoid(ax.i + ah.i + p.p_i * s.c)
    f = sigmoid(ax.f + ah.f + p.p_f * s.c)
    g = tanh(ax.g + ah.g)
    c = f * s.c + i * g
    o = sigmoid(ax.o + ah.o + p.p_o * c)
    return o * tanh(c), c


@cell(gates="f g o", states="h c", remembers="f")
def cifg(ax, ah, s):
    """LSTM with coupled input and forget gates (Greff et al. 2017), gates f g o.

        f, o = sigmoid(W x + U h + b), g = tanh(W x + U h + b)
        c' = f c + (1 - f) g
        h' = o tanh(c')

    The paper has the gate i and f = 1 - i: its weights are those of f here with the other sign.
    """
    f = sigmoid(ax.f + ah.f)
    g = tanh(ax.g + ah.g)
    o = sigmoid(ax.o + ah.o)
    c = g + f * (s.c - g)
    return o * tanh(c), c


@cell(gates="f n")
def mgu(ax, ah, s):
    """Minimal gated unit (Zhou et al. 2016), gates f n.

        f = sigmoid(W x + U h + b)
        n = tanh(W x + U (f h) + b)
        h' = (1 - f) h + f n

    f is called the forget gate in the paper, but an f of 1 forgets all.
    """
    f = sigmoid(ax.f + ah.f)
    n = tanh(ax.n + ah.n(f * s.h))
    return s.h + f * (n - s.h)


@cell(gates="z n", remembers="z")
def ligru(ax, ah, s):
    """Light GRU (Ravanelli et al. 2018), gates z n.

        z = sigmoid(W x + U h + b)
        n = relu(W x + U h + b)
        h' = z h + (1 - z) n

    The paper normalizes W x over the batch, in place of b; this cell does not. With relu h can grow without
    bound.
    """
    z = sigmoid(ax.z + ah.z)
    n = relu(ax.n + ah.n)
    return n + z * (s.h - n)


@cell(gates="z", parameters={"u": "ones"})
def indrnn(ax, ah, s, p):
    """Independently recurrent network (Li et al. 2018), gate z; there is no W_hh.

        h' = relu(W x + b + u h)

    u begins at 1, so that each unit remembers; the paper draws it from 0 to 1 or to 2^(1/T). It also clips abs(u) to
    2^(1/T) after each update, which is for the training loop to do.
    """
    return relu(ax.z + p.u * s.h)


@cell(gates="g n", remembers="g")
def ugrnn(ax, ah, s):
    """Update-gate RNN (Collins, Sohl-Dickstein & Sussillo 2017), gates g n.

        g = sigmoid(W x + U h + b), n = tanh(W x + U h + b)
        h' = g h + (1 - g) n

    The paper adds 1 to the bias of g: ``forget_bias=1`` of the layer.
    """
    g = sigmoid(ax.g + ah.g)
    n = tanh(ax.n + ah.n)
    return n + g * (s.h - n)


def _slstm(log_f, i, z, o, s):
    """The new states of an sLSTM from its gates: log f, log i, tanh's z, o."""
    m = where(s.n > 0, maximum(log_f + s.m, i), i)
    f_scaled = exp(minimum(log_f + s.m - m, 0))
    i_scaled = exp(i - m)
    c = f_scaled * s.c + i_scaled * z
    n = f_scaled * s.n + i_scaled
    return o * (c / n), c, n, m


@cell(gates="i f z o", states="h c n m", remembers="f")
def slstm(ax, ah, s):
    """sLSTM of the xLSTM (Beck et al. 2024) with a sigmoid forget gate and one head, gates i f z o.

        i = exp(W x + U h + b), f and o = sigmoid(W x + U h + b), z = tanh(W x + U h + b)
        c' = f c + i z, n' = f n + i
        h' = o c' / n'

    c and n are stored times exp(-m), so that none overflows: m' = max(log f + m, log i), the third state. Where n is 0,
    as in the first timestep, m' = log i as in the authors' code; in the paper m begins at 0. h' is the same, but where
    exp underflows. An initial n, given or learned, has to be positive or 0.
    """
    return _slstm(log_sigmoid(ax.f + ah.f), ax.i + ah.i, tanh(ax.z + ah.z), sigmoid(ax.o + ah.o), s)


@cell(gates="i f z o", states="h c n m", remembers="f")
def slstm_exp(ax, ah, s):
    """``slstm`` with the paper's other forget gate, f = exp(W x + U h + b)."""
    return _slstm(ax.f + ah.f, ax.i + ah.i, tanh(ax.z + ah.z), sigmoid(ax.o + ah.o), s)


@cell(gates="z n")
def mingru(ax, ah, s):
    """minGRU (Feng et al. 2024), gates z n; there is no W_hh.

        z = sigmoid(W x + b), n = W x + b
        h' = (1 - z) h + z n

    As the paper's sequential form has it. Its form in log space, which public code runs, makes n positive by another
    function.
    """
    z = sigmoid(ax.z)
    return s.h + z * (ax.n - s.h)


@cell(gates="f i n", remembers="f", writes="i")
def minlstm(ax, ah, s):
    """minLSTM (Feng et al. 2024), gates f i n; there is no W_hh.

        f, i = sigmoid(W x + b), n = W x + b
        h' = f / (f + i) h + i / (f + i) n

    The two shares are computed as sigmoid(log f - log i) and sigmoid(log i - log f), which are right where f and i
    underflow. n as in ``mingru``.
    """
    log_ratio = softplus(-ax.f) - softplus(-ax.i)  # log i - log f
    return sigmoid(-log_ratio) * s.h + sigmoid(log_ratio) * ax.n


@cell(gates="r n z")
def mut1(ax, ah, s):
    """MUT1 (Jozefowicz, Zaremba & Sutskever 2015), gates r n z; z has no product with W_hh.

        z = sigmoid(W x + b), r = sigmoid(W x + U h + b)
        n = tanh(U (r h) + tanh(W x + b_ih) + b_hh)
        h' = z n + (1 - z) h

    The paper has tanh(x), which needs an x of H numbers: here W makes them.
    """
    r = sigmoid(ax.r + ah.r)
    z = sigmoid(ax.z)
    n = tanh(ah.n(r * s.h) + tanh(ax.n))
    return s.h + z * (n - s.h)


@functools.lru_cache(maxsize=64)
def elman(activation: str | Callable[..., Any] = "tanh") -> TracedCell:
    """Elman's network (Elman 1990) with any activation, gate z: h' = activation(W x + U h + b).

    Parameters
    ----------
    activation : str or function
        One of ``gpurnn.cells.ACTIVATIONS``, or a function of a symbol.

    Returns
    -------
    TracedCell

    Raises
    ------
    ValueError
        For another name.

    Examples
    --------
    >>> gpurnn.Recurrent(gpurnn.cells.elman("softsign"), 4, 8, backend="numpy")
    Recurrent(elman_softsign, 4, 8; 112 parameters, numpy, float32)
    """
    activation = check_activation("activation", activation)
    function = activation if callable(activation) else ACTIVATIONS[activation]
    name = activation if isinstance(activation, str) else getattr(activation, "__name__", "").strip("<>") or "own"

    @cell(gates="z", name=f"elman_{name}")
    def step(ax, ah, s):
        return function(ax.z + ah.z)

    step.maker = elman, (activation,)
    return step


@functools.lru_cache(maxsize=64)
def cornn(dt: float = 0.042, gamma: float = 2.7, epsilon: float = 4.7) -> TracedCell:
    """Coupled oscillators (Rusch & Mishra 2021), states y z, gates y z.

        z' = z + dt (tanh(W x + U_y y + U_z z + b) - gamma y - epsilon z)
        y' = y + dt z'

    U_y and U_z are the rows of y and of z in W_hh. The damping takes the old z, as in the authors' code; the paper
    allows the new one, too. The rows of z in W_ih multiply nothing; their gradient is zero.

    Parameters
    ----------
    dt, gamma, epsilon : float
        Time step, frequency, damping; not trained. The defaults are the authors' for sequential MNIST.

    Returns
    -------
    TracedCell

    Raises
    ------
    TypeError, ValueError
        Where they are no numbers, or negative.

    Examples
    --------
    >>> layer = gpurnn.Recurrent(gpurnn.cells.cornn(dt=0.1), 4, 8, backend="numpy")
    >>> output, (y, z) = layer(np.zeros((5, 3, 4), "float32"))
    >>> y.shape, z.shape
    ((1, 3, 8), (1, 3, 8))
    """
    dt, gamma, epsilon = (
        check_number(name, value, 0) for name, value in (("dt", dt), ("gamma", gamma), ("epsilon", epsilon))
    )

    @cell(gates="y z", states="y z", name="cornn")
    def step(ax, ah, s):
        force = tanh(ax.y + ah.y + ah.z(s.z))
        z = s.z + dt * (force - gamma * s.y - epsilon * s.z)
        return s.y + dt * z, z

    step.maker = cornn, (dt, gamma, epsilon)
    return step
