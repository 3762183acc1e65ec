"""Layers with other numbers of heads, of the same weights."""

from __future__ import annotations

import copy
from typing import NamedTuple

import numpy as np

from ..errors import check_flag, described
from ..module import refuse_quantized
from .heads import check_heads
from .layer import Recurrent
from .one_step import SingleStep


def with_heads(layer: Recurrent, heads: int, *, mix_heads: bool = True) -> Recurrent:
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
    mix_heads : bool
        As the argument of the layer. Without it the input weights, too, are left with the blocks on their diagonals.

    Raises
    ------
    TypeError
        For what is no recurrent layer, or a single step.
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
    if not isinstance(layer, Recurrent) or isinstance(layer, SingleStep):
        raise TypeError(f"layer: expected a recurrent layer, got {described(layer)}")
    refuse_quantized(layer, "with_heads")
    heads = check_heads(heads, layer.hidden_sizes, layer.proj_size)
    if max(heads, layer.heads) % min(heads, layer.heads):
        raise ValueError(f"heads: {layer.heads} and {heads} heads have no common blocks: one has to divide the other")
    if layer._cell.means:
        raise ValueError(f"heads: the cell {layer._cell.name} has means over the units of a head")
    made, values = copy.deepcopy(layer), {}
    before, after = (Division(one, mixes) for one, mixes in ((layer.heads, layer.mix_heads), (heads, mix_heads)))
    for _, k, _, suffix in layer._passes():
        for name in [name for name in layer.params if name.endswith(suffix)]:
            array = layer.ops.to_numpy(layer.params[name])
            if not name.startswith("initial_"):
                array = after.divided(before.whole(array, layer.hidden_sizes[k], name), name)
            values[name] = array
    made.__dict__["mix_heads"] = check_flag("mix_heads", mix_heads)
    made._set_heads(heads)
    made._declare(values)
    return made


class Division(NamedTuple):
    """How the units of a layer are divided into heads."""

    heads: int
    mix_heads: bool

    def _by_head(self, name):
        """Whether the columns of a parameter are divided, too: of W_hh, and of W_ih where heads read parts of x."""
        return name.startswith("weight_hh") or (name.startswith("weight_ih") and not self.mix_heads)

    def whole(self, array, H, name):
        """A parameter by gate and unit: (gates, H, ...), with zeros between the heads."""
        N = self.heads
        parts = array.reshape(N, -1, H // N, *array.shape[1 + (N > 1) :])  # (heads, gates, H / heads, ...)
        if not self._by_head(name):
            return np.concatenate(list(parts), axis=1)
        rows, columns = parts.shape[2:]
        whole = np.zeros((parts.shape[1], H, N * columns), array.dtype)
        for n, part in enumerate(parts):
            whole[:, n * rows : (n + 1) * rows, n * columns : (n + 1) * columns] = part
        return whole

    def divided(self, whole, name):
        """The reverse of ``whole``."""
        parts = np.split(whole, self.heads, axis=1)
        if self._by_head(name):
            parts = [np.split(part, self.heads, axis=2)[n] for n, part in enumerate(parts)]
        flat = [part.reshape(-1, *part.shape[2:]) for part in parts]
        return flat[0] if self.heads == 1 else np.stack(flat)
