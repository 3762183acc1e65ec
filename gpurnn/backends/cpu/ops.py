"""CpuOps: what compiled code does on the CPU in place of array code.

That is the time loop, products and sums over all of it, cross-entropy, dropout masks, the optimizers and the norm of
the gradients, of every cell. 16-bit numbers are converted in registers, and computed in float32. Arrays are
C-contiguous here. Where the compiled library was not built, the backend ``"cpu"`` is ``"numpy"``.

Compiled results have the same bits in every process and for any number of threads. They differ between instruction sets
(``GPURNN_ISA`` forces one). What NumPy computes (products of a few numbers, attention) differs between BLAS libraries.
Subnormal numbers are flushed to zero: below 2^-126 in float32 and bfloat16, below 2^-1022 in float64.
"""

import ctypes
import math

import numpy as np

from ... import rng
from ...dtypes import compute_dtype, dtype_name
from ...errors import BackendError
from ..marks import HELD, Marks
from ..ops import UPDATE_STATES, Ops, flat, refuse_uncountable
from ..records import PassGradients, SavedLayer, SavedPass
from . import cells, packing, sharing
from .inference import run_inference
from .memory import MemoryPool
from .native import (
    ISAS,
    LEVELS,
    CrossEntropy,
    NativeWeights,
    Pass,
    Product,
    Update,
    address,
    dtype_number,
    load_native,
)
from .state_arrays import own_gradient, state_arrays
from .step_program import StepProgram, refused
from .threads import thread_count
from .uncompiled import in_16_bits, warn_of_16_bits, why_uncompiled

_SMALL = 1 << 14  # below this many multiply-adds NumPy finishes before our operands are packed
_SQUARES = 1 << 12  # SQUARES of update.h
_MOST = 2**31 - 1  # of an int in api.cpp


def describe():
    """Say what the backend "cpu" is on this machine."""
    native = load_native()
    if native is None:
        return f"array code, as 'numpy': {why_uncompiled()}"
    return f"works, compiled for {LEVELS[native[1]]}, up to {thread_count()} threads"


class HostOps(Ops):
    """Array code on NumPy with compiled random masks, of the same bits: in array code a mask takes as long as a layer.

    library, level: from ``load_native``.
    """

    def __init__(self, name, library, level):
        super().__init__(np, name)
        thread_count()  # raises for a wrong GPURNN_NUM_THREADS now, not at the first large call
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
        """Threads for work on every number of an array."""
        return 1 if array.size < sharing.WORK // 64 else thread_count()

    def _call(self, name, *arguments, threads):
        """Call a function of the library; raise what it reports. threads: how many it takes, for the message."""
        self._raise(getattr(self.library, f"gpurnn_native_{name}")(*arguments), name, threads)

    def _raise(self, problem, name, threads):
        """Raise what compiled code reports by its number."""
        if problem == 1:
            raise MemoryError(f"backend 'cpu': no memory for packed weights or products, {threads} threads")
        if problem == 2:
            raise BackendError(f"the system refuses {threads} threads: set GPURNN_NUM_THREADS to less")
        if problem:
            raise BackendError(f"{name} of the compiled library failed for an unknown reason")


