"""All states and gates of a call, which ``return_all`` returns."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from .._typing import Array
from ..backends.marks import HELD, Marks
from .axes import outward


@dataclass
class Steps:
    """All timesteps of one layer and direction, as a call with ``return_all`` returns them.

    Arrays have the layer's dtype (states besides h are float32 beside 16-bit numbers), are zero past the end of a
    sequence and where it is masked, and have the axes of the output: (B, T, ...) with ``batch_first``, (T, ...) for one
    sequence.

    Attributes
    ----------
    h : Array
        (T, B, P), hidden states.
    others : dict
        Name -> (T, B, H), the states besides h: "c" of the LSTM.
    gates : dict
        Name -> activated values (T, B, H): i f g o of the LSTM; r z n of the GRU, and q = W_hn h + b_hn with
        ``reset_after``, else p = r h. The RNN has none.
    """

    h: Array
    others: dict[str, Array] = field(default_factory=dict)
    gates: dict[str, Array] = field(default_factory=dict)

    @property
    def c(self) -> Array | None:
        """(T, B, H), the cell states of the LSTM; None of a cell without."""
        return self.others.get("c")


def copied_steps(layer, passes, lengths):
    """For each direction the ``Steps`` (T, B, ...). passes: the ``SavedPass`` of each strand."""
    return [_copied(layer, passes[n : n + layer.heads], lengths) for n in range(0, len(passes), layer.heads)]


def _copied(layer, heads, lengths):
    """The ``Steps`` of one direction. heads: the ``SavedPass`` of each."""
    cell, marks = layer.cell, heads[0].marks
    H = heads[0].gates.shape[2] // cell.saved_blocks

    def copied(arrays):
        whole = layer.ops.side_by_side(arrays, layer.ops.empty)
        return layer.ops.zero_silent(whole, lengths, marks and Marks(marks.bits & np.uint8(HELD)))

    def block(name):
        k = cell.saved.index(name)
        return copied([one.gates[:, :, k * H : (k + 1) * H] for one in heads])

    others = {name: copied([one.others_new[k] for one in heads]) for k, name in enumerate(cell.states[1:])}
    return Steps(copied([one.h_new for one in heads]), others, {name: block(name) for name in cell.shown})


def outward_steps(layer, steps, single):
    """``Steps`` with the caller's axes."""
    others, gates = (
        {name: outward(layer, array, single) for name, array in arrays.items()}
        for arrays in (steps.others, steps.gates)
    )
    return Steps(outward(layer, steps.h, single), others, gates)
