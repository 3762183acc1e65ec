"""Tensors of torch as arrays of a backend, and back: without copies wherever the memory allows it."""

from __future__ import annotations

import contextlib
from typing import Any

import numpy as np
import torch

from ..._typing import Array
from ...backends.cpu.threads import at_most
from ...dtypes import check_dtype, dtype_name

_VECTOR = 16  # bytes that kernels load at once


def array_dtype(dtype: torch.dtype) -> np.dtype[Any]:
    """The NumPy dtype of a floating-point dtype of torch. Raises DtypeError for one that the library has not."""
    return check_dtype(str(dtype).removeprefix("torch."))


def to_array(ops: Any, tensor: torch.Tensor) -> Array:
    """``tensor`` as an array of the backend ``ops``: its own memory, unless host memory goes to a device."""
    tensor = tensor.detach()
    if tensor.is_cuda:
        tensor = tensor.contiguous()
        if tensor.data_ptr() % _VECTOR:
            tensor = tensor.clone()
        return _from_device(ops.xp, tensor)
    if tensor.dtype == torch.bfloat16:  # NumPy's bfloat16 is that of ml_dtypes, which torch does not know
        return ops.xp.asarray(tensor.view(torch.int16).numpy().view(array_dtype(torch.bfloat16)))
    return ops.xp.asarray(tensor.numpy())


def to_tensor(ops: Any, array: Array, like: torch.Tensor) -> torch.Tensor:
    """``array`` as a contiguous tensor of the device and the dtype of ``like``, in the array's memory if that allows
    it."""
    if like.is_cuda:
        tensor = _to_device(ops.xp.ascontiguousarray(array))
    else:
        array = np.ascontiguousarray(ops.to_numpy(array))
        narrow = dtype_name(array.dtype) == "bfloat16"
        tensor = torch.from_numpy(array.view(np.int16)).view(torch.bfloat16) if narrow else torch.from_numpy(array)
    return tensor if tensor.dtype == like.dtype else tensor.to(like.dtype)


def _from_device(xp, tensor):
    """A CUDA tensor as an array of CuPy, which shares its memory."""
    if tensor.dtype == torch.bfloat16:
        return xp.from_dlpack(tensor.view(torch.int16)).view(array_dtype(torch.bfloat16))
    if tensor.dtype == torch.bool:  # older versions of DLPack have none
        return xp.from_dlpack(tensor.view(torch.uint8)).view(np.bool_)
    return xp.from_dlpack(tensor)


def _to_device(array):
    """An array of CuPy as a CUDA tensor, which shares its memory."""
    if dtype_name(array.dtype) == "bfloat16":
        return torch.from_dlpack(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_dlpack(array)


def as_torch_runs(xp: Any, tensor: torch.Tensor) -> contextlib.AbstractContextManager[Any]:
    """Runs a block on the device of ``tensor`` and on torch's current stream there; on the host with no more threads
    than torch takes."""
    return _device_stream(xp, tensor) if tensor.is_cuda else at_most(torch.get_num_threads())


@contextlib.contextmanager
def _device_stream(xp, tensor):
    stream = torch.cuda.current_stream(tensor.device)
    with xp.cuda.Device(tensor.device.index), xp.cuda.ExternalStream(stream.cuda_stream):
        yield