class CpuOps(HostOps):
    """The primitives with compiled time loops. library, level: from ``load_native``."""

    flat_rows = math.inf  # compiled code takes some rows at a time by itself

    def __init__(self, library, level):
        super().__init__("cpu", library, level)
        self.store = MemoryPool()
        self.array_code = Ops(np, "numpy")  # for what is not compiled, with array code's memory order

    def machine(self):
        return super().machine() | {"isa": ISAS[self.level]}

    def empty_cache(self):
        self.store.clear()

    trim = empty_cache

    def schedule(self, problem, wanted="auto"):
        computed = "float64" if problem.dtype == "float64" else "float32"
        refusal = cells.refusal(problem.cell, computed, self.level)
        if refusal:
            return "array code", f"one timestep after another: {refusal}{in_16_bits(problem.dtype)}"
        units = sharing.units_to_share(problem.cell, problem.projected, problem.H)
        multiplications = problem.T * problem.B * len(problem.cell.gates) * problem.H**2
        threads, by_units = sharing.share(problem.T, problem.B, units, multiplications, problem.directions)
        how_many = "1 thread" if threads == 1 else f"{threads} threads" + " that divide the units" * by_units
        return "compiled", f"for {LEVELS[self.level]}, {how_many}, no array code in it"

    def refuse_sizes(self, T, B, layers):
        refuse_uncountable(T, B, self.name)

    def packed_bytes(self, problem, P, T, wanted="auto"):
        return packing.packed_bytes(self, problem, P, T)

    def empty_steps(self, T, B, F, dtype):
        return self.empty(T, B, F, dtype)

    def empty(self, T, B, F, dtype):
        return self.store.empty((T, B, F), dtype)

    def layer_forward(self, cell, x, weights, states, lengths, options):
        if options.inference and lengths is None:
            done = run_inference(self, cell, x, weights, states, options)
            if done is not None:
                return done
        if not self._compiled(cell, x.dtype):
            warn_of_16_bits(cell, dtype_name(x.dtype))
            return self.array_code.layer_forward(cell, x, weights, states, lengths, options)
        (T, B, I), directions, save = x.shape, options.directions, options.save
        D, H = len(directions), len(weights[0].ih) // len(cell.gates)
        P = H if weights[0].hr is None else len(weights[0].hr)
        fresh = options.fresh_output or D > 1 or options.marks is not None  # otherwise the output is a view of h
        output = self.empty(T, B, D * P, x.dtype) if fresh else None
        x = np.ascontiguousarray(x)
        saved, jobs = SavedLayer(cell, weights, x, lengths, []), []
        masks, marks = options.masks or (None,) * D, options.marks or (None,) * D
        for d, (w, state, reverse) in enumerate(zip(weights, states, directions, strict=True)):
            gates = self.empty(T if save else 1, B, cell.saved_blocks * H, x.dtype)
            h = self.empty(T + 1, B, P, x.dtype)
            h[T if reverse else 0] = state[0]
            others = self._state_slots(cell, T + 1 if save else 2, B, H, compute_dtype(x.dtype))
            for steps, first in zip(others, state[1:], strict=True):
                steps[T if reverse and save else 0] = first
            one = SavedPass(gates, h, others, reverse, masks[d], marks=marks[d])
            job = self._pass(saved, w, one, save)
            job.flat = options.flat
            job.read = np.ascontiguousarray(w.read(x))
            job.x, job.I = address(job.read), job.read.shape[2]
            if w.ready and options.inference and not save:
                job.memory = packing.packed_weights(self, cell, w.ready, job)
                job.packed = job.memory and job.memory.address
            if output is not None:
                job.output, job.output_row = address(output) + d * P * x.itemsize, D * P
            jobs.append(job)
            saved.passes.append(one)
        work = sharing.multiplications(cell, T * B * H, P, I)
        self._run_time_loop(cell, (Pass * D)(*jobs), x.dtype, work, back=False)
        finals = []
        for one in saved.passes:
            end = 0 if one.reverse else T
            finals.append((one.h[end].copy(), *[steps[end if save else T % 2].copy() for steps in one.others]))
            if not save:
                one.gates, one.others = None, ()
        return saved, finals, saved.passes[0].h_new if output is None else output

    def layer_rebuild(self, cell, x, *arguments):
        ops = super() if self._compiled(cell, x.dtype) else self.array_code
        return ops.layer_rebuild(cell, x, *arguments)

    def _compiled(self, cell, dtype):
        """Whether a cell has a compiled time loop. The first call for a traced cell compiles it."""
        return not cell.array_only and (cell.struct is None or self._generated(cell, dtype) is not None)

    def _generated(self, cell, dtype):
        """What was compiled of a traced cell, or None."""
        return cells.generated(cell, dtype_name(compute_dtype(dtype)), self.level) if cell.struct else None

    def _state_slots(self, cell, slots, B, H, dtype):
        """For each state but h its (slots, B, H), all in one array."""
        count = len(cell.states) - 1
        if count < 2:
            return (self.empty(slots, B, H, dtype),) if count else ()
        return tuple(self.empty(count * slots, B, H, dtype).reshape(count, slots, B, H))

    def step_program(self, parts, B, dtype):
        return None if refused(self, parts, dtype) else StepProgram(self, parts, B, dtype)

    def time_loop_backward(self, saved, doutput, dstates, hooks):
        cell = saved.cell
        if hooks is not None or not self._compiled(cell, saved.x.dtype):  # only array code calls hooks
            for one in saved.passes:  # the compiled pass leaves padding uninitialised, possibly NaN
                self.zero_silent(one.gates, saved.lengths, one.marks and Marks(one.marks.bits & HELD))
            return self.array_code.time_loop_backward(saved, doutput, dstates, hooks)
        (T, B, P), dtype = saved.passes[0].h_new.shape, saved.x.dtype
        H, S, real = len(saved.weights[0].ih) // len(cell.gates), len(cell.states), compute_dtype(dtype)
        doutput = None if doutput is None else np.ascontiguousarray(doutput)
        jobs, done = [], []
        for d, (one, w) in enumerate(zip(saved.passes, saved.weights, strict=True)):
            final = dstates[d] or (None,) * S
            dstate = (own_gradient(final[0], (B, P), real), *[own_gradient(part, (B, H), real) for part in final[1:]])
            if S > 2:  # those of the states besides h in one array
                dstate = dstate[0], *np.stack(dstate[1:])
            dh_steps = None if w.hr is None else self.empty(T, B, P, dtype)
            job = self._pass(saved, w, one, save=True)
            job.dh, job.dothers = address(dstate[0]), address(dstate[1]) if S > 1 else None
            job.dh_steps = address(dh_steps)
            if job.reset is not None:
                dh, dothers = job.dreset = state_arrays(one.dreset or (0,) * S, B, P, H, real, real)
                job.dreset_h, job.dreset_others = address(dh), address(dothers)
            dreset = job.reset and (dh, *dothers)
            if doutput is not None:
                job.doutput, job.doutput_row = address(doutput) + d * P * dtype.itemsize, len(saved.passes) * P
            jobs.append(job)
            done.append(PassGradients(one.gates, dstate, dh_steps, dreset))
        work = sharing.multiplications(cell, T * B * H, P)
        self._run_time_loop(cell, (Pass * len(jobs))(*jobs), dtype, work, back=True)
        return done

    def _pass(self, layer, w, saved, save):
        """A ``Pass`` with what the forward and the backward pass both need; its arrays live as long as it does.

        layer: the ``SavedLayer``. w: the ``Weights``. saved: the ``SavedPass``.
        """
        (slots, B, P), dtype = saved.h.shape, saved.h.dtype
        ready = w.ready or NativeWeights(w)
        job = Pass.from_buffer_copy(ready.template(layer.cell, slots - 1, B, dtype, saved.reverse, save))
        lengths = None if layer.lengths is None else layer.lengths.astype(np.int32)
        job.lengths, job.gates, job.h = address(lengths), address(saved.gates), address(saved.h)
        own = masks = None
        if w.own:
            own = np.concatenate(w.own, dtype=compute_dtype(dtype))
            job.own = address(own)
        if saved.others:  # one after another in one array
            job.others, job.state_stride = address(saved.others[0]), saved.others[0].size
        if saved.masks is not None:
            masks = np.ascontiguousarray(saved.masks)
            job.masks, job.mask_step = address(masks), masks[0].size if len(masks) > 1 else 0
        job.reset = None
        if saved.marks is not None:
            job.marks = address(saved.marks.bits)
            if saved.marks.state is not None:
                job.reset = state_arrays(saved.marks.state, B, P, job.H, dtype, compute_dtype(dtype))
                job.reset_h, job.reset_others = map(address, job.reset)
        job.arrays = ready, lengths, own, masks, layer.x, saved.gates, saved.h, saved.others
        return job

    def _run_time_loop(self, cell, jobs, dtype, work, back):
        """Run the passes of all directions, an array. work: the ``multiplications`` of one direction. back: whether to
        run backward passes."""
        job, D = jobs[0], len(jobs)
        if job.B == 0:
            return
        units = sharing.units_to_share(cell, job.P != job.H, job.H)
        threads, by_units = sharing.share(job.T, job.B, units, work, D)
        if by_units:
            for one in jobs:
                one.by_units = not one.flat
        rooms = [packing.lend_room(self, one, packing.pass_bytes(self, cell, one, back)) for one in jobs]
        arguments = jobs, D, threads, int(back)
        if cell.struct is None:
            self._call("time_loop", *arguments, self.level, threads=threads)
        else:
            self._raise(self._generated(cell, dtype).time_loop(*arguments), "time_loop", threads)
        del rooms  # they live until here

    def product(self, a, b, out, accumulate=False):
        (M, K), N, dtype = a.shape, b.shape[1], a.dtype
        same = dtype == b.dtype and (out.dtype == dtype or out.dtype == compute_dtype(dtype))
        strides = a.strides + b.strides + out.strides
        if not same or not _SMALL <= M * N * K or max(M, N, K) > _MOST or min(strides) < 0:
            super().product(a, b, out, accumulate)
            return
        if strides[5] != out.itemsize:  # column-major: compute the transpose; other layouts fall back
            if strides[4] != out.itemsize:
                super().product(a, b, out, accumulate)
                return
            a, b, out, M, N = b.T, a.T, out.T, N, M
        size, out_size = a.itemsize, out.itemsize
        job = Product(
            dtype_number(dtype), dtype_number(out.dtype), accumulate, M, N, K,
            *(stride // size for stride in a.strides + b.strides), out.strides[0] // out_size,
            address(a), address(b), address(out),
        )  # fmt: skip
        threads = 1 if M * N * K < sharing.WORK else min(thread_count(), -(-M // 16))
        arrays = a, b, packing.lend_room(self, job, packing.product_bytes(self, job))
        self._call("multiply", ctypes.byref(job), threads, self.level, threads=threads)
        del arrays  # they live until here

    def reads_int8(self, cell, dtype):
        return dtype.itemsize > 2 and (cell is None or self._compiled(cell, dtype))

    def int8_product(self, x, weight, out):
        """``out = x W^T`` for an ``Int8Matrix``. x: (M, K), out: (M, N), C-contiguous, of one dtype."""
        x = np.ascontiguousarray(x)
        (M, K), N = x.shape, len(weight)
        arrays = x, packing.packed_linear(self, weight, x.dtype), out
        job = Product(*(dtype_number(x.dtype),) * 2, False, M, N, K, K, 1, 1, K, N, *map(address, arrays), weight.bits)
        threads = 1 if M * N * K < sharing.WORK else min(thread_count(), -(-M // 16))
        self._call("multiply", ctypes.byref(job), threads, self.level, threads=threads)

    def rounded(self, array, dtype):
        if array.dtype != np.float32 or dtype.itemsize > 2 or not array.flags.c_contiguous:
            return super().rounded(array, dtype)
        made, threads = np.empty(array.shape, dtype), self._flat_threads(array)
        arguments = array.ctypes.data, array.size, dtype_number(dtype), made.ctypes.data
        self._call("round", *arguments, threads, self.level, threads=threads)
        return made

    def sum_steps(self, d):
        rows = flat(d)
        N, M = rows.shape
        if not N or rows.strides[1] != rows.itemsize:
            return super().sum_steps(d)
        sums = np.empty(M, compute_dtype(rows.dtype))
        threads = 1 if rows.size < sharing.WORK // 8 else thread_count()
        self._call(
            "add_rows", rows.ctypes.data, N, M, rows.strides[0] // rows.itemsize, dtype_number(rows.dtype),
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
        dlogits = self.derivative_array(logits, rows, out)
        scale = np.ascontiguousarray(dlosses, logits.dtype)
        self._cross_entropy(logits, rows, labels, smoothing, highest, total, back=True, scale=scale, dlogits=dlogits)
        return dlogits

    def _cross_entropy(self, logits, rows, labels, smoothing, highest, total, back, **more):
        arrays = {"logits": logits, "labels": np.ascontiguousarray(labels, np.int64), "highest": highest}
        arrays |= more | {"total": total, "rows": None if rows is None else np.ascontiguousarray(rows, np.int64)}
        addresses = {name: address(array) for name, array in arrays.items()}
        job = CrossEntropy(logits.dtype == np.float64, labels.size, logits.shape[1], smoothing, **addresses)
        threads = 1 if labels.size * logits.shape[1] < sharing.WORK // 64 else thread_count()
        self._call("cross_entropy", ctypes.byref(job), threads, int(back), self.level, threads=threads)

    def optimize(self, kernel, params, grads, arrays, scalars, array_code):
        if kernel not in UPDATE_STATES:
            super().optimize(kernel, params, grads, arrays, scalars, array_code)
            return
        job = Update(list(UPDATE_STATES).index(kernel), params.dtype == np.float64, params.size)
        job.scalars[: len(scalars)] = list(scalars.values())
        job.grads, job.params = grads.ctypes.data, params.ctypes.data
        job.arrays[: len(UPDATE_STATES[kernel])] = [address(arrays.get(name)) for name in UPDATE_STATES[kernel]]
        threads = self._flat_threads(params)
        self._call("update", ctypes.byref(job), threads, self.level, threads=threads)

    def sum_squares(self, grads):
        sums = np.empty(-(-grads.size // _SQUARES))
        is_double, threads = grads.dtype == np.float64, self._flat_threads(grads)
        self._call(
            "add_squares", grads.ctypes.data, grads.size, is_double, sums.ctypes.data, threads, self.level,
            threads=threads,
        )  # fmt: skip
        return sums.sum()
