"""The operators that torch sees: ``gpurnn::recurrent``, its backward, and the backward of that.

To torch they are opaque functions of tensors with a formula for their gradients, so that compiled and exported graphs
hold them as they are. What the forward pass saves lies in ``_saved`` for as long as a tensor lives, the token, that the
backward operator takes. The token is no more than a shortcut: without it, after a backward that has used up what was
saved, or when something has put a copy in the token's place, the forward pass runs again, with the same random masks.
"""

from __future__ import annotations

import secrets
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ... import tangents
from ...backends import get_backend
from ...recurrent import Recurrent
from .arrays import array_dtype, to_array, to_tensor, torch_stream
from .configuration import arguments_of, build, find, flat_state, nested_state, stand_in


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
    """A forward pass that has been run for training."""

    layer: Recurrent
    results: tuple[Any, Any]
    backward: Callable[..., Any]


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


def _run(layer, x, given):
    output, state, backward = layer.forward(x, **given)
    return Run(layer, (output, state), backward)


@torch.library.custom_op(
    "gpurnn::recurrent",
    mutates_args=(),
    schema="(Tensor x, Tensor[] weights, Tensor[] state, Tensor?[] marks, str layer, bool save) -> Tensor[]",
)
def recurrent(x, weights, state, marks, layer, save):
    """The output (T, B, D*P), the parts of the final state, and a token: empty unless a backward will follow."""
    found, marks = find(layer), Marks(*marks)
    with torch_stream(_ops(found, x).xp, x):
        made, array, given = _prepared(found, x, weights, state, marks)
        token = torch.empty(0, dtype=torch.int64)
        if save:
            run = _run(made, array, given)
            output, final = run.results
            output = output.copy()  # backward works in the memory of the other one
            token = _hold(run._replace(results=()))
        else:
            output, final = made(array, **given)
        parts = [to_tensor(made.ops, part.copy(), x).to(x.dtype) for part in flat_state(found.state, final)]
        return [to_tensor(made.ops, output, x), *parts, token]


@recurrent.register_fake
def _(x, weights, state, marks, layer, save):
    found, (T, B, _) = find(layer), x.shape
    parts = [x.new_empty((part.rows, B, part.size)) for parts in found.state for part in parts]
    return [x.new_empty((T, B, found.features)), *parts, torch.empty(int(save), dtype=torch.int64)]


@torch.library.custom_op(
    "gpurnn::recurrent_backward",
    mutates_args=(),
    schema="(Tensor token, Tensor[] doutputs, Tensor x, Tensor[] weights, Tensor[] state, Tensor?[] marks, str layer, "
    "bool[] trains) -> Tensor[]",
)
def recurrent_backward(token, doutputs, x, weights, state, marks, layer, trains):
    """The gradients with respect to x, to the weights (empty where they are not trained), and to the initial state."""
    found, marks = find(layer), Marks(*marks)
    with torch_stream(_ops(found, x).xp, x):
        run = _saved.pop(int(token), None) if token.numel() else None
        if run is None:
            run = _run(*_prepared(found, x, weights, state, marks))
        layer = run.layer
        grads = {
            name: layer.xp.zeros(shape, layer.compute_dtype)
            for name, shape, trained in zip(found.names, found.shapes, trains, strict=True)
            if trained
        }
        layer.grads._arrays = grads
        layer._frozen[0].update(name for name in found.names if name not in grads)
        doutput, *dfinal = (to_array(layer.ops, one) for one in doutputs)
        dx, dstate = run.backward(doutput, nested_state(found.state, dfinal))
        dweights = [
            to_tensor(layer.ops, grads[name], x).to(weight.dtype) if name in grads else weight.new_empty(0)
            for name, weight in zip(found.names, weights, strict=True)
        ]
        dparts = [part.copy() for part in flat_state(found.state, dstate)] if state else []
        return [to_tensor(layer.ops, dx, x), *dweights, *(to_tensor(layer.ops, part, x).to(x.dtype) for part in dparts)]


@recurrent_backward.register_fake
def _(token, doutputs, x, weights, state, marks, layer, trains):
    made = [_empty(w) if trained else w.new_empty(0) for w, trained in zip(weights, trains, strict=True)]
    return [_empty(x), *made, *map(_empty, state)]


