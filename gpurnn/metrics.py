"""Metrics: numbers for people, without derivatives."""

import math

from .losses import class_rows
from .ops import blocks


def accuracy(logits, targets, mask=None, *, lengths=None, batch_first=False, ignore_index=None):
    """Share of targets that have the highest logit (of equal ones the first), a float in [0, 1].

    logits: (..., V), usually (T, B, V); targets: integers (...). mask, lengths, batch_first and ignore_index say which
    targets count, and the errors raised are those of ``cross_entropy`` (losses.py).
    Returns nan where no target counts: unlike a loss, 0 would be a claim.

    >>> accuracy(np.array([[0.1, 0.9], [0.8, 0.2]]), np.array([1, 1]))
    0.5
    """
    ops, logits, labels, rows, _ = class_rows(logits, targets, mask, lengths, batch_first, ignore_index)
    right = 0
    for part, index in blocks(rows, labels.size, logits.shape[1], ops.xp):
        right = right + (logits[index].argmax(axis=1) == labels[part]).sum()
    return float(right) / labels.size if labels.size else math.nan


def perplexity(mean_loss):
    """exp of a mean cross-entropy in nats, as a float; inf where that overflows."""
    try:
        return math.exp(float(mean_loss))
    except OverflowError:
        return math.inf


def bits_per_character(mean_loss):
    """A mean cross-entropy per character in nats, turned into bits: divided by ln 2."""
    return float(mean_loss) / math.log(2)
