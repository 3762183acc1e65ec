"""The emulator dressed as CuPy, so that the library's ``xp`` code and its launches run whole without a GPU.

``EmulatedDevice`` is the ``CupyDevice`` of gpurnn/backends/cuda/device.py over this ``xp``, which acts as ``cupy`` does
and refuses as much: nothing is converted to or from NumPy unless asked for, only what ``FUNCTIONS`` has exists, and
results have the dtypes of cupy_types.py.

Under capture nothing runs. Array code is recorded as launches are, into memory of a private pool; what CuPy must wait
for is refused. Its ``argsort`` it may record: Thrust runs there with ``par_nosync``, and takes its memory from the
current allocator (cupy/cuda/cupy_thrust.cu).

Memory from ``xp.empty`` counts as uninitialised for kernels until the host or a kernel writes it.
"""

import numpy as np

from gpurnn.backends.cuda import schedules
from gpurnn.backends.cuda.device import CupyDevice
from gpurnn.backends.sources import kernel_source

from .cuda import Cuda, Pointer, StubCublas, held_as_a_graph_does
from .cupy_types import Types
from .emulator import SHARED_LIMIT

_UFUNCS = (
    "abs add cos divide exp expm1 isfinite log log1p logical_and logical_not maximum minimum multiply negative sign "
    "sin sqrt square subtract tanh"
)
# The functions of CuPy that the library uses -> the keywords they take there. test_cuda_device.py compares with CuPy.
FUNCTIONS = dict.fromkeys(_UFUNCS.split(), ("out", "dtype")) | {
    "argpartition": ("axis",),
    "argsort": ("axis", "kind"),
    "ascontiguousarray": ("dtype",),
    "broadcast_to": (),
    "clip": ("out",),
    "concatenate": ("axis", "out", "dtype"),
    "copyto": ("casting", "where"),
    "cumsum": ("axis", "dtype", "out"),
    "expand_dims": ("axis",),
    "flatnonzero": (),
    "matmul": ("out", "dtype"),
    "stack": ("axis", "out", "dtype"),
    "take_along_axis": ("axis",),
    "where": (),
}
CREATORS = {"zeros": ("dtype", "order"), "ones": ("dtype", "order"), "arange": ("dtype",)}
_METHODS = {
    "sum": ("axis", "dtype", "out", "keepdims"), "mean": ("axis", "dtype", "out", "keepdims"),
    "max": ("axis", "out", "keepdims"), "min": ("axis", "out", "keepdims"), "any": ("axis", "out", "keepdims"),
    "all": ("axis", "out", "keepdims"), "argsort": ("axis", "kind"), "reshape": ("order",), "transpose": (),
    "swapaxes": (), "squeeze": ("axis",), "ravel": (), "astype": ("copy",), "copy": ("order",), "view": ("dtype",),
    "argmax": ("axis", "dtype", "out", "keepdims"), "cumsum": ("axis", "dtype", "out"), "clip": ("out",),
}  # fmt: skip
# CuPy counts on the host what these find, so it waits for the GPU (cupy/_core/_routines_indexing.pyx, _ndarray_nonzero)
_COUNTED = ("flatnonzero",)
TYPES = Types()
_OPERATORS = (
    "add radd sub rsub mul rmul truediv rtruediv floordiv mod pow rpow matmul and or xor rand lshift rshift lt le gt "
    "ge eq ne"
)


