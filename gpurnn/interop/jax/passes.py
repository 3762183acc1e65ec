"""The passes of a layer as XLA calls them: on the host, from arrays to arrays."""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence

import numpy as np

from ..._typing import Array
from ...backends import get_backend
from ..arguments import Form
from ..configuration import find, flat_state, initial_values, nested_state, stand_in
from ..derivatives import second_derivatives
from .saved import Recording, Replaying


def written(form: Form, wanted: Sequence[bool] = ()) -> str:
    """The text from which a pass knows what to do: ``form``; whether a gradient with respect to x is wanted, and to
    each of the weights."""
    return json.dumps([*form, wanted])


@functools.lru_cache(maxsize=1024)
def _read(text):
    """The ``Form``, and what is wanted."""
    *form, marks, wanted = json.loads(text)
    return Form(*form, tuple(marks)), wanted


def result_count(form: Form) -> int:
    """How many results a forward pass has: the output, and the parts of the final state."""
    return 1 + sum(map(len, find(form.layer).state))


def _given(marks):
    """The arguments of a layer's call that are no states, and the seed of its random masks."""
    lengths, reset, mask, key = marks
    return {"lengths": lengths, "reset": reset, "mask": mask}, 0 if key is None else seed_of(key)


def seed_of(key: Array) -> int:
    """The seed, 0 to 2^62 - 1, of a key: two numbers of 32 bits."""
    return (int(key[0]) << 32 | int(key[1])) >> 2


def _prepared(form, arrays, wrap):
    """The layer of a call, its arguments, and the arrays that are left. wrap: of its ``Ops``."""
    (x, weights, state, marks, text), rest = form.arguments(arrays)
    found = find(text)
    ops = get_backend("cpu" if found.backend == "auto" else found.backend)
    given, seed = _given(marks)
    layer = stand_in(found, wrap(ops), x.dtype, weights, seed)
    return layer, {"x": x, "state": nested_state(found.state, state) if state else None} | given, rest


def _fill(results, made):
    for into, array in zip(results, made, strict=True):
        into[...] = array


def forward(text: str, arrays: list[Array], results: list[Array]) -> None:
    """Output and parts of the final state, and what ``backward`` needs."""
    form, _ = _read(text)
    state, count = find(form.layer).state, result_count(form)
    saved = results[count:]
    layer, given, _ = _prepared(form, arrays, lambda ops: Recording(ops, saved) if saved else ops)
    output, final = layer.forward(**given)[:2] if saved else layer(**given)
    _fill(results[:count], [output, *flat_state(state, final)])


def backward(text: str, arrays: list[Array], results: list[Array]) -> None:
    """What is wanted of the gradients with respect to x, to each weight, and those with respect to the initial state.

    It works in the memory of what was saved, which is at the end of ``results``. Where nothing was saved, the forward
    pass runs again.
    """
    form, (wants_dx, *trained) = _read(text)
    found = find(form.layer)
    names = [name for name, wanted in zip(found.names, trained, strict=True) if wanted]
    dx, rest = results[:wants_dx], results[wants_dx:]
    dweights, dstate, saved = rest[: len(names)], rest[len(names) :][: form.state], rest[len(names) + form.state :]
    layer, given, gradients = _prepared(form, arrays, lambda ops: Replaying(ops, saved, wants_dx) if saved else ops)
    run_back = layer.forward(**given)[-1]
    for array in dweights:
        array[...] = 0
    layer.grads._arrays = dict(zip(names, dweights, strict=True))
    layer._frozen[0].update(name for name in found.names if name not in names)
    doutput, *dfinal = gradients[: result_count(form)]
    made, dinitial = run_back(doutput, nested_state(found.state, dfinal))
    _fill(dx, [made] * wants_dx)
    if dstate:
        _fill(dstate, flat_state(found.state, dinitial))


def second(text: str, arrays: list[Array], results: list[Array]) -> None:
    """The gradients of a product with the results of ``backward``: see ``second_derivatives``."""
    form, _ = _read(text)
    (x, weights, state, marks, layer), rest = form.arguments(arrays)
    count = result_count(form)
    doubles = [one.astype(np.float64) for one in (x, *weights, *state, *rest[:count])]
    vectors = [one.astype(np.float64) for one in rest[count:]]
    given, seed = _given(marks)
    _fill(results, second_derivatives(layer, seed, doubles, vectors, given))


def initial(text: str, arrays: list[Array], results: list[Array]) -> None:
    """Initial values of the parameters of the layer of ``text``. arrays: a key."""
    _fill(results, initial_values(text, seed_of(arrays[0])).values())
