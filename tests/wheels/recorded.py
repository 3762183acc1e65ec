"""Calls of the compiled library with their arrays before and after, in a file that replay.cpp runs on another machine.

``python tests/wheels/recorded.py FILE`` records layers, losses, optimizers and products of this machine's library.
"""

import ctypes
import struct
import sys
from pathlib import Path

import numpy as np

import gpurnn
from gpurnn.backends.cpu import native, ops, packing
from gpurnn.backends.ops import UPDATE_STATES
from gpurnn.dtypes import check_dtype

KINDS = ("time_loop", "multiply", "update", "cross_entropy", "dropout_mask")
TYPES = ("float32", "float64", "float16", "bfloat16")  # anything else must be equal to the bit
EPS = {"float32": 2.0**-24, "float64": 2.0**-53, "float16": 2.0**-11, "bfloat16": 2.0**-8}


class Recorder:
    """Stands for the library. It passes calls on and notes them."""

    def __init__(self, library):
        self._library, self.records, self._arrays = library, [], []
        self.terms, self.dtype = 1, "float64"  # of the sums of the next calls, one after another: each may round once

    def __getattr__(self, name):
        function = getattr(self._library, name)
        kind = name.removeprefix("gpurnn_native_")
        return self._noted(kind, function) if kind in KINDS else function

    def address(self, array):
        """``native.address``, which also notes whose address it is."""
        if array is not None:
            self._arrays.append(array)
        return native_address(array)

    def _noted(self, kind, function):
        def call(*arguments):
            if kind == "dropout_mask":
                return self._mask(function, arguments)
            first = arguments[0]
            jobs = first if isinstance(first, ctypes.Array) else [first._obj]
            backward = arguments[-2] if kind in ("time_loop", "cross_entropy") else 0
            try:
                pointers, arrays = self._pointers(jobs)
            except LookupError:  # a product inside a layer: its like is recorded on its own
                return function(*arguments)
            before = [memory(array) for array in arrays]
            content = b"".join(map(bytes, jobs))
            result = function(*arguments)
            assert result == 0, (kind, result)
            self._note(kind, int(backward), len(jobs), content, pointers, arrays, before)
            return result

        return call

    def _mask(self, function, arguments):
        """Of plain numbers: they are written as one struct."""
        N, seed, layer, call, threshold, place, *_ = arguments
        result = function(*arguments)
        mask = np.frombuffer((ctypes.c_char * N).from_address(place), np.uint8)
        content = struct.pack("<qQIIQQ", N, seed, layer, call, threshold, 0)
        self._note("dropout_mask", 0, 1, content, [(32, 0, 0)], [mask], [bytes(N)])
        return result

    def _pointers(self, jobs):
        """[(offset in the structs, number of the array, offset in it)], and the arrays that the structs point to."""
        found, arrays = [], []
        for number, job in enumerate(jobs):
            for offset, value in addresses(job):
                if isinstance(value, bytes):
                    array, inside = np.frombuffer(value + b"\0", np.uint8), 0
                else:
                    array, inside = self._holder(value)
                at = next((i for i, other in enumerate(arrays) if other is array), len(arrays))
                arrays[at:] = arrays[at:] or [array]
                found.append((number * ctypes.sizeof(job) + offset, at, inside))
        return found, arrays

    def _holder(self, value):
        for array in reversed(self._arrays):
            start = native_address(array)
            if start <= value < start + max(array.nbytes, 1):
                return array, value - start
        raise LookupError("an address of an array that was not noted")

    def _note(self, kind, backward, count, content, pointers, arrays, before):
        out = [
            struct.pack("<6I", KINDS.index(kind), backward, count, len(content), len(pointers), len(arrays)),
            content,
        ]
        out += [struct.pack("<IIQ", *pointer) for pointer in pointers]
        for array, old in zip(arrays, before, strict=True):
            name = array.dtype.name
            dtype = TYPES.index(name) if name in TYPES else len(TYPES)
            out += [struct.pack("<QQd", len(old), dtype, self.terms * EPS[self.dtype]), old, memory(array)]
        self.records.append(b"".join(out))

    def save(self, path):
        Path(path).write_bytes(b"gpurnn 1" + struct.pack("<Q", len(self.records)) + b"".join(self.records))


