"""Errors as a share of what is allowed."""

import numpy as np

from ..dtypes import EPSILON


def nan_is_worst(error):
    """An error as a float. NaN becomes infinity, so that no other error hides it."""
    return float("inf") if np.isnan(error) else float(error)


def count_terms(layer, steps):
    """Roundings, one after another, of a layer: one for each term of each product with a parameter, in each step.

    A weight (N, K) is multiplied in sums of K terms forward and of N backward, anything else counts once each way, and
    each parameter's gradient adds up one term a step. A layer without parameters counts as one of a single number.
    """
    shapes = [array.shape for array in layer.params.values()] or [()]
    return max(1, steps) * sum(sum(shape) + 1 if len(shape) > 1 else 2 for shape in shapes)


def allowed_rounding(value, dtype, terms):
    """What ``terms`` roundings in a dtype may add up to: a share of the largest absolute value of an array, or of 1."""
    return terms * EPSILON[dtype] * np.abs(value).max(initial=1)


def worst_error(got, plain, expected, dtype, terms):
    """``(share, detail)``: the largest error of the arrays in ``got`` as a share of what is allowed, and where.

    got, plain, expected: mappings name -> array, of the layer, of the plain implementation, and of float64. terms:
    roundings to allow where ``plain`` says nothing, else None: then twice its largest error and two roundings.
    """
    if terms is None:  # of all results together: a single number may happen to be exact
        usual = max(
            np.abs(plain[name] - value).max(initial=0) / np.abs(value).max(initial=1)
            for name, value in expected.items()
        )
        terms = 2 * usual / EPSILON[dtype] + 2
    worst, detail = 0.0, ""
    for name, value in expected.items():
        if np.shape(got[name]) != np.shape(value):
            return float("inf"), f"{name}: expected shape {np.shape(value)}, got {np.shape(got[name])}"
        allowed = allowed_rounding(value, dtype, terms)
        error = np.abs(got[name] - value).max(initial=0)
        share = nan_is_worst(error / allowed) if error or allowed else 0.0
        if share > worst:
            worst, detail = share, f"{name}: off by {error:.3g}, allowed {allowed:.3g}"
    return worst, detail


def equal_bits(first, second):
    """``(share, detail)``: 0 where the arrays of two mappings are equal, NaN to NaN, else infinity."""
    different = [name for name, value in first.items() if not np.array_equal(value, second[name], equal_nan=True)]
    return (float("inf"), f"two runs differ in {', '.join(different)}") if different else (0.0, "")
