"""Optimisers on a model's flat buffers, gradient clipping, learning-rate schedules.

An optimiser step is one compiled pass, or in array code a handful of in-place operations, over ``model.flat_params``
and ``model.flat_grads``, however many layers the model has. Updates, names and defaults are ``torch.optim``'s.

>>> model = gpurnn.Linear(2, 1)
>>> optimizer = gpurnn.Adam(model, lr=1e-3)
>>> schedule = gpurnn.WarmupSchedule(optimizer, 5, after=gpurnn.CosineSchedule(optimizer, total=100))
>>> for epoch in range(105):
...     for x in [np.ones((4, 2), "float32")]:      # an epoch of one batch
...         model.zero_grad()
...         output, backward = model.forward(x)
...         _ = backward(output)
...         norm = gpurnn.clip_grad_norm(model, 1.0)
...         optimizer.step()
...     schedule.step()
>>> optimizer.lr
0.0
"""

import math
from collections.abc import Mapping
from types import MappingProxyType

import numpy as np

from .arrays import host_array
from .dtypes import is_float
from .errors import DtypeError, NamesArguments, ShapeError, check_flag, check_number, check_size
from .module import Module, writable

# Elements worked on at once. An update passes about ten times over its arrays: on a CPU a block stays in the cache
# between the passes; on a GPU a block is large enough to hide the launches and only bounds the scratch memory.
_CPU_BLOCK = 1 << 14
_GPU_BLOCK = 1 << 22


def _block_size(xp, size):
    return max(1, min(size, _CPU_BLOCK if xp is np else _GPU_BLOCK))


def _blocks(size, block):
    return (slice(start, start + block) for start in range(0, size, block))


def _check_model(model):
    if not isinstance(model, Module):
        raise TypeError(f"model should be a gpurnn layer or model, got {type(model).__name__}")


def _check_names(what, got, expected):
    if not isinstance(got, Mapping):
        raise TypeError(f"{what} should be a dict, got {type(got).__name__}")
    missing, unknown = sorted(set(expected) - set(got)), sorted(set(got) - set(expected))
    if missing or unknown:
        raise KeyError(f"{what} does not fit: missing {missing}, unknown {unknown}")


def _check_kind(what, state, owner):
    """First of the checks of a state: another kind's names are not worth naming."""
    got, expected = state.get("kind") if isinstance(state, Mapping) else state, type(owner).__name__
    if got != expected:
        raise ValueError(f"{what} is of kind {got!r}, expected {expected!r}")


def is_square(name):
    """Whether a state array of an optimiser, by its name, holds averages of squares. These may be infinite: a gradient
    over the root of infinity is a step of 0."""
    return name.partition(".")[0] in ("square_avg", "exp_avg_sq", "max_exp_avg_sq")


# ---- optimisers


