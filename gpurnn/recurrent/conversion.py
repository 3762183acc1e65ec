"""Layers with other numbers of heads, of the same weights."""

from __future__ import annotations

import copy

import numpy as np

from .heads import check_heads
from .layer import Recurrent


def with_heads(layer: Recurrent, heads: int) -> Recurrent:
    """A layer with so many heads that has the weights of another one.

    To more heads, it has the blocks on the diagonals of the recurrent weights, and drops the others. To fewer heads,
    down to one, which is a dense layer, the blocks between heads are zero, and the results are the same but for
    rounding.

    Parameters
    ----------
    layer : Recurrent
        It stays as it is.
    heads : int
        N; one number of heads has to divide the other.

    Raises
    ------
    ValueError
        If heads do not divide the units, or neither number divides the other; for a cell with means over its units
        (layer norm), whose heads have means of their own, so that the results would be others.

    Examples
    --------
    >>> dense = gpurnn.LSTM(4, 6, backend="numpy", seed=0)
    >>> parts = gpurnn.recurrent.with_heads(dense, 3)
    >>> parts.params["weight_hh_l0"].shape, dense.params["weight_hh_l0"].shape
    ((3, 8, 2), (24, 6))
    >>> again = gpurnn.recurrent.with_heads(parts, 1)
    >>> int((again.params["weight_hh_l0"] == 0).sum())        # 4 * 6 * 6, without 3 blocks of 4 * 2 * 2
    96
    """
    heads = check_heads(heads, layer.hidden_sizes, layer.proj_size)
    if max(heads, layer.heads) % min(heads, layer.heads):
        raise ValueError(f"heads: {layer.heads} and {heads} heads have no common blocks: one has to divide the other")
    if layer._cell.means:
        raise ValueError(f"heads: the cell {layer._cell.name} has means over the units of a head")
    made, values = copy.deepcopy(layer), {}
    for _, k, _, suffix in layer._passes():
        for name in [name for name in layer.params if name.endswith(suffix)]:
            array = layer.ops.to_numpy(layer.params[name])
            if not name.startswith("initial_"):
                square = name.startswith("weight_hh")
                array = _in_heads(_whole(array, layer.heads, layer.hidden_sizes[k], square), heads, square)
            values[name] = array
    made._set_heads(heads)
    made._declare(values)
    return made


def _whole(array, heads, H, square):
    """A parameter of so many heads by gate and unit: (gates, H, ...). square: a product with h, (gates, H, H)."""
    parts = array.reshape(heads, -1, H // heads, *array.shape[1 + (heads > 1) :])  # (heads, gates, H / heads, ...)
    if not square:
        return np.concatenate(list(parts), axis=1)
    whole, h = np.zeros((parts.shape[1], H, H), array.dtype), H // heads
    for n, part in enumerate(parts):
        whole[:, n * h : (n + 1) * h, n * h : (n + 1) * h] = part
    return whole


def _in_heads(whole, heads, square):
    """The reverse of ``_whole``."""
    parts = np.split(whole, heads, axis=1)
    if square:
        parts = [np.split(part, heads, axis=2)[n] for n, part in enumerate(parts)]
    flat = [part.reshape(-1, *part.shape[2:]) for part in parts]
    return flat[0] if heads == 1 else np.stack(flat)