class Array:
    """As ``cupy.ndarray``: an array in the device's memory."""

    __hash__ = None

    def __init__(self, xp, host):
        self._xp, self._host = xp, host

    # ---- what CuPy refuses

    def __array__(self, *args, **kwargs):
        raise TypeError("Implicit conversion to a NumPy array is not allowed. Please use `.get()` explicitly.")

    def __array_ufunc__(self, ufunc, method, *inputs, **kwargs):
        if method != "__call__":
            return NotImplemented
        return getattr(self._xp, ufunc.__name__)(*inputs, **kwargs)

    def __array_function__(self, function, types, args, kwargs):
        return getattr(self._xp, function.__name__)(*args, **kwargs)

    # ---- what it knows

    shape = property(lambda self: self._host.shape)
    dtype = property(lambda self: self._host.dtype)
    strides = property(lambda self: self._host.strides)
    size = property(lambda self: self._host.size)
    ndim = property(lambda self: self._host.ndim)
    nbytes = property(lambda self: self._host.nbytes)
    itemsize = property(lambda self: self._host.itemsize)
    flags = property(lambda self: self._host.flags)
    T = property(lambda self: self._wrap(self._host.T))
    device = property(lambda self: self._xp.device)
    data = property(lambda self: Pointer(self._xp.cuda, self._host))

    def get(self):
        """A copy on the host."""
        self._xp.cuda.refuse_copies()
        return self._host.copy()

    def set(self, host, stream=None):
        """Copy an array of the host."""
        self._xp.cuda.refuse_uploads()
        if type(host) is not np.ndarray or host.dtype != self.dtype:
            raise TypeError(f"{getattr(host, 'dtype', type(host))} array cannot be set to {self.dtype} array")
        if host.shape != self.shape:
            raise ValueError(f"Shape mismatch. Old shape: {self.shape}, new shape: {host.shape}")
        if not (self.flags.c_contiguous or self.flags.f_contiguous):
            raise RuntimeError("Cannot set to non-contiguous array")
        self._host[...] = host
        self._xp.written(self._host)

    def item(self):
        return self.get().item()

    def tolist(self):
        return self.get().tolist()

    def fill(self, value):
        self[...] = value

    def __len__(self):
        return len(self._host)

    def __iter__(self):
        return (self[k] for k in range(len(self)))

    def __bool__(self):
        return bool(self.get())

    def __int__(self):
        return int(self.get())

    def __float__(self):
        return float(self.get())

    def __repr__(self):
        return f"device {self._host!r}"

    def __getitem__(self, key):
        xp = self._xp
        if xp.cuda.captured is not None and not _basic(key):
            nowhere = _nowhere(xp, key)
            return xp.record(lambda host, key: host[_view(key)], (self, key), lambda host, key: host[nowhere])
        return self._wrap(self._host[_view(xp.host(key))])

    def __setitem__(self, key, value):
        xp = self._xp
        xp.host(value)  # which refuses an array of the host

        def store(host, key, value):
            host[key] = value
            xp.written(host[_view(key)] if _basic(key) else host)

        if xp.cuda.captured is not None:
            _nowhere(xp, key)
            xp.record(store, (self, key, value))
        else:
            store(self._host, xp.host(key), xp.host(value))

    def __getattr__(self, name):
        if name not in _METHODS:
            raise AttributeError(f"'ndarray' object has no attribute {name!r} (the emulated one; CuPy's may)")

        def method(*args, **kwargs):
            return self._xp.call(getattr(np.ndarray, name), _METHODS[name], name, (self, *args), kwargs)

        return method

    def _wrap(self, host):
        return self._xp.wrap(host)


def _operator(name):
    def operate(self, other):
        return self._xp.call(getattr(np.ndarray, name), (), name, (self, other), {})

    return operate


def _unary(name):
    def operate(self):
        return self._xp.call(getattr(np.ndarray, name), (), name, (self,), {})

    return operate


def _in_place(name):
    plain = getattr(np.ndarray, name.replace("__i", "__", 1))

    def operate(self, other):
        return self._xp.call(plain, ("out",), name, (self, other), {"out": self})

    return operate


for _name in _OPERATORS.split():
    setattr(Array, f"__{_name}__", _operator(f"__{_name}__"))
for _name in ("iadd", "isub", "imul", "itruediv", "iand", "ior"):
    setattr(Array, f"__{_name}__", _in_place(f"__{_name}__"))
for _name in ("neg", "invert", "abs"):
    setattr(
        Array,
        f"__{_name}__",
        lambda self, _n=f"__{_name}__": self._xp.call(getattr(np.ndarray, _n), (), _n, (self,), {}),
    )


def _basic(key):
    keys = key if isinstance(key, tuple) else (key,)
    return all(k is None or k is Ellipsis or isinstance(k, (int, np.integer, slice)) for k in keys)


def _view(key):
    """A key that gives a 0-d view, as CuPy does, where NumPy would give a number."""
    keys = key if isinstance(key, tuple) else (key,)
    return (*keys, Ellipsis) if _basic(key) and not any(k is Ellipsis for k in keys) else key


