"""Metrics: numbers for people, without derivatives."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from ._typing import Array, Lengths
from .backends.ops import blocks
from .errors import ShapeError
from .losses import class_rows


def accuracy(
    logits: Array,
    targets: Array,
    mask: Array | None = None,
    *,
    lengths: Lengths = None,
    batch_first: bool = False,
    ignore_index: int | None = None,
) -> float:
    """Share of targets that have the highest logit (of equal ones the first), a float in [0, 1].

    logits: (..., V), usually (T, B, V); targets: integers (...). mask, lengths, batch_first and ignore_index say which
    targets count, and the errors raised are those of ``cross_entropy``.
    Returns nan where no target counts: unlike a loss, 0 would be a claim.

    >>> accuracy(np.array([[0.1, 0.9], [0.8, 0.2]]), np.array([1, 1]))
    0.5
    """
    ops, logits, labels, rows, _ = class_rows(logits, targets, mask, lengths, batch_first, ignore_index)
    right = 0
    for part, index in blocks(rows, labels.size, logits.shape[1], ops.xp):
        right = right + (logits[index].argmax(axis=1) == labels[part]).sum()
    return float(right) / labels.size if labels.size else math.nan


def perplexity(mean_loss: float) -> float:
    """exp of a mean cross-entropy in nats, as a float; inf where that overflows."""
    try:
        return math.exp(float(mean_loss))
    except OverflowError:
        return math.inf


def bits_per_character(mean_loss: float) -> float:
    """A mean cross-entropy per character in nats, turned into bits: divided by ln 2."""
    return float(mean_loss) / math.log(2)


def edit_distance(a: Sequence[Any], b: Sequence[Any]) -> int:
    """How few insertions, deletions and replacements turn one sequence into the other (Levenshtein 1966).

    a, b: strings, or lists of anything that can be compared (words, class numbers). Returns an int.

    >>> edit_distance("kitten", "sitting")
    3
    """
    numbers = {}
    a, b = (np.array([numbers.setdefault(item, len(numbers)) for item in sequence], np.int64) for sequence in (a, b))
    places = np.arange(len(b) + 1)
    row = places  # distances of the a read so far to every beginning of b
    for item in a:
        row = np.concatenate([row[:1] + 1, np.minimum(row[1:] + 1, row[:-1] + (b != item))])
        row = np.minimum.accumulate(row - places) + places  # insertions, one after another
    return int(row[-1])


def error_rate(hypotheses: Sequence[Sequence[Any]], references: Sequence[Sequence[Any]]) -> float:
    """Edit distances of all pairs, summed, over the length of all references: a float, which may be above 1.

    Two lists of sequences: of strings for the character error rate, of lists of words for the word error rate.
    Returns nan where the references are empty. Raises ShapeError unless there are equally many.

    >>> error_rate(["31", "4"], ["314", "4"])
    0.25
    """
    if len(hypotheses) != len(references):
        raise ShapeError(f"hypotheses: expected {len(references)}, as many as references, got {len(hypotheses)}")
    total = sum(len(reference) for reference in references)
    distances = sum(edit_distance(*pair) for pair in zip(hypotheses, references, strict=True))
    return distances / total if total else math.nan
