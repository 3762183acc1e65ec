"""ONNX's activations as functions of a cell's equations, and gpurnn's by the names that ONNX has for them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from ...cells import functions as f

_DEFAULTS = {  # name -> the alpha and beta that it has where none are given; None: it has no such number
    "relu": (None, None), "tanh": (None, None), "sigmoid": (None, None), "affine": (1.0, 0.0),
    "leakyrelu": (0.01, None), "thresholdedrelu": (1.0, None), "scaledtanh": (1.0, 1.0), "hardsigmoid": (0.2, 0.5),
    "elu": (1.0, None), "softsign": (None, None), "softplus": (None, None),
}  # fmt: skip


class Activation(NamedTuple):
    """An activation of a recurrent node: its name in lower case, and its two numbers, None where it has none."""

    name: str
    alpha: float | None = None
    beta: float | None = None


def activations(names: Sequence[str], alphas: Sequence[float], betas: Sequence[float]) -> list[Activation]:
    """The activations of a node. Those that have an alpha take the given ones in turn, and so with beta.

    Raises ValueError that names an unknown one.
    """
    alphas, betas, found = list(alphas), list(betas), []
    for name in names:
        if name.lower() not in _DEFAULTS:
            raise ValueError(f"activations: expected some of ONNX's, such as Tanh or HardSigmoid, got {name!r}")
        alpha, beta = _DEFAULTS[name.lower()]
        alpha = alpha if alpha is None or not alphas else alphas.pop(0)
        beta = beta if beta is None or not betas else betas.pop(0)
        found.append(Activation(name.lower(), alpha, beta))
    return found


def equation(activation: Activation) -> Callable[[Any], Any]:
    """The function of symbols."""
    name, alpha, beta = activation
    plain = {"relu": f.relu, "tanh": f.tanh, "sigmoid": f.sigmoid, "softsign": f.softsign, "softplus": f.softplus}
    if name in plain:
        return plain[name]
    return {
        "affine": lambda x: alpha * x + beta,
        "leakyrelu": lambda x: f.leaky_relu(x, alpha),
        "thresholdedrelu": lambda x: f.where(x > alpha, x, 0 * x),
        "scaledtanh": lambda x: alpha * f.tanh(beta * x),
        "hardsigmoid": lambda x: f.clip(alpha * x + beta, 0, 1),
        "elu": lambda x: f.where(x > 0, x, alpha * f.expm1(f.minimum(0, x))),
    }[name]


ONNX_NAMES = {  # gpurnn's name -> ONNX's, with alpha and beta
    "tanh": ("Tanh", None, None), "sigmoid": ("Sigmoid", None, None), "relu": ("Relu", None, None),
    "hard_sigmoid": ("HardSigmoid", 1 / 6, 0.5), "hard_sigmoid_2": ("HardSigmoid", 0.2, 0.5),
    "leaky_relu": ("LeakyRelu", 0.01, None), "softsign": ("Softsign", None, None),
    "softplus": ("Softplus", None, None), "elu": ("Elu", 1.0, None), "identity": ("Affine", 1.0, 0.0),
}  # fmt: skip
