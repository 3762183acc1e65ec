"""The operators that torch sees: ``gpurnn::recurrent``, its backward, and the backward of that.

To torch they are opaque functions of tensors with a formula for their gradients, so that compiled and exported graphs
hold them as they are. What the forward pass saves lies in ``_saved`` for as long as a tensor lives, the token, that the
backward operator takes. The token is no more than a shortcut: without it, after a backward that has used up what was
saved, or when something has put a copy in the token's place, the forward pass runs again, with the same random masks.
"""

from __future__ import annotations

import math
import secrets
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ...backends import get_backend
from ...recurrent import Recurrent
from ..arguments import Arguments
from ..configuration import find, flat_state, nested_state, stand_in
from ..derivatives import second_derivatives
from .arrays import array_dtype, as_torch_runs, to_array, to_tensor


class Marks(NamedTuple):
    """The optional tensors of a call: lengths (B,), reset and mask (T, B), and key, the number that masks come from."""

    lengths: Tensor | None
    reset: Tensor | None
    mask: Tensor | None
    key: Tensor | None

    def given(self, ops: Any) -> dict[str, Any]:
        """The arguments of a layer's call."""
        arrays = {"reset": self.reset, "mask": self.mask}
        found = {name: None if one is None else to_array(ops, one) for name, one in arrays.items()}
        return found | {"lengths": None if self.lengths is None else self.lengths.cpu().numpy()}

    def seed(self) -> int:
        """The key of the random draws."""
        return 0 if self.key is None else int(self.key)


class Run(NamedTuple):
    """What a forward pass for training leaves: the layer of that call, and its backward function."""

    layer: Recurrent
    backward: Callable[..., Any]


_library = torch.library.Library("gpurnn", "DEF")
_saved: dict[int, Run] = {}  # number in a token -> what its forward pass saved


def _hold(run):
    """The token (1,) of ``run``, which is dropped with the token's memory."""
    number = np.array([secrets.randbits(62)])  # drawn, so that a token of another process is unknown here
    _saved[int(number[0])] = run
    weakref.finalize(number, _saved.pop, int(number[0]), None).atexit = False
    return torch.from_numpy(number)


def _ops(found, x):
    """The backend on which a call with ``x`` runs."""
    if found.backend != "auto":
        return get_backend(found.backend)
    return get_backend("cuda" if x.is_cuda else "cpu")


def _prepared(found, x, weights, state, marks):
    """The layer of one call, with x, and the other arguments of its ``forward``."""
    ops, dtype = _ops(found, x), array_dtype(x.dtype)
    # 16-bit layers have parameters of float32
    params = [to_array(ops, w.float() if w.element_size() == 2 else w) for w in weights]
    layer = stand_in(found, ops, dtype, params, marks.seed())
    given = marks.given(ops)
    given["state"] = nested_state(found.state, [to_array(ops, one) for one in state]) if state else None
    return layer, to_array(ops, x), given


def _empty_array(ops, shape, dtype):
    """A contiguous array, of memory that the backend has at hand."""
    return ops.empty_steps(1, 1, math.prod(shape), dtype).reshape(shape)


def _run(layer, x, given):
    """The output, the final state, and the ``Run``."""
    output, state, backward = layer.forward(x, **given)
    return output, state, Run(layer, backward)


def _operator(schema):
    """Registers the function of an operator for all devices."""

    def registered(function):
        _library.define(f"{function.__name__}{schema}", tags=(torch.Tag.pt2_compliant_tag,))
        _library.impl(function.__name__, function, "CompositeExplicitAutograd")
        return getattr(torch.ops.gpurnn, function.__name__).default

    return registered


def _fake(operator):
    """Registers what an operator returns, but for the values."""
    return torch.library.register_fake(operator.name(), lib=_library)


