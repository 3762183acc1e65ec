"""CpuOps: what compiled code does on the CPU in place of array code: the time loop, products and sums over all
of it, cross-entropy, dropout masks, the optimisers and the norm of the gradients.

The library ``gpurnn._native`` is kernels/cpu/api.cpp, the cells of kernels/cells under a schedule for the CPU. It is
built when gpurnn is installed and a C++ compiler is there; without it the backend ``"cpu"`` is ``"numpy"``. float32 and
float64 of every cell; 16-bit numbers stay array code. Arrays are C-contiguous here.

Compiled results have the same bits in every process and for any number of threads. They differ between instruction sets
(``GPURNN_ISA`` forces one), and what NumPy computes (products of a few numbers, 16-bit layers, attention) between BLAS
libraries. In float32 numbers below 2^-126 count as zero, in float64 those below 2^-1022.
"""

import collections
import ctypes
import functools
import importlib.machinery
import math
import os
import threading
import weakref
from pathlib import Path

import numpy as np

from . import rng
from .errors import BackendError, check_choice, one_line
from .ops import Ops, Saved, flat, refuse_uncountable

LEVELS = ("vectors of 128 bits", "AVX2", "AVX-512")
ISAS = ("baseline", "avx2", "avx512")  # what GPURNN_ISA calls them
_ROWS = 4  # sequences of a thread, at least: a product with fewer reads the weights for little
_SMALL = 1 << 14  # multiplications of a product, at most, that NumPy has done before ours is packed
_SQUARES = 1 << 12  # SQUARES of update.h
_AHEAD = 48  # AHEAD of time_loop.h
_UNITS = 64  # units of a thread, at least, in a single step
_QUOTA = ("/sys/fs/cgroup", "/proc/self/cgroup")
_INTERFACE = 5  # of gpurnn_native_bytes in api.cpp
_MOST = 2**31 - 1  # of an int in api.cpp
_MOST_THREADS = 4096
_PATIENCE = 0.01  # seconds to wait for memory that is kept: fresh memory takes less than that
_STRETCH = 256  # arrays after which what was in use is forgotten: some training steps
_PAGES = 1 << 17  # bytes of an array whose memory is worth keeping
_WORK = 1 << 23  # multiplications, at least, for a second thread: a fifth of a millisecond

_pointer, _stride = ctypes.c_void_p, ctypes.c_ssize_t


class _Pass(ctypes.Structure):
    """``Pass`` of api.cpp."""

    _fields_ = [
        ("cell", ctypes.c_char_p),
        *((name, ctypes.c_int) for name in ("is_double", "T", "B", "I", "H", "P", "reverse", "save")),
        *((name, _stride) for name in ("gates_row", "output_row", "doutput_row")),
        *((name, _pointer) for name in (
            "lengths", "x", "weight_ih", "weight_hh", "weight_hr", "bias_ih", "bias_hh", "gates", "h", "c", "output",
            "doutput", "dh", "dc", "dh_steps",
        )),
    ]  # fmt: skip


class _Product(ctypes.Structure):
    """``Product`` of api.cpp."""

    _fields_ = [
        *((name, ctypes.c_int) for name in ("is_double", "accumulate")),
        *((name, _stride) for name in ("M", "N", "K", "a_row", "a_column", "b_row", "b_column", "c_row")),
        *((name, _pointer) for name in "ABC"),
    ]


class _Update(ctypes.Structure):
    """``Update`` of api.cpp."""

    _fields_ = [
        *((name, ctypes.c_int) for name in ("rule", "is_double")),
        ("N", _stride),
        ("scalars", ctypes.c_double * 8),
        *((name, _pointer) for name in ("grads", "params")),
        ("arrays", _pointer * 3),
    ]


class _Rows(ctypes.Structure):
    """``CrossEntropy`` of api.cpp."""

    _fields_ = [
        ("is_double", ctypes.c_int),
        *((name, _stride) for name in ("count", "V")),
        ("smoothing", ctypes.c_double),
        *((name, _pointer) for name in ("logits", "rows", "labels", "losses", "highest", "total", "scale", "dlogits")),
    ]


