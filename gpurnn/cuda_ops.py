"""CudaOps: what a hand-written kernel makes faster than the generic code of ``Ops``.

The time loop runs by a schedule of schedules.py. ``step``: between two launches of a fused kernel (step.cu)
stands the GEMM with the recurrent weights, and nothing else; where a shape comes back, the loop is recorded as a CUDA
graph of up to 64 timesteps over fixed arrays and replayed, so that Python is out of it. ``block``, ``grid``: one launch
runs the whole time loop (block.cu, block_mma.cu, grid.cu, grid_mma.cu). Both directions of a layer go in the
same launches.

Everything that touches the GPU goes through a device: ``CupyDevice`` of _device.py, or under test an emulated one.
"""

import contextlib
import functools
import logging
import math
import threading
import weakref
from collections import OrderedDict, deque
from dataclasses import replace

import numpy as np

from . import rng, schedules
from ._cublas import is_matrix
from ._kernels import ALIGNMENT, EACH, Kernels, Rows, signature
from .dtypes import C_NAMES, dtype_name
from .errors import BackendError, ShapeError
from .ops import Ops, Saved, Streams, flat, refuse_uncountable

CELLS = ("RnnTanh", "RnnRelu", "LstmCell", "GruCell", "GruOriginal")  # structs in kernels/cells
_BLOCK = (32, 4)  # units, sequences: a warp reads along the units
_BLOCKS = 65535  # of a launch along y or z, at most (CUDA C++ Programming Guide, compute capabilities)
_REMEMBERED = 256  # shapes whose calls are counted
_RECORDED = 64  # timesteps of a graph: longer sequences launch it again
_log = logging.getLogger("gpurnn")


_SINGLE, _DOUBLE = np.dtype("float32"), np.dtype("float64")


def c_type(dtype):
    """What the kernels call a NumPy dtype."""
    return C_NAMES[dtype_name(dtype)]


def kernel_names(dtypes=tuple(C_NAMES), cells=CELLS):
    """(file, name expression) of every kernel that layers of these dtypes and cells use."""
    storages = [C_NAMES[dtype] for dtype in dtypes]
    reals = sorted({"double" if storage == "double" else "float" for storage in storages})
    names = []
    for storage in storages:
        names += [
            ("step.cu", f"step_{which}<{cell}, {storage}>") for cell in cells for which in ("forward", "backward")
        ]
        if "GruOriginal" in cells:
            names += [("step.cu", f"step_{which}<GruOriginal, {storage}>") for which in ("reset", "reset_backward")]
        if "LstmCell" in cells:
            names += [("step.cu", f"step_{which}<{storage}>") for which in ("project", "project_backward")]
        names += [("bptt.cu", f"sum_steps_partial<{storage}>"), ("embedding.cu", f"embedding_chunks<{storage}>")]
    for real in reals:
        names += [("bptt.cu", f"sum_steps_finish<{real}>"), ("embedding.cu", f"embedding_borders<{real}>")]
        names += [("loss.cu", f"cross_entropy_{which}<{real}>") for which in ("forward", "backward")]
        kernels = ("sgd", "rmsprop", "adam", "norm_partial", "scale_grads")
        names += [("optimize.cu", f"{kernel}<{real}>") for kernel in kernels]
    return [*names, ("step.cu", "step_done"), ("optimize.cu", "norm_finish"), ("dropout.cu", "dropout_mask")]


def kernel_of(problem, candidate):
    """(file, name expression) of a candidate's kernel; None for ``step``, whose kernels fit every size."""
    if candidate.schedule == "step":
        return None
    which = "backward" if problem.backward else "forward"
    types = ", ".join((problem.kernel, C_NAMES[problem.dtype], *candidate.types))
    return f"{candidate.kernel}.cu", f"{candidate.kernel}_{which}<{types}>"


