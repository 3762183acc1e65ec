"""Where arrays from outside come in: each is taken as it is, copied, or refused with a sentence on what to do.

Compiled code and cuBLAS receive addresses and do not check them. Every array that passes here therefore has this
machine's byte order, addresses and strides that are multiples of its item size, and no class that redefines operators.
An array with something that would be lost (a mask, a graph of torch) is refused.
"""

from __future__ import annotations

from numbers import Real
from typing import Any

import numpy as np

from ._typing import Array
from .dtypes import is_float
from .errors import BackendError, DtypeError, ShapeError, described

_DLPACK_HOST = (1, 3)  # kDLCPU, kDLCUDAHost


def plain(array: np.ndarray) -> np.ndarray:
    """A NumPy ``array`` in a form that arithmetic and compiled code may read: itself, a view, or a copy."""
    if type(array) is not np.ndarray:
        array = np.asarray(array)  # np.matrix redefines "*"
    if not array.dtype.isnative:
        array = array.astype(array.dtype.newbyteorder("="))
    elif not array.flags.aligned:
        array = array.copy()
    return array


def plain_on_device(array: Array) -> Array:
    """``plain`` for a CuPy array. CuPy has one byte order and no subclasses, so only the alignment is checked."""
    size = array.itemsize
    if not array.size or (array.data.ptr % size == 0 and array.flags.c_contiguous):
        return array  # as most are
    return array.copy() if array.data.ptr % size or any(stride % size for stride in array.strides) else array


def refuse_masked(name: str, value: Any) -> None:
    """Raise DtypeError for a masked array, or for a list that holds one: its mask would be lost silently."""
    if isinstance(value, np.ma.MaskedArray) or (
        isinstance(value, (list, tuple)) and any(_holds_masked(part) for part in value)
    ):
        raise DtypeError(
            f"{name}: got a masked array, whose mask would be lost. Give {name.split()[-1]}.filled(0), and say what "
            "counts with lengths=, or with mask= if the loss or the layer takes one"
        )


def _holds_masked(value):
    """Whether ``value`` is a masked array, or a list of lists with one."""
    if isinstance(value, (list, tuple)):
        return any(_holds_masked(part) for part in value)
    return isinstance(value, np.ma.MaskedArray)


def refuse_graph(name: str, value: Any) -> None:
    """Raise TypeError for a tensor that requires grad: its graph would be lost silently."""
    if getattr(value, "requires_grad", False) is True:
        raise TypeError(
            f"{name}: this tensor requires grad, and no gradient would come back to it. In a model of torch use "
            f"the layers of gpurnn.interop.torch. Give {name.split()[-1]}.detach() where no gradient is needed"
        )


def refuse_function(name: str, value: Any) -> None:
    """Raise TypeError for a function instead of an array; most often it is the backward of a loss, not called."""
    if callable(value):
        hint = ". Call it: backward(dloss())" if name.startswith("d") else ""
        raise TypeError(f"{name}: expected an array, got a function{hint}")


def refuse_loss(name: str, value: Any, shape: tuple[int, ...]) -> None:
    """Raise ShapeError for one number instead of an array of ``shape``; most often it is the loss itself."""
    if shape and (isinstance(value, Real) or getattr(value, "shape", None) == ()):
        raise ShapeError(
            f"{name}: expected the gradient of the output, of shape {shape}, got one number. Give what the loss's "
            "backward returns, not the loss: backward(dloss())"
        )


def as_array(xp: Any, backend: str, value: Array, name: str) -> Array:
    """``value`` as an array of ``xp``, NumPy or CuPy; ``Ops.asarray`` says what is taken and what is refused.

    backend: its name, for the error.
    """
    if type(value) is np.ndarray and xp is np:  # as most are
        return value if value.flags.aligned and value.dtype.isnative else plain(value)
    if xp is not np and isinstance(value, xp.ndarray):
        return plain_on_device(value)
    refuse_function(name, value)
    refuse_masked(name, value)
    refuse_graph(name, value)
    through_dlpack = hasattr(value, "__dlpack_device__") and not isinstance(value, np.ndarray)
    if through_dlpack:
        on_host = value.__dlpack_device__()[0] in _DLPACK_HOST
    else:
        on_host = not hasattr(value, "__cuda_array_interface__")
    if xp is np and not on_host:
        raise BackendError(f"{name}: is on a GPU, but the layer's backend is {backend!r}. Move it to the host first")
    if through_dlpack:
        try:
            value = (np if on_host else xp).from_dlpack(value)  # CuPy takes no host memory through DLPack
        except (BufferError, RuntimeError, TypeError) as error:
            raise DtypeError(f"{name}: cannot be handed over by {type(value).__name__} ({error})") from error
    return plain(np.asarray(value)) if xp is np else xp.asarray(plain(np.asarray(value)) if on_host else value)


def check_float(array: Array, value: Array, dtype: Any, name: str) -> Array:
    """``array``, made of ``value``; raises DtypeError, with the conversion, unless it is of ``dtype``."""
    if array.dtype != dtype:
        if not (array.dtype.kind in "biufc" or is_float(array.dtype)):
            got = f"an array of {array.dtype}" if isinstance(value, np.ndarray) else described(value)
            raise DtypeError(f"{name}: expected an array of numbers of dtype {dtype}, got {got}")
        short = name.split()[-1]  # of "state c", which is no expression
        raise DtypeError(
            f"{name}: dtype ({array.dtype}) does not match the layer's ({dtype}). "
            f"Convert it: {short} = {conversion(short, value, str(dtype))}"
        )
    return array


def conversion(name: str, value: Any, dtype: str) -> str:
    """The expression that makes ``value``, called ``name``, an array of ``dtype``."""
    if hasattr(value, "astype"):
        return f"{name}.astype({dtype!r})"
    if hasattr(value, "detach"):  # a torch tensor
        return f"{name}.to(torch.{dtype})"
    return f"np.asarray({name}, {dtype!r})"


def without_torch(value: Any) -> Any:
    """A torch tensor as a NumPy array, numbers of it in float64, as NumPy has no bfloat16; anything else as it is."""
    if not hasattr(value, "detach"):
        return value
    value = value.detach().cpu()
    return (value.double() if value.is_floating_point() else value).numpy()


def host_array(value: Array, name: str) -> np.ndarray:
    """``value`` as a plain NumPy array; arrays on a device are copied to the host.

    Raises DtypeError for a masked array and TypeError for a tensor that requires grad, both naming the argument.
    """
    if type(value) is np.ndarray:
        return plain(value)
    refuse_masked(name, value)
    refuse_graph(name, value)
    if not isinstance(value, (list, tuple, np.ndarray)) and hasattr(value, "get"):
        value = value.get()  # CuPy
    return plain(np.asarray(value))
