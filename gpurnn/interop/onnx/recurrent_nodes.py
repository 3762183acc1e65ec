"""The operators RNN, GRU and LSTM: each direction of a node is a gpurnn layer with the equations that it asks for.

ONNX's blocks of weights are in the orders i o f c (LSTM) and z r h (GRU); gpurnn's are i f g o and r z n. ``clip``
limits the pre-activations of gates. The specification can be read so that it limits c before the last activation, too;
ONNX Runtime does not, and neither is it done here.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import numpy as np

from ...cells import TracedCell
from ...cells import functions as f
from ...cells.record import Cell, Parameter
from ...errors import ShapeError, check_shape
from ...recurrent import GRU, LSTM, RNN, Recurrent
from .activations import Activation, activations, equation

BLOCKS = {"RNN": (0,), "GRU": (1, 0, 2), "LSTM": (0, 2, 3, 1)}  # gpurnn's blocks by their places in ONNX's weights
PEEPHOLES = ("p_i", "p_o", "p_f")  # in ONNX's order
ACTIVATIONS = {"RNN": ("Tanh",), "GRU": ("Sigmoid", "Tanh"), "LSTM": ("Sigmoid", "Tanh", "Tanh")}
DIRECTIONS = {"forward": (False,), "reverse": (True,), "bidirectional": (False, True)}
_ATTRIBUTES = {
    "activations", "activation_alpha", "activation_beta", "clip", "direction", "hidden_size", "input_forget", "layout",
    "linear_before_reset",
}  # fmt: skip


class Equations(NamedTuple):
    """What decides the cell of one direction. kind: "RNN", "GRU" or "LSTM". clip: 0 for none."""

    kind: str
    activations: tuple[Activation, ...]
    clip: float = 0.0
    peephole: bool = False
    input_forget: bool = False
    reset_after: bool = False

    @property
    def plain(self) -> bool:
        """Whether a built-in cell has them."""
        usual = tuple(Activation(name.lower()) for name in ACTIVATIONS[self.kind])
        return self.activations == usual and not (self.clip or self.peephole or self.input_forget)


def settings(node: Any) -> tuple[list[Equations], int]:
    """The ``Equations`` of each direction of a node without peepholes, and its layout. Raises ValueError."""
    kind, given = node.op, node.attributes
    unknown = set(given) - _ATTRIBUTES
    if unknown:
        raise ValueError(f"unknown attributes {', '.join(sorted(unknown))}")
    direction = given.get("direction", "forward")
    if direction not in DIRECTIONS:
        raise ValueError(f"direction: expected one of {', '.join(DIRECTIONS)}, got {direction!r}")
    D, each = len(DIRECTIONS[direction]), len(ACTIVATIONS[kind])
    names = given.get("activations") or ACTIVATIONS[kind] * D
    if len(names) != D * each:
        raise ValueError(f"activations: expected {each} for each of {D} directions, got {len(names)}")
    found = activations(names, given.get("activation_alpha", ()), given.get("activation_beta", ()))
    clip = float(given.get("clip", 0.0))
    if not 0 <= clip < np.inf:
        raise ValueError(f"clip: expected a number of at least 0, got {clip}")
    flags = {name: given.get(name, 0) for name in ("input_forget", "linear_before_reset", "layout")}
    for name, value in flags.items():
        if value not in (0, 1):
            raise ValueError(f"{name}: expected 0 or 1, got {value}")
    more = {"input_forget": bool(flags["input_forget"]), "reset_after": bool(flags["linear_before_reset"])}
    equations = [Equations(kind, tuple(found[d * each : (d + 1) * each]), clip, **more) for d in range(D)]
    return equations, flags["layout"]


@functools.lru_cache(maxsize=256)
def _cell(equations: Equations) -> Cell:
    """The traced cell of equations that no built-in cell has."""
    acts = [equation(one) for one in equations.activations]
    limit = equations.clip

    def clipped(x):
        return f.clip(x, -limit, limit) if limit else x

    return {"RNN": _rnn, "GRU": _gru, "LSTM": _lstm}[equations.kind](equations, acts, clipped)


def _rnn(equations, acts, clipped):
    def step(ax, ah, s):
        return acts[0](clipped(ax.z + ah.z))

    return TracedCell(step, ("z",), ("h",), (), "onnx_rnn")


def _gru(equations, acts, clipped):
    gate, act = acts

    def step(ax, ah, s):
        r, z = gate(clipped(ax.r + ah.r)), gate(clipped(ax.z + ah.z))
        hidden = r * ah.n if equations.reset_after else ah.n(r * s.h)
        n = act(clipped(ax.n + hidden))
        return n + z * (s.h - n)

    return TracedCell(step, ("r", "z", "n"), ("h",), (), "onnx_gru")


def _lstm(equations, acts, clipped):
    gate, act, output = acts
    gates = ("i", "g", "o") if equations.input_forget else ("i", "f", "g", "o")
    own = [Parameter(f"p_{name}") for name in gates if name != "g"] if equations.peephole else []

    def step(ax, ah, s, p):
        def gated(name, c):
            z = getattr(ax, name) + getattr(ah, name)
            return gate(clipped(z + getattr(p, f"p_{name}") * c if equations.peephole else z))

        i = gated("i", s.c)
        forget = 1 - i if equations.input_forget else gated("f", s.c)
        c = forget * s.c + i * act(clipped(ax.g + ah.g))
        return gated("o", c) * output(c), c

    return TracedCell(step, gates, ("h", "c"), own, "onnx_lstm")


# ---- layers


def _layer(equations, sizes, reverse, dtype, ops):
    kind, (inputs, H) = equations.kind, sizes
    options = {"reverse": reverse, "dtype": dtype, "backend": ops, "seed": 0}
    if not equations.plain:
        return Recurrent(_cell(equations), inputs, H, **options)
    if kind == "GRU":
        return GRU(inputs, H, reset_after=equations.reset_after, **options)
    return {"RNN": RNN, "LSTM": LSTM}[kind](inputs, H, **options)


def _parameters(equations, W, R, B, P):
    """gpurnn's parameters of one direction, by name, from ONNX's weights."""
    H, order = R.shape[-1], list(BLOCKS[equations.kind])
    if equations.input_forget and equations.kind == "LSTM":
        order.pop(1)  # i takes the place of f

    def blocks(array):
        return array.reshape(-1, H, *array.shape[1:])[order].reshape(-1, *array.shape[1:])

    biases = np.zeros(2 * len(W), W.dtype) if B is None else B
    found = {"weight_ih_l0": blocks(W), "weight_hh_l0": blocks(R)}
    found |= {"bias_ih_l0": blocks(biases[: len(W)]), "bias_hh_l0": blocks(biases[len(W) :])}
    if P is not None:
        vectors = dict(zip(PEEPHOLES, P.reshape(3, H), strict=True))
        found |= {f"{name}_l0": v for name, v in vectors.items() if name != "p_f" or not equations.input_forget}
    return found


def _check_weights(kind, D, weights):
    """(I, H) of the weights W, R, B, P of a node. Raises ShapeError."""
    W, R, B, P = weights
    G = len(BLOCKS[kind])
    if R.ndim != 3 or W.ndim != 3:
        raise ShapeError(f"W and R: expected 3 axes, got shapes {W.shape} and {R.shape}")
    H, inputs = R.shape[2], W.shape[2]
    check_shape("W", W, (D, G * H, inputs))
    check_shape("R", R, (D, G * H, H))
    for name, array, size in (("B", B, 2 * G * H), ("P", P, 3 * H)):
        if array is not None:
            check_shape(name, array, (D, size))
    if not H or not inputs:
        raise ShapeError(f"W and R: expected at least one input and one hidden unit, got {inputs} and {H}")
    return inputs, H


def layers_of(node: Any, dtype: Any, weights: tuple[Any, ...]) -> list[Recurrent]:
    """A layer for each direction of a node. weights: NumPy arrays W, R, and B and P or None. Raises ValueError."""
    every, _ = settings(node)
    inputs, H = _check_weights(node.op, len(every), weights)
    if node.attributes.get("hidden_size", H) != H:
        raise ShapeError(f"hidden_size: expected {H}, as R has it, got {node.attributes['hidden_size']}")
    layers = []
    for d, reverse in enumerate(DIRECTIONS[node.attributes.get("direction", "forward")]):
        one = [None if array is None else array[d] for array in weights]
        equations = every[d]._replace(peephole=weights[3] is not None)
        layer = _layer(equations, (inputs, H), reverse, dtype, node.ops)
        layer.load_state_dict({name: np.asarray(v) for name, v in _parameters(equations, *one).items()})
        layers.append(layer.eval())
    return layers


def run(node: Any, x: Any, W: Any, R: Any, B: Any = None, lengths: Any = None, *states: Any) -> tuple[Any, ...]:
    """Y, Y_h and, of an LSTM, Y_c. states: initial_h; of an LSTM then initial_c and P; each may be None."""
    paired = node.op == "LSTM"
    h, c, P = (*states, None, None, None)[:3]
    if not paired and (c is not None or P is not None):
        raise ValueError(f"expected at most 6 inputs, got {5 + len(states)}")
    _, layout = settings(node)
    if x.ndim != 3:
        raise ShapeError(f"X: expected 3 axes, got shape {x.shape}")
    layers = node.cached(lambda: layers_of(node, x.dtype, tuple(map(node.ops_to_numpy, (W, R, B, P)))))
    xp, D = node.ops.xp, len(layers)
    if layout:
        x, h, c = (None if array is None else array.swapaxes(0, 1) for array in (x, h, c))
    T, B = x.shape[:2]
    lengths = None if lengths is None else node.ops_to_numpy(lengths)
    outputs, finals = [], []
    H = layers[0].hidden_size
    for name, array in (("initial_h", h), ("initial_c", c)):
        if array is not None:
            check_shape(name, array, (D, B, H))
    for d, layer in enumerate(layers):
        parts = [xp.zeros((1, B, H), x.dtype) if array is None else array[d : d + 1] for array in (h, c)]
        output, final = layer(x, tuple(parts) if paired else parts[0], lengths)
        outputs.append(output)
        finals.append(final if paired else (final,))
    y, lasts = xp.stack(outputs, axis=1), [xp.concatenate(part, axis=0) for part in zip(*finals, strict=True)]
    lasts = [last.astype(x.dtype, copy=False) for last in lasts]
    if layout:
        y, lasts = y.transpose(2, 0, 1, 3), [last.swapaxes(0, 1) for last in lasts]
    return y, *lasts


OPERATORS = {"RNN": run, "GRU": run, "LSTM": run}
