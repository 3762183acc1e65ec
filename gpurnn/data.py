"""Batches: a long text cut into streams, sequences of different length padded together, and two classic synthetic
tasks.

A batch source has a length, the number of batches in an epoch, and ``batch(epoch, index)``, a pure function of its
arguments: shuffling is keyed by (seed, epoch). So "the position in the data" is the pair (epoch, index) and nothing
else, and a resumed training sees exactly the batches that it would have seen.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from . import rng
from .arrays import host_array, refuse_masked
from .errors import DtypeError, ShapeError, check_flag, check_size


@dataclass
class Batch:
    """One training batch, time-major NumPy arrays.

    inputs: (T, B, ...), or a tuple of arrays where the model takes several. targets: whatever the loss takes. lengths:
    (B,) or None, given to the model; a tuple, one for each of the inputs, where these are several. carry: the recurrent
    state of the batch before goes on (truncated BPTT) instead of starting anew. loss_options: what the loss takes by
    name; None: ``lengths``, where there are any. weight: how much the mean loss of this batch counts in a mean over
    batches, the number of valid steps where it is None. With
    several inputs both must be given.
    """

    inputs: object
    targets: object
    lengths: object = None
    carry: bool = False
    loss_options: dict | None = None
    weight: int | None = None

    def __post_init__(self):
        self.carry = check_flag("carry", self.carry)
        if self.loss_options is None:
            self.loss_options = {} if self.lengths is None else {"lengths": self.lengths}
        if self.weight is None:
            shape = np.shape(self.inputs)
            self.weight = int(shape[0] * shape[1] if self.lengths is None else np.sum(self.lengths))


class BatchSource(Protocol):
    """What ``fit`` and ``evaluate`` take as batches: any object with these two methods."""

    def __len__(self) -> int:
        """The number of batches in an epoch."""

    def batch(self, epoch: int, index: int) -> Batch:
        """Batch number ``index`` of an epoch; a pure function of its arguments."""


class TextBatches:
    """A long sequence of ids cut into ``batch_size`` streams that are read side by side, ``steps`` at a time.

    ids: 1-D integers, for instance a ``np.memmap`` (only what a batch needs is read). Stream b holds the ids from b *
    S, with S = (len(ids) - 1) // batch_size. A batch has inputs and targets (T, B) int64, the targets one place later;
    the last batch of an epoch is shorter where S is no multiple of ``steps``. All but the first of an epoch carry the
    state. Raises ValueError for fewer than batch_size + 1 ids.
    """

    def __init__(self, ids, batch_size, steps):
        refuse_masked("ids", ids)
        if getattr(ids, "ndim", None) != 1:
            raise ShapeError(f"ids: expected a 1-D array, got shape {getattr(ids, 'shape', type(ids).__name__)}")
        if ids.dtype.kind not in "iu":
            raise DtypeError(f"ids: expected integers, got {ids.dtype}")
        self.ids = ids
        self.batch_size, self.steps = check_size("batch_size", batch_size), check_size("steps", steps)
        self.stream = (len(ids) - 1) // self.batch_size
        if self.stream < 1:
            raise ValueError(f"ids: {batch_size} streams need at least {self.batch_size + 1} ids, got {len(ids)}")

    def __len__(self):
        return -(-self.stream // self.steps)

    def batch(self, epoch, index):
        index = check_index(self, index)
        first = index * self.steps
        T = min(self.steps, self.stream - first)
        rows = [self.ids[start : start + T + 1] for start in np.arange(self.batch_size) * self.stream + first]
        both = np.ascontiguousarray(np.stack(rows, axis=1), dtype=np.int64)
        return Batch(both[:-1], both[1:], carry=index > 0)


class SequenceBatches:
    """Sequences of different length, shuffled, padded with zeros to the longest of their batch.

    inputs: a list of arrays (T_n, ...). targets: a list of arrays (T_n, ...), one entry for each step, padded alike;
    or with ``per_step=False`` an array or list with one target for each sequence: the loss then gets no lengths, and a
    batch weighs as many sequences as it has. shuffle: another order in every epoch. bucket: sequences of similar length
    go together (sorted within windows of 32 batches), so that little is padded.

    Where a batch needs more, a subclass overrides ``collate``, which makes it from the chosen sequences' numbers.
    """

    def __init__(self, inputs, targets, batch_size, *, per_step=True, shuffle=True, bucket=True, seed=0):
        self.per_step, self.seed = check_flag("per_step", per_step), rng.check_seed(seed)
        self.shuffle, self.bucket = check_flag("shuffle", shuffle), check_flag("bucket", bucket)
        refuse_masked("inputs", inputs)
        refuse_masked("targets", targets)
        self.inputs = [host_array(x, "inputs") for x in inputs]
        self.targets = [host_array(y, "targets") for y in targets] if per_step else host_array(targets, "targets")
        self.batch_size = check_size("batch_size", batch_size)
        if not self.inputs:
            raise ValueError("inputs: expected at least one sequence")
        if len(self.targets) != len(self.inputs):
            raise ShapeError(f"targets: expected {len(self.inputs)} entries, as inputs has, got {len(self.targets)}")
        self.lengths = np.array([len(x) for x in self.inputs], np.int64)
        self._last = (None, None)  # an epoch and its order: sorted once, not for every batch
        for n, (x, y) in enumerate(zip(self.inputs, self.targets, strict=True)):
            if per_step and len(y) != len(x):
                raise ShapeError(f"targets[{n}]: expected {len(x)} steps, as inputs[{n}] has, got {len(y)}")

    def __len__(self):
        return -(-len(self.inputs) // self.batch_size)

    def batch(self, epoch, index):
        index = check_index(self, index)
        if self._last[0] != epoch:
            order = order_batches(
                self.lengths, self.batch_size, self.seed, epoch, shuffle=self.shuffle, bucket=self.bucket
            )
            self._last = (epoch, order)
        return self.collate(self._last[1][index], epoch)

    def collate(self, chosen, epoch):
        """The Batch of the sequences with these numbers, (B,); ``epoch`` is for what shall differ between epochs."""
        inputs, lengths = pad([self.inputs[n] for n in chosen]), self.lengths[chosen]
        if self.per_step:
            return Batch(inputs, pad([self.targets[n] for n in chosen]), lengths)
        return Batch(inputs, self.targets[chosen], lengths, loss_options={}, weight=len(chosen))


def order_batches(lengths, batch_size, seed, epoch=0, *, shuffle=True, bucket=True):
    """The numbers of sequences of these lengths, batch by batch, in this epoch: a list of integer arrays.

    shuffle, bucket: see ``SequenceBatches``.
    """
    order = np.arange(len(lengths))
    if shuffle:
        order = np.argsort(rng.words(len(order), seed, rng.name_key("sequences"), epoch), kind="stable")
    if bucket:
        window = 32 * batch_size
        for start in range(0, len(order), window):
            part = order[start : start + window]
            order[start : start + window] = part[np.argsort(lengths[part], kind="stable")]
    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    if shuffle and bucket:  # else every window would go from short to long
        drawn = rng.words(len(batches), seed, rng.name_key("batches"), epoch)
        batches = [batches[n] for n in np.argsort(drawn, kind="stable")]
    return batches


def pad(sequences, value=0):
    """Arrays (T_n, ...) side by side: (T, B, ...) with T the longest, ``value`` past each one's end."""
    refuse_masked("sequences", sequences)
    T = max(len(sequence) for sequence in sequences)
    padded = np.full((T, len(sequences), *sequences[0].shape[1:]), value, sequences[0].dtype)
    for b, sequence in enumerate(sequences):
        padded[: len(sequence), b] = sequence
    return padded