class Optimizer(NamesArguments):
    """Base of the optimisers.

    Attributes
    ----------
    model : the Module whose parameters are updated.
    lr : learning rate, settable at any time; 0 is allowed.
    steps : number of steps taken.
    hyper : read-only mapping of the other hyper-parameters.

    State arrays are allocated once, in the model's dtype; a step allocates nothing.
    """

    def __init__(self, model, lr, **hyper):
        _check_model(model)
        if model.flat_params.size == 0:
            raise ValueError("model has no parameters to train")
        self.lr = lr
        self.hyper = MappingProxyType(self._check_hyper(**hyper))
        self.model = model
        self.steps = 0
        xp, self._size, self._count = model.xp, model.flat_params.size, model.parameter_count
        self._arrays = {name: xp.zeros(self._size, model.compute_dtype) for name in self._array_names(self.hyper)}
        self._block = _block_size(xp, self._size)
        self._scratch = xp.empty((2, self._block), model.compute_dtype)

    def __copy__(self):
        raise TypeError(
            f"copy.copy: a shallow copy of this {type(self).__name__} would share its state arrays and its model: use "
            "copy.deepcopy((model, optimizer)), which copies both"
        )

    def __getstate__(self):
        """As copies and pickles hold it: arrays on the host. The model goes with it; copy both together to keep them
        together, ``model, adam = copy.deepcopy((model, adam))``."""
        arrays = {name: self.model.ops.to_numpy(array) for name, array in self._arrays.items()}
        remembered = {
            "_ops": self.model.ops,
            "_compute_dtype": self.model.compute_dtype,
        }  # a model may refer to this, and get its state later
        return self.__dict__ | {"hyper": dict(self.hyper), "_arrays": arrays, "_scratch": None} | remembered

    def __setstate__(self, state):
        xp, compute_dtype = state.pop("_ops").xp, state.pop("_compute_dtype")
        self.__dict__.update(state)
        self.hyper = MappingProxyType(self.hyper)
        self._arrays = {name: xp.asarray(writable(array)) for name, array in self._arrays.items()}
        self._scratch = xp.empty((2, self._block), compute_dtype)

    @property
    def lr(self):
        """Learning rate: a finite number, at least 0."""
        return self._lr

    @lr.setter
    def lr(self, value):
        self._lr = check_number("lr", value, 0.0)

    def step(self):
        """Update ``model.flat_params`` in place from ``model.flat_grads``, which stay as they are.

        Frozen parameters and what is kept for them stay, too; one that is unfrozen later begins with zeros.

        Raises ValueError where the model's number of parameters has changed since the optimiser was built.
        """
        params, grads = self._buffers()
        self.steps += 1
        parts, frozen = self.model._trained_parts(), set(self.model.frozen)
        if parts:
            self.model.changed(*(name for name in self.model.params if frozen and name not in frozen))
        for part in parts:
            self._step(params[part], grads[part], {name: array[part] for name, array in self._arrays.items()})

    def _step(self, params, grads, arrays):
        """Update a part of the flat buffers and of the state arrays."""
        if self.model.ops.optimize(self._kernel, params, grads, arrays, self._scalars()):
            return
        with np.errstate(over="ignore", invalid="ignore"):  # numbers that are not finite say so, as on a GPU
            for part in _blocks(params.size, self._block):
                p = params[part]
                a, b = self._scratch[:, : p.size]
                self._update(p, grads[part], a, b, **{name: array[part] for name, array in arrays.items()})

    def state_dict(self):
        """All that a resumed run needs: ``{"scalars": JSON-ready dict, "arrays": name -> NumPy array}``.

        Array names are the state's and the parameter's (``exp_avg.rnn.weight_ih_l0``), shapes the parameter's.
        """
        scalars = {"kind": type(self).__name__, "lr": self.lr, "steps": self.steps, **self.hyper}
        arrays = {name: self.model.ops.to_numpy(array).copy() for name, array in self._named_arrays().items()}
        return {"scalars": scalars, "arrays": arrays}

    def load_state_dict(self, state):
        """Continue from ``state_dict()``: learning rate, step count, hyper-parameters and arrays.

        Raises ValueError for another kind of optimiser, for hyper-parameters that need other arrays and for values
        that are not finite, other than squares that had overflowed; KeyError for missing and unknown names; ShapeError
        and DtypeError for arrays that do not fit; TypeError for what is no such state. Nothing changes on an error.
        """
        _check_names("optimiser state", state, ("scalars", "arrays"))
        scalars, arrays = state["scalars"], state["arrays"]
        _check_kind("optimiser state", scalars, self)
        _check_names("optimiser state", scalars, ("kind", "lr", "steps", *self.hyper))
        lr = check_number("lr", scalars["lr"], 0.0)
        steps = check_size("steps", scalars["steps"], minimum=0)
        hyper = self._check_hyper(**{name: scalars[name] for name in self.hyper})
        if self._array_names(hyper) != list(self._arrays):
            raise ValueError(f"this state is of an optimiser with {hyper}, expected one with {dict(self.hyper)}")
        targets = self._named_arrays()
        _check_names("optimiser state", arrays, targets)
        loaded = {name: self._check_array(name, arrays[name], target) for name, target in targets.items()}

        self.lr, self.steps, self.hyper = lr, steps, MappingProxyType(hyper)
        for name, value in loaded.items():
            targets[name][...] = self.model.xp.asarray(value)

    def __repr__(self):
        hyper = ", ".join(f"{name}={value}" for name, value in self.hyper.items())
        return f"{type(self).__name__}(lr={self.lr}, {hyper}, steps={self.steps})"

    # ---- what each optimiser defines

    def _check_hyper(self, **hyper):
        """The hyper-parameters, checked, as a JSON-ready dict."""
        raise NotImplementedError

    def _array_names(self, hyper):
        """Names of the state arrays that these hyper-parameters ask for; they start at zero."""
        raise NotImplementedError

    def _scalars(self):
        """The numbers that ``_kernel`` in kernels/sums/optimize.cu takes, by name; ``_update`` in the same order."""
        raise NotImplementedError

    def _update(self, p, g, a, b, **arrays):
        """Update the block ``p`` and its state arrays from the gradients ``g``; ``a`` and ``b`` are scratch."""
        raise NotImplementedError

    # ---- shared by them

    def _decayed(self, p, g, scratch):
        """Gradient with the L2 penalty, g + weight_decay * p."""
        if self.hyper["weight_decay"] == 0:
            return g
        self.model.xp.multiply(p, self.hyper["weight_decay"], out=scratch)
        scratch += g
        return scratch

    def _average(self, average, value, decay, scratch):
        """average = decay * average + (1 - decay) * value; ``scratch`` may be ``value``."""
        average *= decay
        self.model.xp.multiply(value, 1 - decay, out=scratch)
        average += scratch

    def _average_square(self, average, value, decay, scratch):
        """average = decay * average + (1 - decay) * value^2; the factor first, so that a square overflows as late as it
        can."""
        average *= decay
        self.model.xp.multiply(value, 1 - decay, out=scratch)
        scratch *= value
        average += scratch

    def _buffers(self):
        """The model's flat buffers as they are now: a module may have been moved into a bigger one."""
        params, grads = self.model.flat_params, self.model.flat_grads
        if self.model.parameter_count != self._count or params.size != self._size:
            raise ValueError(
                f"the model had {self._count} parameters when the optimiser was built and has "
                f"{self.model.parameter_count} now"
            )
        return params, grads

    def _named_arrays(self):
        """State arrays as views by parameter: "<state>.<parameter>" -> array of the parameter's shape."""
        self._buffers()
        views = {state: self.model._views(array) for state, array in self._arrays.items()}
        return {f"{state}.{name}": views[state][name] for name in self.model.params for state in views}

    def _check_array(self, name, value, target):
        """``value`` on the host in the target's dtype, checked."""
        value = host_array(value, name)
        if not is_float(value.dtype):
            raise DtypeError(f"{name}: expected floating-point numbers, got {value.dtype}")
        if value.shape != target.shape:
            raise ShapeError(f"{name}: expected shape {target.shape}, got {value.shape}")
        with np.errstate(over="ignore"):
            loaded = value.astype(target.dtype)
        legal = np.isfinite(loaded)
        if is_square(name):
            legal |= np.isposinf(value)
        if not legal.all():
            raise ValueError(f"{name}: holds values that are not finite in {target.dtype}")
        return loaded