@torch.library.custom_op(
    "gpurnn::recurrent_second_backward",
    mutates_args=(),
    schema="(Tensor[] vectors, Tensor[] doutputs, Tensor x, Tensor[] weights, Tensor[] state, Tensor?[] marks, "
    "str layer) -> Tensor[]",
)
def recurrent_second_backward(vectors, doutputs, x, weights, state, marks, layer):
    """The gradients with respect to doutputs, x, weights and state of the product of ``vectors`` with the results of
    ``recurrent_backward``.

    That product is <v, J'u>, with J the derivative of the forward pass and u = doutputs. With respect to u its gradient
    is Jv, the tangent of the forward pass along v. With respect to everything else it is the tangent of the backward
    pass along v, because second derivatives are symmetric. So one pass in forward mode over both gives all of it.
    """
    found, marks = find(layer), Marks(*marks)
    model = build(*arguments_of(layer), marks.seed(), dtype="float64", precision="float32")
    model.training, model.schedule = found.layer.training, "auto"
    on_host = [one.detach().cpu().double().numpy() for one in (*weights, x, *state, *doutputs)]
    params, inputs = dict(zip(found.names, on_host, strict=False)), on_host[len(weights) :]
    model.load_state_dict(params)
    along = [one.detach().cpu().double().numpy() if one.numel() else None for one in vectors]
    count, given = len(state), marks._replace(key=None).given(model.ops)

    def both(copied, x, *rest):
        initial = nested_state(found.state, rest[:count]) if count else None
        output, final, backward = copied.forward(x, initial, **given)
        dx, dinitial = backward(rest[count], nested_state(found.state, rest[count + 1 :]))
        return output, final, dx, dict(copied.grads), dinitial

    moved = {name: v for name, v in zip(found.names, along[1 : 1 + len(weights)], strict=True) if v is not None}
    directions = [along[0], *along[1 + len(weights) :], *[None] * len(doutputs)]
    output, final, dx, dweights, dinitial = tangents.jvp(model, both, moved, inputs, directions)[1]
    made = [output, *flat_state(found.state, final), dx, *(dweights[name] for name in found.names)]
    made += flat_state(found.state, dinitial) if count else []
    like = [*doutputs, x, *weights, *state]
    return [torch.tensor(array, dtype=one.dtype, device=one.device) for array, one in zip(made, like, strict=True)]


@recurrent_second_backward.register_fake
def _(vectors, doutputs, x, weights, state, marks, layer):
    return [_empty(one) for one in (*doutputs, x, *weights, *state)]


def _empty(tensor):
    return torch.empty_like(tensor, memory_format=torch.contiguous_format)


# ---- formulas: what autograd calls


class Arguments(NamedTuple):
    """The arguments that all three operators have."""

    x: Tensor
    weights: list[Tensor]
    state: list[Tensor]
    marks: list[Tensor | None]
    layer: str


def _save(ctx, given, *more):
    """Save ``given`` for the formula, and more tensors. torch refuses a backward after one of them was changed."""
    marks = [one for one in given.marks if one is not None]
    ctx.save_for_backward(given.x, *given.weights, *given.state, *marks, *more)
    ctx.counts, ctx.layer = (len(given.weights), len(given.state)), given.layer
    ctx.is_given = [one is not None for one in given.marks]


def _saved_arguments(ctx):
    """The ``Arguments`` that ``_save`` was given, and the other tensors."""
    x, *rest = ctx.saved_tensors
    weights, state = ctx.counts
    rest, marks = rest[weights + state :], rest[: weights + state]
    weights, state = marks[:weights], marks[weights:]
    marks = [rest.pop(0) if given else None for given in ctx.is_given]
    return Arguments(x, weights, state, marks, ctx.layer), rest


def _no_gradients(marks):
    """What a formula returns for marks: torch takes a list for a list of tensors, where none is missing."""
    return None if None in [one if one is None else 0 for one in marks] else [None] * len(marks)


def _save_forward(ctx, inputs, output):
    x, weights, state, marks, layer, _ = inputs
    _save(ctx, Arguments(x, weights, state, marks, layer), output[-1])


def _differentiate_forward(ctx, gradients):
    given, (token,) = _saved_arguments(ctx)
    trains = list(ctx.needs_input_grad[1])
    made = recurrent_backward(token, gradients[:-1], *given, trains)
    count = 1 + len(trains)
    dweights = [one if trained else None for one, trained in zip(made[1:count], trains, strict=True)]
    return made[0], dweights, made[count:], _no_gradients(given.marks), None, None


def _save_backward(ctx, inputs, output):
    _, doutputs, x, weights, state, marks, layer, _ = inputs
    _save(ctx, Arguments(x, weights, state, marks, layer), *doutputs)


def _differentiate_backward(ctx, vectors):
    given, doutputs = _saved_arguments(ctx)
    made = recurrent_second_backward(vectors, doutputs, *given)
    first, second = len(doutputs), len(doutputs) + 1 + len(given.weights)
    dx, dweights, dstate = made[first], made[first + 1 : second], made[second:]
    return None, made[:first], dx, dweights, dstate, _no_gradients(given.marks), None, None


def _refuse_third(ctx, gradients):
    raise RuntimeError(
        "gpurnn.interop.torch: a recurrent layer has first and second derivatives, and this needs third ones. For "
        "Hessian-vector products gpurnn.hvp needs no graph of the second derivative"
    )


recurrent.register_autograd(_differentiate_forward, setup_context=_save_forward)
recurrent_backward.register_autograd(_differentiate_backward, setup_context=_save_backward)
recurrent_second_backward.register_autograd(_refuse_third)
