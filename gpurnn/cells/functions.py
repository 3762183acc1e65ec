"""Functions of a cell's equations that are made of those in symbols.py, and so have their derivatives from there."""

from __future__ import annotations

from numbers import Real
from typing import Any

from ..errors import check_choice, check_number
from .symbols import (
    Symbol,
    expm1,
    fabs,
    graph_of,
    maximum,
    mean,
    minimum,
    relu,
    sigmoid,
    softplus,
    sqrt,
    symbol,
    tanh,
    where,
)


def log_sigmoid(x: Any) -> Symbol:
    """log(sigmoid(x)) = -softplus(-x)."""
    return -softplus(-x)


def clip(x: Any, low: float, high: float) -> Symbol:
    """x within [low, high]; the derivative is 1 inside and 0 outside and at the limits."""
    if isinstance(low, Real) and isinstance(high, Real) and not low <= high:
        raise ValueError(f"clip: expected low <= high, got {low} and {high}")
    return minimum(maximum(x, low), high)


def hard_sigmoid(x: Any) -> Symbol:
    """clip(x / 6 + 1/2, 0, 1): that of PyTorch and of Keras 3."""
    return clip(x / 6 + 0.5, 0, 1)


def hard_sigmoid_2(x: Any) -> Symbol:
    """clip(x / 5 + 1/2, 0, 1): that of Keras 1 and 2 and of ONNX."""
    return clip(0.2 * x + 0.5, 0, 1)


def softsign(x: Any) -> Symbol:
    """x / (1 + abs(x))."""
    return x / (1 + fabs(x))


def elu(x: Any) -> Symbol:
    """x where it is positive, else e^x - 1 (Clevert 2016)."""
    return where(x > 0, x, expm1(minimum(0, x)))  # at 0 the derivative goes to the second: it is 1


def leaky_relu(x: Any, slope: float = 0.01) -> Symbol:
    """x where it is positive, else slope x."""
    return where(x > 0, x, slope * x)


def silu(x: Any) -> Symbol:
    """x sigmoid(x)."""
    return x * sigmoid(x)


def identity(x: Any) -> Symbol:
    """x itself."""
    return x


def normalized(x: Any, epsilon: float = 1e-5) -> Symbol:
    """x less its mean over the units, by its standard deviation (Ba, Kiros, Hinton 2016)."""
    return normalized_together(x, epsilon=epsilon)[0]


def normalized_together(*parts: Any, epsilon: float = 1e-5) -> tuple[Symbol, ...]:
    """As ``normalized``, with one mean and one deviation for all units of all parts."""
    if not parts:
        raise TypeError("normalized_together: expected symbols, got none")
    check_number("epsilon", epsilon, 0)
    center = mean(_sum(parts) / len(parts))
    centered = [part - center for part in parts]
    deviation = sqrt(mean(_sum([part * part for part in centered]) / len(parts)) + epsilon)
    scale = 1 / deviation
    return tuple(part * scale for part in centered)


def _sum(parts):
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total


def batch_normalized(x: Any, timesteps: int = 100, epsilon: float = 1e-5) -> Symbol:
    """x less its mean over the batch, by its standard deviation, at each timestep (Cooijmans et al. 2017).

    In evaluation they are running means of training, of each of the first ``timesteps`` ones; later ones have those of
    the last. A cell with it is array code on every backend.
    """
    graph = graph_of((x,), "batch_normalized")
    place, graph.timesteps = len(graph.normalizations), max(graph.timesteps, timesteps)
    if graph.training:
        center = graph.make("batch_mean", symbol(graph, x))
        centered = x - center
        variance = graph.make("batch_mean", centered * centered)
    else:
        center, variance = graph.make("running", value=2 * place), graph.make("running", value=2 * place + 1)
        centered = x - center
    graph.normalizations.append((center, variance))
    return centered / sqrt(variance + epsilon)


def dropout(x: Any, rate: float, each: str = "timestep") -> Symbol:
    """In training x / (1 - rate) with probability 1 - rate, else 0; in evaluation x.

    each: "timestep" for a mask at each timestep (Semeniuta, Severyn, Barth 2016), "sequence" for one for all timesteps
    of a sequence (Gal & Ghahramani 2016).
    """
    graph, rate = graph_of((x,), "dropout"), check_number("dropout: rate", rate, 0, 1)
    check_choice("dropout: each", each, ("timestep", "sequence"))
    if not graph.training or not rate:
        return x
    scale = 1.0 if rate == 1 else 1 / (1 - rate)  # all of a mask of rate 1 are 0
    return x * (graph.draw(rate, each) * scale)


def zoneout(new: Any, old: Any, rate: float) -> Symbol:
    """In training ``old`` with probability ``rate``, else ``new``; in evaluation the expected value (Krueger 2017)."""
    graph, rate = graph_of((new, old), "zoneout"), check_number("zoneout: rate", rate, 0, 1)
    if not rate:
        return new
    if rate == 1:
        raise ValueError("zoneout: a rate of 1 keeps the old state for ever: give less than 1")
    if not graph.training:
        return old + (1 - rate) * (new - old)
    return where(graph.draw(rate, "timestep") > 0, new, old)


# Those of one number that a cell may have for its activation, by name.
ACTIVATIONS = {
    function.__name__: function
    for function in (
        tanh, sigmoid, hard_sigmoid, hard_sigmoid_2, relu, leaky_relu, softsign, softplus, elu, silu, identity,
    )
}  # fmt: skip


def check_activation(name: str, value: Any) -> Any:
    """``value``, the name of an activation or a function. Raises ValueError."""
    if callable(value):
        return value
    try:
        return check_choice(name, value, tuple(ACTIVATIONS))
    except ValueError as error:
        raise ValueError(f"{error}; a function of symbols, such as gpurnn.cells.tanh, is taken, too") from None