class SGD(Optimizer):
    """Stochastic gradient descent, with momentum if asked for.

    ``g += weight_decay * p``; with momentum ``buf = momentum * buf + (1 - dampening) * g`` (the first step takes
    ``buf = g``) and ``g = buf``, with Nesterov's ``g += momentum * buf``; then ``p -= lr * g``.

    model: the Module to train; lr >= 0; momentum in [0, 1); dampening in [0, 1]; weight_decay >= 0; nesterov needs
    momentum and no dampening. Raises TypeError and ValueError.
    Source: Sutskever, Martens, Dahl, Hinton, ICML 2013, in the form of ``torch.optim.SGD``.
    """

    def __init__(self, model, lr, momentum=0.0, dampening=0.0, nesterov=False, weight_decay=0.0):
        super().__init__(
            model, lr, momentum=momentum, dampening=dampening, nesterov=nesterov, weight_decay=weight_decay
        )

    def _check_hyper(self, momentum, dampening, nesterov, weight_decay):
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

    def _array_names(self, hyper):
        return ["momentum_buffer"] if hyper["momentum"] else []

    _kernel = "sgd"

    def _scalars(self):
        hyper = self.hyper
        return {
            "first": int(self.steps == 1), "nesterov": int(hyper["nesterov"]), "lr": self.lr,
            "momentum": hyper["momentum"], "undamped": 1 - hyper["dampening"], "weight_decay": hyper["weight_decay"],
        }  # fmt: skip

    def _update(self, p, g, a, b, momentum_buffer=None):
        xp, momentum = self.model.xp, self.hyper["momentum"]
        g = self._decayed(p, g, a)
        if momentum_buffer is not None:
            if self.steps == 1:
                momentum_buffer[...] = g
            else:
                momentum_buffer *= momentum
                xp.multiply(g, 1 - self.hyper["dampening"], out=b)
                momentum_buffer += b
            if self.hyper["nesterov"]:
                xp.multiply(momentum_buffer, momentum, out=b)
                b += g
                g = b
            else:
                g = momentum_buffer
        xp.multiply(g, self.lr, out=b)
        p -= b


