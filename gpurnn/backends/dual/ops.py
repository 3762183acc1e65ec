"""``DualOps``: the primitives over ``Dual`` arrays, on NumPy in float64."""

from __future__ import annotations

from typing import Any

import numpy as np

from ...arrays import host_array
from ...dtypes import is_float
from ...errors import DtypeError
from ..ops import Ops
from .array import REAL, Dual, parts


class _Namespace:
    """NumPy, whose new arrays of floating-point numbers are ``Dual``."""

    ndarray = Dual

    def __getattr__(self, name: str) -> Any:
        return getattr(np, name)

    def empty(self, shape: Any, dtype: Any = REAL) -> Any:
        return _made(np.empty, shape, dtype)

    def zeros(self, shape: Any, dtype: Any = REAL) -> Any:
        return _made(np.zeros, shape, dtype)

    def ones(self, shape: Any, dtype: Any = REAL) -> Any:
        array = _made(np.zeros, shape, dtype)
        array[...] = 1
        return array

    def ascontiguousarray(self, value: Any) -> Any:
        if isinstance(value, Dual):
            return Dual(*map(np.ascontiguousarray, parts(value)))
        return np.ascontiguousarray(value)

    def asarray(self, value: Any, dtype: Any = None) -> Any:
        return value if isinstance(value, Dual) else np.asarray(value, dtype)


def _made(make, shape, dtype):
    if not is_float(np.dtype(dtype)):
        return make(shape, dtype)
    return Dual(make(shape, REAL), np.zeros(shape, REAL))


class DualOps(Ops):
    """Array code with derivatives. All floating-point numbers are float64."""

    def __init__(self) -> None:
        super().__init__(_Namespace(), "dual")
        self.plain = Ops(np, "numpy")

    def asarray(self, value: Any, name: str = "array") -> Any:
        if isinstance(value, Dual):
            return value
        array = host_array(value, name)
        return array.astype(REAL, copy=False) if is_float(array.dtype) else array

    def asfloat(self, value: Any, dtype: Any, name: str) -> Any:
        array = self.asarray(value, name)
        if not is_float(array.dtype):
            raise DtypeError(f"{name}: expected floating-point numbers, got {array.dtype}")
        return array

    def synchronize(self) -> None:
        pass

    def accumulate_rows(self, grad: Any, index: Any, d: Any) -> None:
        for one, part in zip((grad.value, grad.tangent), parts(d), strict=True):
            if isinstance(part, np.ndarray):
                self.plain.accumulate_rows(one, index, part)

    def dropout_mask(self, shape: Any, rate: float, seed: int, layer: int, call: int) -> Any:
        return self.plain.dropout_mask(shape, rate, seed, layer, call)


DUAL_OPS = DualOps()