def adding_problem(count, T, seed=0, call=0):
    """Add the two marked numbers of a sequence (Hochreiter & Schmidhuber 1997).

    Returns x (T, count, 2) float32: numbers uniform in [0, 1), and a marker that is 1 once in each half; y (count, 1):
    the sum of the two marked numbers. Always predicting 1 gives a mean squared error of 1/6, the variance of the sum
    (0.1767 in the literature, where it was measured on a finite set). Another ``call`` draws other sequences.
    """
    T, half = check_size("T", T, 2), T // 2
    x = np.zeros((T, check_size("count", count), 2), np.float32)
    x[:, :, 0] = rng.uniform((T, count), 0, 1, seed, rng.name_key("adding"), call)
    drawn = rng.uniform((2, count), 0, 1, seed, rng.name_key("markers"), call, np.float64)
    places = np.stack([drawn[0] * half, half + drawn[1] * (T - half)]).astype(np.int64)
    everyone = np.arange(count)
    x[places, everyone, 1] = 1
    return x, x[places, everyone, 0].sum(axis=0)[:, None]


def copy_memory(count, T, symbols=8, length=10, seed=0, call=0):
    """Repeat the first ``length`` symbols after T blanks (Arjovsky, Shah, Bengio 2016).

    Returns ids and targets (T + 2 * length, count) int64. Class 0 is blank, 1 .. symbols the symbols, symbols + 1 the
    sign to begin; targets are blank but for the last ``length`` steps. Guessing gives length ln(symbols) / (T + 2
    length) nats. Another ``call`` draws other sequences.
    """
    T, length = check_size("T", T), check_size("length", length)
    shape = (length, check_size("count", count))
    drawn = rng.uniform(shape, 1, check_size("symbols", symbols) + 1, seed, rng.name_key("copy"), call, np.float64)
    pattern = drawn.astype(np.int64)
    ids = np.zeros((T + 2 * length, count), np.int64)
    targets = np.zeros_like(ids)
    ids[:length] = pattern
    ids[T + length - 1] = symbols + 1
    targets[-length:] = pattern
    return ids, targets


def check_index(source, index):
    """``index`` as int; raises IndexError unless the batch source has a batch of this number."""
    if not 0 <= index < len(source):
        raise IndexError(f"index: this source has batches 0 to {len(source) - 1}, got {index}")
    return int(index)