class RMSprop(Optimizer):
    """Gradients divided by a running average of their magnitude.

    ``g += weight_decay * p``; ``v = alpha * v + (1 - alpha) * g^2``; ``p -= lr * g / (sqrt(v) + eps)``. ``centered``
    takes the variance, ``v`` less the square of the average gradient (held at 0 or above, where rounding would make
    it negative and its root NaN); momentum accumulates the quotient. A gradient whose square overflows makes no step,
    as in torch: ``v`` is infinite then, and stays so.

    lr >= 0; alpha and momentum in [0, 1); eps > 0; weight_decay >= 0. Raises TypeError and ValueError.
    Source: Tieleman and Hinton, Coursera lecture 6.5, 2012; centered: Graves, arXiv:1308.0850, eq. 38-45.
    """

    def __init__(self, model, lr=1e-2, alpha=0.99, eps=1e-8, weight_decay=0.0, momentum=0.0, centered=False):
        super().__init__(
            model, lr, alpha=alpha, eps=eps, weight_decay=weight_decay, momentum=momentum, centered=centered
        )

    def _check_hyper(self, alpha, eps, weight_decay, momentum, centered):
        return {
            "alpha": check_number("alpha", alpha, 0.0, 1.0, high_open=True),
            "eps": check_number("eps", eps, 0.0, low_open=True),
            "weight_decay": check_number("weight_decay", weight_decay, 0.0),
            "momentum": check_number("momentum", momentum, 0.0, 1.0, high_open=True),
            "centered": check_flag("centered", centered),
        }

    def _array_names(self, hyper):
        wanted = {"square_avg": True, "grad_avg": hyper["centered"], "momentum_buffer": hyper["momentum"]}
        return [name for name, needed in wanted.items() if needed]

    _kernel = "rmsprop"

    def _scalars(self):
        hyper = self.hyper
        return {
            "lr": self.lr, "alpha": hyper["alpha"], "rest": 1 - hyper["alpha"], "eps": hyper["eps"],
            "momentum": hyper["momentum"], "weight_decay": hyper["weight_decay"], "most": self._most,
        }  # fmt: skip

    @property
    def _most(self):
        return float(np.finfo(self.model.compute_dtype).max)

    def _update(self, p, g, a, b, square_avg, grad_avg=None, momentum_buffer=None):
        xp, alpha = self.model.xp, self.hyper["alpha"]
        g = self._decayed(p, g, a)
        self._average_square(square_avg, g, alpha, b)
        if grad_avg is None:
            xp.sqrt(square_avg, out=b)
        else:
            self._average(grad_avg, g, alpha, b)
            xp.multiply(grad_avg, grad_avg, out=b)
            xp.minimum(b, self._most, out=b)  # inf - inf would be NaN
            xp.subtract(square_avg, b, out=b)
            xp.maximum(b, 0.0, out=b)
            xp.sqrt(b, out=b)
        b += self.hyper["eps"]
        xp.divide(g, b, out=b)
        if momentum_buffer is not None:
            momentum_buffer *= self.hyper["momentum"]
            momentum_buffer += b
            xp.multiply(momentum_buffer, self.lr, out=b)
        else:
            b *= self.lr
        p -= b