# What an optimiser's state arrays are in an _Update; rules by their place here.
_STATES = {
    "sgd": ("momentum_buffer",),
    "rmsprop": ("square_avg", "grad_avg", "momentum_buffer"),
    "adam": ("exp_avg", "exp_avg_sq", "max_exp_avg_sq"),
}


@functools.cache
def load_native():
    """``(library, level)``, or None where it was not built.

    level: number in LEVELS, the best of this processor or what ``GPURNN_ISA`` says. Raises BackendError for a library
    of another version of gpurnn, and as ``chosen_level``.
    """
    folder = Path(__file__).parent
    for suffix in importlib.machinery.EXTENSION_SUFFIXES:
        path = folder / f"_native{suffix}"
        if path.is_file():
            break
    else:
        return None
    library = ctypes.CDLL(str(path))
    number = ctypes.c_int
    structs = (_Pass, _Product, _Update, _Rows)
    expected = (*map(ctypes.sizeof, structs), _INTERFACE)
    if any(library.gpurnn_native_bytes(n) != size for n, size in enumerate(expected)):
        raise BackendError(f"{path} was built from other sources than these: install gpurnn again")
    library.gpurnn_native_add_rows.argtypes = [_pointer, _stride, number, _stride, number, _pointer, number, number]
    library.gpurnn_native_add_squares.argtypes = [_pointer, _stride, number, _pointer, number, number]
    word, long = ctypes.c_uint32, ctypes.c_uint64
    library.gpurnn_native_dropout_mask.argtypes = [_stride, long, word, word, long, _pointer, number, number]
    return library, chosen_level(library.gpurnn_native_level())


def chosen_level(best):
    """``GPURNN_ISA`` as a number in LEVELS, or ``best`` where it is not set. Bits of results differ between them.

    Raises ValueError for a word that is none of ISAS, BackendError where this processor lacks it.
    """
    name = os.environ.get("GPURNN_ISA")
    if not name:
        return best
    level = ISAS.index(check_choice("GPURNN_ISA", name, ISAS))
    if level > best:
        raise BackendError(f"GPURNN_ISA={name}: this processor has no {LEVELS[level]}; it can do {ISAS[best]}")
    return level


def thread_count():
    """Threads of a time loop: GPURNN_NUM_THREADS, else OMP_NUM_THREADS, else the processors that this process may use.

    In a container with a limit of processor time no more than that is worth: with more, all of them would be stopped
    together until the next period. Raises ValueError for a GPURNN_NUM_THREADS that is no number from 1 to 4096; of
    OMP_NUM_THREADS, which is other libraries', no more than that is taken, and nothing where it makes no sense.
    """
    text = os.environ.get("GPURNN_NUM_THREADS", "")
    if text:
        count = _whole(text)
        if not 1 <= count <= _MOST_THREADS:
            got = one_line(repr(text), 60)
            raise ValueError(f"GPURNN_NUM_THREADS should be a whole number from 1 to {_MOST_THREADS}, got {got}")
        return count
    count = _whole(os.environ.get("OMP_NUM_THREADS", "").partition(",")[0])
    if count:
        return min(count, _MOST_THREADS)
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(count, quota(*_QUOTA))


def _whole(text):
    """The number that ``text`` is in decimal digits; 0 where it is none, or has more digits than a number may."""
    return int(text) if text.isascii() and text.isdigit() and len(text) < 20 else 0


@functools.cache
def quota(root, groups):
    """Processors' worth of time that Linux's control groups allow this process; inf where they set no limit.

    root: where they are mounted. groups: a file that names this process's groups, /proc/self/cgroup. A limit of a group
    around another holds for both. Inside a container the names may be those outside, where no such folder is: then the
    limit stands at the top.
    """
    try:
        lines = [line.split(":", 2) for line in Path(groups).read_text().splitlines()]
    except OSError:
        return math.inf
    allowed = [math.inf]
    for _, controllers, name in lines:
        if controllers and "cpu" not in controllers.split(","):
            continue
        for mount in (root, f"{root}/cpu", f"{root}/cpu,cpuacct") if controllers else (root,):
            group = Path(mount, name.lstrip("/"))
            for folder in (group, *group.parents):
                if folder.is_relative_to(mount):
                    allowed.append(_limit(folder))
    return min(allowed)