@_operator("(Tensor x, Tensor[] weights, Tensor[] state, Tensor?[] marks, str layer, bool save) -> Tensor[]")
def recurrent(x, weights, state, marks, layer, save):
    """The output (T, B, D*P), the parts of the final state, and a token: empty unless a backward will follow."""
    found, marks = find(layer), Marks(*marks)
    with as_torch_runs(_ops(found, x).xp, x):
        made, array, given = _prepared(found, x, weights, state, marks)
        token = torch.empty(0, dtype=torch.int64)
        if save:
            output, final, run = _run(made, array, given)
            token, returned = _hold(run), _empty_array(made.ops, output.shape, output.dtype)
            returned[...], output = output, returned  # backward works in the memory of the other one
        else:
            output, final = made(array, **given)
        parts = [to_tensor(made.ops, part.copy(), x) for part in flat_state(found.state, final)]
        return [to_tensor(made.ops, output, x), *parts, token]


@_fake(recurrent)
def _(x, weights, state, marks, layer, save):
    found, (T, B, _) = find(layer), x.shape
    parts = [x.new_empty((part.rows, B, part.size)) for parts in found.state for part in parts]
    return [x.new_empty((T, B, found.features)), *parts, torch.empty(int(save), dtype=torch.int64)]


@_operator(
    "(Tensor token, Tensor[] doutputs, Tensor x, Tensor[] weights, Tensor[] state, Tensor?[] marks, str layer, "
    "bool[] trains) -> Tensor[]"
)
def recurrent_backward(token, doutputs, x, weights, state, marks, layer, trains):
    """The gradients with respect to x, to the weights (empty where they are not trained), and to the initial state."""
    found, marks = find(layer), Marks(*marks)
    with as_torch_runs(_ops(found, x).xp, x):
        run = _saved.pop(int(token), None) if token.numel() else None
        if run is None:
            run = _run(*_prepared(found, x, weights, state, marks))[-1]
        layer = run.layer
        grads = {
            name: _empty_array(layer.ops, shape, layer.compute_dtype)
            for name, shape, trained in zip(found.names, found.shapes, trains, strict=True)
            if trained
        }
        for array in grads.values():
            array[...] = 0
        layer.grads._arrays = grads
        layer._frozen[0].update(name for name in found.names if name not in grads)
        doutput, *dfinal = (to_array(layer.ops, one) for one in doutputs)
        dx, dstate = run.backward(doutput, nested_state(found.state, dfinal))
        dweights = [
            to_tensor(layer.ops, grads[name], weight) if name in grads else weight.new_empty(0)
            for name, weight in zip(found.names, weights, strict=True)
        ]
        dparts = [part.copy() for part in flat_state(found.state, dstate)] if state else []
        return [to_tensor(layer.ops, dx, x), *dweights, *(to_tensor(layer.ops, part, x) for part in dparts)]


@_fake(recurrent_backward)
def _(token, doutputs, x, weights, state, marks, layer, trains):
    made = [_empty(w) if trained else w.new_empty(0) for w, trained in zip(weights, trains, strict=True)]
    return [_empty(x), *made, *map(_empty, state)]


@_operator(
    "(Tensor[] vectors, Tensor[] doutputs, Tensor x, Tensor[] weights, Tensor[] state, Tensor?[] marks, str layer) "
    "-> Tensor[]"
)
def recurrent_second_backward(vectors, doutputs, x, weights, state, marks, layer):
    """The gradients with respect to doutputs, x, weights and state of the product of ``vectors`` with the results of
    ``recurrent_backward``."""
    marks = Marks(*marks)
    on_host = [one.detach().cpu().double().numpy() for one in (x, *weights, *state, *doutputs)]
    along = [one.detach().cpu().double().numpy() if one.numel() else None for one in vectors]
    given = marks._replace(key=None).given(get_backend("numpy"))
    made = second_derivatives(layer, marks.seed(), on_host, along, given)
    like = [*doutputs, x, *weights, *state]
    return [torch.tensor(array, dtype=one.dtype, device=one.device) for array, one in zip(made, like, strict=True)]