class Adam(Optimizer):
    """Adaptive moments; weight decay is an L2 penalty on the loss (AdamW decouples it).

    ``g += weight_decay * p``; ``m = beta1 * m + (1 - beta1) * g``; ``v = beta2 * v + (1 - beta2) * g^2``;
    ``p -= lr * m^ / (sqrt(v^) + eps)`` with ``m^ = m / (1 - beta1^n)``, ``v^ = v / (1 - beta2^n)`` at step n. With
    ``amsgrad`` the largest ``v`` so far takes the place of ``v`` in the quotient. A gradient whose square overflows
    makes no step, as in torch: ``v`` is infinite then, and stays so, in ``state_dict`` and checkpoints, too.

    lr >= 0; betas in [0, 1); eps > 0; weight_decay >= 0. Raises TypeError and ValueError.
    Source: Kingma and Ba, ICLR 2015; AMSGrad: Reddi, Kale, Kumar, ICLR 2018.
    """

    _decoupled = False

    def __init__(self, model, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, amsgrad=False):
        super().__init__(model, lr, betas=betas, eps=eps, weight_decay=weight_decay, amsgrad=amsgrad)

    def _check_hyper(self, betas, eps, weight_decay, amsgrad):
        if not isinstance(betas, (tuple, list)) or len(betas) != 2:
            raise TypeError(f"betas should be a pair of numbers, got {betas!r}")
        return {
            "betas": [check_number(f"betas[{n}]", beta, 0.0, 1.0, high_open=True) for n, beta in enumerate(betas)],
            "eps": check_number("eps", eps, 0.0, low_open=True),
            "weight_decay": check_number("weight_decay", weight_decay, 0.0),
            "amsgrad": check_flag("amsgrad", amsgrad),
        }

    def _array_names(self, hyper):
        return ["exp_avg", "exp_avg_sq", "max_exp_avg_sq"][: 3 if hyper["amsgrad"] else 2]

    _kernel = "adam"

    def _scalars(self):
        (beta1, beta2), decay = self.hyper["betas"], self.hyper["weight_decay"]
        eps, rate = self._corrected()
        return {
            "shrink": 1 - self.lr * decay if self._decoupled else 1, "weight_decay": 0 if self._decoupled else decay,
            "beta1": beta1, "rest1": 1 - beta1, "beta2": beta2, "rest2": 1 - beta2, "eps": eps, "rate": rate,
        }  # fmt: skip

    def _corrected(self):
        """eps and learning rate with the corrections of m^ and v^ taken into them: one pass over the arrays fewer."""
        beta1, beta2 = self.hyper["betas"]
        root = math.sqrt(1 - beta2**self.steps)
        return self.hyper["eps"] * root, self.lr * root / (1 - beta1**self.steps)

    def _update(self, p, g, a, b, exp_avg, exp_avg_sq, max_exp_avg_sq=None):
        xp, (beta1, beta2) = self.model.xp, self.hyper["betas"]
        if self._decoupled:
            p *= 1 - self.lr * self.hyper["weight_decay"]
        else:
            g = self._decayed(p, g, a)
        self._average(exp_avg, g, beta1, b)
        self._average_square(exp_avg_sq, g, beta2, b)
        if max_exp_avg_sq is not None:
            xp.maximum(max_exp_avg_sq, exp_avg_sq, out=max_exp_avg_sq)
            exp_avg_sq = max_exp_avg_sq
        eps, rate = self._corrected()
        xp.sqrt(exp_avg_sq, out=b)
        b += eps
        xp.divide(exp_avg, b, out=b)
        b *= rate
        p -= b


class AdamW(Adam):
    """Adam with decoupled weight decay: ``p *= 1 - lr * weight_decay`` first, and no penalty in the gradient.

    Source: Loshchilov and Hutter, ICLR 2019.
    """

    _decoupled = True

    def __init__(self, model, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=1e-2, amsgrad=False):
        super().__init__(model, lr, betas, eps, weight_decay, amsgrad)


# ---- clipping


