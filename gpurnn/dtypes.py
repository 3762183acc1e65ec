"""The four dtypes that the library computes in, and what each part of it must know of them."""

import functools
from typing import Any

import numpy as np

from .errors import DtypeError

DTYPES = ("float32", "float64", "float16", "bfloat16")
ITEMSIZE = {"float32": 4, "float64": 8, "float16": 2, "bfloat16": 2}  # bytes
EPSILON = {"float32": 2.0**-23, "float64": 2.0**-52, "float16": 2.0**-10, "bfloat16": 2.0**-7}  # from 1 to the next
C_NAMES = {"float32": "float", "float64": "double", "float16": "__half", "bfloat16": "__nv_bfloat16"}  # in the kernels


def check_dtype(dtype: Any) -> np.dtype[Any]:
    """``dtype`` as a NumPy dtype; raises DtypeError unless the library computes in it.

    bfloat16 is the one of ml_dtypes: NumPy has none of its own.
    """
    try:
        name = "None" if dtype is None else np.dtype(dtype).name  # np.dtype(None) is float64
    except TypeError:
        name = str(dtype)
    if name not in DTYPES:
        hint = "" if isinstance(dtype, (str, type, np.dtype)) else ": give a string such as 'float32'"
        raise DtypeError(f"dtype should be one of {', '.join(DTYPES)}, got {name}{hint}")
    if name != "bfloat16":
        return np.dtype(name)
    try:
        from ml_dtypes import bfloat16
    except ImportError as error:
        raise DtypeError("dtype bfloat16 needs ml_dtypes. Run pip install ml_dtypes") from error
    return np.dtype(bfloat16)


def _bfloat16():
    """ml_dtypes' bfloat16 as a NumPy dtype, or None where ml_dtypes is not installed."""
    try:
        from ml_dtypes import bfloat16
    except ImportError:
        return None
    return np.dtype(bfloat16)


def bfloat16_or_none_such():
    """bfloat16; where ml_dtypes is not installed, a dtype that no array of numbers has."""
    return _bfloat16() or np.dtype("V2")


def is_float(dtype):
    """Whether a dtype is of floating-point numbers. NumPy's kind does not say so of those of ml_dtypes."""
    return dtype.kind == "f" or dtype.name.startswith(("bfloat", "float"))


def compute_dtype(dtype: np.dtype[Any]) -> np.dtype[Any]:
    """What arrays of a dtype are computed in: float32 for the 16-bit ones, else the dtype itself."""
    return np.dtype(np.float32) if dtype.itemsize == 2 else dtype


def upcast(array):
    """``array`` in what it is computed in; itself unless it is 16-bit."""
    return array.astype(compute_dtype(array.dtype), copy=False)


@functools.cache
def dtype_name(dtype):
    """``dtype.name``, which NumPy builds anew each time."""
    return dtype.name
