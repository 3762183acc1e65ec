"""Weights in 8 bits, as compiled code reads them."""

from __future__ import annotations

from typing import Any, NamedTuple

from .._typing import Array


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


class Parts(NamedTuple):
    """The arrays of weights for compiled code: those of floats have no scales."""

    weights: Array | None
    scales: Array | None


def parts_of(weights: Array | Int8Matrix | None) -> Parts:
    """The ``Parts`` of weights of either kind."""
    return Parts(weights.values, weights.scales) if isinstance(weights, Int8Matrix) else Parts(weights, None)
