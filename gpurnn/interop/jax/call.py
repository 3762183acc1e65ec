"""From arrays and options of a user to the operator: what is read from parameters, what is checked, which axes."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from ...dtypes import DTYPES, compute_dtype, dtype_name
from ...errors import DtypeError, ShapeError, check_choice, check_flag
from ...masks import check_lengths
from ..arguments import Arguments
from ..configuration import configure, evaluating, find, flat_state, nested_state
from .operators import forward, state_dtypes

_ELSEWHERE = {
    "seed": "Random masks and initial values come from key",
    "dtype": "Results have the dtype of x",
    "device": "Everything is computed on the host",
}
_BACKENDS = ("auto", "numpy", "cpu")
_READ = "input_size", "hidden_size", "num_layers", "bidirectional", "bias", "proj_size", "heads", "learn_state"
_PLACE = re.compile(r"_l(\d+)(_reverse)?$")


def initial_params(kind: str, key: jax.Array, arguments: dict[str, Any], dtype: Any) -> dict[str, jax.Array]:
    """Name -> array of each parameter of a layer. kind: a name in ``interop.configuration.KINDS``."""
    _refuse(kind, arguments)
    arguments.pop("batch_first", None)
    text, dtype = configure(kind, arguments), _known_dtype("dtype", dtype)
    found, computed = find(text), compute_dtype(dtype)
    shapes = [jax.ShapeDtypeStruct(shape, computed) for shape in found.shapes]
    values = jax.ffi.ffi_call("gpurnn_initial", shapes, vmap_method="sequential")(_words(key), call=text)
    return {name: value.astype(dtype) for name, value in zip(found.names, values, strict=True)}


def call_layer(
    kind: str,
    params: Mapping[str, ArrayLike],
    x: ArrayLike,
    state: Any,
    marks: tuple[Any, Any, Any],
    key: jax.Array | None,
    options: dict[str, Any],
) -> tuple[jax.Array, Any]:
    """Output and final state, as ``lstm`` returns them. marks: lengths, reset, mask."""
    _refuse(kind, options)
    batch_first = check_flag("batch_first", options.pop("batch_first", False))
    params, x = {name: jnp.asarray(one) for name, one in params.items()}, jnp.asarray(x)
    text = configure(kind, options | sizes_of(kind, params, options))
    text = evaluating(text) if key is None else text
    found, axes = find(text), _Axes(x.ndim == 2, batch_first)
    weights = _checked_params(found, params, _known_dtype("x", x.dtype))
    _check_input(found, x)
    steps = axes.inward(x)
    (T, B, _), (lengths, reset, mask) = steps.shape, marks
    given = [] if state is None else _checked_state(found, state, () if axes.single else (B,))
    reset, mask = (_checked_mark(axes, *one, x.shape[:-1]) for one in (("reset", reset), ("mask", mask)))
    inner = [axes.lifted(part.astype(dtype)) for part, dtype in zip(given, state_dtypes(found, x.dtype), strict=False)]
    words = _words(key) if key is not None and found.draws else None
    all_marks = [_checked_lengths(lengths, T, B, axes), reset, mask, words]
    form, arrays = Arguments(steps, weights, inner, all_marks, text).flat()
    output, *final = forward.bind(*arrays, form=form, save=False)
    dtypes = [part.dtype for part in given] or [x.dtype] * len(final)
    final = [axes.lowered(part).astype(dtype) for part, dtype in zip(final, dtypes, strict=True)]
    return axes.outward(output), nested_state(found.state, final)


class _Axes(NamedTuple):
    """The axes of a call: whether x is (T, I) alone, or (B, T, I)."""

    single: bool
    batch_first: bool

    def lifted(self, array):
        """With an axis B of one sequence as axis 1."""
        return array[:, None] if self.single else array

    def lowered(self, array):
        """Without it."""
        return array[:, 0] if self.single else array

    def inward(self, array):
        """The steps of a user as (T, B, ...)."""
        return array[:, None] if self.single else jnp.swapaxes(array, 0, 1) if self.batch_first else array

    def outward(self, array):
        """The reverse."""
        return array[:, 0] if self.single else jnp.swapaxes(array, 0, 1) if self.batch_first else array


# ---- what parameters say


def sizes_of(kind: str, params: Mapping[str, jax.Array], options: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a layer that its parameters tell. options: the others."""
    for name in _READ:
        if name in options:
            raise TypeError(f"{name}: the parameters tell it. Leave it out")
    places = [match for match in map(_PLACE.search, params) if match]
    first = params.get("weight_ih_l0")
    if not places or first is None or first.ndim not in (2, 3):
        raise ValueError(
            "params: expected weight_ih_l0 (G*H, I) and the others of a layer of gpurnn, got "
            f"{', '.join(sorted(params)) or 'none'}"
        )
    heads = first.shape[0] if first.ndim == 3 else 1
    cell = find(configure(kind, options | {"input_size": heads, "hidden_size": heads} | _alone(options))).layer.cell
    hidden, projected = [], 0
    for k in range(1 + max(int(match[1]) for match in places)):
        rows, narrow = params.get(f"weight_ih_l{k}", first).shape[-2], params.get(f"weight_hr_l{k}")
        hidden.append(max(1, rows * heads // len(cell.gates)))
        projected = 0 if narrow is None else narrow.shape[0]
    parted = heads if not options.get("mix_heads", True) else 1
    return {
        "input_size": first.shape[-1] * parted,
        "hidden_size": hidden if len(set(hidden)) > 1 else hidden[0],
        "num_layers": len(hidden),
        "bidirectional": any(match[2] for match in places),
        "bias": "bias_ih_l0" in params or not cell.biases,
        "heads": heads,
        "learn_state": any(name.startswith("initial_") for name in params),
    } | ({"proj_size": projected} if projected else {})


def _alone(options):
    """What a layer of its own cannot have, of options for a stack."""
    return {name: value for name, value in (("dropout", 0.0), ("residual", False)) if name in options}


def _checked_params(found, params, dtype):
    """The parameters in the order of the layer, in what they are computed in."""
    missing, more = [name for name in found.names if name not in params], params.keys() - set(found.names)
    if missing or more:
        texts = [f"{what} {', '.join(sorted(names))}" for what, names in (("lacks", missing), ("has", more)) if names]
        raise ValueError(
            f"params: a layer of these options and sizes has {', '.join(found.names)}; this one {' and '.join(texts)}"
        )
    for name, shape in zip(found.names, found.shapes, strict=True):
        if params[name].shape != shape:
            raise ShapeError(f"params: expected {name} of shape {shape}, got {params[name].shape}")
        if params[name].dtype not in (dtype, compute_dtype(dtype)):
            raise DtypeError(
                f"params: expected {name} of dtype {dtype_name(dtype)}, that of x, got {params[name].dtype}. Convert "
                "one of them with .astype()"
            )
    return [params[name].astype(compute_dtype(dtype)) for name in found.names]


# ---- what a call is given


def _refuse(kind, options):
    for name, value in options.items():
        if isinstance(value, jax.core.Tracer):
            raise TypeError(
                f"{name}: an option decides what is compiled, and so jit must not trace it. Give it to "
                "functools.partial, or name it in static_argnames"
            )
    for name, why in _ELSEWHERE.items():
        if name in options:
            raise TypeError(f"{kind.lower()}() takes no argument {name!r}. {why}")
    if "backend" in options:
        check_choice("backend", options["backend"], _BACKENDS)


def _known_dtype(name, dtype):
    """A dtype that layers have, and that JAX has now. Raises DtypeError."""
    if not any(dtype == jnp.dtype(one) for one in DTYPES):
        raise DtypeError(f"{name}: expected dtype {', '.join(DTYPES[:-1])} or {DTYPES[-1]}, got {dtype}")
    dtype = jnp.dtype(dtype)
    if dtype != jax.dtypes.canonicalize_dtype(dtype):
        raise DtypeError(f"{name}: float64 is off in JAX. Run jax.config.update('jax_enable_x64', True) first")
    return dtype


def _check_input(found, x):
    size = found.layer.input_size
    if x.ndim not in (2, 3) or x.shape[-1] != size:
        raise ShapeError(f"x: expected (T, B, {size}), or (T, {size}) for one sequence, got shape {x.shape}")


def _checked_state(found, state, batch):
    """The parts of a state. batch: (B,), or () for one sequence."""
    given = [jnp.asarray(part) for part in flat_state(found.state, state, "state", "array")]
    for part, array in zip((part for parts in found.state for part in parts), given, strict=True):
        expected = (part.rows, *batch, part.size)
        if array.shape != expected:
            raise ShapeError(f"state: expected {part.kind} of shape {expected}, got {array.shape}")
        _known_dtype("state", array.dtype)
    return given


def _checked_mark(axes, name, mark, shape):
    """``reset`` or ``mask`` as (T, B)."""
    if mark is None:
        return None
    mark = jnp.asarray(mark)
    if mark.dtype != bool:
        raise DtypeError(f"{name}: expected booleans, got {mark.dtype}. Convert them with .astype(bool)")
    if mark.shape != shape:
        raise ShapeError(f"{name}: expected shape {shape}, the axes of x, got {mark.shape}")
    return axes.inward(mark)


def _checked_lengths(lengths, T, B, axes):
    """(B,) of int32. What a compiled call is given is checked when it runs."""
    if lengths is None:
        return None
    if any(isinstance(one, jax.core.Tracer) for one in jax.tree.leaves(lengths)):
        lengths = jnp.asarray(lengths)
        lengths = lengths[None] if axes.single and lengths.ndim == 0 else lengths
        if lengths.shape != (B,) or not jnp.issubdtype(lengths.dtype, jnp.integer):
            raise ShapeError(f"lengths: expected {B} integers, got shape {lengths.shape} of {lengths.dtype}")
        if lengths.dtype.itemsize > 4:  # 32 bits would make another length of one that is too large
            lengths = jnp.minimum(lengths, T + 1)
            lengths = jnp.maximum(lengths, -1) if jnp.issubdtype(lengths.dtype, jnp.signedinteger) else lengths
        return lengths.astype(jnp.int32)
    lengths = [lengths] if axes.single and jnp.ndim(lengths) == 0 else lengths
    return jnp.asarray(check_lengths(lengths, T, B, batch_first=axes.batch_first), jnp.int32)


def _words(key):
    """Two numbers of 32 bits from a key of ``jax.random``."""
    return jax.random.bits(key, (2,), "uint32")
