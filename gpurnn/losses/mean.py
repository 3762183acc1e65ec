"""What the mean of a loss divides by: the weight of a batch in a mean over several batches."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from ..arrays import host_array
from ..backends import array_ops
from ..dtypes import is_float
from ..masks import lift, valid_places
from .classes import cross_entropy, nll_loss
from .divergence import kl_div
from .elementwise import binary_cross_entropy_with_logits, huber, mae, mse, smooth_l1
from .quantile import quantile_loss

_OF_CLASSES = (cross_entropy, nll_loss)
_OF_NUMBERS = (mse, mae, huber, smooth_l1, binary_cross_entropy_with_logits, kl_div, quantile_loss)


def mean_weight(loss: Callable[..., Any], targets: Any, options: Mapping[str, Any]) -> float | None:
    """What the mean of a loss over ``targets`` divides by, where mask, ignore_index or class weights decide it.

    Parameters
    ----------
    loss : callable
        A loss of this package, or a ``functools.partial`` of one.
    targets : Array
        As the loss takes them.
    options : mapping
        Keyword arguments of the loss besides those that the partial has.

    Returns
    -------
    float or None
        The number of targets that count, see ``places_weight``, or the sum of their class weights. None where none of
        the three is given, and for any other loss.

    Examples
    --------
    >>> loss = functools.partial(gpurnn.cross_entropy, ignore_index=-1)
    >>> mean_weight(loss, np.array([[2, -1, 0]]), {})
    2
    >>> mean_weight(gpurnn.cross_entropy, np.array([[2, 1, 0]]), {}) is None
    True
    """
    options, of_classes = all_options(loss, options), is_one_of(loss, _OF_CLASSES)
    if not is_one_of(loss) or options.get("reduction", "mean") != "mean" or not hasattr(targets, "dtype"):
        return None
    targets = host_array(targets, "targets")
    if of_classes and is_float(targets.dtype):  # probabilities of the classes, along the last axis
        return places_weight(np.empty(targets.shape[:-1], bool), options)
    if not of_classes or options.get("weight") is None:
        return places_weight(targets, options)
    weights = host_array(options["weight"], "weight").astype(np.float64)
    labels = targets[_counting(targets, options)]
    return float(weights[labels[(labels >= 0) & (labels < len(weights))]].sum())  # the loss refuses other labels


def places_weight(targets: Any, options: Mapping[str, Any]) -> float | None:
    """How many targets count by ``mask``, ``ignore_index`` and ``lengths``; None without the first two.

    With more axes than (T, B) it is their mean over these axes, so that batches with and without a mask fit together.
    """
    if all(options.get(name) is None for name in ("mask", "ignore_index")) or not hasattr(targets, "dtype"):
        return None
    targets = host_array(targets, "targets")
    count, inner = int(_counting(targets, options).sum()), math.prod(targets.shape[2:])
    return count if inner < 2 else count / inner


def is_one_of(loss: Callable[..., Any], losses: tuple[Callable[..., Any], ...] = _OF_CLASSES + _OF_NUMBERS) -> bool:
    """Whether a loss, or what it is a ``functools.partial`` of, is one of these, by default of this package's."""
    function = loss.func if isinstance(loss, functools.partial) else loss
    return any(function is one for one in losses)


def all_options(function: Callable[..., Any], options: Mapping[str, Any]) -> dict[str, Any]:
    """The options that a function gets by name, with those that a ``functools.partial`` has fixed."""
    return {**(function.keywords if isinstance(function, functools.partial) else {}), **options}


def _counting(targets, options):
    """Booleans of the shape of ``targets``, True where a target counts."""
    mask = None if options.get("mask") is None else host_array(options["mask"], "mask")
    places = (mask, options.get("lengths"), options.get("batch_first", False))
    valid = valid_places(targets.shape, *places, array_ops(targets))
    counting = np.ones(targets.shape, bool) if valid is None else lift(valid, targets.ndim)
    if options.get("ignore_index") is not None and targets.dtype.kind in "iu":
        counting = counting & (targets != options["ignore_index"])
    return np.broadcast_to(counting, targets.shape)
