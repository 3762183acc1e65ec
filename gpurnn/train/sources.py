"""What ``fit`` takes as batches, made into one kind of source."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from ..arrays import host_array
from ..data import Batch, BatchSource

_EXPECTED = (
    "expected a batch source such as gpurnn.SequenceBatches or gpurnn.TextBatches, or a list or loader of (x, y) or "
    "gpurnn.Batch"
)


class Numbered:
    """A source whose batches are asked for by number, so that an epoch can be continued in the middle.

    Attributes
    ----------
    count : int or None
        Batches in an epoch, or None if that is not known.
    numbered : bool
        Whether a batch can be asked for by number.
    """

    numbered = True

    def __init__(self, source: BatchSource, name: str) -> None:
        self._source, self._name = source, name

    @property
    def count(self) -> int | None:
        return len(self._source)

    def read(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """The batches of an epoch from number ``start`` on."""
        if not len(self._source):
            raise ValueError(f"{self._name}: expected at least one batch, got none")
        return (self._source.batch(epoch, index) for index in range(start, len(self._source)))


class Listed(Numbered):
    """A list of batches, the same in every epoch."""

    def __init__(self, batches: Sequence[Any], name: str) -> None:
        super().__init__(batches, name)

    def read(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        if not len(self._source):
            raise ValueError(f"{self._name}: expected at least one batch, got an empty {type(self._source).__name__}")
        return (as_batch(self._source[n], f"{self._name}[{n}]") for n in range(start, len(self._source)))


class Loaded(Numbered):
    """An object that can be iterated over again and again, such as a DataLoader of torch."""

    numbered = False

    def __init__(self, batches: Iterable[Any], name: str) -> None:
        super().__init__(batches, name)

    @property
    def count(self) -> int | None:
        try:
            return len(self._source)
        except TypeError:
            return None

    def read(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        if start:  # it is resumed only at the end of an epoch, where no batch is left, or at the beginning of one
            return
        number = -1
        for number, item in enumerate(self._source):
            yield as_batch(item, f"{self._name}, batch {number}")
        if number < 0:
            raise ValueError(f"{self._name}: gave no batch in epoch {epoch + 1}")


def as_source(batches: Any, name: str) -> Numbered:
    """The source that an argument of ``fit`` or ``measure`` means.

    Raises TypeError for what is no source of batches, with what to give instead.
    """
    if isinstance(batches, Numbered):
        return batches
    if callable(getattr(batches, "batch", None)):
        if not hasattr(batches, "__len__"):
            raise TypeError(f"{name}: {type(batches).__name__} has batch(epoch, index) but no length: give it __len__")
        return Numbered(batches, name)
    if isinstance(batches, Batch):
        raise TypeError(f"{name}: got one Batch: give a list of them, [batch]")
    if isinstance(batches, (str, bytes, dict)) or hasattr(batches, "dtype"):
        hint = "; one batch of arrays is [(x, y)]" if hasattr(batches, "dtype") else ""
        raise TypeError(f"{name}: {_EXPECTED}, got {type(batches).__name__}{hint}")
    if isinstance(batches, (list, tuple)):
        if isinstance(batches, tuple) and any(hasattr(part, "dtype") for part in batches):
            raise TypeError(f"{name}: got a tuple of arrays: one batch of arrays is [(x, y)], a list of pairs")
        return Listed(batches, name)
    if not isinstance(batches, Iterable):
        raise TypeError(f"{name}: {_EXPECTED}, got {type(batches).__name__}")
    if isinstance(batches, Iterator):
        raise TypeError(
            f"{name}: a {type(batches).__name__} can be read only once, and every epoch reads the data: give a list, "
            "or an object whose __iter__ begins anew"
        )
    return Loaded(batches, name)


def as_batch(item: Any, name: str) -> Batch:
    """A Batch of what a list or a loader gives: a Batch, (x, y), or (x, y, lengths).

    If the first two axes of y are those of x, there is one target for each timestep, and the loss gets the lengths.
    Otherwise there is one for each sequence.
    """
    if isinstance(item, Batch):
        return item
    if not isinstance(item, (tuple, list)) or len(item) not in (2, 3):
        size = f" of {len(item)}" if isinstance(item, (tuple, list)) else ""
        raise TypeError(f"{name}: expected (x, y), (x, y, lengths) or a gpurnn.Batch, got {type(item).__name__}{size}")
    x, y = _on_host(_several(item[0]), f"{name}: x"), _on_host(item[1], f"{name}: y")
    lengths = host_array(item[2], f"{name}: lengths") if len(item) == 3 else None
    if isinstance(x, tuple) and lengths is not None:
        raise TypeError(f"{name}: several inputs and lengths: give a gpurnn.Batch, which says whose lengths they are")
    inputs, targets = np.shape(_first(x)), np.shape(_first(y)) if hasattr(_first(y), "shape") else (len(y),)
    if not inputs:
        raise TypeError(f"{name}: x: expected an array with a batch, got {type(item[0]).__name__}")
    if len(inputs) > 1 and targets[:2] == inputs[:2]:
        options = {} if lengths is None else {"lengths": lengths}
        weight = int(inputs[0] * inputs[1] if lengths is None else lengths.sum())
    else:
        options, weight = {}, targets[0] if targets else 1
    batch = Batch(x, y, lengths, loss_options=options, weight=weight)
    batch.weight_is_given = False
    return batch


def _several(inputs: Any) -> Any:
    """A list of arrays, as torch's DataLoader gives several inputs, as a tuple; anything else as it is."""
    listed = isinstance(inputs, list) and inputs and all(hasattr(part, "dtype") for part in inputs)
    return tuple(inputs) if listed else inputs


def _first(arrays: Any) -> Any:
    """The first of several arrays, as of a model with several inputs or heads; an array as it is."""
    if isinstance(arrays, dict):
        arrays = tuple(arrays.values())
    return arrays[0] if isinstance(arrays, tuple) and arrays else arrays


def _on_host(value: Any, name: str) -> Any:
    """A tensor of another library as a NumPy array, without a copy where it lies on the host; tuples part by part."""
    if isinstance(value, tuple):
        return tuple(_on_host(part, f"{name}[{n}]") for n, part in enumerate(value))
    taken = isinstance(value, np.ndarray) or hasattr(value, "__cuda_array_interface__")
    return value if taken or not hasattr(value, "__array__") else host_array(value, name)
