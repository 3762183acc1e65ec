"""What a training call would take at its peak: its arrays, added up as forward and backward make and free them."""

from __future__ import annotations

import itertools
from typing import Any, NamedTuple

from ..backends.cpu.memory import pool_room
from ..backends.time_loop import INCOMING


class Shape(NamedTuple):
    """How a call is cut. lengths: timesteps of each segment, in the order of the time loop. states: whether all states
    are saved. marked: whether there are lengths, resets or masks, for which the input is copied."""

    lengths: tuple[int, ...]
    B: int
    states: bool = False
    marked: bool = False

    @property
    def T(self) -> int:  # noqa: N802
        """Timesteps of the call."""
        return sum(self.lengths)

    @property
    def segments(self) -> int:
        """How many segments there are."""
        return len(self.lengths)


def mask_bytes(layer: Any, T: int, B: int) -> int:
    """Bytes of the random masks of a training call: of cells, of recurrent weights, of the dropout between layers."""
    draws, total = layer.cell.draws, 0
    steps = T if any(draw.each == "timestep" for draw in draws) else min(T, 1)
    for _, k, _, suffix in layer._passes():
        total += steps * B * layer._sizes(k)[1] * len(draws)
        name = "weight_hh" + suffix
        total += layer.params[name].size if layer.weight_dropout and name in layer.params else 0
    between = range(1, layer.num_layers) if layer.dropout else ()
    return total + sum(T * B * layer._sizes(k)[0] for k in between)


def added(layer: Any, k: int) -> bool:
    """Whether the input of layer ``k`` is added to its output."""
    I, _, P = layer._sizes(k)
    return bool(layer.residual and k and P * len(layer._directions) == I)


class Ledger:
    """Bytes in use. pooled: whether freed arrays are held for others of their size, as the backend "cpu" does."""

    def __init__(self, pooled):
        self.pooled, self.unused = pooled, {}
        self.now = self.peak = 0

    def take(self, size, own=True):
        """An array of ``size`` bytes: what ``free`` takes. own: whether ``Ops`` makes it, so that it may be pooled."""
        room = pool_room(size) if self.pooled and own else None
        if room and self.unused.get(room):
            self.unused[room] -= 1
        else:
            self.now += room or size
            self.peak = max(self.peak, self.now)
        return room or size, bool(room)

    def free(self, *arrays):
        for size, pooled in arrays:
            if pooled:
                self.unused[size] = self.unused.get(size, 0) + 1
            else:
                self.now -= size

    def briefly(self, size):
        """An array of NumPy's that is freed at once."""
        self.free(self.take(size, own=False))

    def trim(self):
        """As ``Ops.trim``."""
        self.now -= sum(size * count for size, count in self.unused.items())
        self.unused.clear()


class Saved(NamedTuple):
    """The arrays of one layer in a segment, in bytes. x: a copy of its input."""

    x: list[Any]
    gates: list[Any]
    h: list[Any]
    others: list[Any]
    output: list[Any]


