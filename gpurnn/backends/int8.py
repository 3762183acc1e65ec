"""Weights in 8 bits, as compiled code reads them."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from .._typing import Array
from ..quantization import MOST


class Int8Matrix:
    """Weights in the place of an array (N, K). values: (N, K) int8. scales: (N,) float32, what 1 stands for in each
    row. bits: of the whole numbers that they are multiplied by, 16 or 8. packed: what a backend makes of them."""

    def __init__(self, values: Array, scales: Array, bits: int = 16) -> None:
        self.values, self.scales, self.bits = values, scales, bits
        self.shape = values.shape
        self.packed: dict[Any, Any] = {}

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, head: int) -> Int8Matrix:
        """That of one head, of arrays (heads, N, K) and (heads, N)."""
        return Int8Matrix(self.values[head], self.scales[head], self.bits)

    def floats(self, dtype: Any) -> Array:
        """The numbers that it stands for, a new array. dtype: float32 or float64."""
        return self.values.astype(dtype) * self.scales.astype(dtype)[..., None]

    def rounding_floats(self, dtype: Any) -> np.ndarray:
        """The same on NumPy, whose products round what they multiply to 8 bits where ``bits`` says so."""
        floats = self.floats(dtype)
        return floats.view(RoundingFloats) if self.bits == 8 else floats


class RoundingFloats(np.ndarray):
    """Floats of weights whose matrix products round the other matrix first, as compiled code does."""

    def __array_ufunc__(self, ufunc: Any, method: str, *inputs: Any, out: Any = None, **options: Any) -> Any:
        plain = [np.asarray(one) for one in inputs]
        if ufunc is np.matmul:
            other = isinstance(inputs[0], RoundingFloats)  # its place; weights stand first, or transposed second
            plain[other] = rounded_to_8_bits(plain[other], -2 if other else -1)
        return getattr(ufunc, method)(*plain, out=out, **options)


def rounded_to_8_bits(array: np.ndarray, axis: int) -> np.ndarray:
    """Numbers as whole multiples of the largest absolute value along an axis / 127, NaN where that is not finite.

    Zero where that value is less than 65536 times the smallest normal number, which compiled code takes for zero.
    """
    dtype = array.dtype.type
    largest = np.abs(array).max(axis=axis, keepdims=True, initial=0)
    scales = largest / dtype(MOST)
    scales[largest < np.finfo(dtype).tiny * dtype(65536)] = np.inf
    with np.errstate(invalid="ignore", over="ignore"):
        whole = np.rint(array / scales)
        scales[(largest <= np.finfo(dtype).max) & np.isinf(scales)] = 0
        return np.clip(whole * scales, -largest, largest)  # 127 * (largest / 127) may round to infinity


class Parts(NamedTuple):
    """The arrays of weights for compiled code: those of floats have no scales."""

    weights: Array | None
    scales: Array | None


def parts_of(weights: Array | Int8Matrix | None) -> Parts:
    """The ``Parts`` of weights of either kind."""
    return Parts(weights.values, weights.scales) if isinstance(weights, Int8Matrix) else Parts(weights, None)
