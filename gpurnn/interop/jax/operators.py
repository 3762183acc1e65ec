"""The three operations that JAX differentiates, batches and compiles, with their rules.

``forward``, ``backward`` and ``second`` are primitives of JAX. Each runs on the host by a function of ``passes``. Where
a derivative is taken, ``forward`` also returns what ``backward`` needs: as arrays of the graph, so nothing stays behind
when they go. The derivatives are those of functions with a ``jax.custom_vjp``. These are inside of primitives, so that
a ``vmap`` within ``grad`` is one larger batch, with one sum for the gradients of the weights.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from ...dtypes import compute_dtype
from ..arguments import Form
from ..configuration import Configuration, find
from . import ffi, passes
from .saved import saved_shapes

forward, backward, second = (Primitive(f"gpurnn_{name}") for name in ("forward", "backward", "second"))


def state_dtypes(found: Configuration, dtype: Any) -> list[Any]:
    """The dtype of each part of a state within a call with x of this dtype: only h may have 16 bits."""
    return [compute_dtype(dtype) if kind else dtype for kind, parts in enumerate(found.state) for _ in parts]


def _shapes_of_results(form, x):
    """(shape, dtype) of the output and of the parts of the final state of x (T, B, I)."""
    found, (T, B, _) = find(form.layer), x.shape
    parts = [(part.rows, B, part.size) for parts in found.state for part in parts]
    return [((T, B, found.features), x.dtype), *zip(parts, state_dtypes(found, x.dtype), strict=True)]


def _shapes_of_forward(*arrays, form, save):
    x = arrays[0]
    saved = saved_shapes(find(form.layer).layer, *x.shape[:2], x.dtype) if save else []
    return _shapes_of_results(form, x) + saved


def _shapes_of_backward(*arrays, form, wanted):
    x, weights, state, _, _ = form.arguments(arrays)[0]
    found = [one for one, is_wanted in zip([x, *weights], wanted, strict=True) if is_wanted]
    return [(one.shape, one.dtype) for one in found + state]


def _shapes_of_second(*arrays, form):
    x, weights, state, _, _ = form.arguments(arrays)[0]
    return [*_shapes_of_results(form, x), *((one.shape, one.dtype) for one in (x, *weights, *state))]


# ---- on the host


def _call_forward(*arrays, form, save):
    return _call("forward", arrays, _shapes_of_forward(*arrays, form=form, save=save), passes.written(form))


def _call_backward(*arrays, form, wanted):
    """Its results. What was saved is given as memory to work in: XLA copies it first where it is needed again."""
    shapes = _shapes_of_backward(*arrays, form=form, wanted=wanted)
    saved = form.arguments(arrays)[1][passes.result_count(form) :]
    first = len(arrays) - len(saved)
    aliases = {first + k: len(shapes) + k for k in range(len(saved))}
    made = [*shapes, *((one.shape, one.dtype) for one in saved)]
    return _call("backward", arrays, made, passes.written(form, wanted), aliases)[: len(shapes)]


def _call_second(*arrays, form):
    return _call("second", arrays, _shapes_of_second(*arrays, form=form), passes.written(form))


def _call(name, arrays, shapes, text, aliases=None):
    """Run the function of ``passes`` of that name."""
    made = [jax.ShapeDtypeStruct(*one) for one in shapes]
    return jax.ffi.ffi_call(f"gpurnn_{name}", made, input_output_aliases=aliases)(*arrays, call=text)


# ---- derivatives: a function with a custom VJP for each rule


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _once(form: Form, save: bool, wanted: tuple[bool, ...], *arrays: Any) -> list[Any]:
    """What ``forward`` returns, differentiable. wanted: with respect to x, and to which weights."""
    return forward.bind(*arrays, form=form, save=save)


def _once_forward(form, save, wanted, *arrays):
    made, count = forward.bind(*arrays, form=form, save=True), passes.result_count(form)
    return made if save else made[:count], (arrays, made[count:])


def _once_backward(form, save, wanted, left, gradients):
    arrays, saved = left  # what is saved has no gradient of its own: the rule of ``backward`` has all there is
    made = backward.bind(*arrays, *gradients[: passes.result_count(form)], *saved, form=form, wanted=wanted)
    return _all_gradients(form, wanted, arrays, made)


_once.defvjp(_once_forward, _once_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _twice(form: Form, wanted: tuple[bool, ...], *arrays: Any) -> list[Any]:
    """What ``backward`` returns, differentiable."""
    return backward.bind(*arrays, form=form, wanted=wanted)


def _twice_forward(form, wanted, *arrays):
    return backward.bind(*arrays, form=form, wanted=wanted), arrays


def _twice_backward(form, wanted, arrays, vectors):
    _, rest = form.arguments(arrays)
    count = passes.result_count(form)
    arrays, doutputs, saved = arrays[: len(arrays) - len(rest)], rest[:count], rest[count:]
    made = second.bind(*arrays, *doutputs, *_with_zeros(form, wanted, arrays, vectors), form=form)
    with_respect_to_arrays = _all_gradients(form, (True,) * len(wanted), arrays, made[count:])
    return (*with_respect_to_arrays, *made[:count], *map(jnp.zeros_like, saved))


_twice.defvjp(_twice_forward, _twice_backward)


def _all_gradients(form, wanted, arrays, made):
    """For each of ``arrays`` its gradient, of the results of ``backward``: nothing for marks."""
    found = _with_zeros(form, wanted, arrays, made)
    nothing = [np.zeros(one.shape, jax.dtypes.float0) for one in arrays[len(found) :]]
    return (*found, *nothing)


def _with_zeros(form, wanted, arrays, made):
    """Gradients with respect to x, all weights and the initial state: what is not wanted is zero."""
    made = iter(made)
    found = [next(made) if one_wanted else jnp.zeros_like(one) for one, one_wanted in zip(arrays, wanted, strict=False)]
    return [*found, *made]


def _along(function, arrays, tangents):
    """Results of ``function`` of all arrays, and their tangents. Only those that move are differentiated."""
    moves = [k for k, tangent in enumerate(tangents) if type(tangent) is not ad.Zero]

    def of_moving(*moving):
        found = list(arrays)
        for k, one in zip(moves, moving, strict=True):
            found[k] = one
        return function(*found)

    return jax.jvp(of_moving, [arrays[k] for k in moves], [tangents[k] for k in moves])


def _forward_jvp(arrays, tangents, *, form, save):
    wanted = tuple(type(one) is not ad.Zero for one in tangents[: 1 + form.weights])
    return _along(functools.partial(_once, form, save, wanted), arrays, tangents)


def _backward_jvp(arrays, tangents, *, form, wanted):
    return _along(functools.partial(_twice, form, wanted), arrays, tangents)


def _second_jvp(arrays, tangents, *, form):
    raise NotImplementedError(
        "gpurnn.interop.jax: a recurrent layer has first and second derivatives, and this needs third ones. For a "
        "product with second ones differentiate the product of the gradient with a constant vector"
    )


# ---- batches


def _batched(primitive, folds):
    """The rule for ``vmap``: a larger batch where all share the weights, else one after another.

    folds: whether all results have an axis B, by the parameters of the call.
    """

    def rule(arrays, dims, **params):
        form = params["form"]
        axes = _batch_axes(form, arrays)
        shared = all(dim is None for axis, dim in zip(axes, dims, strict=True) if axis is None)
        if not shared or form.marks[3] or not folds(**params):
            return _one_by_one(primitive, arrays, dims, params)
        (size,) = {one.shape[dim] for one, dim in zip(arrays, dims, strict=True) if dim is not None}
        unfolded = [_beside(*each, size) for each in zip(arrays, dims, axes, strict=True)]
        B = unfolded[0].shape[2]
        folded = [
            one if axis is None else one.reshape(*one.shape[:axis], size * B, *one.shape[axis + 2 :])
            for one, axis in zip(unfolded, axes, strict=True)
        ]
        made = primitive.bind(*folded, **params)
        return [one.reshape(len(one), size, B, *one.shape[2:]) for one in made], [1] * len(made)

    return rule


def _batch_axes(form, arrays):
    """Which axis of each of ``arrays`` is B: None for weights and for the key."""
    given, rest = form.arguments(arrays)
    marks = [axis for axis, one in zip((0, 1, 1, None), given.marks, strict=True) if one is not None]
    return [1, *[None] * form.weights, *[1] * form.state, *marks, *[1] * len(rest)]


def _beside(array, dim, axis, size):
    """``array`` with the axis of ``vmap``, which is ``dim``, before its axis B, which is ``axis``."""
    if axis is None:
        return array
    if dim is not None:
        return jnp.moveaxis(array, dim, axis)
    return jnp.broadcast_to(jnp.expand_dims(array, axis), (*array.shape[:axis], size, *array.shape[axis:]))


def _one_by_one(primitive, arrays, dims, params):
    mapped = [jnp.moveaxis(one, dim, 0) for one, dim in zip(arrays, dims, strict=True) if dim is not None]

    def call(some):
        some = iter(some)
        return primitive.bind(
            *(a if dim is None else next(some) for a, dim in zip(arrays, dims, strict=True)), **params
        )

    made = jax.lax.map(call, mapped)
    return made, [0] * len(made)


# ---- registration


def _register(primitive, shapes, call, derivative, folds):
    def abstract(*arrays, **params):
        return [jax.core.ShapedArray(*one) for one in shapes(*arrays, **params)]

    @functools.cache
    def compiled(**params):
        """What runs outside of ``jit``."""
        return jax.jit(functools.partial(primitive.bind, **params))

    primitive.multiple_results = True
    primitive.def_abstract_eval(abstract)
    primitive.def_impl(lambda *arrays, **params: compiled(**params)(*arrays))
    mlir.register_lowering(primitive, mlir.lower_fun(call, multiple_results=True), platform="cpu")
    ad.primitive_jvps[primitive] = derivative
    batching.primitive_batchers[primitive] = _batched(primitive, folds)


_register(forward, _shapes_of_forward, _call_forward, _forward_jvp, lambda form, save: True)
_register(backward, _shapes_of_backward, _call_backward, _backward_jvp, lambda form, wanted: not any(wanted[1:]))
_register(second, _shapes_of_second, _call_second, _second_jvp, lambda form: False)
for _function in (passes.forward, passes.backward, passes.second, passes.initial):
    ffi.register(f"gpurnn_{_function.__name__}", _function)