class CudaOps(Ops):
    """The primitives with kernels. graphs: how many recorded loops may be held at once; 0 records none. measured: a
    ``tuned_table.Table`` of this device, or None."""

    def __init__(self, device, graphs=16, measured=None):
        super().__init__(device.xp, "cuda")
        self.device = device
        self.kernels = Kernels(device)
        self.pool = LoopPool(graphs)
        self.measured = measured
        self.exchanges = {}  # queue of the device -> Exchange
        self._lock = threading.Lock()
        self._chosen = {}  # what decides the candidates of a loop -> (problems, candidates)
        self._with_tf32 = None

    def with_tf32(self):
        if self.tf32:
            return self
        if self._with_tf32 is None:
            self._with_tf32 = object.__new__(type(self))  # the device, its kernels and the pool of loops are shared
            self._with_tf32.__dict__.update(self.__dict__, tf32=True)
        return self._with_tf32

    def synchronize(self):
        self.device.synchronize()
        self.raise_if_failed()

    def to_numpy(self, array):
        host = super().to_numpy(array)
        self.raise_if_failed()
        return host

    def machine(self):
        limits = self.device.limits
        return {"backend": self.name, "gpu": limits.name, "capability": limits.capability, "cupy": self.xp.__version__}

    def empty_cache(self):
        self.pool.clear()
        self.device.free_memory()

    def disable_cooperative(self):
        """From now on no schedule is chosen whose blocks wait for one another."""
        self.device.limits = replace(self.device.limits, cooperative=False)

    def exchange(self):
        """The ``Exchange`` of the current stream."""
        queue = self.device.queue
        with self._lock:
            if queue not in self.exchanges:
                self.exchanges[queue] = Exchange(self.device)
            return self.exchanges[queue]

    def raise_if_failed(self):
        """Raise BackendError where a schedule ``grid`` has given up; from then on layers take another."""
        with self._lock:
            timed_out = any(exchange.timed_out() for exchange in self.exchanges.values())
            if timed_out:
                self.exchanges.clear()
        if timed_out:
            self.disable_cooperative()
            raise BackendError(
                "schedule grid: a thread block waited in vain for the others, results since the last check are wrong. "
                "Other work on this GPU may have kept them out; layers take another schedule from now on: run again"
            )

    def schedule(self, problem, wanted="auto"):
        candidate, reason = self.choose(problem, wanted)
        if candidate.schedule == "step":
            refused = self.pool.refusal(replace(problem, tf32=self.tf32))
            launches = f"launch by launch: {refused}" if refused else "recorded as a CUDA graph when a shape comes back"
            return "step", f"a fused kernel and a cuBLAS product for each timestep, {launches}; {reason}"
        return candidate.schedule, f"one launch for the whole sequence: {reason}"

    def recordings(self):
        """Which time loops became CUDA graphs, and why others did not: a list of
        {"loop", "pass", "recorded", "reason"}."""
        return self.pool.recordings()

    def aligned(self, array):
        """``array``, C-contiguous and where kernels may load several numbers at once: itself, or a copy."""
        array = self.xp.ascontiguousarray(array)
        return array.copy() if self.device.address(array) % ALIGNMENT else array

    def choose(self, problem, wanted="auto"):
        """``schedules.choose`` on this device."""
        return schedules.choose(replace(problem, tf32=self.tf32), self.device.limits, wanted, self.measured)

    def candidates(self, save, schedule, *sizes):
        """``(problems, candidates)`` of a loop, "forward" and where ``save`` "backward" -> its
        schedules.Problem and the schedules.Candidate that was chosen.

        sizes: the kernel, gates, H, T, B, directions, dtype's name, projected, I and share of ``schedules.Problem``.
        """
        key, known = (save, schedule, sizes, self.tf32), (self.device.limits, self.measured)
        if any(old is not new for old, new in zip(self._chosen.get("known", ()), known, strict=False)):
            self._chosen.clear()  # another device, or more was measured
        found = self._chosen.get(key)
        if found is None:
            if len(self._chosen) >= 4096:
                self._chosen.clear()
            self._chosen["known"] = known
            *first, I, concurrent = sizes
            names = ("forward", "backward") if save else ("forward",)
            problems = {name: schedules.Problem(*first, name == "backward", self.tf32, I, concurrent) for name in names}
            found = self._chosen[key] = (
                problems,
                {name: self.candidate(problem, schedule) for name, problem in problems.items()},
            )
        return found

    def candidate(self, problem, wanted="auto"):
        """What ``choose`` finds, as the compiler at hand can do it: with fewer weights in registers where it spills."""
        return self.without_spills(problem, self.choose(problem, wanted)[0])

    def without_spills(self, problem, candidate):
        less = candidate
        while less is not None and less.schedule != "step" and self.device.spills(*kernel_of(problem, less)):
            less = schedules.hold_less(problem, less, self.device.limits)
        return less or candidate

    # ---- one layer through time

    def refuse_sizes(self, T, B, layers):
        refuse_uncountable(T, B, self.name)
        most = _BLOCKS * _BLOCK[1]
        if most < B and any(
            candidate.schedule == "step" for sizes in layers() for candidate in self.candidates(*sizes)[1].values()
        ):
            raise ShapeError(
                f"x: B = {B} is more than the {most} sequences that the schedule 'step' of backend 'cuda' takes in one "
                "call: split the batch"
            )

    def streams(self, count):
        return CudaStreams(self.device, count) if count > 1 else super().streams(count)

    def layer_forward(
        self, cell, x, weights, states, lengths, directions, save, fresh_output, schedule="auto", concurrent=1
    ):
        T, B, I = x.shape
        rows, P = weights[0].hh.shape
        H, D = rows // cell.gates, len(weights)
        key = (cell.kernel, T, B, I, H, P, directions, x.dtype, save, lengths is not None,
               weights[0].bias_ih is not None, schedule, concurrent, self.tf32)  # fmt: skip
        # Work on another stream may still be under way on a loop that was given back there.
        loop, lease = self.pool.take((*key, self.device.queue), lambda: Loop(self, cell, *key[1:-1]))
        loop.load(weights, lengths)
        x = self.xp.ascontiguousarray(x)
        if loop.inputs:
            loop.take(x)
        else:
            for d in range(D):
                self.product(flat(x), weights[d].ih.astype(x.dtype, copy=False).T, flat(loop.gates[d])[:, :rows])
        loop.start(states)
        loop.forward()
        all_saved = [Saved(x, loop.gates[d] if save else None, loop.h[d], loop.c_slots(d), lease) for d in range(D)]
        output = loop.output.copy() if fresh_output and loop.recorded else loop.output
        return all_saved, loop.final(), output

    def layer_backward(self, cell, all_saved, weights, doutput, dstates, lengths, directions, hooks):
        if any(hooks):  # only the array code calls hooks with dh and dc
            return super().layer_backward(cell, all_saved, weights, doutput, dstates, lengths, directions, hooks)
        return all_saved[0].lease.loop.backward(doutput, dstates)  # uses the weights that the forward pass loaded

    # ---- products and sums

    def product(self, a, b, out, accumulate=False):
        self.device.gemm(self._readable(a), self._readable(b), out, accumulate=accumulate, tf32=self.tf32)

    def accumulate_product(self, grad, d, x):
        self.product(flat(d).T, flat(x), grad, accumulate=True)

    def _readable(self, matrix):
        """``matrix``, or a copy of one whose strides BLAS cannot read."""
        return matrix if is_matrix(matrix) else self.xp.ascontiguousarray(matrix)

    def sum_steps(self, d):
        rows = flat(d)
        N, M = rows.shape
        if rows.strides[1] != rows.itemsize or rows.strides[0] < 0:
            rows = self.xp.ascontiguousarray(rows)
        kind = c_type(d.dtype)
        real = _DOUBLE if kind == "double" else _SINGLE
        if N == 0:
            return self.xp.zeros(M, real)
        chunks = min(-(-N // 256), 256)  # by N alone: equal bits on every GPU
        partial, sums = self.xp.empty((chunks, M), np.float64), self.xp.empty(M, real)
        ld = rows.strides[0] // rows.itemsize if N > 1 else M
        self.kernels.launch(
            "bptt.cu", "sum_steps_partial", (kind,), (-(-M // 32), chunks), (32, 8), N, M, ld, Rows(rows), partial
        )
        real_type = c_type(real)
        self.kernels.launch(
            "bptt.cu", "sum_steps_finish", (real_type,), (-(-M // 128),), (128,), chunks, M, partial, sums
        )
        return sums

    def accumulate_rows(self, grad, index, d):
        N, H = d.shape
        if N == 0:
            return
        if H > _BLOCKS * 32:
            super().accumulate_rows(grad, index, d)
            return
        order = self.xp.argsort(index, kind="stable").astype(np.int64, copy=False)
        ids = index[order].astype(np.int64, copy=False)
        d = self.xp.ascontiguousarray(d)
        chunks, kind = -(-N // 64), c_type(d.dtype)
        partial = self.xp.empty((chunks, 2, H), np.float64)
        grid, block = (chunks, -(-H // 32)), (32,)
        self.kernels.launch(
            "embedding.cu", "embedding_chunks", (kind,), grid, block, N, H, ids, order, d, partial, grad
        )
        real = c_type(grad.dtype)
        self.kernels.launch("embedding.cu", "embedding_borders", (real,), grid, block, N, H, ids, partial, grad)

    # ---- softmax cross-entropy

    def softmax_forward(self, logits, rows, labels, smoothing):
        count, V = labels.size, logits.shape[1]
        losses, total = self.xp.empty(count, np.float64), self.xp.empty(count, np.float64)
        highest = self.xp.empty(count, logits.dtype)
        args = V, smoothing, self.xp.ascontiguousarray(logits), rows, labels, losses, highest, total
        self.kernels.launch("loss.cu", "cross_entropy_forward", (c_type(logits.dtype),), (count,), (128,), *args)
        return losses, highest, total

    def softmax_backward(self, logits, rows, labels, smoothing, highest, total, dlosses, out=None):
        dlogits = self._derivative_array(logits, rows, out)
        scale = self.xp.ascontiguousarray(dlosses[:, 0])
        args = (
            logits.shape[1],
            smoothing,
            self.xp.ascontiguousarray(logits),
            rows,
            labels,
            highest,
            total,
            scale,
            dlogits,
        )
        grid = (labels.size,)
        self.kernels.launch("loss.cu", "cross_entropy_backward", (c_type(logits.dtype),), grid, (128,), *args)
        return dlogits

    # ---- what follows the gradients

    def optimize(self, kernel, params, grads, arrays, scalars):
        kind, N = c_type(params.dtype), params.size
        given = scalars | arrays | {"N": N, "params": params, "grads": grads}
        args = [given.get(argument.name) for argument in signature("optimize.cu", kernel, (kind,))]
        self.kernels.launch("optimize.cu", kernel, (kind,), (-(-N // 256),), (256,), *args)
        return True

    def clip_norm(self, grads, max_norm):
        kind, N = c_type(grads.dtype), grads.size
        chunks = max(1, min(-(-N // 4096), 1024))  # by N alone: equal bits on every GPU
        partial, norm = self.xp.empty(chunks, np.float64), self.xp.empty(2, np.float64)
        self.kernels.launch("optimize.cu", "norm_partial", (kind,), (chunks,), (256,), N, grads, partial)
        self.kernels.launch("optimize.cu", "norm_finish", (), (1,), (256,), chunks, max_norm, partial, norm)
        if max_norm != math.inf:
            self.kernels.launch("optimize.cu", "scale_grads", (kind,), (-(-N // 256),), (256,), N, norm, grads)
        return norm[0]

    # ---- random masks

    def dropout_mask(self, shape, rate, seed, layer, call):
        N = math.prod(shape)
        mask = self.xp.empty(N, np.bool_)
        threshold = rng.dropout_threshold(rate)
        self.kernels.launch(
            "dropout.cu", "dropout_mask", (), (-(-N // 512),), (128,), N, seed, layer & 0xFFFFFFFF, call & 0xFFFFFFFF,
            threshold, mask,
        )  # fmt: skip
        return mask.reshape(shape)


class Loop:
    """The time loop of one layer: its arrays and its launches, for one shape and one set of options.

    ``forward`` and ``backward`` run launch by launch, or replay what ``LoopPool`` has had recorded.
    """

    def __init__(self, ops, cell, T, B, I, H, P, directions, dtype, save, ragged, biased, schedule, concurrent=1):
        xp = ops.xp
        self.ops, self.cell, self.directions, self.save = ops, cell, directions, save
        self.T, self.B, self.H, self.P, self.D = T, B, H, P, len(directions)
        D, G = self.D, cell.gates
        self.projected, self.original = P != H, cell.kernel == "GruOriginal"
        self.dtype = np.dtype(dtype)
        self.real = _DOUBLE if self.dtype == _DOUBLE else _SINGLE
        self.width = cell.saved_blocks if save else G
        self.reverse = sum(reverse << d for d, reverse in enumerate(directions))
        self.recorded = False  # whether the arrays stay, so that launches may be recorded over them
        self.graphs = {}  # name -> CUDA graphs, one behind the other
        self.note = lambda name, reason: None  # told why a name is not recorded, or None where it is
        self.problems, self.candidates = ops.candidates(
            save, schedule, cell.kernel, G, H, T, B, D, dtype_name(self.dtype), self.projected, I, concurrent
        )
        # for W_ih x, and for what the cell keeps
        self.gates = xp.empty((D, T, B, self.width * H), self.dtype) if save or not self.inputs else None
        self.h = xp.empty((D, T + 1, B, P), self.dtype)
        self.c = xp.empty((D, T + 1 if save else 2, B, H), self.real) if cell.states == 2 else None
        self.output = xp.empty((T, B, D * P), self.dtype)
        self.nbytes = self.h.nbytes + 2 * self.output.nbytes  # with doutput
        self.nbytes += sum(array.nbytes for array in (self.gates, self.c) if array is not None)
        self.steps_done = None  # timesteps before the graph that runs
        self.lengths = self.order = None
        if ragged:  # order: the longest first, so that the sequences of a block end together
            self.lengths, self.order = xp.empty(B, np.int32), xp.empty(B, np.int32)
        self.biased = biased
        self.hh = self.hr = self.ih = self.x = self.bias_ih = self.bias_hh = None
        self.h_now = self.d_now = None  # made by the first step of either pass
        self.doutput = self.received = self.dh = None  # made by the first backward

    @property
    def inputs(self):
        """Columns of W_ih whose products the kernel makes itself; 0: ``gates`` holds W_ih x when it begins."""
        return self.candidates["forward"].inputs

    # ---- what a call brings

    def take(self, x):
        """x (T, B, I) for a kernel that multiplies it itself."""
        if not self.recorded:
            self.x = x
            return
        if self.x is None:
            self.x = self.ops.xp.empty(x.shape, x.dtype)
        self.x[...] = x

    def load(self, weights, lengths):
        """Take the weights, (D, rows, columns), (D, rows), for one call there and back. A recorded loop copies them, it
        reads at fixed addresses. 16-bit ones are rounded here, in each call anew: parameters are arrays that anyone may
        write to, so nobody tells when they change, and one small kernel costs less than a stale weight.
        """
        names = {"hh": self.dtype}
        if self.projected:
            names["hr"] = self.dtype
        if self.inputs:
            names["ih"] = self.dtype
        if self.biased:
            names |= {"bias_ih": self.real, "bias_hh": self.real}
        for name, dtype in names.items():
            given = [getattr(w, name) for w in weights]
            if self.D == 1 and given[0].dtype == dtype and not self.recorded:
                setattr(self, name, self.ops.aligned(given[0][None]))
                continue
            if getattr(self, name) is None:
                setattr(self, name, self.ops.xp.empty((self.D, *given[0].shape), dtype))
            for mine, array in zip(getattr(self, name), given, strict=True):
                mine[...] = array
        if lengths is not None:
            self.lengths[...] = self.ops.xp.asarray(lengths.astype(np.int32))
            order = np.argsort(-lengths, kind="stable")
            self.order[...] = self.ops.xp.asarray(order.astype(np.int32))

    def start(self, states):
        for d, (state, reverse) in enumerate(zip(states, self.directions, strict=True)):
            first = self.T if reverse else 0
            self.h[d, first] = state[0]
            if self.c is not None:
                self.c[d, first if self.save else 0] = state[1]

    def final(self):
        """For each direction its final state."""
        finals = []
        for d, reverse in enumerate(self.directions):
            last = 0 if reverse else self.T
            final = (self.h[d, last].copy(),)
            if self.c is not None:
                final += (self.c[d, last if self.save else self.T % 2].copy(),)
            finals.append(final)
        return finals

    def c_slots(self, d):
        return self.c[d] if self.save and self.c is not None else None

    @property
    def by_step(self):
        """The passes with enough launches for recording to pay."""
        return [name for name, candidate in self.candidates.items() if candidate.schedule == "step"]

    # ---- forward

    def forward(self):
        getattr(self, f"_forward_{self.candidates['forward'].schedule}")()

    def _forward_grid(self):
        self._or_by_step(self._forward_block, self._forward_step)

    def _backward_grid(self):
        self._or_by_step(self._backward_block, self._backward_step)

    def _or_by_step(self, launch, steps):
        """A launch of all blocks at once, or where the device refuses that, the schedule step now and ever after."""
        self.ops.raise_if_failed()
        try:
            launch()
        except BackendError as error:
            _log.warning("schedule grid is left alone: %s", str(error))
            self.ops.disable_cooperative()
            steps()

    def _forward_block(self):
        how = self.width, self.reverse, int(self.save), self.lengths, self.order, self.hh, self.bias_ih, self.bias_hh
        if self.candidates["forward"].schedule == "block":
            how = self.ih.shape[-1] if self.inputs else 0, *how, self.ih if self.inputs else None, self.x
        self._launch_block("forward", *how, self.gates, self.h, self.c, self.output)

    def _forward_step(self):
        xp, D, B, H, P = self.ops.xp, self.D, self.B, self.H, self.P
        if self.h_now is None:
            self.h_now = xp.empty((D, B, P), self.dtype)
            self.ah = xp.empty((D, B, self.cell.gates * H), self.real)
            if self.original:  # two products: the first one's rows are r and z
                self.first_ah, self.p_now = xp.empty((D, B, 2 * H), self.real), xp.empty((D, B, H), self.dtype)
            if self.projected:
                self.m, self.projection = xp.empty((D, B, H), self.dtype), xp.empty((D, B, P), self.dtype)
        for d, reverse in enumerate(self.directions):
            self.h_now[d] = self.h[d, self.T if reverse else 0]
        self._run("forward", self._forward_launches)

    def _forward_launches(self, done):
        """What a timestep launches, in order: functions of its number among those that are launched with ``done``."""
        save, transposed, launches = int(self.save), self.hh.swapaxes(1, 2), []
        biases = self.lengths, self.bias_ih, self.bias_hh
        if self.original:
            H = self.H
            launches += [
                self._product(self.h_now, transposed[..., : 2 * H], self.first_ah),
                self._bind("step_reset", H, self.width, EACH, done, self.reverse, save, *biases, self.first_ah,
                           self.gates, self.h_now, self.p_now),
                self._product(self.p_now, transposed[..., 2 * H :], self.ah[..., 2 * H :]),
            ]  # fmt: skip
        else:
            launches.append(self._product(self.h_now, transposed, self.ah))
        how = self.H, self.width, EACH, done, self.reverse, save, *biases, self.ah, self.gates
        if not self.projected:
            return [*launches, self._bind("step_forward", *how, self.h, self.h_now, self.c, None, self.output)]
        return [
            *launches,
            self._bind("step_forward", *how, None, None, self.c, self.m, None),
            self._product(self.m, self.hr.swapaxes(1, 2), self.projection),
            self._bind("step_project", self.P, EACH, done, self.reverse, self.lengths, self.projection, self.h,
                       self.h_now, self.output),
        ]  # fmt: skip

    # ---- backward

    def backward(self, doutput, dstates):
        """As ``Ops.layer_backward``."""
        xp, D, T, B, H, P = self.ops.xp, self.D, self.T, self.B, self.H, self.P
        if self.dh is None:
            self.dh = xp.empty((D, B, P), self.real)
            self.dc = xp.empty((D, B, H), self.real) if self.cell.states == 2 else None
            self.by_inner = xp.empty((D, B, H), self.real) if self.projected or self.original else None  # dm, d_p
            self.dh_steps = xp.empty((D, T, B, P), self.dtype) if self.projected else None
            self.dh_now = xp.empty((D, B, P), self.dtype) if self.projected else None
        for d, dstate in enumerate(dstates):
            for mine, given in zip((self.dh, self.dc), dstate or (None, None), strict=False):
                if mine is not None:
                    mine[d] = 0 if given is None else given
        if doutput is None:
            self.doutput = None
        elif self.recorded:  # a recorded loop reads at fixed addresses
            if self.received is None:
                self.received = xp.empty((T, B, D * P), self.dtype)
            self.doutput = self.received
            self.doutput[...] = doutput
        else:
            self.doutput = self.ops.aligned(doutput)
        getattr(self, f"_backward_{self.candidates['backward'].schedule}")()
        self.doutput = None
        done = []
        for d in range(D):
            dstate = (self.dh[d].copy(),)
            if self.dc is not None:
                dstate += (self.dc[d].copy(),)
            done.append((dstate, None if self.dh_steps is None else self.dh_steps[d]))
        return done

    def _backward_block(self):
        self._launch_block(
            "backward", self.width, self.reverse, self.lengths, self.order, self.hh, self.gates, self.h, self.c,
            self.doutput, self.dh, self.dc,
        )  # fmt: skip

    def _backward_step(self):
        if self.d_now is None:
            self.d_now = self.ops.xp.empty((self.D, self.B, self.cell.gates * self.H), self.dtype)
        name = "backward" if self.doutput is not None else "backward of the state"
        self._run(name, self._backward_launches)

    def _backward_launches(self, done):
        """As ``_forward_launches``."""
        H, launches = self.H, []
        how = H, self.width, EACH, done, self.reverse, self.lengths, self.gates
        if self.projected:
            launches = [
                self._bind("step_project_backward", self.P, EACH, done, self.reverse, self.lengths, self.doutput,
                           self.dh, self.dh_steps, self.dh_now),
                self._product(self.dh_now, self.hr, self.by_inner),
                self._bind("step_backward", *how, None, self.c, None, self.by_inner, None, self.dc, self.d_now),
            ]  # fmt: skip
        else:
            how = *how, self.h, self.c, self.doutput, None, self.dh, self.dc, self.d_now
            launches = [self._bind("step_backward", *how)]
        if not self.original:
            return [*launches, self._product(self.d_now, self.hh, self.dh, accumulate=True)]
        return [
            *launches,
            self._product(self.d_now[..., 2 * H :], self.hh[:, 2 * H :], self.by_inner),
            self._bind("step_reset_backward", H, self.width, EACH, done, self.reverse, self.gates, self.h,
                       self.by_inner, self.dh, self.d_now),
            self._product(self.d_now[..., : 2 * H], self.hh[:, : 2 * H], self.dh, accumulate=True),
        ]  # fmt: skip

    # ---- launches

    def _run(self, name, launches_of):
        """All timesteps, by graphs where this loop is recorded. launches_of: makes what one timestep launches."""
        if not self.B:
            return
        if self.recorded and name not in self.graphs:
            self.graphs[name] = self._record(name, launches_of)
        graphs = self.graphs.get(name)
        if graphs is None:
            self._launch_steps(launches_of(None), self.T)
            return
        try:
            for graph in graphs:
                graph.launch()
        except BaseException:  # Ctrl-C among them: the next call begins at the first timestep again
            if self.steps_done is not None:
                self.steps_done.fill(0)
            raise

    def _record(self, name, launches_of):
        """The graphs of all timesteps, some of them the same one, or None where that fails."""
        whole, rest = divmod(self.T, _RECORDED)
        one = whole + (rest > 0) < 2
        if not one and self.steps_done is None:
            self.steps_done = self.ops.xp.zeros(1, np.int32)
            self._done(0)  # nothing is loaded for the first time under a capture
        launches = launches_of(None if one else self.steps_done)

        def steps(count):
            self._launch_steps(launches, count)
            if not one:
                self._done(count)

        try:
            graphs = [self.ops.device.record(lambda: steps(_RECORDED))] * whole if whole else []
            graphs += [self.ops.device.record(lambda: steps(rest))] if rest else []
        except BackendError as error:
            self.note(name, str(error))
            return None
        self.note(name, None)
        return graphs

    def _done(self, count):
        """So many more timesteps are done."""
        self.ops.kernels.launch("step.cu", "step_done", (), (1,), (1,), self.T, count, self.steps_done)

    @staticmethod
    def _launch_steps(launches, count):
        for step in range(count):
            for launch in launches:
                launch(step)

    def _bind(self, kernel, size, *args):
        """``Kernels.bind`` of a kernel of step.cu, whose EACH is the timestep."""
        types = (c_type(self.dtype),)
        if "project" not in kernel:
            types = (self.cell.kernel, *types)
        grid = (-(-size // _BLOCK[0]), -(-self.B // _BLOCK[1]), self.D)
        return self.ops.kernels.bind("step.cu", kernel, types, grid, _BLOCK, self.T, self.B, size, *args)

    def _product(self, a, b, out, accumulate=False):
        """A product that is the same in every timestep."""
        if self.D == 1:
            a, b, out = a[0], b[0], out[0]
        run = self.ops.device.product(a, b, out, accumulate, self.ops.tf32)
        return lambda step: run()

    def __str__(self):
        """The loop in a message: cell, sizes and dtype."""
        both = ", both directions" * (self.D == 2)
        return f"{self.cell.kernel} T {self.T}, B {self.B}, H {self.H}, {self.dtype}{both}"

    def _launch_block(self, which, *args):
        block = self.candidates[which]
        types = (self.cell.kernel, c_type(self.dtype), *block.types)
        file, kernel = f"{block.kernel}.cu", f"{block.kernel}_{which}"
        args, how = (self.T, self.B, self.H, *args), {"shared": block.shared}
        tiles = -(-self.B // block.rows)
        if block.schedule != "grid" or not tiles:
            grid = (tiles, 1, self.D)
            self.ops.kernels.launch(file, kernel, types, grid, (block.threads,), *args, **how)
            return
        # the blocks along y, of which there are two or more: CuPy shrinks a grid that is 1 along y and z in silence
        grid, how["cooperative"] = (self.D, block.blocks, block.groups), True
        exchange, numbers = self.ops.exchange(), self.D * block.groups * block.words
        with exchange.lock:  # no other launch comes between what prepares the exchange and the one that it is for
            if block.kernel == "grid":
                args += exchange.take(numbers, -(-tiles // block.groups) * self.T)
            else:
                args += exchange.empty(numbers)
            self.ops.kernels.launch(file, kernel, types, grid, (block.threads,), *args, **how)
            exchange.refresh()


class Exchange:
    """Where the blocks of schedule ``grid`` put numbers for one another, on one stream: kernels/schedules/exchange.cuh.

    lock: held from ``take`` or ``empty`` until the launch that they are for.
    """

    patience = 1 << 22  # polls of L2, at half a microsecond or more: some seconds

    def __init__(self, device):
        self.xp, self.lock = device.xp, threading.Lock()
        self.words, self.epoch = self.xp.zeros(0, np.uint64), 0
        self.ring = self.xp.zeros(0, np.uint32)
        self.failed = self.xp.zeros(1, np.int32)
        self.seen, self.refresh = device.mirror(self.failed)

    def take(self, numbers, epochs):
        """The last arguments of a kernel that needs so many words and epochs."""
        if self.words.size < numbers or self.epoch + epochs >= 1 << 32:
            self.words, self.epoch = self.xp.zeros(max(numbers, self.words.size), np.uint64), 0
        epoch, self.epoch = self.epoch, self.epoch + epochs
        return epoch, self.patience, self.words, self.failed

    def empty(self, numbers):
        """The last arguments of a kernel that needs so many words without numbers in them."""
        if self.ring.size < numbers:
            self.ring = self.xp.zeros(numbers, np.uint32)
        self.ring[:numbers] = 0xFFFFFFFF
        return self.patience, self.ring, self.failed

    def timed_out(self):
        """Whether a kernel is known to have given up; one under way may still."""
        return bool(self.seen[0])


class CudaStreams(Streams):
    """A stream for each layer. They begin when the current stream has come here, and it goes on when they are done.

    Memory returns to the stream it was taken on, which does not know who else still reads it: what one stream has
    written for another has to be held until the end.
    """

    def __init__(self, device, count):
        super().__init__(count)
        self.device, self.streams = device, device.streams(count)

    def __enter__(self):
        for stream in self.streams:
            self.device.wait(stream, None)
        return self

    def __exit__(self, *error):
        for stream in self.streams:
            self.device.wait(None, stream)

    @contextlib.contextmanager
    def on(self, stream, after=-1):
        if after >= 0:
            self.device.wait(self.streams[stream], self.streams[after])
        with self.streams[stream]:
            yield


class LoopPool:
    """Which loops are recorded. A shape that comes back gets a loop that is kept and recorded; others are dropped.

    A kept loop's arrays belong to one call at a time, from forward until nobody holds the call's ``Lease`` any more;
    calls that overlap get a loop each. capacity: how many loops are kept, bytes: how much memory in all; past either
    the longest unused is dropped. (Where a loop is large, launches cost little beside the work: no need to record.)
    """

    def __init__(self, capacity, bytes=1 << 30):
        self.capacity, self.bytes = capacity, bytes
        self.seen = OrderedDict()  # key -> None
        self.free = OrderedDict()  # loop number -> (key, loop), the longest unused first
        # (key, loop) that came back while the pool was at work: a lease may end at any moment, in any thread
        self.returned = deque()
        self._lock = threading.Lock()
        self.pooled = self.pooled_bytes = 0
        self.outcomes = OrderedDict()  # (schedules.Work, name) -> why it is not recorded, or None where it is

    def take(self, key, make):
        """``(loop, lease)``: a loop for this call. The lease is held by whoever uses the loop's arrays."""
        with self._lock:
            self._sort_in()
            number = next((number for number, (held, _) in self.free.items() if held == key), None)
            loop = None if number is None else self.free.pop(number)[1]
            again = key in self.seen
            self.seen[key] = None
            self.seen.move_to_end(key)
            if len(self.seen) > _REMEMBERED:
                self.seen.popitem(last=False)
        if loop is not None:
            return loop, self._lend(key, loop)
        loop = make()
        if not (again and self.capacity and loop.by_step):
            return loop, Lease(loop)
        with self._lock:
            self._sort_in()
            while not self._fits(loop) and self.free and loop.nbytes <= self.bytes:
                _, (_, dropped) = self.free.popitem(last=False)
                self._count(dropped, -1)
            fits = self._fits(loop)
            if fits:
                self._count(loop, 1)
            reason = (
                f"its arrays take {loop.nbytes / 1e6:.1f} MB; {self.pooled} loops with "
                f"{self.pooled_bytes / 1e6:.1f} MB are recorded and in use, "
                f"of {self.capacity} with {self.bytes / 1e6:.1f} MB at most"
            )
        if not fits:
            for name in loop.by_step:
                self.note(loop, name, reason)
            return loop, Lease(loop)
        loop.recorded, loop.note = True, functools.partial(self.note, loop)
        return loop, self._lend(key, loop)

    def clear(self):
        """Drop the loops that nobody uses."""
        with self._lock:
            self._sort_in()
            for _, loop in self.free.values():
                self._count(loop, -1)
            self.free.clear()

    def note(self, loop, name, reason):
        """Remember what became of a loop's recording, and say it once where it failed."""
        key = loop.problems[name.partition(" ")[0]], name
        with self._lock:
            known = self.outcomes.get(key) == reason
            self.outcomes[key] = reason
            self.outcomes.move_to_end(key)
            if len(self.outcomes) > _REMEMBERED:
                self.outcomes.popitem(last=False)
        if reason and not known:
            _log.warning("the time loop of %s, %s, runs launch by launch: %s", loop, name, reason)

    def refusal(self, problem):
        """Why a ``schedules.Problem`` by the schedule step is not recorded, or None where it is or will be."""
        if not self.capacity:
            return "nothing is recorded"
        with self._lock:
            return next((reason for (known, _), reason in self.outcomes.items() if known == problem and reason), None)

    def recordings(self):
        """As ``CudaOps.recordings``."""
        with self._lock:
            outcomes = list(self.outcomes.items())
        return [
            {"loop": str(problem), "pass": name, "recorded": reason is None, "reason": reason or ""}
            for (problem, name), reason in outcomes
        ]

    def _fits(self, loop):
        return self.pooled < self.capacity and self.pooled_bytes + loop.nbytes <= self.bytes

    def _count(self, loop, sign):
        self.pooled += sign
        self.pooled_bytes += sign * loop.nbytes

    def _lend(self, key, loop):
        lease = Lease(loop)
        weakref.finalize(lease, self._give_back, key, loop).atexit = False
        return lease

    def _give_back(self, key, loop):
        self.returned.append((key, loop))
        if self._lock.acquire(blocking=False):  # else whoever holds it, or the next one, sorts this in
            try:
                self._sort_in()
            finally:
                self._lock.release()

    def _sort_in(self):
        while self.returned:
            key, loop = self.returned.popleft()
            self.free[id(loop)] = (key, loop)


class Lease:
    """Holds a loop for as long as its arrays are in use."""

    def __init__(self, loop):
        self.loop = loop
