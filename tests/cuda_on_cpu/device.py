"""The emulator dressed as CuPy, so that the library's ``xp`` code and its launches run whole without a GPU.

``EmulatedDevice`` is the ``CupyDevice`` of gpurnn/backends/cuda/device.py over this ``xp``, which acts as ``cupy`` does
and refuses as much: nothing is converted to or from NumPy unless asked for, only what ``FUNCTIONS`` has exists, and
results have the dtypes of cupy_types.py.
Memory from ``xp.empty`` counts as uninitialised for kernels until the host or a kernel writes it.
"""

import numpy as np

from gpurnn.backends.cuda import schedules
from gpurnn.backends.cuda.device import CupyDevice
from gpurnn.backends.sources import kernel_source

from .cuda import Cuda, Pointer, StubCublas
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
        return self._wrap(self._host[_view(self._xp.host(key))])

    def __setitem__(self, key, value):
        self._xp.working()
        key, value = self._xp.host(key), self._xp.host(value)
        self._host[key] = value
        part = self._host[_view(key)] if _basic(key) else self._host
        self._xp.written(part)

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
        self.working()
        shape = (shape,) if isinstance(shape, (int, np.integer)) else tuple(shape)
        return Array(self, self.emulator.empty(shape, dtype, "empty"))

    def asarray(self, value, dtype=None):
        if isinstance(value, Array):
            return value if dtype is None or value.dtype == dtype else value.astype(dtype)
        self.working()
        return self.wrap(np.asarray(value, dtype), fresh=True)

    array = asarray

    # ---- between host and device

    def working(self, name=""):
        """Products by CuPy's own wrapper are refused under capture, as CuPy refuses them. Other array work CuPy would
        record, over memory that goes back to its pool: the library does none, so it is refused here, too."""
        if "matmul" in name:
            self.cuda.refuse_cublas()
        if self.cuda.captured is not None:
            raise RuntimeError("array work while a graph is recorded: only kernels and products may be launched")

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
            result = moved.transpose(np.argsort(order)) if result.ndim else moved
        return Array(self, result)

    def written(self, host):
        self.emulator.written(host)

    def call(self, function, keywords, name, args, kwargs):
        self.working_unless_view(name)
        for keyword in kwargs:
            if keyword not in keywords:
                raise TypeError(f"cupy's {name} takes no keyword {keyword!r}")
        out = kwargs.get("out")
        computed = TYPES.computed(name, args, kwargs.get("dtype"), out)
        if computed is not None:
            kwargs = {key: value for key, value in kwargs.items() if key != "out"}
        with np.errstate(all="ignore"):
            result = function(*map(self.host, args), **{key: self.host(value) for key, value in kwargs.items()})
            if computed is not None:
                result = np.asarray(result).astype(computed, copy=False)
                if out is not None:
                    out._host[...] = result
        if name == "copyto":
            self.written(args[0]._host)
        if out is not None:
            self.written(out._host)
            return out
        return self.wrap(result)

    def working_unless_view(self, name):
        if name not in ("reshape", "transpose", "swapaxes", "squeeze", "ravel", "view", "broadcast_to", "expand_dims"):
            self.working(name)


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
            source = kernel_source(file, struct)
            for old, new in self.edits:
                if source.count(old) > 1:
                    raise ValueError(f"{old!r} stands {source.count(old)} times in {file}")
                source = source.replace(old, new)
            self._loaded[file, expression, struct] = self.emulator.load(source, name=expression, file=file)
        kernel = self._loaded[file, expression, struct]

        def launch(grid, block, args, shared_mem=0, cooperative=False):
            args = tuple(arg._host if isinstance(arg, Array) else arg for arg in args)
            self._do(lambda: kernel(grid, block, args, shared_mem=shared_mem, cooperative=cooperative))

        return launch

    def _multiply(self, call, multiply):
        """A product that cuBLAS was asked for."""

        def action():
            for matrix in multiply():
                self.emulator.written(matrix.T)

        self._do(action)

    def _do(self, action):
        captured = self.xp.cuda.captured
        if captured is None:
            action()
        else:
            captured.append(action)