def _limit(folder):
    """The limit that a control group sets: cpu.max of version 2, or two files of version 1."""
    for names in (("cpu.max",), ("cpu.cfs_quota_us", "cpu.cfs_period_us")):
        try:
            quota, period = " ".join((folder / name).read_text() for name in names).split()
            if quota not in ("max", "-1"):
                return max(1, math.ceil(int(quota) / int(period)))
        except (OSError, ValueError, ZeroDivisionError):
            continue
    return math.inf


def describe():
    """What the backend "cpu" is on this machine, in words."""
    native = load_native()
    if native is None:
        if (Path(__file__).parents[1] / "pyproject.toml").is_file():
            return "array code, as 'numpy': this checkout was not built: run pip install -e . with a C++ compiler here"
        return "array code, as 'numpy': gpurnn was installed without a C++ compiler"
    return f"works, compiled for {LEVELS[native[1]]}, up to {thread_count()} threads"


class MemoryPool:
    """Memory of arrays that are gone, for the next ones.

    Fresh memory is made of fresh pages, each of which the system clears at its first use: for arrays that live as long
    as one training step that is up to a fifth of the step's time. What is kept unused is no more than ``limit``, nor
    than one and a half times of what has lately been in use at once: arrays of different sizes that a step needs one
    after another are each kept.

    An array may end at any moment, in any thread, even in the one that is at work here: what comes back waits in a
    queue. Nobody waits long for the lock, as whoever holds it may be the one that asks, in a signal handler: memory
    then comes from the system.
    """

    def __init__(self, limit=1 << 29):
        self.limit = limit
        self.peaks = [0, 0]  # the most bytes in use at once, in this stretch of _STRETCH arrays and in the one before
        self.count = 0  # arrays of this stretch
        self.in_use = 0
        self.reset()
        _stores.add(self)

    def reset(self):
        """Forget all memory and whoever was at work: for a new process, where other threads are gone."""
        self.lock, self.returned = threading.Lock(), collections.deque()
        self.unused, self.bytes = collections.OrderedDict(), 0  # bytes -> list of memories, the longest unused first
        self.generation = object()  # of the memories that may come back

    def empty(self, shape, dtype):
        """As ``np.empty``; the memory comes back when the last view of the array is gone."""
        size = math.prod(shape) * dtype.itemsize
        if not _PAGES <= size <= self.limit:
            return np.empty(shape, dtype)
        step = 1 << (size.bit_length() - 6)
        room = -(-size // step) * step  # up to 3 % more, so that T and T + 1 steps share one memory
        if not self.lock.acquire(timeout=_PATIENCE):
            return np.empty(shape, dtype)
        try:
            self._sort_in()
            memory = self._take(room)
            generation = self.generation
        finally:
            self.lock.release()
        if memory is None:
            try:
                memory = np.empty(room, np.uint8)
            except MemoryError:  # what is unused may be what is missing
                self.in_use -= room
                self.clear()
                return np.empty(shape, dtype)
        owner = _Block(memory)
        weakref.finalize(owner, self._take_back, memory, generation).atexit = False
        return np.asarray(owner)[:size].view(dtype).reshape(shape)  # a dtype of ml_dtypes does not come through _Owner

    def clear(self):
        """Give back to the system what is unused."""
        if self.lock.acquire(timeout=_PATIENCE):
            try:
                self._sort_in()
                self._drop(self.bytes)
                self.peaks = [self.in_use, 0]
            finally:
                self.lock.release()

    def _take(self, room):
        """A memory of so many bytes, or None where there is none; it counts as in use from now on."""
        some = self.unused.get(room)
        memory = some.pop() if some else None
        if memory is not None:
            self.bytes -= room
            if not some:
                del self.unused[room]
        self.in_use += room
        self.count += 1
        if self.count == _STRETCH:
            self.count, self.peaks = 0, [0, self.peaks[0]]
        self.peaks[0] = max(self.peaks[0], self.in_use)
        self._drop(self._excess())
        return memory

    def _take_back(self, memory, generation):
        self.returned.append((memory, generation))
        if self.lock.acquire(blocking=False):  # else whoever holds it, or the next one, sorts this in
            try:
                self._sort_in()
            finally:
                self.lock.release()

    def _sort_in(self):
        while self.returned:
            memory, generation = self.returned.popleft()
            if generation is not self.generation:
                continue
            room = memory.nbytes
            self.in_use -= room
            self.bytes += room
            self.unused.setdefault(room, []).append(memory)
            self.unused.move_to_end(room)
            self._drop(self._excess())

    def _excess(self):
        return self.bytes - min(self.limit, max(self.peaks) * 3 // 2)

    def _drop(self, excess):
        """Give back at least so many bytes of what is unused, the longest unused first."""
        while excess > 0 and self.unused:
            room, some = next(iter(self.unused.items()))
            some.pop()
            if not some:
                del self.unused[room]
            self.bytes -= room
            excess -= room


_stores = weakref.WeakSet()


def _reset_stores():
    for store in list(_stores):
        store.in_use = 0
        store.reset()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_reset_stores)


class _Block:
    """What the arrays over one memory of bytes hold on to: NumPy makes it their base."""

    def __init__(self, array):
        self.__array_interface__ = array.__array_interface__


class HostOps(Ops):
    """Array code on NumPy whose random masks are compiled: equal bits, for which array code takes as long as for a
    layer. library, level: of ``load_native``."""

    def __init__(self, name, library, level):
        super().__init__(np, name)
        thread_count()  # raises now where GPURNN_NUM_THREADS makes no sense, not at the first large call
        self.library, self.level = library, level

    def dropout_mask(self, shape, rate, seed, layer, call):
        mask = np.empty(shape, bool)
        threads = self._flat_threads(mask)
        self._call(
            "dropout_mask", mask.size, seed, layer & 0xFFFFFFFF, call & 0xFFFFFFFF, rng.dropout_threshold(rate),
            mask.ctypes.data, threads, self.level, threads=threads,
        )  # fmt: skip
        return mask

    def _flat_threads(self, array):
        return 1 if array.size < _WORK // 64 else thread_count()

    def _call(self, name, *arguments, threads):
        """A function of the library; raises what it reports. threads: how many it was told to take."""
        problem = getattr(self.library, f"gpurnn_native_{name}")(*arguments)
        if problem == 1:
            raise MemoryError(f"backend 'cpu': no memory for packed weights or products, {threads} threads")
        if problem == 2:
            raise BackendError(f"the system refuses {threads} threads: set GPURNN_NUM_THREADS to less")
        if problem:
            raise BackendError(f"{name} of the compiled library failed in an unknown way")


class CpuOps(HostOps):
    """The primitives with compiled time loops. library, level: of ``load_native``."""

    def __init__(self, library, level):
        super().__init__("cpu", library, level)
        self.store = MemoryPool()
        self.array_code = Ops(np, "numpy")  # for what is not compiled, with its own order in memory

    def machine(self):
        return super().machine() | {"isa": ISAS[self.level]}

    def empty_cache(self):
        self.store.clear()

    def schedule(self, problem, wanted="auto"):
        if problem.dtype not in ("float32", "float64"):
            return "array code", "one timestep after another: 16-bit numbers have no compiled time loop on a CPU"
        units = shared_units(problem.kernel, problem.projected, problem.backward, problem.H)
        threads = self._threads(
            problem.T, problem.B, units, problem.T * problem.B * problem.gates * problem.H**2, problem.directions
        )
        how_many = "1 thread" if threads == 1 else f"{threads} threads"
        return "compiled", f"for {LEVELS[self.level]}, {how_many}, no array code in it"

    def refuse_sizes(self, T, B, layers):
        refuse_uncountable(T, B, self.name)

    def packed_bytes(self, problem, P, T):
        if problem.dtype not in ("float32", "float64"):
            return 0
        size = 4 if problem.dtype == "float32" else 8
        lanes = (16 << self.level) // size
        B, H, G, D = problem.B, problem.H, problem.gates, problem.directions

        def row(outputs, gates=1):
            """Numbers in a row of products: whole blocks of ``Packed`` in gemm.h."""
            units = lanes if gates > 1 else 2 * lanes
            return -(-outputs // units) * units * gates

        reset = problem.kernel == "GruOriginal"
        first = 2 if reset else G  # gates of the first product
        weights = (
            row(H, G) * problem.I + row(H, first) * P + (row(H) * P if reset else 0) + (row(P) * H if P < H else 0)
        )
        threads = self._threads(T, B, shared_units(problem.kernel, P < H, False, H), T * B * G * H * (P + problem.I), D)
        ahead = min(T * B, max(B, threads * _AHEAD)) * row(H, G)  # products of the input, of some steps
        forward = (weights if T > 1 else 0) * D + (max(row(H, first), row(P)) * B + ahead) * min(D, threads)
        back = row(P) * first * H + (row(P) * H if reset else 0) + (row(H) * P if P < H else 0)
        through_time = back * D + B * max(row(P), row(H)) * min(D, threads)
        gradients = T * B * max(row(problem.I), row(P))  # x and h, for the products with d
        return size * max(forward, through_time, gradients, G * H * row(problem.I))

    def empty_steps(self, T, B, F, dtype):
        return super().empty_steps(T, B, F, dtype) if dtype.itemsize == 2 else self.empty(T, B, F, dtype)

    def empty(self, T, B, F, dtype):
        return self.store.empty((T, B, F), dtype)

    def layer_forward(
        self, cell, x, weights, states, lengths, directions, save, fresh_output, schedule="auto", concurrent=1
    ):
        if x.dtype.itemsize == 2:
            return self.array_code.layer_forward(cell, x, weights, states, lengths, directions, save, fresh_output)
        T, B, _ = x.shape
        D, (rows, P) = len(directions), weights[0].hh.shape
        H = rows // cell.gates
        output = self.empty(T, B, D * P, x.dtype) if fresh_output or D > 1 else None  # else h itself will do
        x = np.ascontiguousarray(x)
        lengths32 = None if lengths is None else lengths.astype(np.int32)
        all_saved, slots, held = [], [], []
        for d, (w, state, reverse) in enumerate(zip(weights, states, directions, strict=True)):
            gates = self.empty(T if save else 1, B, cell.saved_blocks * H, x.dtype)
            h = self.empty(T + 1, B, P, x.dtype)
            h[T if reverse else 0] = state[0]
            c = None
            if cell.states == 2:
                c = self.empty(T + 1 if save else 2, B, H, x.dtype)
                c[T if reverse and save else 0] = state[1]
            one = self._pass(cell, w, gates, h, c, reverse, lengths32, save)
            one.x, one.I, ih = x.ctypes.data, x.shape[2], np.ascontiguousarray(w.ih)
            one.weight_ih = ih.ctypes.data
            one.arrays += [x, ih]
            if output is not None:
                one.output, one.output_row = output.ctypes.data + d * P * x.itemsize, D * P
            held.append(one)
            all_saved.append(Saved(x, gates if save else None, h, c if save else None))
            slots.append(c)
        self._run_time_loop(held, T * B * rows * (P + x.shape[2]), back=False)
        finals = []
        for saved, c, reverse in zip(all_saved, slots, directions, strict=True):
            end = 0 if reverse else T
            finals.append(
                (saved.h[end].copy(),) if c is None else (saved.h[end].copy(), c[end if save else T % 2].copy())
            )
        return all_saved, finals, all_saved[0].states("h", directions[0]) if output is None else output

    def layer_backward(self, cell, all_saved, weights, doutput, dstates, lengths, directions, hooks):
        if any(hooks) or all_saved[0].gates.dtype.itemsize == 2:  # only the array code calls hooks with dh and dc
            for saved in all_saved:
                self.zero_past_end(saved.gates, lengths)  # the compiled pass leaves padding uninitialised, possibly NaN
            return self.array_code.layer_backward(
                cell, all_saved, weights, doutput, dstates, lengths, directions, hooks
            )
        T, B, _ = all_saved[0].gates.shape
        rows, P = weights[0].hh.shape
        dtype, H = all_saved[0].gates.dtype, rows // cell.gates
        doutput = None if doutput is None else np.ascontiguousarray(doutput)
        lengths32 = None if lengths is None else lengths.astype(np.int32)
        held, done = [], []
        for d, (saved, w, reverse) in enumerate(zip(all_saved, weights, directions, strict=True)):
            sizes = (P, H)[: cell.states]
            dstate = tuple(
                np.zeros((B, F), dtype) if given is None else np.array(given, dtype, order="C")
                for F, given in zip(sizes, dstates[d] or (None, None), strict=False)
            )
            dh_steps = None if w.hr is None else self.empty(T, B, P, dtype)
            one = self._pass(cell, w, saved.gates, saved.h, saved.c, reverse, lengths32, save=True)
            one.dh, one.dc = (_address(part) for part in (*dstate, None)[:2])
            one.dh_steps = _address(dh_steps)
            if doutput is not None:
                one.doutput, one.doutput_row = doutput.ctypes.data + d * P * dtype.itemsize, len(all_saved) * P
            held.append(one)
            done.append((dstate, dh_steps))
        self._run_time_loop(held, T * B * rows * P, back=True)
        return done

    def _pass(self, cell, w, gates, h, c, reverse, lengths, save):
        """A ``_Pass`` with all that both ways need; its arrays live as long as it does."""
        T, B, P = h.shape
        hh, hr, bias_ih, bias_hh = arrays = [
            None if array is None else np.ascontiguousarray(array) for array in (w.hh, w.hr, w.bias_ih, w.bias_hh)
        ]
        one = _Pass(
            cell=cell.kernel.encode(), is_double=gates.dtype == np.float64, T=T - 1, B=B, H=len(hh) // cell.gates,
            P=P, reverse=reverse, save=save, gates_row=gates.shape[2],
            lengths=_address(lengths), weight_hh=_address(hh), weight_hr=_address(hr), bias_ih=_address(bias_ih),
            bias_hh=_address(bias_hh), gates=_address(gates), h=_address(h), c=_address(c),
        )  # fmt: skip
        one.arrays = [*arrays, gates, h, c]
        return one

    def _run_time_loop(self, passes, multiplications, back):
        if passes[0].B == 0:
            return
        D = len(passes)
        one = passes[0]
        units = shared_units(one.cell.decode(), bool(one.weight_hr), back, one.H)
        threads = self._threads(one.T, one.B, units, multiplications, D)
        self._call("time_loop", (_Pass * D)(*passes), D, threads, int(back), self.level, threads=threads)

    def _threads(self, T, B, units, multiplications, directions):
        """units: of ``shared_units``. In a single step weights come from memory for one product: less is worth it."""
        shares, least = -(-B // _ROWS), _WORK
        if T == 1:
            shares, least = max(shares, units // _UNITS), _WORK // 2
        if multiplications * directions < least:
            return 1
        return max(1, min(thread_count(), directions * shares))

    def product(self, a, b, out, accumulate=False):
        is_double = a.dtype == np.float64
        (M, K), N = a.shape, b.shape[1]
        same = a.dtype == b.dtype == out.dtype and a.dtype.itemsize > 2
        if (
            not same
            or not _SMALL <= M * N * K
            or max(M, N, K) > _MOST
            or any(stride < 0 for array in (a, b, out) for stride in array.strides)
        ):
            super().product(a, b, out, accumulate)
            return
        if out.strides[1] != out.itemsize:  # the transposed product has rows of neighbours, or there are none
            if out.strides[0] != out.itemsize:
                super().product(a, b, out, accumulate)
                return
            a, b, out, M, N = b.T, a.T, out.T, N, M
        strides = [stride // a.itemsize for array in (a, b, out) for stride in array.strides]
        job = _Product(is_double, accumulate, M, N, K, *strides[:5], *(array.ctypes.data for array in (a, b, out)))
        threads = 1 if M * N * K < _WORK else min(thread_count(), -(-M // 16))
        self._call("multiply", ctypes.byref(job), threads, self.level, threads=threads)

    def accumulate_product(self, grad, d, x):
        self.product(flat(d).T, flat(x), grad, accumulate=True)

    def sum_steps(self, d):
        rows = flat(d)
        N, M = rows.shape
        if rows.dtype.itemsize == 2 or not N or rows.strides[1] != rows.itemsize:
            return super().sum_steps(d)
        sums = np.empty(M, rows.dtype)
        threads = 1 if rows.size < _WORK // 8 else thread_count()
        self._call(
            "add_rows", rows.ctypes.data, N, M, rows.strides[0] // rows.itemsize, rows.dtype == np.float64,
            sums.ctypes.data, threads, self.level, threads=threads,
        )  # fmt: skip
        return sums

    def softmax_forward(self, logits, rows, labels, smoothing):
        if not logits.flags.c_contiguous:
            return super().softmax_forward(logits, rows, labels, smoothing)
        count = labels.size
        losses, highest, total = np.empty(count), np.empty(count, logits.dtype), np.empty(count)
        self._cross_entropy(logits, rows, labels, smoothing, highest, total, back=False, losses=losses)
        return losses, highest, total

    def softmax_backward(self, logits, rows, labels, smoothing, highest, total, dlosses, out=None):
        if not logits.flags.c_contiguous:
            return super().softmax_backward(logits, rows, labels, smoothing, highest, total, dlosses, out)
        dlogits = self._derivative_array(logits, rows, out)
        scale = np.ascontiguousarray(dlosses, logits.dtype)
        self._cross_entropy(logits, rows, labels, smoothing, highest, total, back=True, scale=scale, dlogits=dlogits)
        return dlogits

    def _cross_entropy(self, logits, rows, labels, smoothing, highest, total, back, **more):
        arrays = {
            "logits": logits,
            "labels": np.ascontiguousarray(labels, np.int64),
            "highest": highest,
            "total": total,
        }
        arrays |= more | {"rows": None if rows is None else np.ascontiguousarray(rows, np.int64)}
        addresses = {name: _address(array) for name, array in arrays.items()}
        job = _Rows(logits.dtype == np.float64, labels.size, logits.shape[1], smoothing, **addresses)
        threads = 1 if labels.size * logits.shape[1] < _WORK // 64 else thread_count()
        self._call("cross_entropy", ctypes.byref(job), threads, int(back), self.level, threads=threads)

    def optimize(self, kernel, params, grads, arrays, scalars):
        job = _Update(list(_STATES).index(kernel), params.dtype == np.float64, params.size)
        job.scalars[: len(scalars)] = list(scalars.values())
        job.grads, job.params = grads.ctypes.data, params.ctypes.data
        job.arrays[: len(_STATES[kernel])] = [_address(arrays.get(name)) for name in _STATES[kernel]]
        threads = self._flat_threads(params)
        self._call("update", ctypes.byref(job), threads, self.level, threads=threads)
        return True

    def sum_squares(self, grads):
        sums = np.empty(-(-grads.size // _SQUARES))
        is_double, threads = grads.dtype == np.float64, self._flat_threads(grads)
        self._call(
            "add_squares",
            grads.ctypes.data,
            grads.size,
            is_double,
            sums.ctypes.data,
            threads,
            self.level,
            threads=threads,
        )
        return sums.sum()


def shared_units(kernel, projected, back, H):
    """How many units threads share in a single timestep: those of time_loop.h's ``by_units``, no thread waiting."""
    return 0 if back or projected or kernel == "GruOriginal" else H


def _address(array):
    return None if array is None else array.ctypes.data
