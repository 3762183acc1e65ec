"""Prediction intervals: the loss by which they are learned, and their calibration on the validation part."""

import numpy as np

from ...backends import array_ops
from ...checkpoint import CheckpointError
from ...errors import check_number
from ...losses import quantile_loss

_LEAST = -0.5  # the smallest margin: with it the two ends of an interval meet


class IntervalLoss:
    """The loss of outputs (..., 1 + Q) against targets (...): ``loss`` of the first output, which is the forecast
    itself, plus the sum of the quantile losses of the other Q."""

    def __init__(self, loss, quantiles):
        self.loss, self.quantiles = loss, tuple(quantiles)

    def __call__(self, outputs, targets):
        xp, Q = array_ops(outputs).xp, len(self.quantiles)
        loss, point_backward = self.loss(xp.ascontiguousarray(outputs[..., 0]), targets)
        others, quantile_backward = quantile_loss(xp.ascontiguousarray(outputs[..., 1:]), targets, self.quantiles)

        def backward(dloss=1.0):
            return xp.concatenate([point_backward(dloss)[..., None], quantile_backward(Q * dloss)], axis=-1)

        return loss + Q * others, backward


def bounds(outputs, margins=()):
    """Low and high ends of the intervals, (L, 2, ...), from outputs (..., 1 + 2 L): the forecast and its quantiles in
    ascending order. The narrowest interval comes first.

    margins: (L,), the share of its extent by which both ends of an interval are moved out (in, if negative). Ends never
    cross: an interval contains the forecast and all narrower intervals.
    """
    point, quantiles = outputs[..., 0], np.sort(outputs[..., 1:], axis=-1)
    count, ends = quantiles.shape[-1] // 2, []
    low = high = point
    for n, margin in zip(range(count), margins or [0.0] * count, strict=True):
        first, last = quantiles[..., count - 1 - n], quantiles[..., count + n]
        extent = margin * (last - first)
        low, high = np.minimum(low, first - extent), np.maximum(high, last + extent)
        ends.append((low, high))
    return np.array(ends)


def calibrate(outputs, truth, levels):
    """The margins for ``bounds``, a list of floats, with which the intervals cover shares ``levels`` of the truth.

    outputs: (W, H, 1 + 2 L), truth: (W, H), both of the validation part, which the model was not trained on. For each
    value, how far it lies outside the interval is taken as a share of the interval's extent. The margin is the quantile
    of these numbers at the level (conformalized quantile regression: Romano, Patterson and Candes, NeurIPS 2019). It is
    negative for an interval that covers too much.
    """
    margins, N = [], truth.size
    for n, level in enumerate(levels):
        low, high = np.sort(outputs[..., 1:], axis=-1)[..., [len(levels) - 1 - n, len(levels) + n]].transpose(2, 0, 1)
        extent = np.maximum(high - low, 1e-9 * max(1.0, np.abs(truth).max()))
        outside = np.maximum(low - truth, truth - high) / extent
        rank = min(1.0, level * (N + 1) / N)
        margins.append(max(_LEAST, float(np.quantile(outside, rank, method="higher"))))
    return margins


def coverage(ends, truth, levels):
    """{"80": {"coverage": share of the truth inside, "extent": mean high - low}}, of ends (L, 2, ...)."""
    return {
        name_level(level): {
            "coverage": float(((low <= truth) & (truth <= high)).mean()),
            "extent": float((high - low).mean()),
        }
        for level, (low, high) in zip(levels, ends, strict=True)
    }


def note_ends(values, ends):
    """A list of the note that some intervals, (L, 2, steps), end at the forecast, (steps,), itself; empty for none."""
    count = int((ends == values).any(axis=(0, 1)).sum())
    where = f"at {count:,} of {len(values):,} steps" if len(values) > 1 else "here"
    why = "by the model, the true value then lies on the other side of the forecast"
    return [f"an interval ends at the forecast itself {where}: {why}"] if count else []


def name_level(level):
    """A level as text: 0.8 is "80"."""
    return f"{100 * level:g}"


def saved_margins(trained):
    """The margins that the end of the training left, or None. Raises CheckpointError for a damaged ``config.json``."""
    found = trained.result.get("margins")
    if found is None:
        return None
    try:
        if not isinstance(found, list) or len(found) != len(trained.settings.levels):
            raise ValueError(f"expected {len(trained.settings.levels)} numbers, got {found!r}")
        return [check_number("margins", margin, _LEAST) for margin in found]
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"{trained.folder}: config.json is damaged: margins: {error}") from error
