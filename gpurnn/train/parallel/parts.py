"""The part of a batch that one process computes, and how much of the batch's loss it is."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from ...arrays import host_array
from ...ctc import ctc_loss
from ...data import Batch
from ...dtypes import is_float
from ...layers.timesteps import axis_orders
from ...losses.mean import all_options, is_one_of, mean_weight
from ...masks import valid_places
from ...module import Module
from ...shards import Shard
from .group import Group

_OF_SEQUENCES = (ctc_loss,)  # losses whose mean is over sequences, whatever their lengths
_ALONG = ("lengths", "target_lengths")  # options of a loss with an entry for each sequence
_PLACES = ("mask",)  # options of a loss with an entry for each target


@dataclass
class Part:
    """A process's part of a batch. share: of the batch's mean loss, 0 to 1. shard: for the layers, None for a whole."""

    batch: Batch
    share: float
    shard: Shard | None

    @property
    def empty(self) -> bool:
        """Whether there is no sequence in it."""
        return self.shard is not None and self.shard.count == 0


def part_of(group: Group, model: Module, loss: Callable[..., Any], batch: Batch) -> Part:
    """The sequences of a batch that this process computes.

    Raises ValueError for a batch whose sequences cannot be found, and for a loss that is no mean.
    """
    if group.size == 1:
        return Part(batch, 1.0, None)
    reduction = all_options(loss, batch.loss_options or {}).get("reduction", "mean")
    if reduction != "mean" and (is_one_of(loss) or is_one_of(loss, _OF_SEQUENCES)):
        raise ValueError(
            f"loss: several processes add up parts of a mean: expected reduction='mean', got {reduction!r}"
        )
    cut = _Cut(group, model, batch, False if is_one_of(loss, _OF_SEQUENCES) else batch.per_step)
    made = cut.batch()
    whole = counted(loss, batch, cut.total, None)
    share = counted(loss, made, cut.last - cut.first, whole[0])[1] / whole[1] if whole[1] else 0.0
    items = cut.items()
    return Part(made, share, Shard(cut.first, cut.last - cut.first, cut.total, cut.axis, items, group.add))


def zeros_like(xp: Any, outputs: Any) -> Any:
    """A gradient of zeros with respect to outputs: an array, or a tuple of arrays."""
    return tuple(zeros_like(xp, one) for one in outputs) if isinstance(outputs, tuple) else xp.zeros_like(outputs)


def counted(loss: Callable[..., Any], batch: Batch, sequences: int, rule: str | None) -> tuple[str, float]:
    """(rule, number) of what the mean of a loss divides by.

    A loss of this package says it. Of another one ``per_step=False`` does, or the weight of the batch: what it equals,
    the valid timesteps or the sequences, is what is counted. rule: the one that the whole batch gave.
    """
    given = batch.loss_options or {}
    if rule is None:
        rule = "own" if is_one_of(loss) and hasattr(batch.targets, "dtype") else None
        if is_one_of(loss, _OF_SEQUENCES) or (rule is None and batch.per_step is False and not batch.weight_is_given):
            rule = "pooled" if batch.pooled else "sequences"
    rules: dict[str, Callable[[], float]] = {
        "own": lambda: _own_count(loss, batch, sequences),
        "steps of the loss": lambda: _summed(given.get("lengths")),
        "steps": lambda: _steps_of(batch),
        "pooled": lambda: len(batch.targets) if batch.pooled else math.nan,
        "sequences": lambda: sequences,
    }
    if rule is None:
        rule = next((name for name in list(rules)[1:] if rules[name]() == batch.weight), "sequences")
    return rule, rules[rule]()


def _own_count(loss, batch, sequences):
    """What the mean of a loss of this package divides by, up to a factor that all parts have in common."""
    options = batch.loss_options or {}
    found = mean_weight(loss, batch.targets, options)
    if found is not None:
        return found
    if options.get("lengths") is None:
        return sequences if not batch.pooled else len(batch.targets)
    from ...backends import array_ops

    places = options.get("mask"), options["lengths"], options.get("batch_first", False)
    valid = valid_places(np.shape(batch.targets), *places, array_ops(batch.targets))
    return int(host_array(valid, "lengths").sum())


def _summed(lengths):
    return math.nan if lengths is None or isinstance(lengths, tuple) else int(np.sum(host_array(lengths, "lengths")))


def _steps_of(batch):
    if isinstance(batch.inputs, tuple) or (isinstance(batch.lengths, tuple)):
        return math.nan
    return batch._valid_timesteps()


class _Cut:
    """Where a batch is cut: axis and number of the sequences, and the first and the last of this process."""

    def __init__(self, group: Group, model: Module, batch: Batch, per_step: bool | None) -> None:
        self.whole, self._per_step = batch, per_step
        inputs = batch.inputs if isinstance(batch.inputs, tuple) else (batch.inputs,)
        first = inputs[0]
        flat = np.ndim(first) == 2 and is_float(first.dtype)  # (N, features): no time axis
        self.axis = 0 if flat or np.ndim(first) == 1 or True in axis_orders(model) else 1
        if np.ndim(first) <= self.axis:
            raise ValueError(f"batches: expected inputs with an axis of sequences, got shape {np.shape(first)}")
        self.total = np.shape(first)[self.axis]
        if any(np.shape(one)[self.axis : self.axis + 1] != (self.total,) for one in inputs):
            shapes = ", ".join(str(np.shape(one)) for one in inputs)
            raise ValueError(
                f"batches: several processes cut inputs along axis {self.axis}, and there these differ: {shapes}"
            )
        self.first, self.last = group.bounds(self.total)

    def batch(self) -> Batch:
        """This process's ``Batch``. Its inputs, lengths and targets are views."""
        whole = self.whole
        inputs = tuple(map(self._steps, whole.inputs)) if isinstance(whole.inputs, tuple) else self._steps(whole.inputs)
        lengths = whole.lengths
        if lengths is not None:
            lengths = tuple(map(self._rows, lengths)) if isinstance(lengths, tuple) else self._rows(lengths)
        options = dict(whole.loss_options or {})
        for name in _ALONG:
            if options.get(name) is not None:
                options[name] = self._rows(options[name])
        for name in _PLACES:
            if options.get(name) is not None:
                options[name] = self._targets(options[name])
        made = Batch(
            inputs, self._targets(whole.targets), lengths, whole.carry, options, whole.weight,
            self._steps(whole.reset), self._steps(whole.mask), whole.per_step,
        )  # fmt: skip
        made.weight_is_given = whole.weight_is_given
        return made

    def items(self) -> tuple[int, int, int]:
        """The first, the number and the total of the vectors that pooling makes of the rows."""
        if not self.whole.pooled:
            return self.first, self.last - self.first, self.total
        ends = np.concatenate([[0], np.cumsum(self._in_rows())]).tolist()
        return ends[self.first], ends[self.last] - ends[self.first], ends[-1]

    def _in_rows(self):
        """How many packed sequences each row holds."""
        return host_array(self.whole.reset, "reset").sum(axis=1 - self.axis)

    def _rows(self, array):
        return array[self.first : self.last]

    def _steps(self, array):
        if array is None:
            return None
        return array[(slice(None),) * self.axis + (slice(self.first, self.last),)]

    def _targets(self, targets):
        if isinstance(targets, tuple):
            return tuple(map(self._targets, targets))
        if isinstance(targets, dict):
            return {name: self._targets(one) for name, one in targets.items()}
        if self.whole.pooled:
            start, count, _ = self.items()
            return targets[start : start + count]
        counts = (self.whole.loss_options or {}).get("target_lengths")
        if counts is not None and np.ndim(targets) == 1 and len(targets) != self.total:  # labels one after another
            ends = np.concatenate([[0], np.cumsum(host_array(counts, "target_lengths"))]).tolist()
            return targets[ends[self.first] : ends[self.last]]
        return self._steps(targets) if self._has_steps(targets) else self._rows(targets)

    def _has_steps(self, targets):
        """Whether targets have an axis of time, too."""
        if self._per_step is not None or not hasattr(targets, "shape"):
            return bool(self._per_step) and hasattr(targets, "shape")
        several = self.whole.inputs if isinstance(self.whole.inputs, tuple) else (self.whole.inputs,)
        shapes = {np.shape(one)[:2] for one in several if np.ndim(one) > 1 + (self.axis == 0 and is_float(one.dtype))}
        return np.shape(targets)[:2] in shapes