def clip_grad_norm(model, max_norm):
    """Scale all gradients in place by ``min(1, max_norm / (norm + 1e-6))``; return their norm before that.

    max_norm: above 0; ``math.inf`` only measures. Returns the Euclidean norm over all gradients together as a float64
    scalar of the backend (no wait for the GPU until it is read), its squares summed in float64 in a fixed order.

    Gradients of frozen parameters become zero and do not count.

    Where the norm is not finite the gradients stay as they are, so that the caller can see which of them broke:

    >>> model = gpurnn.Linear(2, 1)
    >>> norm = gpurnn.clip_grad_norm(model, 1.0)
    >>> if not math.isfinite(norm):
    ...     raise FloatingPointError(f"gradient norm is {norm}")

    Source: Pascanu, Mikolov, Bengio, ICML 2013, in the form of ``torch.nn.utils.clip_grad_norm_``.
    """
    _check_model(model)
    if max_norm != math.inf:
        check_number("max_norm", max_norm, 0.0, low_open=True)
    xp, grads = model.xp, model.flat_grads
    _drop_frozen(model)
    norm = model.ops.clip_norm(grads, max_norm)
    if norm is not None:
        return norm
    total = model.ops.sum_squares(grads)
    if total is None:
        total = _sum_squares(grads, xp)
    norm = xp.sqrt(total)
    if max_norm != math.inf:
        scale = xp.where(xp.isfinite(norm), xp.minimum(max_norm / (norm + 1e-6), 1.0), 1.0)
        if xp is not np or scale < 1:  # a GPU would have to be waited for
            xp.multiply(grads, scale.astype(grads.dtype), out=grads)
    return norm


def _drop_frozen(model):
    for name in model.frozen:
        model.grads[name][...] = 0


def _sum_squares(grads, xp):
    block = _block_size(xp, grads.size)
    squares = xp.empty(block, np.float64)
    total = xp.zeros((), np.float64)
    with np.errstate(over="ignore"):  # a float64 gradient beyond 1e154 gives the norm inf, which says it all
        for part in _blocks(grads.size, block):
            g = grads[part]
            total += xp.multiply(g, g, out=squares[: g.size], dtype=np.float64).sum()
    return total


def clip_grad_value(model, value):
    """Limit every gradient to [-value, value], in place; value above 0. NaN stays NaN."""
    _check_model(model)
    value = check_number("value", value, 0.0, low_open=True)
    _drop_frozen(model)
    model.xp.clip(model.flat_grads, -value, value, out=model.flat_grads)


# ---- schedules


class Schedule(NamesArguments):
    """Base of the learning-rate schedules: ``step()`` advances and sets ``opt.lr``.

    ``step()`` is called after each epoch, or after each optimiser step: all durations count these calls. A schedule
    starts from the ``opt.lr`` it finds when it is built, its base rate, and owns ``opt.lr`` from then on. Rates are
    functions of counters, not of the rate before, so that nothing drifts and a resumed schedule continues exactly.
    """

    def __init__(self, opt, **hyper):
        if not isinstance(opt, Optimizer):
            raise TypeError(f"opt should be a gpurnn optimiser, got {type(opt).__name__}")
        self._opt = opt
        self._hyper = self._check_hyper(base_lr=opt.lr, **hyper)
        self._counters = self._check_counters()

    def __copy__(self):
        raise TypeError(
            f"copy.copy: a shallow copy of this {type(self).__name__} would set the learning rate of the same "
            "optimizer: use copy.deepcopy((model, optimizer, schedule)), which copies all three"
        )

    @property
    def lr(self):
        """The learning rate at this point of the schedule."""
        return self._rate(**self._hyper, **self._counters)

    def step(self, metric=None):
        """Advance by one and set ``opt.lr``. metric: what the epoch achieved; only PlateauSchedule needs it."""
        self._counters = self._advance(metric, **self._counters)
        self._opt.lr = self.lr

    def state_dict(self):
        """All that a resumed run needs, JSON-ready."""
        return {"kind": type(self).__name__, **self._hyper, **self._counters}

    def load_state_dict(self, state):
        """Continue from ``state_dict()`` and set ``opt.lr``.

        Raises ValueError, TypeError or KeyError for a state that does not fit; nothing changes then.
        """
        self._hyper, self._counters = self._check_state(state)
        self._opt.lr = self.lr

    def _check_state(self, state):
        _check_kind("schedule state", state, self)
        _check_names("schedule state", state, self.state_dict())
        hyper = self._check_hyper(**{name: state[name] for name in self._hyper})
        return hyper, self._check_counters(**{name: state[name] for name in self._counters})

    def __repr__(self):
        values = ", ".join(f"{name}={value}" for name, value in {**self._hyper, **self._counters}.items())
        return f"{type(self).__name__}(lr={self.lr}, {values})"

    # ---- what each schedule defines; most count calls alone

    def _check_hyper(self, base_lr, **hyper):
        """The base rate and the hyper-parameters, checked, as a JSON-ready dict."""
        raise NotImplementedError

    def _rate(self, base_lr, **hyper_and_counters):
        """The learning rate; called with all hyper-parameters and counters by name."""
        raise NotImplementedError

    def _check_counters(self, calls=0):
        """The counters, checked, as a JSON-ready dict; the defaults are the start."""
        return {"calls": check_size("calls", calls, minimum=0)}

    def _advance(self, metric, calls):
        """The counters after one more call of ``step``."""
        return {"calls": calls + 1}


