"""Weights in 8 bits: whole numbers, with a scale for each row."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from .errors import ShapeError

MOST = 127  # the largest whole number: -128 is left out, so that a weight and its opposite are stored alike


class Quantized(NamedTuple):
    """A matrix (N, K) in 8 bits. values: (N, K) int8, from -127 to 127. scales: (N,) float32, what 1 stands for."""

    values: np.ndarray
    scales: np.ndarray


def quantize_rows(array: Any) -> Quantized:
    """A matrix in 8 bits: each row in whole numbers from -127 to 127, its largest absolute value being 127.

    No number is off by more than half the scale of its row, which is that value / 127.

    Parameters
    ----------
    array : array
        (N, K) floats.

    Returns
    -------
    Quantized
        values (N, K) int8 and scales (N,) float32; a row of zeros has the scale 0.

    Raises
    ------
    ShapeError
        The array is no matrix.
    ValueError
        It holds numbers that are not finite, or too large for a scale in float32.

    Examples
    --------
    >>> values, scales = gpurnn.quantization.quantize_rows([[0.5, -1.27], [0.0, 0.0]])
    >>> values.tolist(), scales.round(4).tolist()
    ([[50, -127], [0, 0]], [0.009999999776482582, 0.0])
    """
    array = np.asarray(array, np.float64)
    if array.ndim != 2:
        raise ShapeError(f"array: expected a matrix (N, K), got shape {array.shape}")
    largest = np.abs(array).max(axis=1, initial=0)
    if not np.all(largest <= np.finfo(np.float32).max):  # NaN is not, either
        raise ValueError("array: expected finite numbers within the range of float32, got others")
    scales = (largest / MOST).astype(np.float32)
    divisors = np.where(scales > 0, scales, np.inf).astype(np.float64)
    values = np.clip(np.rint(array / divisors[:, None]), -MOST, MOST)  # a scale below normal numbers is rounded much
    return Quantized(values.astype(np.int8), scales)


def dequantize_rows(quantized: Quantized) -> np.ndarray:
    """The numbers that a ``Quantized`` matrix stands for, (N, K) float32.

    Examples
    --------
    >>> stored = gpurnn.quantization.quantize_rows(np.array([[0.3, -1.0]]))
    >>> gpurnn.quantization.dequantize_rows(stored).round(3).tolist()
    [[0.29899999499320984, -1.0]]
    """
    return quantized.values.astype(np.float32) * quantized.scales[:, None]