class Rehearsal:
    """One training call, array by array. compiled: whether the time loop is compiled code of the CPU."""

    def __init__(self, layer: Any, shape: Shape, compiled: bool) -> None:
        self.layer, self.shape, self.compiled = layer, shape, compiled
        self.ledger = Ledger(layer.ops.name == "cpu")
        self.size, self.real = layer.dtype.itemsize, layer.compute_dtype.itemsize
        self.D = len(layer._strands)
        self.by_direction = len(set(layer._directions)) > 1 and shape.segments > 1
        self.cut = layer.memory is not None and shape.segments > 1

    def _sizes(self, k):
        """(I, H, P) of a strand of layer ``k``."""
        I, H, P = self.layer._sizes(k)
        return I, H // self.layer.heads, P // self.layer.heads

    def peak(self) -> int:
        """Bytes at the peak, beyond what the caller holds."""
        self._draw()
        if self.by_direction:
            self._directions()
        elif self.cut:
            self._segments()
        else:
            self._whole()
        return self.ledger.peak

    def _draw(self):
        """The masks of the whole call."""
        layer, ledger = self.layer, self.ledger
        ledger.now += mask_bytes(layer, self.shape.T, self.shape.B)
        ledger.now += self.shape.marked * len(layer._directions) * self.shape.T * self.shape.B
        if layer.weight_dropout:  # the weights without the dropped ones, and their gradients
            hh = [array for name, array in layer.params.items() if name.startswith("weight_hh")]
            ledger.now += sum(2 * array.size * array.itemsize for array in hh)

    # ---- one layer

    def _forward(self, k, t, save, fresh, D):
        """A layer's forward pass of t timesteps and D directions."""
        cell, (I, H, P), B, take = self.layer.cell, self._sizes(k), self.shape.B, self.ledger.take
        slots, blocks = t + 1 if save else 2, cell.saved_blocks if save else len(cell.gates)
        copied = self.compiled and self.layer.batch_first and not k
        saved = Saved([take(t * B * I * self.size)] if copied else [], [], [], [], [])
        if self.shape.marked and not k:
            saved.x.append(take(t * B * I * self.size, own=False))
        wanted = fresh or D > 1 or self.shape.marked
        if wanted and self.compiled:
            saved.output.append(take(t * B * D * P * self.size))
        for _ in range(D):
            steps = 1 if self.compiled and not save else t
            saved.gates.append(take(steps * B * blocks * H * self.size))
            if self.size == 2 and not self.compiled:  # products of chunks in float32
                self.ledger.briefly(self._rows(t) * (I + len(cell.gates) * H) * 4)
            saved.h.append(take((t + 1) * B * P * self.size))
            saved.others.append(take(slots * B * H * self.real * (len(cell.states) - 1)))
            if not save and not self.compiled:
                self._free(saved.gates, saved.others)
        if wanted and not self.compiled:
            saved.output.append(take(t * B * D * P * self.size))
        if not save and self.compiled:
            self._free(saved.gates, saved.others)
        return saved

    def _rows(self, t):
        """Rows of the longest chunk in t timesteps."""
        B = self.shape.B
        return B * max((part.stop - part.start for part in self.layer.ops.time_chunks(t, B)), default=0)

    def _backward(self, k, t, saved, D, copied, into=False):
        """A layer's backward pass; frees all but the gradient with respect to its input, which it returns.

        copied: whether the gradient with respect to its output is. into: whether dx is added to an array.
        """
        cell, (I, H, P), B, take = self.layer.cell, self._sizes(k), self.shape.B, self.ledger.take
        dy = [take(t * B * D * P * self.size, own=False)] if copied and self.compiled else []
        if not self.compiled:
            dy.append(take(max(1, min(t, INCOMING // max(1, B * P))) * B * P * self.size))
        steps = [take(t * B * P * self.size) for _ in range(D)] if P != H else []
        self._free(dy)
        if not self.compiled:
            self.ledger.briefly(len(cell.gates) * H * max(I, P) * self.real)  # a product before it is added
        if cell.apart:  # NumPy copies a block whose overlap with another it cannot rule out
            self.ledger.briefly(self._rows(t) * H * self.size)
        if not into:
            self._free(saved.others[:1])
            rounded = [take(len(cell.gates) * H * I * 2, own=False)] if self.size == 2 and self.compiled else []
            dx = [take(t * B * I * self.size)]
            self._free(rounded)
        else:
            dx = []
        if not self.compiled and (D > 1 or into):
            self.ledger.briefly(self._rows(t) * I * self.real)
        self._free(saved.others[len(saved.others) if into else 1 :] if not into else saved.others)
        self._free(saved.x, saved.gates, saved.h, saved.output, steps)
        return dx

    def _between(self, k, t, arrays):
        """What dropout and residual sums make of an output or its gradient: ``arrays``, or others instead."""
        layer, B = self.layer, self.shape.B
        for wanted, own in ((added(layer, k), False), (layer.dropout and k < layer.num_layers - 1, True)):
            if wanted:
                new = [self.ledger.take(t * B * self.D * self._sizes(k)[2] * self.size, own)]
                self._free(arrays)
                arrays = new
        return arrays

    def _free(self, *lists):
        for arrays in lists:
            self.ledger.free(*arrays)
            arrays.clear()

    # ---- the call

    def _stack(self, t, save, fresh=True):
        """A segment forward through all layers: what each saved, what lies between them, and the output."""
        L, all_saved, between = self.layer.num_layers, [], []
        for k in range(L):
            saved = self._forward(k, t, save, fresh and k == L - 1, self.D)
            y = self._between(k, t, saved.output)
            if not save:  # only what the layer above reads is there still
                self._free(*itertools.chain.from_iterable(all_saved), *between)
                all_saved, between = [], []
            all_saved.append(saved)
            between.append(y)
        return all_saved, between

    def _rebuild(self, k, t, states, D):
        """A layer from its states, those of t timesteps. states: a ``Saved`` with h and the other states alone."""
        cell, (I, H, P), B, take = self.layer.cell, self._sizes(k), self.shape.B, self.ledger.take
        rows, width, marked = t * B, cell.saved_blocks * H * self.size, self.shape.marked
        states_of_row = P * self.size + H * self.real * (len(cell.states) - 1)
        saved = Saved([], [], list(states.h), states.others, [])
        if marked and not k:
            saved.x.append(take(rows * I * self.size, own=False))
        if D > 1 or marked:
            saved.output.append(take(rows * D * P * self.size))
        whole = rows <= self.layer.ops.flat_rows if cell.saved else False
        if not whole:
            saved.gates.extend(take(rows * width) for _ in range(D))
        if marked:
            saved.h[:] = [take((t + 1) * B * P * self.size, own=False) for _ in range(D)]
        if cell.saved:
            rows = rows if whole else max(1, self.layer.ops.flat_rows // max(B, 1)) * B
            brief = [take(rows * I * self.size, own=False)] if self.layer.batch_first and not k and not marked else []
            brief += [take(rows * states_of_row, own=False) for _ in range(D)] if marked else []
            brief += [take(rows * D * P * self.size)] if D > 1 or marked else []
            for _ in range(D):
                (saved.gates if whole else brief).append(take(rows * width))
                brief += [take(2 * rows * P * self.size), take(2 * rows * H * self.real * (len(cell.states) - 1))]
                if not self.compiled:
                    self.ledger.briefly(rows * (cell.saved_blocks + 2) * H * self.real)
            brief += [take(rows * states_of_row, own=False) for _ in range(D)]  # the final states
            self._free(brief)
        return saved

    def _stack_back(self, t, all_saved, between):
        """The segment backward; the gradient with respect to x."""
        dx, L = [], self.layer.num_layers
        for k in reversed(range(L)):
            dy = self._dropped(k, t, dx)
            copied = k == L - 1 and self.layer.batch_first
            dx = self._backward(k, t, all_saved.pop(), self.D, copied)
            dx = self._summed(k, t, dx)
            self._free(dy, *between[k - 1 : k])
        self._free(*between)
        return dx

    def _dropped(self, k, t, dy):
        """The gradient with respect to the output of layer ``k`` after dropout."""
        if not self.layer.dropout or k == self.layer.num_layers - 1:
            return dy
        dropped = [self.ledger.take(t * self.shape.B * self.D * self._sizes(k)[2] * self.size)]
        self._free(dy)
        return dropped

    def _summed(self, k, t, dx):
        """The gradient with respect to the input of layer ``k``, with the residual's."""
        if not added(self.layer, k):
            return dx
        summed = [self.ledger.take(t * self.shape.B * self._sizes(k)[0] * self.size, own=False)]
        self._free(dx)
        return summed

    def _held_output(self, all_saved, between):
        """Take the output, which the caller holds, out of what the layers saved."""
        (between[-1] or all_saved[-1].output).clear()

    def _whole(self):
        all_saved, between = self._stack(self.shape.T, save=True)
        self._held_output(all_saved, between)
        self._stack_back(self.shape.T, all_saved, between)

    def _border(self):
        """Bytes of the states of all layers."""
        states = len(self.layer.cell.states) - 1
        sizes = [self.layer._sizes(k) for _, k, _, _ in self.layer._passes()]
        return sum(self.shape.B * (P * self.size + H * self.real * states) for _, H, P in sizes)

    def _segments(self):
        """Segments through the whole stack: the last of them is saved; the one before has the most others' states."""
        (*rest, last), (B, ledger), states = self.shape.lengths, (self.shape.B, self.ledger), self.shape.states
        T, border = self.shape.T, 0 if states else self._border()
        ledger.take(T * B * self.D * self._sizes(self.layer.num_layers - 1)[2] * self.size)
        ledger.now += border * len(rest)
        held, before, skipped = [], None, max(0, len(rest) - 4)
        for t in [*rest[: -3 - skipped], *rest[-3:]] if states else [max(rest)]:
            if t != before:
                ledger.trim()
            all_saved, between = self._stack(t, save=states)
            if states:
                held.append([Saved([], [], one.h.copy(), one.others.copy(), []) for one in all_saved])
                taken = sum(size for one in all_saved for size, _ in _states_of(one))
                if len(held) == 2:  # all but the first are alike, so that two or three of them stand for many
                    ledger.now += skipped * taken
            self._free(*itertools.chain.from_iterable(all_saved), *between)
            before = t
        if last != before:
            ledger.trim()
        all_saved, between = self._stack(last, save=True)
        self._free(between[-1] or all_saved[-1].output)
        ledger.trim()
        dx = self._stack_back(last, all_saved, between)
        ledger.take(T * B * self.layer.input_size * self.size)
        self._free(dx)
        ledger.now -= border
        if last != before:
            ledger.trim()
        for t in (
            rest[:-3:-1] if states else [before]
        ):  # the second one finds memory in the pool that the first has left
            all_saved, between = self._stack_again(t, held.pop() if states else None)
            self._free(between[-1])
            self._free(self._stack_back(t, all_saved, between))

    def _stack_again(self, t, states):
        """What a segment has saved, made again: by another forward pass, or from the states of its layers."""
        if states is None:
            return self._stack(t, save=True, fresh=False)
        all_saved, between = [], []
        for k, one in enumerate(states):
            all_saved.append(self._rebuild(k, t, one, self.D))
            between.append(self._between(k, t, all_saved[k].output))
        if self.shape.marked:  # each backward pass has a copy of h, in which it writes
            self._free(*(one.h for one in states))
        return all_saved, between

    def _directions(self):
        """Layer by layer, each direction in segments; the inputs of all layers are saved whole."""
        (lengths, B, states, _), ledger, layer = self.shape, self.ledger, self.layer
        T, longest = self.shape.T, max(lengths)
        inputs, held = [[]], []
        for k in range(layer.num_layers):
            whole = [ledger.take(T * B * self.D * self._sizes(k)[2] * self.size)]
            held.append([])
            for t in lengths * self.D if states else [longest]:
                ledger.trim()
                saved = self._forward(k, t, states, k == layer.num_layers - 1, 1)
                held[k] += _states_of(saved) if states else []
                self._free(*saved)
            inputs.append(self._between(k, T, whole))
        ledger.now += 0 if states else self._border() * len(lengths)
        inputs.pop()  # the output is the caller's
        dy = []
        for k in reversed(range(layer.num_layers)):
            dy = self._dropped(k, T, dy)
            dx = [ledger.take(T * B * self._sizes(k)[0] * self.size)]
            for into in (False, True):
                ledger.trim()
                if states:  # those of the layer stay until it is done
                    saved = self._rebuild(k, longest, Saved([], [], [], [], []), 1)
                else:
                    saved = self._forward(k, longest, True, False, 1)
                self._free(self._backward(k, longest, saved, 1, True, into))
            dx = self._summed(k, T, dx)
            self._free(dy, inputs.pop(), held.pop())
            dy = dx


def _states_of(saved):
    """Take the arrays of states out of a ``Saved``."""
    arrays = saved.h + saved.others
    saved.h.clear()
    saved.others.clear()
    return arrays