def _nowhere(xp, key):
    """A key of the same shapes whose numbers are all 0: under capture nobody knows them yet.

    Raises RuntimeError for booleans, which CuPy counts on the host.
    """
    if isinstance(key, tuple):
        return tuple(_nowhere(xp, part) for part in key)
    if not isinstance(key, Array):
        return key
    if key.dtype == bool:
        xp.cuda.refuse_copies()
    return np.zeros(key.shape, np.int64)


class Xp:
    """An object that acts as the module ``cupy`` over an emulator's memory."""

    ndarray, __version__ = Array, "14.0.0"
    float32, float64, int32, int64, bool_ = np.float32, np.float64, np.int32, np.int64, np.bool_

    def __init__(self, emulator):
        self.emulator = emulator
        self.cuda = Cuda()

    def __getattr__(self, name):
        if name in CREATORS:
            return lambda *args, **kwargs: self.call(getattr(np, name), CREATORS[name], name, args, kwargs)
        if name not in FUNCTIONS:
            raise AttributeError(f"module 'cupy' has no attribute {name!r} (or it is missing in FUNCTIONS)")
        return lambda *args, **kwargs: self.call(getattr(np, name), FUNCTIONS[name], name, args, kwargs)

    def empty(self, shape, dtype="float64", order="C"):
        shape = (shape,) if isinstance(shape, (int, np.integer)) else tuple(shape)
        host = self.emulator.empty(shape, dtype, "empty")
        self.cuda.allocated(host)
        return Array(self, host)

    def asarray(self, value, dtype=None):
        if isinstance(value, Array):
            return value if dtype is None or value.dtype == dtype else value.astype(dtype)
        host = np.asarray(value, dtype)
        if self.cuda.captured is not None and host.ndim == 0:  # CuPy fills it by a kernel: the number is frozen
            return self.record(lambda: host, (), lambda: host)
        self.cuda.refuse_uploads()
        return self.wrap(host, fresh=True)

    array = asarray

    # ---- between host and device

    def record(self, function, args, shape_of=None):
        """Have the capture call ``function`` with these arguments later; its result, in memory that is there now.

        shape_of: a function of the same arguments whose result is of the same shape, order and dtype; None where there
        is no result.
        """
        later, captured = [self._later(arg) for arg in args], self.cuda.captured
        if shape_of is None:
            captured.append(lambda: function(*[one() for one in later]))
            return None
        with np.errstate(all="ignore"):
            made = shape_of(*[self.host(arg) for arg in args])
        if not isinstance(made, (np.ndarray, np.generic)):
            raise TypeError("array code of several results is not recorded here")
        made = np.asarray(made)
        if self.emulator.runtime.emulator_knows(made.ctypes.data, made.itemsize):
            return Array(self, made)  # a view
        result = self.wrap(made, fresh=True)
        result._host[...] = np.frombuffer(b"\xff" * made.itemsize, made.dtype)[0]  # nothing runs now

        def action():
            with np.errstate(all="ignore"):
                result._host[...] = function(*[one() for one in later])
            self.written(result._host)

        captured.append(action)
        return result

    def _later(self, arg):
        """An argument as a function without arguments, called when the graph runs."""
        if isinstance(arg, (tuple, list)):
            parts = [self._later(part) for part in arg]
            return lambda: type(arg)(part() for part in parts)
        if isinstance(arg, Array):
            return held_as_a_graph_does(arg._host, self.cuda.captured)
        self.host(arg)
        return lambda: arg

    def host(self, value):
        """What NumPy sees of an argument; raises TypeError for an array that is not on the device."""
        if isinstance(value, Array):
            return value._host
        if isinstance(value, np.ndarray) and value.ndim:
            raise TypeError(f"Unsupported type {type(value)}")
        if isinstance(value, (tuple, list)):
            return type(value)(map(self.host, value))
        return value

    def wrap(self, result, fresh=False):
        """A result of NumPy as an ``Array``, moved to the device's memory unless it is a view of it."""
        if isinstance(result, (tuple, list)):
            return type(result)(map(self.wrap, result))
        if not isinstance(result, (np.ndarray, np.generic)):
            return result
        result = np.asarray(result)
        emulator = self.emulator
        if fresh or not emulator.runtime.emulator_knows(result.ctypes.data, result.itemsize):
            order = sorted(range(result.ndim), key=lambda axis: -abs(result.strides[axis]))  # keep the memory order
            moved = emulator.array(result.transpose(order), "result")
            self.cuda.allocated(moved)
            result = moved.transpose(np.argsort(order)) if result.ndim else moved
        return Array(self, result)

    def written(self, host):
        self.emulator.written(host)

    def call(self, function, keywords, name, args, kwargs):
        if "matmul" in name:  # CuPy's own wrapper of cuBLAS
            self.cuda.refuse_cublas()
        if name in _COUNTED:
            self.cuda.refuse_copies()
        for keyword in kwargs:
            if keyword not in keywords:
                raise TypeError(f"cupy's {name} takes no keyword {keyword!r}")
        out = kwargs.get("out")
        computed = TYPES.computed(name, args, kwargs.get("dtype"), out)
        into = args[0] if name == "copyto" else out
        if computed is not None:
            kwargs = {key: value for key, value in kwargs.items() if key != "out"}
        names = tuple(kwargs)

        def run(*values):
            args, named, into = values[: -len(names) - 1], values[-len(names) - 1 : -1], values[-1]
            with np.errstate(all="ignore"):
                result = function(*args, **dict(zip(names, named, strict=True)))
                if computed is not None:
                    result = np.asarray(result).astype(computed, copy=False)
                    if into is not None:
                        into[...] = result
            if into is not None:
                self.written(into)
            return result

        values = (*args, *kwargs.values(), into)
        if self.cuda.captured is None:
            result = run(*map(self.host, values))
            return out if out is not None else self.wrap(result)
        if into is not None:
            self.record(run, values)
            return out
        if name == "take_along_axis":
            return self.record(run, values, lambda a, index, *rest: run(a, np.zeros_like(index), *rest))
        return self.record(run, values, run)


