"""Batch normalization inside the time loop: means and variances over the batch at each timestep."""

from __future__ import annotations

from .. import shards
from .._typing import Array

MOMENTUM = 0.1  # of a running statistic, the share of the newest


class BatchStatistics:
    """The running statistics of one pass: of each normalization of its cell, for each timestep (Cooijmans 2017).

    mean, variance: (normalizations, steps, H). A timestep beyond these has those of the last one. update: whether the
    time loop moves them, as training does.
    """

    def __init__(self, mean: Array, variance: Array, update: bool) -> None:
        self.mean, self.variance, self.update = mean, variance, update

    def at(self, count: int) -> list[Array]:
        """Mean and variance of each normalization, in turn, (H, 1), at the count-th timestep of the loop."""
        place = min(count, self.mean.shape[1] - 1)
        return [both[k, place][:, None] for k in range(len(self.mean)) for both in (self.mean, self.variance)]

    def add(self, xp, count: int, found: list[tuple[Array, Array]], sequences: int) -> None:
        """Move the running statistics towards those (H, 1) that a timestep found in so many sequences."""
        if not self.update:
            return
        sequences = shards.counted(xp, sequences)
        if sequences < 2:  # one sequence has no variance
            return
        place, unbiased = min(count, self.mean.shape[1] - 1), sequences / (sequences - 1)
        for k, (mean, variance) in enumerate(found):
            for running, value in ((self.mean, mean), (self.variance, variance * unbiased)):
                change = value[:, 0] - running[k, place]
                running[k, place] += MOMENTUM * xp.where(xp.isfinite(change), change, 0)


class BatchStep:
    """What a cell reads of the batch at one timestep. valid: (B,) booleans, or None for all; running: as of
    ``BatchStatistics.at``. ``found`` takes the (mean, variance) of each normalization."""

    __slots__ = ("found", "running", "valid")

    def __init__(self, valid: Array | None, running: list[Array]) -> None:
        self.valid, self.running, self.found = valid, running, []
