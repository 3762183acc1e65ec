"""Gates that were not saved, made again from the states that were.

A timestep reads x and the states before it. Where all states are saved, none waits for another: T timesteps of B
sequences are one timestep of T*B sequences, without a time loop, and the products of all of them with W_hh are one.
"""

from dataclasses import replace

import numpy as np

from .marks import HELD, RESET, Marks, read_states
from .records import RunOptions, SavedLayer, SavedPass


class FromStates:
    """The part of ``Ops`` that makes of its states what a layer returns and saves."""

    def all_states(self, saved):
        """For each direction of a ``SavedLayer`` its states, h (T+1, B, P) and the others (T+1, B, H). They stay as
        they are when the rest of it is gone."""
        return [(one.h, *one.others) for one in saved.passes]

    def output_of(self, passes, lengths, fresh):
        """The output (T, B, D*P) of a layer's passes. fresh: as ``RunOptions.fresh_output``."""
        outputs = [saved.h_new for saved in passes]
        if not fresh and len(outputs) == 1 and passes[0].marks is None:  # what is held may be NaN, and is read
            return outputs[0]
        whole = self.side_by_side(outputs, self.empty if fresh else self.empty_steps)
        return self.zero_silent(whole, lengths if fresh else None, passes[0].marks)

    def layer_rebuild(self, cell, x, weights, states, lengths, options):
        """What ``layer_forward`` returns with ``save``, but None instead of final states.

        states: from ``all_states``; it leaves them as they are. The rest as in ``layer_forward``.
        """
        (T, B, _), passes = x.shape, passes_of(states, options)
        output = self.output_of(passes, None, fresh=False)
        columns = len(weights[0].ih) // len(cell.gates) * cell.saved_blocks
        in_one = cell.saved and self.flat_rows >= T * B
        for one in passes:
            one.gates = None if in_one else self.empty_steps(T, B, columns, x.dtype)
            if one.marks is not None:  # the backward pass overwrites h where something is marked
                one.h = one.h.copy(order="K")
        for part, gates in self.rebuilt_gates(cell, x, weights, passes, lengths):
            for one, steps in zip(passes, gates, strict=True):
                if in_one:
                    one.gates = steps
                else:
                    self.copy_steps(one.gates[part], steps)
        return SavedLayer(cell, weights, x, lengths, passes), None, output

    def rebuilt_gates(self, cell, x, weights, passes, lengths):
        """For slices of T, one after another: itself, and for each pass the gates (t, B, K*H). Nothing for a cell that
        saves none."""
        T, B, _ = x.shape
        count = max(1, min(T, self.flat_rows // max(B, 1)))
        for part in (slice(t, min(t + count, T)) for t in range(0, T if cell.saved else 0, count)):
            within = None if lengths is None else lengths - part.start
            yield part, self.gates_at_once(cell, x[part], weights, [steps_within(one, part) for one in passes], within)

    @property
    def flat_rows(self):
        """Rows, timesteps times sequences, that are rebuilt at once. Array code makes several arrays of so many."""
        return self.chunk_rows // (16 if self.xp is np else 4)

    def gates_at_once(self, cell, x, weights, passes, lengths):
        """The gates (T, B, K*H) of each pass, by a call with one timestep.

        passes: ``SavedPass`` with all states. lengths: of the sequences, or None.
        """
        T, B, _ = x.shape
        states = [tuple(_flat(part) for part in read_states(self.xp, one)) for one in passes]
        masks, marks = ([make(one) for one in passes] for make in (self._flat_masks, self._flat_marks))
        if lengths is not None and marks[0] is None:
            held = self.xp.asarray(np.arange(T)[:, None] >= lengths) * np.uint8(HELD)
            marks = [Marks(held.reshape(1, -1))] * len(passes)
        options = RunOptions(
            (False,) * len(passes), save=True, fresh_output=False, flat=True,
            masks=None if masks[0] is None else tuple(masks), marks=None if marks[0] is None else tuple(marks),
        )  # fmt: skip
        saved = self.layer_forward(cell, x.reshape(1, T * B, -1), weights, states, None, options)[0]
        return [one.gates.reshape(T, B, -1) for one in saved.passes]

    def _flat_masks(self, one):
        if one.masks is None:
            return None
        T, B, _ = one.h_old.shape
        return self.xp.broadcast_to(one.masks, (T, *one.masks.shape[1:])).reshape(1, T * B, -1)

    @staticmethod
    def _flat_marks(one):
        """Without resets, after which ``read_states`` are."""
        return one.marks and Marks((one.marks.bits & np.uint8(~RESET & 0xFF)).reshape(1, -1))


def passes_of(states, options):
    """For each direction a ``SavedPass`` with these states and no gates. options: ``RunOptions``."""
    nothing = (None,) * len(states)
    rest = zip(options.directions, options.masks or nothing, options.marks or nothing, strict=True)
    return [
        SavedPass(None, h, tuple(others), reverse, masks, marks=marks)
        for (h, *others), (reverse, masks, marks) in zip(states, rest, strict=True)
    ]


def steps_within(one, part):
    """A ``SavedPass`` without gates for some of its timesteps. part: a slice of them."""
    slots = slice(part.start, part.stop + 1)
    return replace(
        one, h=one.h[slots], others=tuple(state[slots] for state in one.others),
        masks=one.masks[part] if one.masks is not None and len(one.masks) > 1 else one.masks,
        marks=one.marks and one.marks.within(part),
    )  # fmt: skip


def _flat(steps):
    """(T, B, F) as (T*B, F)."""
    return steps.reshape(-1, steps.shape[2])