@_fake(recurrent_second_backward)
def _(vectors, doutputs, x, weights, state, marks, layer):
    return [_empty(one) for one in (*doutputs, x, *weights, *state)]


def _empty(tensor):
    return torch.empty_like(tensor, memory_format=torch.contiguous_format)


# ---- formulas: what autograd calls


class _Recurrent(torch.autograd.Function):
    @staticmethod
    def forward(ctx, form, save, *tensors):
        with _below_autograd():
            results = recurrent(*form.arguments(tensors)[0], save)
        ctx.form = form
        ctx.save_for_backward(*tensors, results[-1])  # torch refuses a backward after one of them was changed
        ctx.mark_non_differentiable(results[-1])
        return tuple(results)

    @staticmethod
    def backward(ctx, *gradients):
        given, (token,) = ctx.form.arguments(ctx.saved_tensors)
        trains = list(ctx.needs_input_grad[3 : 3 + ctx.form.weights])
        made = recurrent_backward(token, gradients[:-1], *given, trains)
        made[1 : 1 + len(trains)] = [one if trained else None for one, trained in zip(made[1:], trains, strict=False)]
        made += [None] * (ctx.form.state - len(made) + 1 + len(trains))
        return None, None, *ctx.form.gradients(made)


class _RecurrentBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, form, trains, token, *tensors):
        given, doutputs = form.arguments(tensors)
        with _below_autograd():
            results = recurrent_backward(token, doutputs, *given, trains)
        ctx.form = form
        ctx.save_for_backward(*tensors)
        return tuple(results)

    @staticmethod
    def backward(ctx, *vectors):
        given, doutputs = ctx.form.arguments(ctx.saved_tensors)
        made = recurrent_second_backward(vectors, doutputs, *given)
        return None, None, None, *ctx.form.gradients(made[len(doutputs) :]), *made[: len(doutputs)]


class _RecurrentSecondBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, form, count, *tensors):
        given, rest = form.arguments(tensors)
        with _below_autograd():
            return tuple(recurrent_second_backward(rest[:count], rest[count:], *given))

    @staticmethod
    def backward(ctx, *gradients):
        raise RuntimeError(
            "gpurnn.interop.torch: a recurrent layer has first and second derivatives, and this needs third ones. For "
            "Hessian-vector products gpurnn.hvp needs no graph of the second derivative"
        )


_below_autograd = torch._C._AutoDispatchBelowAutograd


def _differentiated(operator):
    """Registers the function that runs in an operator's place where autograd looks on."""
    return lambda function: _library.impl(operator.name().partition("::")[2], function, "Autograd")


@_differentiated(recurrent)
def _(x, weights, state, marks, layer, save):
    given = Arguments(x, weights, state, marks, layer)
    form, tensors = given.flat()
    if _is_recorded(tensors):
        return list(_Recurrent.apply(form, save, *tensors))
    with _below_autograd():
        return recurrent(*given, save)


@_differentiated(recurrent_backward)
def _(token, doutputs, x, weights, state, marks, layer, trains):
    given = Arguments(x, weights, state, marks, layer)
    form, tensors = given.flat()
    if _is_recorded([*tensors, *doutputs]):
        return list(_RecurrentBackward.apply(form, trains, token, *tensors, *doutputs))
    with _below_autograd():
        return recurrent_backward(token, doutputs, *given, trains)


@_differentiated(recurrent_second_backward)
def _(vectors, doutputs, x, weights, state, marks, layer):
    given = Arguments(x, weights, state, marks, layer)
    form, tensors = given.flat()
    if _is_recorded([*tensors, *vectors, *doutputs]):
        return list(_RecurrentSecondBackward.apply(form, len(vectors), *tensors, *vectors, *doutputs))
    with _below_autograd():
        return recurrent_second_backward(vectors, doutputs, *given)


def _is_recorded(tensors):
    return torch.is_grad_enabled() and any(one.requires_grad for one in tensors)
