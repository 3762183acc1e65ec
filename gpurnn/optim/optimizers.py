"""The optimizers: SGD, RMSprop, Adam, AdamW. kernels/sums/update.cuh is the same arithmetic, compiled."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from .._typing import Array
from ..errors import check_flag, check_number
from ..module import Module
from .base import Optimizer
from .groups import Setting


class SGD(Optimizer):
    """Stochastic gradient descent, with optional momentum.

    ``g += weight_decay * p``; with momentum ``buf = momentum * buf + (1 - dampening) * g`` (the first update takes
    ``buf = g``) and ``g = buf``, or with Nesterov's form ``g += momentum * buf``; then ``p -= lr * g``.

    Parameters
    ----------
    model : Module
        The model to train.
    lr : float
        Learning rate, at least 0.
    momentum : float
        Factor of the momentum buffer, in [0, 1); 0 means no buffer.
    dampening : float
        Reduction of the new gradient in the buffer, in [0, 1].
    nesterov : bool
        Nesterov's momentum; it needs momentum above 0 and dampening 0.
    weight_decay : float
        Factor of the L2 penalty, at least 0.
    groups, decay_biases, maximize
        Settings of some parameters, no decay of biases, going up the gradient: see ``gpurnn.optim.Optimizer``.

    Raises
    ------
    TypeError, ValueError
        For an argument of the wrong type or out of its range.

    Notes
    -----
    Source: Sutskever, Martens, Dahl, Hinton, ICML 2013, in the form of ``torch.optim.SGD``.

    Examples
    --------
    >>> model = gpurnn.Linear(2, 1)
    >>> optimizer = gpurnn.SGD(model, lr=0.1, momentum=0.9)
    >>> model.params["bias"], model.grads["bias"] = 0.0, 1.0
    >>> optimizer.step()
    >>> model.params["bias"]
    array([-0.1], dtype=float32)
    """

    _kernel = "sgd"

    def __init__(
        self,
        model: Module,
        lr: float,
        momentum: float = 0.0,
        dampening: float = 0.0,
        nesterov: bool = False,
        weight_decay: float = 0.0,
        *,
        groups: Sequence[Mapping[str, Any]] | None = None,
        decay_biases: bool = True,
        maximize: bool = False,
    ) -> None:
        options = {"groups": groups, "decay_biases": decay_biases, "maximize": maximize}
        super().__init__(
            model, lr, momentum=momentum, dampening=dampening, nesterov=nesterov, weight_decay=weight_decay,
            **options,
        )  # fmt: skip

    def _check_hyper(
        self, momentum: float, dampening: float, nesterov: bool, weight_decay: float
    ) -> dict[str, float | bool]:
        hyper = {
            "momentum": check_number("momentum", momentum, 0.0, 1.0, high_open=True),
            "dampening": check_number("dampening", dampening, 0.0, 1.0),
            "nesterov": check_flag("nesterov", nesterov),
            "weight_decay": check_number("weight_decay", weight_decay, 0.0),
        }
        if nesterov and (momentum == 0 or dampening != 0):
            raise ValueError(
                f"nesterov needs momentum above 0 and dampening 0, got momentum {momentum}, dampening {dampening}"
            )
        return hyper

    def _array_names(self, hyper: Mapping[str, Any]) -> list[str]:
        return ["momentum_buffer"] if hyper["momentum"] else []

    def _scalars(self, by: Setting) -> dict[str, float]:
        hyper = by.hyper
        return {
            "first": int(self.steps == 1), "nesterov": int(hyper["nesterov"]), "lr": by.lr,
            "momentum": hyper["momentum"], "undamped": 1 - hyper["dampening"], "weight_decay": hyper["weight_decay"],
        }  # fmt: skip

    def _update(
        self, by: Setting, p: Array, g: Array, a: Array, b: Array, momentum_buffer: Array | None = None
    ) -> None:
        xp, momentum = self.model.xp, by.hyper["momentum"]
        g = self._decayed(by, p, g, a)
        if momentum_buffer is not None:
            if self.steps == 1:
                momentum_buffer[...] = g
            else:
                momentum_buffer *= momentum
                xp.multiply(g, 1 - by.hyper["dampening"], out=b)
                momentum_buffer += b
            if by.hyper["nesterov"]:
                xp.multiply(momentum_buffer, momentum, out=b)
                b += g
                g = b
            else:
                g = momentum_buffer
        xp.multiply(g, by.lr, out=b)
        p -= b


class RMSprop(Optimizer):
    """Gradients divided by a running average of their magnitude.

    ``g += weight_decay * p``; ``v = alpha * v + (1 - alpha) * g^2``; ``p -= lr * g / (sqrt(v) + eps)``. With
    ``centered`` the variance takes the place of ``v``: ``v`` minus the square of the average gradient, at least 0
    (rounding could make it negative, and its root NaN). Momentum accumulates the quotient. A gradient whose square
    overflows makes no update, as in torch: ``v`` is infinite then, and stays infinite.

    Parameters
    ----------
    model : Module
        The model to train.
    lr : float
        Learning rate, at least 0.
    alpha : float
        Factor of the running average, in [0, 1).
    eps : float
        Added to the root, above 0.
    weight_decay : float
        Factor of the L2 penalty, at least 0.
    momentum : float
        Factor of the momentum buffer, in [0, 1); 0 means no buffer.
    centered : bool
        Divide by the standard deviation of the gradient.
    groups, decay_biases, maximize
        Settings of some parameters, no decay of biases, going up the gradient: see ``gpurnn.optim.Optimizer``.

    Raises
    ------
    TypeError, ValueError
        For an argument of the wrong type or out of its range.

    Notes
    -----
    Source: Tieleman and Hinton, Coursera lecture 6.5, 2012; centered: Graves, arXiv:1308.0850, eq. 38-45.
    """

    _kernel = "rmsprop"

    def __init__(
        self,
        model: Module,
        lr: float = 1e-2,
        alpha: float = 0.99,
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        momentum: float = 0.0,
        centered: bool = False,
        *,
        groups: Sequence[Mapping[str, Any]] | None = None,
        decay_biases: bool = True,
        maximize: bool = False,
    ) -> None:
        options = {"groups": groups, "decay_biases": decay_biases, "maximize": maximize}
        super().__init__(
            model, lr, alpha=alpha, eps=eps, weight_decay=weight_decay, momentum=momentum, centered=centered,
            **options,
        )  # fmt: skip

    def _check_hyper(
        self, alpha: float, eps: float, weight_decay: float, momentum: float, centered: bool
    ) -> dict[str, float | bool]:
        return {
            "alpha": check_number("alpha", alpha, 0.0, 1.0, high_open=True),
            "eps": check_number("eps", eps, 0.0, low_open=True),
            "weight_decay": check_number("weight_decay", weight_decay, 0.0),
            "momentum": check_number("momentum", momentum, 0.0, 1.0, high_open=True),
            "centered": check_flag("centered", centered),
        }

    def _array_names(self, hyper: Mapping[str, Any]) -> list[str]:
        wanted = {"square_avg": True, "grad_avg": hyper["centered"], "momentum_buffer": hyper["momentum"]}
        return [name for name, needed in wanted.items() if needed]

    def _scalars(self, by: Setting) -> dict[str, float]:
        hyper = by.hyper
        return {
            "lr": by.lr, "alpha": hyper["alpha"], "rest": 1 - hyper["alpha"], "eps": hyper["eps"],
            "momentum": hyper["momentum"], "weight_decay": hyper["weight_decay"], "most": self._largest,
        }  # fmt: skip

    @property
    def _largest(self) -> float:
        """The largest finite number of the compute dtype."""
        return float(np.finfo(self.model.compute_dtype).max)

    def _update(
        self,
        by: Setting,
        p: Array,
        g: Array,
        a: Array,
        b: Array,
        square_avg: Array,
        grad_avg: Array | None = None,
        momentum_buffer: Array | None = None,
    ) -> None:
        xp, alpha = self.model.xp, by.hyper["alpha"]
        g = self._decayed(by, p, g, a)
        self._average_square(square_avg, g, alpha, b)
        if grad_avg is None:
            xp.sqrt(square_avg, out=b)
        else:
            self._average(grad_avg, g, alpha, b)
            xp.multiply(grad_avg, grad_avg, out=b)
            xp.minimum(b, self._largest, out=b)  # inf - inf would be NaN
            xp.subtract(square_avg, b, out=b)
            xp.maximum(b, 0.0, out=b)
            xp.sqrt(b, out=b)
        b += by.hyper["eps"]
        xp.divide(g, b, out=b)
        if momentum_buffer is not None:
            momentum_buffer *= by.hyper["momentum"]
            momentum_buffer += b
            xp.multiply(momentum_buffer, by.lr, out=b)
        else:
            b *= by.lr
        p -= b


class Adam(Optimizer):
    """Adaptive moments; weight decay is an L2 penalty on the loss (AdamW decouples it).

    ``g += weight_decay * p``; ``m = beta1 * m + (1 - beta1) * g``; ``v = beta2 * v + (1 - beta2) * g^2``;
    ``p -= lr * m^ / (sqrt(v^) + eps)`` with ``m^ = m / (1 - beta1^n)``, ``v^ = v / (1 - beta2^n)`` in update n. With
    ``amsgrad`` the largest ``v`` so far takes the place of ``v`` in the quotient. A gradient whose square overflows
    makes no update, as in torch: ``v`` is infinite then and stays infinite, in ``state_dict`` and checkpoints too.

    Parameters
    ----------
    model : Module
        The model to train.
    lr : float
        Learning rate, at least 0.
    betas : pair of float
        Factors of the two running averages, each in [0, 1).
    eps : float
        Added to the root, above 0.
    weight_decay : float
        Factor of the L2 penalty, at least 0.
    amsgrad : bool
        Divide by the largest average so far.
    groups, decay_biases, maximize
        Settings of some parameters, no decay of biases, going up the gradient: see ``gpurnn.optim.Optimizer``.

    Raises
    ------
    TypeError, ValueError
        For an argument of the wrong type or out of its range.

    Notes
    -----
    Source: Kingma and Ba, ICLR 2015; AMSGrad: Reddi, Kale, Kumar, ICLR 2018.

    Examples
    --------
    >>> optimizer = gpurnn.Adam(gpurnn.LSTM(2, 3), lr=1e-2)
    >>> optimizer.lr = 1e-3                            # settable at any time
    >>> optimizer
    Adam(lr=0.001, betas=[0.9, 0.999], eps=1e-08, weight_decay=0.0, amsgrad=False, steps=0)
    """

    _kernel = "adam"
    _decoupled = False

    def __init__(
        self,
        model: Module,
        lr: float = 1e-3,
        betas: Sequence[float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        amsgrad: bool = False,
        *,
        groups: Sequence[Mapping[str, Any]] | None = None,
        decay_biases: bool = True,
        maximize: bool = False,
    ) -> None:
        options = {"groups": groups, "decay_biases": decay_biases, "maximize": maximize}
        super().__init__(model, lr, betas=betas, eps=eps, weight_decay=weight_decay, amsgrad=amsgrad, **options)

    def _check_hyper(self, betas: Sequence[float], eps: float, weight_decay: float, amsgrad: bool) -> dict[str, Any]:
        if not isinstance(betas, (tuple, list)) or len(betas) != 2:
            raise TypeError(f"betas should be a pair of numbers, got {betas!r}")
        return {
            "betas": [check_number(f"betas[{n}]", beta, 0.0, 1.0, high_open=True) for n, beta in enumerate(betas)],
            "eps": check_number("eps", eps, 0.0, low_open=True),
            "weight_decay": check_number("weight_decay", weight_decay, 0.0),
            "amsgrad": check_flag("amsgrad", amsgrad),
        }

    def _array_names(self, hyper: Mapping[str, Any]) -> list[str]:
        return ["exp_avg", "exp_avg_sq", "max_exp_avg_sq"][: 3 if hyper["amsgrad"] else 2]

    def _scalars(self, by: Setting) -> dict[str, float]:
        (beta1, beta2), decay = by.hyper["betas"], by.hyper["weight_decay"]
        eps, rate = self._corrected(by)
        return {
            "shrink": 1 - by.lr * decay if self._decoupled else 1, "weight_decay": 0 if self._decoupled else decay,
            "beta1": beta1, "rest1": 1 - beta1, "beta2": beta2, "rest2": 1 - beta2, "eps": eps, "rate": rate,
        }  # fmt: skip

    def _corrected(self, by: Setting) -> tuple[float, float]:
        """eps and learning rate with the bias corrections of m^ and v^ in them, which saves a pass over the arrays."""
        beta1, beta2 = by.hyper["betas"]
        root = math.sqrt(1 - beta2**self.steps)
        return by.hyper["eps"] * root, by.lr * root / (1 - beta1**self.steps)

    def _update(
        self,
        by: Setting,
        p: Array,
        g: Array,
        a: Array,
        b: Array,
        exp_avg: Array,
        exp_avg_sq: Array,
        max_exp_avg_sq: Array | None = None,
    ) -> None:
        xp, (beta1, beta2) = self.model.xp, by.hyper["betas"]
        if self._decoupled:
            p *= 1 - by.lr * by.hyper["weight_decay"]
        else:
            g = self._decayed(by, p, g, a)
        self._average(exp_avg, g, beta1, b)
        self._average_square(exp_avg_sq, g, beta2, b)
        if max_exp_avg_sq is not None:
            xp.maximum(max_exp_avg_sq, exp_avg_sq, out=max_exp_avg_sq)
            exp_avg_sq = max_exp_avg_sq
        eps, rate = self._corrected(by)
        xp.sqrt(exp_avg_sq, out=b)
        b += eps
        xp.divide(exp_avg, b, out=b)
        b *= rate
        p -= b


class AdamW(Adam):
    """Adam with decoupled weight decay: ``p *= 1 - lr * weight_decay`` first, and no penalty in the gradient.

    Parameters are those of ``Adam``; the default of ``weight_decay`` is 1e-2.

    Notes
    -----
    Source: Loshchilov and Hutter, ICLR 2019.
    """

    _decoupled = True

    def __init__(
        self,
        model: Module,
        lr: float = 1e-3,
        betas: Sequence[float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        groups: Sequence[Mapping[str, Any]] | None = None,
        decay_biases: bool = True,
        maximize: bool = False,
    ) -> None:
        options = {"groups": groups, "decay_biases": decay_biases, "maximize": maximize}
        super().__init__(model, lr, betas, eps, weight_decay, amsgrad, **options)
