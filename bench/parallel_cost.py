"""What training by N processes should cost: a model with three numbers of the link, and one of the machine.

An update is the compute of one process's part, a sum of the gradients and one exchange of a few numbers. In a sum every
process sends N - 1 messages of 1 / N of the gradients, twice (gpurnn/train/parallel/group.py):

    sum(N, S) = 2 (latency + (N - 2) message + (N - 1) / N S / bandwidth)          N >= 2, S bytes of gradients
    exchange(N) = latency ceil(log2 N)

Left out: processes that wait for a slower one, links that several processes of one machine share, a network whose
middle is narrower than its edge. So a prediction is a lower limit of the time. What the backward pass hides is left
out, too: sums begin when it has ended.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Link:
    """latency: seconds of a message of no bytes. message: seconds that each further message takes of its sender.
    bandwidth: bytes a second."""

    latency: float
    message: float
    bandwidth: float

    def sum_seconds(self, ranks: int, size: int) -> float:
        """Seconds of a sum of ``size`` bytes over all processes."""
        if ranks < 2:
            return 0.0
        return 2 * (self.latency + (ranks - 2) * self.message + (ranks - 1) / ranks * size / self.bandwidth)

    def exchange_seconds(self, ranks: int) -> float:
        """Seconds of one exchange of a few numbers."""
        return self.latency * math.ceil(math.log2(ranks)) if ranks > 1 else 0.0


def fit_link(sizes: list[int], seconds: list[float], message: float) -> Link:
    """The link whose sums of two processes come nearest to what was measured, each by its share of the time.

    sizes: bytes. message: as measured, by many small messages at once.
    """
    rows = np.array([[2.0, size] for size in sizes]) / np.array(seconds)[:, None]  # two latencies; 2 (1 / 2) size
    (latency, per_byte), *_ = np.linalg.lstsq(rows, np.ones(len(sizes)), rcond=None)
    return Link(max(float(latency), 1e-9), message, 1 / max(float(per_byte), 1e-15))


def predict(link: Link, compute: float, size: int, ranks: int) -> tuple[float, float]:
    """(seconds of an update, efficiency) where each process computes for ``compute`` seconds: weak scaling."""
    seconds = compute + link.sum_seconds(ranks, size) + link.exchange_seconds(ranks)
    return seconds, compute / seconds
