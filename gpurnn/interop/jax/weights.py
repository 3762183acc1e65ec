"""Weights of Flax's and equinox's cells for the functions here, and back.

Each conversion goes through one form: the four arrays of a layer as gpurnn has them, blocks of rows gate by gate. Flax
and equinox have the same gates in the same order. They differ in transposes, in names, and in having one bias vector.
Numbers are moved by NumPy: they are those of a model, and no part of a compiled function.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

_GATES = {"LSTM": ("i", "f", "g", "o"), "GRU": ("r", "z", "n"), "RNN": ("",)}
_NAMES = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")


class _Weights(NamedTuple):
    """The arrays of a layer: (G*H, I), (G*H, H), (G*H,), (G*H,); no biases are None."""

    ih: np.ndarray
    hh: np.ndarray
    bias_ih: np.ndarray | None
    bias_hh: np.ndarray | None


def from_flax(cell: Mapping[str, Any], layer: int = 0, reverse: bool = False) -> dict[str, jax.Array]:
    """The parameters for ``lstm``, ``gru`` or ``rnn`` from those of a cell of Flax.

    A stack of layers, or of directions, has one cell for each: ``from_flax(first) | from_flax(second, layer=1)``.

    Parameters
    ----------
    cell : mapping
        The parameters of ``flax.linen``'s ``OptimizedLSTMCell``, ``LSTMCell``, ``GRUCell`` or ``SimpleCell``, as
        ``cell.init`` returns them; or of those of ``flax.nnx``, ``nnx.to_pure_dict(nnx.state(cell))``.
    layer : int
        Which layer of the stack they become.
    reverse : bool
        Whether they become its second direction.

    Returns
    -------
    dict
        Name -> array, of one layer and direction.

    Raises
    ------
    ValueError
        For the parameters of another cell.

    Examples
    --------
    >>> import gpurnn.interop.jax as gj
    >>> cell = {"params": {"i": {"kernel": np.ones((8, 16)), "bias": np.zeros(16)}, "h": {"kernel": np.ones((16, 16))}}}
    >>> {name: array.shape for name, array in gj.from_flax(cell).items()}
    {'weight_ih_l0': (16, 8), 'weight_hh_l0': (16, 16), 'bias_ih_l0': (16,), 'bias_hh_l0': (16,)}
    """
    tree = cell.get("params", cell)
    kind, fused = _flax_kind(tree)

    def rows(side, what):
        """The blocks of all gates, transposed; zeros for a gate that has none, None where none has one."""
        parts = [tree[name].get(what) for name in _flax_names(tree, kind, fused, side)]
        some = next((np.asarray(one) for one in parts if one is not None), None)
        if some is None:
            return None
        return np.concatenate([np.zeros_like(some) if one is None else np.asarray(one).T for one in parts])

    bias_ih, bias_hh = rows("i", "bias"), rows("h", "bias")
    bias_ih = np.zeros_like(bias_hh) if bias_ih is None else bias_ih
    bias_hh = np.zeros_like(bias_ih) if bias_hh is None else bias_hh
    return _named(_Weights(rows("i", "kernel"), rows("h", "kernel"), bias_ih, bias_hh), layer, reverse)


def to_flax(
    params: Mapping[str, ArrayLike], cell: Mapping[str, Any], layer: int = 0, reverse: bool = False
) -> dict[str, Any]:
    """The parameters of a cell of Flax from those of a layer.

    Parameters
    ----------
    params : mapping
        Of ``lstm``, ``gru`` or ``rnn``.
    cell : mapping
        The parameters of the cell, as in ``from_flax``: their names and shapes count, not their values.
    layer : int
        Which layer of ``params`` is taken.
    reverse : bool
        Whether its second direction is.

    Returns
    -------
    dict
        As ``cell``, for ``cell.apply``; or for ``nnx.update(cell, ...)``.

    Raises
    ------
    ValueError
        For a layer that this cell cannot compute.

    Examples
    --------
    >>> import jax, gpurnn.interop.jax as gj
    >>> cell = {"params": {"i": {"kernel": np.ones((8, 16)), "bias": np.zeros(16)}, "h": {"kernel": np.ones((16, 16))}}}
    >>> made = gj.to_flax(gj.init_rnn(jax.random.key(0), 8, 16), cell)
    >>> jax.tree.map(np.shape, made)
    {'params': {'h': {'kernel': (16, 16)}, 'i': {'bias': (16,), 'kernel': (8, 16)}}}
    """
    tree = cell.get("params", cell)
    kind, fused = _flax_kind(tree)
    taken = _taken(params, layer, reverse)
    names = [_flax_names(tree, kind, fused, side) for side in "ih"]
    each = len(_GATES[kind]) // len(names[0])  # gates of a name
    with_x, with_h = ([one for name in some for one in ["bias" in tree[name]] * each] for some in names)
    made = {}
    for some, weight, bias in zip(names, (taken.ih, taken.hh), _divided(taken, with_x, with_h), strict=True):
        for name, kernel, vector in zip(some, *(np.split(one, len(some)) for one in (weight, bias)), strict=True):
            values = {"kernel": kernel.T, "bias": vector}
            made[name] = {what: _fitting(values[what], old, f"{name} {what}") for what, old in tree[name].items()}
    return {"params": made} if "params" in cell else made


def from_equinox(cell: Any, layer: int = 0, reverse: bool = False) -> dict[str, jax.Array]:
    """The parameters for ``lstm`` or ``gru`` from a cell of equinox.

    Parameters
    ----------
    cell : equinox.nn.LSTMCell or equinox.nn.GRUCell
        The cell.
    layer, reverse :
        As ``from_flax``.

    Returns
    -------
    dict
        Name -> array, of one layer and direction; without biases where the cell has none.

    Raises
    ------
    TypeError
        For what is no such cell.

    Examples
    --------
    >>> import types, gpurnn.interop.jax as gj
    >>> cell = types.SimpleNamespace(weight_ih=np.ones((64, 8)), weight_hh=np.ones((64, 16)), bias=np.zeros(64))
    >>> sorted(gj.from_equinox(cell))
    ['bias_hh_l0', 'bias_ih_l0', 'weight_hh_l0', 'weight_ih_l0']
    """
    _check_equinox(cell)
    bias_ih = bias_hh = None
    if cell.bias is not None:
        bias_ih, bias_hh = np.asarray(cell.bias), np.zeros_like(cell.bias)
        if getattr(cell, "bias_n", None) is not None:
            bias_hh[-len(cell.bias_n) :] = cell.bias_n
    return _named(_Weights(np.asarray(cell.weight_ih), np.asarray(cell.weight_hh), bias_ih, bias_hh), layer, reverse)


def to_equinox(params: Mapping[str, ArrayLike], cell: Any, layer: int = 0, reverse: bool = False) -> Any:
    """A cell of equinox with the parameters of a layer.

    Parameters
    ----------
    params : mapping
        Of ``lstm`` or ``gru``.
    cell : equinox.nn.LSTMCell or equinox.nn.GRUCell
        A cell of the same sizes, which stays as it is.
    layer, reverse :
        As ``to_flax``.

    Returns
    -------
    equinox.nn.LSTMCell or equinox.nn.GRUCell
        As ``cell``, with other arrays.

    Raises
    ------
    TypeError
        For what is no such cell.
    ValueError
        For a layer that this cell cannot compute.
    """
    _check_equinox(cell)
    taken, gates = _taken(params, layer, reverse), len(cell.weight_ih) // cell.weight_hh.shape[1]
    has_bias, has_n = cell.bias is not None, getattr(cell, "bias_n", None) is not None
    bias_ih, bias_hh = _divided(taken, [has_bias] * gates, [False] * (gates - 1) + [has_n])
    values = {"weight_ih": taken.ih, "weight_hh": taken.hh, "bias": bias_ih}
    if has_n:
        values["bias_n"] = bias_hh[-len(cell.bias_n) :]
    new = {id(getattr(cell, name)): (name, value) for name, value in values.items()}

    def replaced(leaf):
        if id(leaf) not in new:
            return leaf
        name, value = new[id(leaf)]
        return _fitting(value, leaf, name)

    return jax.tree.map(replaced, cell)


# ---- what both share


def _named(made, layer, reverse):
    suffix = f"_l{layer}" + ("_reverse" if reverse else "")
    return {name + suffix: jnp.asarray(array) for name, array in zip(_NAMES, made, strict=True) if array is not None}


def _taken(params, layer, reverse):
    """The ``_Weights`` of one layer and direction."""
    suffix = f"_l{layer}" + ("_reverse" if reverse else "")
    names = [name.removesuffix(suffix) for name in params if name.endswith(suffix)]
    unknown = sorted(set(names) - set(_NAMES))
    if not {"weight_ih", "weight_hh"} <= set(names) or unknown:
        text = f"has {', '.join(name + suffix for name in unknown)}, too" if unknown else "has not both"
        raise ValueError(f"params: expected weight_ih{suffix}, weight_hh{suffix} and their biases; this layer {text}")
    made = _Weights(*(np.asarray(params[name + suffix]) if name in names else None for name in _NAMES))
    if made.ih.ndim != 2:
        raise ValueError("params: a layer with heads has no such cell in Flax or equinox")
    return made


def _divided(taken, with_x, with_h):
    """Both biases of a layer, as a cell can hold them. with_x, with_h: for each gate, whether it has that bias.

    A sum of both does the same for all gates but the GRU's n, of which the one beside h is multiplied by r.
    """
    zeros = np.zeros(len(taken.ih), taken.ih.dtype)
    beside_x, beside_h = (zeros if bias is None else bias for bias in (taken.bias_ih, taken.bias_hh))
    blocks = zip(*(np.split(bias, len(with_x)) for bias in (beside_x, beside_h)), with_x, with_h, strict=True)
    made = []
    for gate, (x, h, has_x, has_h) in enumerate(blocks):
        if len(with_x) == 3 and gate == 2:
            if (np.any(h) and not has_h) or (np.any(x) and not has_x):
                raise ValueError("params: the cell has no place for both biases of the GRU's gate n")
            made.append((x, h))
        elif not has_x and not has_h and np.any(x + h):
            raise ValueError("params: the cell has no bias, and this layer has")
        else:
            made.append((x + h, 0 * h) if has_x else (0 * x, x + h))
    return tuple(np.concatenate(parts) for parts in zip(*made, strict=True))


def _fitting(value, old, name):
    if value.shape != np.shape(old):
        raise ValueError(f"params: the cell has {name} of shape {np.shape(old)}, and this layer {value.shape}")
    return jnp.asarray(value.astype(old.dtype))


def _flax_kind(tree):
    """The kind of a cell, and whether one matrix holds all of its gates, as in ``flax.nnx``."""
    if {"dense_i", "dense_h"} == set(tree):
        rows, columns = np.shape(tree["dense_h"]["kernel"])
        found = [kind for kind, gates in _GATES.items() if len(gates) * rows == columns]
        if found:
            return found[0], True
    for kind, gates in _GATES.items():
        names = {side + gate for side in "ih" for gate in gates}
        if {name.removesuffix("_") for name in tree} == names:
            return kind, False
    raise ValueError(
        "cell: expected the parameters of OptimizedLSTMCell, LSTMCell, GRUCell or SimpleCell of Flax, got the names "
        f"{', '.join(sorted(map(str, tree))) or 'of nothing'}"
    )


def _flax_names(tree, kind, fused, side):
    """The names of the parts of a cell beside x (side "i") or h ("h"), in the order of its gates."""
    if fused:
        return [f"dense_{side}"]
    return [name if (name := side + gate) in tree else f"{name}_" for gate in _GATES[kind]]  # nnx has if_


def _check_equinox(cell):
    if not all(hasattr(cell, name) for name in ("weight_ih", "weight_hh", "bias")):
        raise TypeError(f"cell: expected an LSTMCell or a GRUCell of equinox, got {type(cell).__name__}")