native_address = native.address


def memory(array):
    """The bytes of an array, which need not be contiguous: all from its first to its last."""
    return bytes((ctypes.c_char * span(array)).from_address(native_address(array)))


def span(array):
    return (
        sum((n - 1) * stride for n, stride in zip(array.shape, array.strides, strict=True)) + array.itemsize
        if array.size
        else 0
    )


def addresses(job):
    """(offset, value) of each pointer of a struct that is not null."""
    for name, kind, *_ in job._fields_:
        offset, value = getattr(type(job), name).offset, getattr(job, name)
        if kind in (ctypes.c_void_p, ctypes.c_char_p):
            yield from [(offset, value)] if value else ()
        elif isinstance(value, ctypes.Array) and kind._type_ is ctypes.c_void_p:
            yield from ((offset + 8 * i, one) for i, one in enumerate(value) if one)


def layers(dtype):
    """Layers with every kind of what a time loop reads."""
    yield gpurnn.RNN(5, 19, dtype=dtype, backend="cpu", seed=1), {}
    yield gpurnn.LSTM(5, 19, dtype=dtype, backend="cpu", seed=1, bidirectional=True), {"lengths": [6, 4, 1]}
    yield gpurnn.GRU(5, 19, dtype=dtype, backend="cpu", seed=1), {"reset": np.arange(18).reshape(6, 3) % 5 == 2}
    yield (
        gpurnn.LSTM(5, 19, proj_size=7, dtype=dtype, backend="cpu", seed=1),
        {"mask": np.arange(18).reshape(6, 3) % 4 > 0},
    )


def record(path):
    """Record calls for every dtype into a file. Returns how many."""
    backend = gpurnn.get_backend("cpu")
    recorder = Recorder(backend.library)
    rng = np.random.default_rng(0)
    saved = backend.library, backend.store.empty, ops.address, packing.packed_weights
    backend.library, ops.address, native.address = recorder, recorder.address, recorder.address
    backend.store.empty = lambda shape, dtype: np.zeros(shape, dtype)
    packing.packed_weights = lambda *arguments: None  # their layout is that of one instruction set
    try:
        for dtype in TYPES:
            recorder.dtype = dtype
            for layer, options in layers(dtype):
                x = rng.standard_normal((6, 3, 5)).astype(check_dtype(dtype))
                recorder.terms = 6 * 4 * (19 + 5)  # of gradients: timesteps, gates, columns
                y, _, backward = layer.forward(x, **options)
                backward(np.ones_like(y))
        record_rest(backend, recorder, rng)
    finally:
        backend.library, backend.store.empty, ops.address, packing.packed_weights = saved
        native.address = native_address
    recorder.save(path)
    return len(recorder.records)


def record_rest(backend, recorder, rng):
    """Products, cross-entropy, optimizers and random masks."""
    numbers = lambda *shape: rng.standard_normal(shape).astype(dtype)  # noqa: E731
    for dtype in ("float32", "float64"):
        recorder.dtype = dtype
        a, b, out = numbers(33, 40), numbers(40, 37), numbers(33, 37)
        recorder.terms = 40
        for array in (a, b, out):
            recorder.address(array)
        backend.product(a, b, out, accumulate=True)
        logits, labels, rows = numbers(9, 35), np.arange(5) * 6, np.array([0, 2, 4, 7, 8])
        recorder.terms = 35 + 8  # and the roundings of exp and log
        found = backend.softmax_forward(logits, rows, labels, 0.1)
        backend.softmax_backward(logits, rows, labels, 0.1, *found[1:], numbers(9))
        for kernel, names in UPDATE_STATES.items():
            arrays = {name: abs(numbers(101)) for name in names}
            params, grads = numbers(101), numbers(101)
            for array in (params, grads):
                recorder.address(array)
            recorder.terms = 16  # operations of an update
            scalars = dict(zip("abcdefgh", (0.9, 0.1, 0.2, 0.01, 0.3, 0.5, 0.7, 0.6), strict=True))
            backend.optimize(kernel, params, grads, arrays, scalars, None)
    for rate in (0.1, 0.7):
        backend.dropout_mask((7, 53), rate, seed=5, layer=2, call=3)


if __name__ == "__main__":
    print(record(sys.argv[1]), "calls")