class ConstantSchedule(Schedule):
    """The base rate throughout."""

    def __init__(self, opt):
        super().__init__(opt)

    def _check_hyper(self, base_lr):
        return {"base_lr": check_number("base_lr", base_lr, 0.0)}

    def _rate(self, base_lr, calls):
        return base_lr


class StepSchedule(Schedule):
    """The rate times ``gamma`` after every ``step_size`` calls; ``torch.optim.lr_scheduler.StepLR``.

    step_size >= 1; gamma in (0, 1]. Raises TypeError and ValueError.
    """

    def __init__(self, opt, step_size, gamma=0.1):
        super().__init__(opt, step_size=step_size, gamma=gamma)

    def _check_hyper(self, base_lr, step_size, gamma):
        return {
            "base_lr": check_number("base_lr", base_lr, 0.0),
            "step_size": check_size("step_size", step_size),
            "gamma": check_number("gamma", gamma, 0.0, 1.0, low_open=True),
        }

    def _rate(self, base_lr, step_size, gamma, calls):
        return base_lr * gamma ** (calls // step_size)


class CosineSchedule(Schedule):
    """Half a cosine from the base rate to ``min_lr`` in ``total`` calls, and ``min_lr`` from then on.

    total >= 1; min_lr from 0 to the base rate. Raises TypeError and ValueError.
    Source: Loshchilov and Hutter, ICLR 2017, without restarts; ``torch.optim.lr_scheduler.CosineAnnealingLR``, which
    rises again after ``total``.
    """

    def __init__(self, opt, total, min_lr=0.0):
        super().__init__(opt, total=total, min_lr=min_lr)

    def _check_hyper(self, base_lr, total, min_lr):
        base_lr = check_number("base_lr", base_lr, 0.0)
        return {
            "base_lr": base_lr,
            "total": check_size("total", total),
            "min_lr": check_number("min_lr", min_lr, 0.0, base_lr),
        }

    def _rate(self, base_lr, total, min_lr, calls):
        share = (1 + math.cos(math.pi * min(calls, total) / total)) / 2  # exactly 1 at the start, exactly 0 at the end
        return share * base_lr + (1 - share) * min_lr


class PlateauSchedule(Schedule):
    """The rate times ``factor`` whenever the metric, a loss, has not improved for more than ``patience`` calls.

    An improvement is a metric below ``best * (1 - threshold)``. ``step(metric)`` needs the metric: a number, or a
    scalar of the backend; NaN and -inf raise ValueError, inf counts as no improvement.

    factor in (0, 1); patience >= 0; threshold in [0, 1); min_lr from 0 to the base rate. Raises TypeError and
    ValueError. Equals ``torch.optim.lr_scheduler.ReduceLROnPlateau`` with ``eps=0``.
    """

    def __init__(self, opt, factor=0.1, patience=10, threshold=1e-4, min_lr=0.0):
        super().__init__(opt, factor=factor, patience=patience, threshold=threshold, min_lr=min_lr)

    def _check_hyper(self, base_lr, factor, patience, threshold, min_lr):
        base_lr = check_number("base_lr", base_lr, 0.0)
        return {
            "base_lr": base_lr,
            "factor": check_number("factor", factor, 0.0, 1.0, low_open=True, high_open=True),
            "patience": check_size("patience", patience, minimum=0),
            "threshold": check_number("threshold", threshold, 0.0, 1.0, high_open=True),
            "min_lr": check_number("min_lr", min_lr, 0.0, base_lr),
        }

    def _check_counters(self, best=None, bad=0, reductions=0):
        return {
            "best": None if best is None else check_number("best", best),  # None where inf would not be JSON
            "bad": check_size("bad", bad, minimum=0),
            "reductions": check_size("reductions", reductions, minimum=0),
        }

    def _advance(self, metric, best, bad, reductions):
        if metric is None:
            raise TypeError("metric is missing: PlateauSchedule follows it, call step(metric)")
        try:
            metric = float(metric)  # a scalar of the backend comes to the host here
        except (TypeError, ValueError):
            raise TypeError(f"metric should be a number, got {metric!r}") from None
        if math.isnan(metric) or metric == -math.inf:
            raise ValueError(f"metric should be a number above -inf, got {metric}")
        bar = math.inf if best is None else best * (1 - self._hyper["threshold"])
        if metric < bar:
            return {"best": metric, "bad": 0, "reductions": reductions}
        if bad < self._hyper["patience"]:
            return {"best": best, "bad": bad + 1, "reductions": reductions}
        return {"best": best, "bad": 0, "reductions": reductions + 1}

    def _rate(self, base_lr, factor, min_lr, reductions, **_):
        return max(base_lr * factor**reductions, min_lr)


class WarmupSchedule(Schedule):
    """Rise from ``base / steps`` to the base rate in equal parts, then continue with ``after``.

    After k calls of ``step`` the rate is ``base * (k + 1) / steps`` for k < steps: building the schedule lowers
    ``opt.lr`` to ``base / steps``, and the base rate is there after ``steps - 1`` calls. The next call is the start of
    ``after``, so that ``after`` runs as it would on its own, ``steps`` calls later. Metrics given during the warm-up
    are not used.

    steps >= 1; after: a schedule built on the same optimiser just before this one, or None to stay at the base rate.
    Raises TypeError and ValueError. ``state_dict()`` holds that of ``after``.
    Equals ``torch.optim.lr_scheduler.SequentialLR([LinearLR(o, 1 / steps, total_iters=steps - 1), after], [steps])``.
    """

    def __init__(self, opt, steps, after=None):
        super().__init__(opt, steps=steps)
        if after is None:
            after = ConstantSchedule(opt)
        if not isinstance(after, Schedule):
            raise TypeError(f"after should be a gpurnn schedule, got {type(after).__name__}")
        if after._opt is not opt:
            raise ValueError("after should be built on the same optimiser as the warm-up")
        if after.lr != opt.lr:
            raise ValueError(
                f"after is at the rate {after.lr}, the optimiser at {opt.lr}: build after just before this"
            )
        self._after = after
        opt.lr = self.lr

    def step(self, metric=None):
        """Advance by one and set ``opt.lr``. metric: passed on to ``after`` once the warm-up is over."""
        if self._counters["calls"] >= self._hyper["steps"]:
            self._after.step(metric)
        super().step()

    def state_dict(self):
        return {**super().state_dict(), "after": self._after.state_dict()}

    def load_state_dict(self, state):
        self._check_state(state)  # all checks before any change
        self._after.load_state_dict(state["after"])
        super().load_state_dict(state)

    def _check_hyper(self, base_lr, steps):
        return {"base_lr": check_number("base_lr", base_lr, 0.0), "steps": check_size("steps", steps)}

    def _rate(self, base_lr, steps, calls):
        return base_lr * ((calls + 1) / steps) if calls < steps else self._after.lr
