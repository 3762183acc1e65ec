"""Batches: a long text in parallel pieces, and padded sequences of different length.

A batch source has a length, the number of batches in an epoch, and ``batch(epoch, index)``, a pure function of its
arguments: shuffling is keyed by (seed, epoch). So the position in the data is the pair (epoch, index) and nothing else,
and a resumed training gets exactly the batches that it would have had.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from .. import rng
from .._typing import Array
from ..arrays import host_array, refuse_masked
from ..errors import DtypeError, ShapeError, check_flag, check_size, described
from ..masks import valid_steps
from .packing import pack


@dataclass
class Batch:
    """One training batch, of time-major NumPy arrays.

    Parameters
    ----------
    inputs : Array or tuple of Array
        (T, B, ...); a tuple where the model takes several inputs.
    targets : object
        Whatever the loss takes.
    lengths : Array or tuple of Array, optional
        (B,) integers for the model; a tuple, one for each of the inputs, where these are several.
    carry : bool
        Continue from the recurrent state of the previous batch (truncated BPTT) instead of starting from the initial
        state.
    loss_options : dict, optional
        Keyword arguments of the loss. By default ``lengths`` and ``mask``, where they are given.
    weight : int, optional
        Weight of this batch's mean loss in a mean over batches. By default the number of valid timesteps; with a loss
        of this package that has ``mask``, ``ignore_index`` or class weights, what its mean divides by.
    reset, mask : Array of bool, optional
        (T, B) for the model, as a recurrent layer takes them: where a sequence begins, and which timesteps are there.
    per_step : bool, optional
        Whether ``targets`` have a time axis, as several processes must know that divide the sequences. By default they
        do where their first two axes are those of inputs.

    With several inputs, ``loss_options`` and ``weight`` must be given.

    Attributes
    ----------
    weight_is_given : bool
        Whether the caller chose ``weight``: it is then taken whatever the loss.
    pooled : bool
        Whether there is one target for each of the sequences that ``reset`` divides the rows into.

    Examples
    --------
    >>> gpurnn.Batch(np.zeros((4, 3, 2)), np.zeros((4, 3)), lengths=np.array([4, 1, 2])).weight
    7
    """

    inputs: Array | tuple[Array, ...]
    targets: Any
    lengths: Array | tuple[Array, ...] | None = None
    carry: bool = False
    loss_options: dict[str, Any] | None = None
    weight: float | None = None
    reset: Array | None = None
    mask: Array | None = None
    per_step: bool | None = None
    weight_is_given: bool = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        self.weight_is_given = self.weight is not None
        self.carry = check_flag("carry", self.carry)
        if self.loss_options is None:
            given = {"lengths": self.lengths, "mask": self.mask}
            self.loss_options = {name: one for name, one in given.items() if one is not None}
        if self.weight is None:
            self.weight = self._valid_timesteps()

    @property
    def pooled(self) -> bool:
        return self.reset is not None and self.per_step is False

    def _valid_timesteps(self):
        if self.mask is None:
            shape = np.shape(self.inputs)
            return int(shape[0] * shape[1] if self.lengths is None else np.sum(self.lengths))
        there = host_array(self.mask, "mask")
        if self.lengths is not None:
            there = there & valid_steps(self.lengths, *there.shape)
        return int(there.sum())


class BatchSource(Protocol):
    """What ``fit`` and ``evaluate`` take as batches: any object with these two methods."""

    def __len__(self) -> int:
        """The number of batches in an epoch."""

    def batch(self, epoch: int, index: int) -> Batch:
        """Batch number ``index`` of an epoch; a pure function of its arguments."""


class TextBatches:
    """A long sequence of ids, cut into ``batch_size`` parallel pieces; a batch has ``steps`` timesteps of each.

    With S = (len(ids) - 1) // batch_size, sequence b of every batch comes from the S ids from place b * S on. A batch
    has inputs and targets (T, B) int64, the targets one place later. The last batch of an epoch is shorter where S is
    no multiple of ``steps``. All batches but the first of an epoch carry the state.

    Parameters
    ----------
    ids : Array
        1-D integers. Of a ``np.memmap`` only what a batch needs is read.
    batch_size : int
        Sequences in a batch, B.
    steps : int
        Timesteps of a batch, T.
    begins : int, optional
        The id that begins a document, such as that of a line end: batches then have resets, and before each timestep
        that reads this id the state becomes the initial one. So the first id of a document is predicted from
        ``begins`` alone, and the last id of a document predicts ``begins``. Recurrent layers need
        ``reset_to="initial"``, or a reset would give the carried state again.

    Raises
    ------
    ValueError
        For fewer than batch_size + 1 ids, or a size below 1.
    ShapeError, DtypeError
        For ``ids`` that are not 1-D or no integers.

    Examples
    --------
    >>> text = gpurnn.TextBatches(np.arange(9), batch_size=2, steps=3)
    >>> len(text), text.batch(epoch=0, index=0).inputs.tolist()
    (2, [[0, 4], [1, 5], [2, 6]])
    >>> text = gpurnn.TextBatches(np.array([0, 5, 6, 0, 7, 8, 9, 0, 5]), batch_size=1, steps=8, begins=0)
    >>> text.batch(epoch=0, index=0).reset.ravel().astype(int).tolist()
    [1, 0, 0, 1, 0, 0, 0, 1]
    """

    ids: Array
    batch_size: int
    steps: int
    begins: int | None
    stream: int

    def __init__(self, ids: Array, batch_size: int, steps: int, *, begins: int | None = None) -> None:
        refuse_masked("ids", ids)
        if getattr(ids, "ndim", None) != 1:
            got = f"shape {ids.shape}" if hasattr(ids, "shape") else described(ids)
            raise ShapeError(f"ids: expected a 1-D array of character or word numbers, got {got}")
        if ids.dtype.kind not in "iu":
            raise DtypeError(f"ids: expected integers, got {ids.dtype}")
        self.ids = ids
        self.batch_size, self.steps = check_size("batch_size", batch_size), check_size("steps", steps)
        self.begins = None if begins is None else check_size("begins", begins, minimum=0)
        self.stream = (len(ids) - 1) // self.batch_size
        if self.stream < 1:
            raise ValueError(
                f"ids: a batch_size of {batch_size} needs at least {self.batch_size + 1} ids, got {len(ids)}"
            )

    def __len__(self) -> int:
        return -(-self.stream // self.steps)

    def batch(self, epoch: int, index: int) -> Batch:
        """Batch number ``index`` of an epoch. Raises IndexError for a number that there is not."""
        index = check_index(self, index)
        first = index * self.steps
        T = min(self.steps, self.stream - first)
        rows = [self.ids[start : start + T + 1] for start in np.arange(self.batch_size) * self.stream + first]
        both = np.ascontiguousarray(np.stack(rows, axis=1), dtype=np.int64)
        reset = None if self.begins is None else both[:-1] == self.begins
        return Batch(both[:-1], both[1:], carry=index > 0, reset=reset, per_step=True)


class SequenceBatches:
    """Sequences of different length, shuffled, padded with zeros to the longest of their batch, or packed.

    A subclass may override ``collate``, which makes a batch from the numbers of its sequences.

    Parameters
    ----------
    inputs : sequence of Array
        One array (T_n, ...) for each sequence.
    targets : sequence of Array, or Array
        One array (T_n, ...) for each sequence, padded like the inputs; with ``per_step=False`` an array or list with
        one target for each sequence.
    batch_size : int
        Sequences in a batch, B.
    per_step : bool
        Whether each timestep has a target. Otherwise the loss gets no lengths, and the weight of a batch is its
        number of sequences.
    shuffle : bool
        Use another order in every epoch.
    bucket : bool
        Put sequences of similar length together, so that there is little padding: they are sorted within windows of
        32 batches. Of no effect on packed batches, which have hardly any.
    seed : int
        Key of the order.
    packed : bool
        Put the sequences of a batch one behind another into rows as long as the longest of them; see
        ``gpurnn.data.pack``. A batch then has resets and a mask, and with ``per_step=False`` the targets in the order
        in which ``Pooling`` gives the vectors.

    Raises
    ------
    ShapeError
        For targets that do not fit the inputs, and for an empty sequence that should be packed.
    TypeError, ValueError
        For other arguments of the wrong type or value, and for no sequences.

    Examples
    --------
    >>> inputs = [np.ones((T, 2), "float32") for T in (3, 1, 2)]
    >>> batches = gpurnn.SequenceBatches(inputs, [0, 1, 0], batch_size=2, per_step=False, shuffle=False)
    >>> batch = batches.batch(epoch=0, index=0)
    >>> batch.inputs.shape, batch.lengths.tolist()
    ((2, 2, 2), [1, 2])
    """

    inputs: list[Array]
    targets: Any
    lengths: Array
    batch_size: int
    per_step: bool
    shuffle: bool
    bucket: bool
    seed: int
    packed: bool

    def __init__(
        self,
        inputs: Sequence[Array],
        targets: Sequence[Array] | Array,
        batch_size: int,
        *,
        per_step: bool = True,
        shuffle: bool = True,
        bucket: bool = True,
        seed: int = 0,
        packed: bool = False,
    ) -> None:
        self.packed = check_flag("packed", packed)
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
        if packed and not self.lengths.all():
            raise ShapeError(f"inputs[{self.lengths.argmin()}]: a sequence without timesteps cannot be packed")
        self._last = (None, None)  # (epoch, its order), so that an epoch is sorted once
        for n, (x, y) in enumerate(zip(self.inputs, self.targets, strict=True)):
            if per_step and np.ndim(y) == 0:
                raise ShapeError(
                    f"targets[{n}]: expected an array with a target for each of the {len(x)} steps, got one value: "
                    "per_step=False says that a sequence has one target"
                )
            if per_step and len(y) != len(x):
                raise ShapeError(f"targets[{n}]: expected {len(x)} steps, as inputs[{n}] has, got {len(y)}")

    def __len__(self) -> int:
        return -(-len(self.inputs) // self.batch_size)

    def batch(self, epoch: int, index: int) -> Batch:
        """Batch number ``index`` of an epoch. Raises IndexError for a number that there is not."""
        index = check_index(self, index)
        if self._last[0] != epoch:
            bucket = self.bucket and not self.packed
            order = order_batches(self.lengths, self.batch_size, self.seed, epoch, shuffle=self.shuffle, bucket=bucket)
            self._last = (epoch, order)
        return self.collate(self._last[1][index], epoch)

    def collate(self, chosen: Array, epoch: int) -> Batch:
        """The batch of the sequences with these numbers.

        Parameters
        ----------
        chosen : Array
            (B,) integers.
        epoch : int
            For subclasses whose batches differ between epochs.
        """
        if self.packed:
            return self._pack(chosen)
        inputs, lengths = pad([self.inputs[n] for n in chosen]), self.lengths[chosen]
        if self.per_step:
            return Batch(inputs, pad([self.targets[n] for n in chosen]), lengths, per_step=True)
        batch = Batch(inputs, self.targets[chosen], lengths, loss_options={}, weight=len(chosen), per_step=False)
        batch.weight_is_given = False
        return batch

    def _pack(self, chosen):
        """The batch of the sequences with these numbers, packed."""
        rows, reset, mask, where = pack([self.inputs[n] for n in chosen])
        marks = {"reset": reset, "mask": mask}
        if self.per_step:
            return Batch(rows, pack([self.targets[n] for n in chosen]).rows, per_step=True, **marks)
        targets = self.targets[chosen][where.order]
        batch = Batch(rows, targets, loss_options={}, weight=len(chosen), per_step=False, **marks)
        batch.weight_is_given = False
        return batch


def order_batches(
    lengths: Array, batch_size: int, seed: int, epoch: int = 0, *, shuffle: bool = True, bucket: bool = True
) -> list[Array]:
    """The numbers of the sequences in each batch of an epoch, as integer arrays.

    Sequences have these ``lengths``; for the other arguments see ``SequenceBatches``.
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
    if shuffle and bucket:  # otherwise every window would be sorted by length
        drawn = rng.words(len(batches), seed, rng.name_key("batches"), epoch)
        batches = [batches[n] for n in np.argsort(drawn, kind="stable")]
    return batches


def pad(sequences: Sequence[Array], value: float = 0) -> Array:
    """Join arrays (T_n, ...) to one of (T, B, ...), where T is the longest; ``value`` fills it past each one's end."""
    refuse_masked("sequences", sequences)
    T = max(len(sequence) for sequence in sequences)
    padded = np.full((T, len(sequences), *sequences[0].shape[1:]), value, sequences[0].dtype)
    for b, sequence in enumerate(sequences):
        padded[: len(sequence), b] = sequence
    return padded


def check_index(source: BatchSource, index: int) -> int:
    """``index`` as int; raises IndexError unless the batch source has a batch of this number."""
    if not 0 <= index < len(source):
        raise IndexError(f"index: this source has batches 0 to {len(source) - 1}, got {index}")
    return int(index)
