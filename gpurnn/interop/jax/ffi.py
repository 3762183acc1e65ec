"""Python functions that XLA calls with the very memory of its arrays.

``jax.pure_callback`` moves each array through JAX, which costs time and can wait forever for a thread of XLA. XLA's
foreign function interface calls a C function with the addresses of arguments and results. Here ctypes makes that C
function, so nothing has to be compiled. The structures are those of ``xla/ffi/api/c_api.h``, which is installed with
jaxlib: within one major version of that interface they only grow at their ends.
"""

from __future__ import annotations

import ctypes
import math
import re
from collections.abc import Callable
from pathlib import Path

import jax
import ml_dtypes
import numpy as np

from ..._typing import Array

_METADATA, _EXECUTE, _STRING = (
    1,
    3,
    4,
)  # XLA_FFI_Extension_Metadata, XLA_FFI_ExecutionStage_EXECUTE, XLA_FFI_AttrType_STRING
_INVALID_ARGUMENT, _INTERNAL = 3, 13  # XLA_FFI_Error_Code
_DTYPES = {  # XLA_FFI_DataType
    1: np.bool_, 4: np.int32, 5: np.int64, 8: np.uint32, 10: np.float16, 11: np.float32, 12: np.float64,
    16: ml_dtypes.bfloat16,
}  # fmt: skip


class _Extension(ctypes.Structure):
    pass


class _Version(ctypes.Structure):
    _fields_ = [("size", ctypes.c_size_t), ("extension", ctypes.POINTER(_Extension)),
                ("major", ctypes.c_int), ("minor", ctypes.c_int)]  # fmt: skip


class _Metadata(ctypes.Structure):
    _fields_ = [("size", ctypes.c_size_t), ("version", _Version), ("traits", ctypes.c_uint32)]


_Extension._fields_ = [  # XLA_FFI_Metadata_Extension, where the kind says so
    ("size", ctypes.c_size_t), ("kind", ctypes.c_int), ("next", ctypes.POINTER(_Extension)),
    ("metadata", ctypes.POINTER(_Metadata)),
]  # fmt: skip


class _NewError(ctypes.Structure):
    _fields_ = [("size", ctypes.c_size_t), ("extension", ctypes.c_void_p), ("message", ctypes.c_char_p),
                ("code", ctypes.c_int)]  # fmt: skip


class _Api(ctypes.Structure):
    _fields_ = [("size", ctypes.c_size_t), ("extension", ctypes.c_void_p), ("version", _Version),
                ("internal", ctypes.c_void_p),
                ("new_error", ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.POINTER(_NewError)))]  # fmt: skip


class _Buffer(ctypes.Structure):
    _fields_ = [("size", ctypes.c_size_t), ("extension", ctypes.c_void_p), ("dtype", ctypes.c_int),
                ("data", ctypes.c_void_p), ("rank", ctypes.c_int64),
                ("shape", ctypes.POINTER(ctypes.c_int64))]  # fmt: skip


class _Buffers(ctypes.Structure):
    _fields_ = [("size", ctypes.c_size_t), ("extension", ctypes.c_void_p), ("count", ctypes.c_int64),
                ("kinds", ctypes.c_void_p),
                ("buffers", ctypes.POINTER(ctypes.POINTER(_Buffer)))]  # fmt: skip


class _Text(ctypes.Structure):
    _fields_ = [("data", ctypes.c_void_p), ("length", ctypes.c_size_t)]


class _Attributes(ctypes.Structure):
    _fields_ = [("size", ctypes.c_size_t), ("extension", ctypes.c_void_p), ("count", ctypes.c_int64),
                ("kinds", ctypes.POINTER(ctypes.c_int)), ("names", ctypes.c_void_p),
                ("values", ctypes.POINTER(ctypes.POINTER(_Text)))]  # fmt: skip


class _Call(ctypes.Structure):
    _fields_ = [("size", ctypes.c_size_t), ("extension", ctypes.POINTER(_Extension)), ("api", ctypes.POINTER(_Api)),
                ("context", ctypes.c_void_p), ("stage", ctypes.c_int), ("arguments", _Buffers), ("results", _Buffers),
                ("attributes", _Attributes)]  # fmt: skip


_HANDLER = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.POINTER(_Call))
_handlers = []  # XLA has no more than their addresses


def register(name: str, function: Callable[[str, list[Array], list[Array]], None]) -> None:
    """Let ``jax.ffi.ffi_call(name, ...)(*arguments, call=text)`` run ``function(text, arguments, results)`` on a CPU.

    ``function`` reads NumPy arrays over the memory of the arguments and writes to those of the results. It must not
    call JAX: XLA may have no thread left for that. What it raises becomes an error of JAX with the same message.
    """
    version = _interface_version()

    def handler(pointer):
        call = pointer.contents
        extension = call.extension
        if extension and extension.contents.kind == _METADATA:
            found = extension.contents.metadata.contents.version
            found.major, found.minor = version
            return None
        try:
            if call.stage == _EXECUTE:
                function(_text(call.attributes), _arrays(call.arguments), _arrays(call.results))
        except BaseException as error:  # it cannot cross XLA
            return _as_error(call.api.contents, error)
        return None

    handler = _HANDLER(handler)
    _handlers.append(handler)
    address = ctypes.cast(handler, ctypes.c_void_p).value
    jax.ffi.register_ffi_target(name, jax.ffi.pycapsule(address), platform="cpu")


def _interface_version():
    """(major, minor) of the interface that this jaxlib has. Raises ImportError for one with other structures."""
    text = Path(jax.ffi.include_dir(), "xla", "ffi", "api", "c_api.h").read_text(encoding="utf-8")
    major, minor = (int(re.findall(rf"#define XLA_FFI_API_{part} (\d+)", text)[0]) for part in ("MAJOR", "MINOR"))
    if major != 0:
        raise ImportError(
            "gpurnn.interop.jax knows version 0 of XLA's foreign function interface, and this jaxlib has version "
            f"{major}: install an older jax, or a newer gpurnn"
        )
    return major, minor


def _text(attributes):
    """The only attribute."""
    assert attributes.count == 1 and attributes.kinds[0] == _STRING
    text = attributes.values[0].contents
    return ctypes.string_at(text.data, text.length).decode()


def _arrays(buffers):
    return [_array(buffers.buffers[k].contents) for k in range(buffers.count)]


def _array(buffer):
    """A NumPy array over a buffer's memory."""
    shape, dtype = tuple(buffer.shape[: buffer.rank]), np.dtype(_DTYPES[buffer.dtype])
    size = math.prod(shape) * dtype.itemsize
    if not size:  # its address may be anything
        return np.empty(shape, dtype)
    return np.frombuffer((ctypes.c_char * size).from_address(buffer.data), dtype).reshape(shape)


def _as_error(api, error):
    """What makes XLA raise ``error``'s message."""
    message = f"{type(error).__name__}: {error}".encode()
    code = _INVALID_ARGUMENT if isinstance(error, (TypeError, ValueError)) else _INTERNAL
    return api.new_error(ctypes.byref(_NewError(ctypes.sizeof(_NewError), None, message, code)))