class EmulatedDevice(CupyDevice):
    """A GPU as ``CudaOps`` sees it, in the emulator. edits: (old, new) pairs, errors planted in the sources."""

    def __init__(self, emulator, edits=()):
        super().__init__(Xp(emulator))
        self.emulator, self.edits = emulator, edits
        self.arch = emulator.arch
        self.limits = schedules.Device(emulator.arch, 4, SHARED_LIMIT[emulator.arch] * 1024)
        self.blas = StubCublas(self.xp, self._multiply)
        self._loaded = {}

    def tick(self):
        """What the current stream was given just now, for ``waited_for``."""
        stream = self.xp.cuda.get_current_stream()
        stream.clock[stream.ptr] += 1
        return stream.ptr, stream.clock[stream.ptr]

    def waited_for(self, tick):
        """Whether on the current stream a ``tick`` is surely done."""
        stream, number = tick
        return self.xp.cuda.get_current_stream().clock.get(stream, 0) >= number

    def spills(self, file, expression, struct=None):
        """Nothing is known of registers here."""
        return 0

    def load(self, file, expression, struct=None):
        """The kernel of a name expression: ``kernel(grid, block, args, shared_mem=0)``."""
        if (file, expression, struct) not in self._loaded:
            if self.xp.cuda.captured is not None:  # CUDA may allocate, and wait, while it loads code
                raise RuntimeError(f"{expression} is loaded while a graph is recorded")
            source = kernel_source(file, struct)
            for old, new in self.edits:
                if source.count(old) > 1:
                    raise ValueError(f"{old!r} stands {source.count(old)} times in {file}")
                source = source.replace(old, new)
            self._loaded[file, expression, struct] = self.emulator.load(source, name=expression, file=file)
        kernel = self._loaded[file, expression, struct]

        def launch(grid, block, args, shared_mem=0, cooperative=False, dependent=False):
            def run(*args):
                kernel(grid, block, args, shared_mem=shared_mem, cooperative=cooperative, dependent=dependent)

            if self.xp.cuda.captured is not None:
                self.xp.record(run, args)
            else:
                run(*(arg._host if isinstance(arg, Array) else arg for arg in args))

        return launch

    def _multiply(self, call, multiply):
        """A product that cuBLAS was asked for."""

        def action():
            for matrix in multiply():
                self.emulator.written(matrix.T)

        addresses = call[8], call[12], call[17]

        def later():
            if not all(self.emulator.runtime.emulator_knows(address, 1) for address in addresses):
                raise RuntimeError("a graph uses memory that was given back to the pool")
            action()

        self._do(action if self.xp.cuda.captured is None else later)

    def _do(self, action):
        """Do it now, or under capture when the graph runs."""
        captured = self.xp.cuda.captured
        if captured is None:
            action()
        else:
            captured.append(action)
