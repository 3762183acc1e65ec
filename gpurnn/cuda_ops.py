"""CudaOps: what a hand-written kernel makes faster than the generic code of ``Ops``.

The time loop runs by a schedule of schedules.py. ``step``: between two launches of a fused kernel (kernels/step.cu)
stands the GEMM with the recurrent weights, and nothing else; where a shape comes back, the whole loop is recorded as a
CUDA graph over fixed arrays and replayed, so that Python is out of it. ``block``, ``grid``: one launch walks all of
time (kernels/block.cu, block_mma.cu, grid.cu, grid_mma.cu). Both directions of a layer go in the same launches.

Everything that touches the GPU goes through a device: ``CupyDevice`` of _kernels.py, or under test an emulated one.
"""

import contextlib
import copy
import logging
import math
import weakref
from collections import OrderedDict
from dataclasses import replace

import numpy as np

from . import rng, schedules
from ._kernels import Kernels, Rows, signature
from .errors import BackendError
from .ops import Lanes, Ops, Walk, flat

TYPES = {"float32": "float", "float64": "double", "float16": "__half", "bfloat16": "__nv_bfloat16"}
CELLS = ("RnnTanh", "RnnRelu", "LstmCell", "GruCell", "GruOriginal")  # structs in kernels/cells
_BLOCK = (32, 4)  # units, sequences: a warp reads along the units
_REMEMBERED = 256  # shapes whose calls are counted
_log = logging.getLogger("gpurnn")


def kernel_names(dtypes=tuple(TYPES), cells=CELLS):
    """(file, name expression) of every kernel that layers of these dtypes and cells use."""
    storages = [TYPES[dtype] for dtype in dtypes]
    reals = sorted({"double" if storage == "double" else "float" for storage in storages})
    names = []
    for storage in storages:
        names += [("step.cu", f"step_{way}<{cell}, {storage}>") for cell in cells for way in ("forward", "backward")]
        if "GruOriginal" in cells:
            names += [("step.cu", f"step_{way}<GruOriginal, {storage}>") for way in ("reset", "reset_backward")]
        if "LstmCell" in cells:
            names += [("step.cu", f"step_{way}<{storage}>") for way in ("project", "project_backward")]
        names += [("bptt.cu", f"sum_steps_partial<{storage}>"), ("embedding.cu", f"embedding_chunks<{storage}>")]
    for real in reals:
        names += [("bptt.cu", f"sum_steps_finish<{real}>"), ("embedding.cu", f"embedding_borders<{real}>")]
        names += [("loss.cu", f"cross_entropy_{way}<{real}>") for way in ("forward", "backward")]
        kernels = ("sgd", "rmsprop", "adam", "norm_partial", "scale_grads")
        names += [("optimise.cu", f"{kernel}<{real}>") for kernel in kernels]
    return [*names, ("optimise.cu", "norm_finish"), ("dropout.cu", "keep_mask")]


def way_name(work, way):
    """(file, name expression) of the kernel of a ``schedules.Way``; None for ``step``, whose kernels fit every size."""
    if way.schedule == "step":
        return None
    way_back = "backward" if work.backward else "forward"
    types = ", ".join((work.kernel, TYPES[work.dtype], *way.types))
    return f"{way.kernel}.cu", f"{way.kernel}_{way_back}<{types}>"


class CudaOps(Ops):
    """The primitives with kernels. graphs: how many recorded loops may be held at once; 0 records none. measured: a
    ``tuning.Table`` of this device, or None."""

    def __init__(self, device, graphs=16, measured=None):
        super().__init__(device.xp, "cuda")
        self.device = device
        self.kernels = Kernels(device)
        self.pool = LoopPool(graphs)
        self.measured = measured
        self.exchanges = {}  # stream -> Exchange
        self._with_tf32 = None

    def with_tf32(self):
        if self.tf32:
            return self
        if self._with_tf32 is None:
            self._with_tf32 = copy.copy(self)  # the device, its kernels and the pool of loops are shared
            self._with_tf32.tf32 = True
        return self._with_tf32

    def synchronize(self):
        self.device.synchronize()
        self.listen()

    def to_numpy(self, array):
        host = super().to_numpy(array)
        self.listen()
        return host

    def refuse_cooperation(self):
        """From now on no schedule is chosen whose blocks wait for one another."""
        self.device.limits = replace(self.device.limits, cooperative=False)

    def exchange(self):
        """The ``Exchange`` of the current stream."""
        stream = self.device.stream
        if stream not in self.exchanges:
            self.exchanges[stream] = Exchange(self.device)
        return self.exchanges[stream]

    def listen(self):
        """Raise BackendError where a schedule ``grid`` has given up; from then on layers take another."""
        if any(exchange.gave_up() for exchange in self.exchanges.values()):
            self.exchanges.clear()
            self.refuse_cooperation()
            raise BackendError(
                "schedule grid: a thread block waited in vain for the others, results since the last check are wrong. "
                "Other work on this GPU may have kept them out; layers take another schedule from now on: run again"
            )

    def schedule(self, work, wanted="auto"):
        way, reason = self.choose(work, wanted)
        if way.schedule == "step":
            launches = "recorded as a CUDA graph when a shape comes back" if self.pool.capacity else "launch by launch"
            return "step", f"a fused kernel and a cuBLAS product for each timestep, {launches}; {reason}"
        return way.schedule, f"one launch for the whole sequence: {reason}"

    def choose(self, work, wanted="auto"):
        """``schedules.choose`` on this device."""
        return schedules.choose(replace(work, tf32=self.tf32), self.device.limits, wanted, self.measured)

    # ---- one layer through time

    def lanes(self, count):
        return StreamLanes(self.device, count) if count > 1 else super().lanes(count)

    def layer_forward(self, cell, x, weights, states, lengths, directions, keep, own, schedule="auto", share=1):
        T, B, I = x.shape
        rows, P = weights[0].hh.shape
        H, D = rows // cell.gates, len(weights)
        key = (cell.kernel, T, B, I, H, P, directions, x.dtype.name, keep, lengths is not None,
               weights[0].bias_ih is None, schedule, share, self.tf32)  # fmt: skip
        # Work on another stream may still be under way on a loop that was given back there.
        loop, lease = self.pool.take((*key, self.device.stream), lambda: Loop(self, cell, *key[1:-1]))
        loop.load(weights, lengths)
        x = self.xp.ascontiguousarray(x)
        if loop.inputs:
            loop.take(x)
        else:
            for d in range(D):
                self.product(flat(x), weights[d].ih.astype(x.dtype, copy=False).T, flat(loop.gates[d])[:, :rows])
        loop.start(states)
        loop.forward()
        walks = [Walk(x, loop.gates[d] if keep else None, loop.h[d], loop.c_slots(d), lease) for d in range(D)]
        output = loop.output.copy() if own and loop.recorded else loop.output
        return walks, loop.final(), output

    def layer_backward(self, cell, walks, weights, doutput, dstates, lengths, directions, sees):
        if any(sees):  # somebody watches dh and dc at every step: only the generic walk shows them
            return super().layer_backward(cell, walks, weights, doutput, dstates, lengths, directions, sees)
        return walks[0].lease.loop.backward(doutput, dstates)  # with the weights that the way there has taken

    # ---- products and sums

    def product(self, a, b, out, accumulate=False):
        self.device.gemm(a, b, out, accumulate=accumulate, tf32=self.tf32)

    def accumulate_product(self, grad, d, x):
        self.device.gemm(flat(d).T, flat(x), grad, accumulate=True, tf32=self.tf32)

    def sum_steps(self, d):
        rows = flat(d)
        N, M = rows.shape
        kind = TYPES[d.dtype.name]
        real = np.dtype("float64" if kind == "double" else "float32")
        if N == 0:
            return self.xp.zeros(M, real)
        chunks = min(-(-N // 256), 256)  # by N alone: equal bits on every GPU
        partial, sums = self.xp.empty((chunks, M), np.float64), self.xp.empty(M, real)
        ld = rows.strides[0] // rows.itemsize if N > 1 else M
        self.kernels.launch(
            "bptt.cu", "sum_steps_partial", (kind,), (-(-M // 32), chunks), (32, 8), N, M, ld, Rows(rows), partial
        )
        real_type = TYPES[real.name]
        self.kernels.launch(
            "bptt.cu", "sum_steps_finish", (real_type,), (-(-M // 128),), (128,), chunks, M, partial, sums
        )
        return sums

    def accumulate_rows(self, grad, index, d):
        N, H = d.shape
        if N == 0:
            return
        order = self.xp.argsort(index, kind="stable").astype(np.int64, copy=False)
        ids = index[order].astype(np.int64, copy=False)
        d = self.xp.ascontiguousarray(d)
        chunks, kind = -(-N // 64), TYPES[d.dtype.name]
        partial = self.xp.empty((chunks, 2, H), np.float64)
        grid, block = (chunks, -(-H // 32)), (32,)
        self.kernels.launch(
            "embedding.cu", "embedding_chunks", (kind,), grid, block, N, H, ids, order, d, partial, grad
        )
        real = TYPES[grad.dtype.name]
        self.kernels.launch("embedding.cu", "embedding_borders", (real,), grid, block, N, H, ids, partial, grad)

    # ---- softmax cross-entropy

    def softmax_forward(self, logits, rows, labels, smoothing):
        count, V = labels.size, logits.shape[1]
        losses, total = self.xp.empty(count, np.float64), self.xp.empty(count, np.float64)
        highest = self.xp.empty(count, logits.dtype)
        args = V, smoothing, self.xp.ascontiguousarray(logits), rows, labels, losses, highest, total
        self.kernels.launch("loss.cu", "cross_entropy_forward", (TYPES[logits.dtype.name],), (count,), (128,), *args)
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
        self.kernels.launch("loss.cu", "cross_entropy_backward", (TYPES[logits.dtype.name],), grid, (128,), *args)
        return dlogits

    # ---- what follows the gradients

    def optimise(self, kernel, params, grads, arrays, scalars):
        kind, N = TYPES[params.dtype.name], params.size
        given = scalars | arrays | {"N": N, "params": params, "grads": grads}
        args = [given.get(argument.name) for argument in signature("optimise.cu", kernel, (kind,))]
        self.kernels.launch("optimise.cu", kernel, (kind,), (-(-N // 256),), (256,), *args)
        return True

    def clip_norm(self, grads, max_norm):
        kind, N = TYPES[grads.dtype.name], grads.size
        chunks = max(1, min(-(-N // 4096), 1024))  # by N alone: equal bits on every GPU
        partial, norm = self.xp.empty(chunks, np.float64), self.xp.empty(2, np.float64)
        self.kernels.launch("optimise.cu", "norm_partial", (kind,), (chunks,), (256,), N, grads, partial)
        self.kernels.launch("optimise.cu", "norm_finish", (), (1,), (256,), chunks, max_norm, partial, norm)
        if max_norm != math.inf:
            self.kernels.launch("optimise.cu", "scale_grads", (kind,), (-(-N // 256),), (256,), N, norm, grads)
        return norm[0]

    # ---- random masks

    def keep_mask(self, shape, rate, seed, layer, call):
        N = math.prod(shape)
        keep = self.xp.empty(N, np.bool_)
        threshold = rng.keep_threshold(rate)
        self.kernels.launch(
            "dropout.cu", "keep_mask", (), (-(-N // 512),), (128,), N, seed, layer & 0xFFFFFFFF, call & 0xFFFFFFFF,
            threshold, keep,
        )  # fmt: skip
        return keep.reshape(shape)


class Loop:
    """The walk through time of one layer: its arrays and its launches, for one shape and one set of options.

    ``forward`` and ``backward`` run launch by launch, or replay what ``LoopPool`` has had recorded.
    """

    def __init__(self, ops, cell, T, B, I, H, P, directions, dtype, keep, ragged, unbiased, schedule, share=1):
        xp = ops.xp
        self.ops, self.cell, self.directions, self.keep = ops, cell, directions, keep
        self.T, self.B, self.H, self.P, self.D = T, B, H, P, len(directions)
        D, G = self.D, cell.gates
        self.projected, self.original = P != H, cell.kernel == "GruOriginal"
        self.dtype = np.dtype(dtype)
        self.real = np.dtype("float64" if dtype == "float64" else "float32")
        self.width = cell.kept if keep or self.original else G
        self.reverse = sum(reverse << d for d, reverse in enumerate(directions))
        self.graphs = {}
        self.recorded = False
        self.ways = {}  # "forward", "backward" -> schedules.Way
        for backward in (False, True) if keep else (False,):
            work = schedules.Work(cell.kernel, G, H, T, B, D, str(dtype), self.projected, backward, I=I, share=share)
            self.ways["backward" if backward else "forward"], _ = ops.choose(work, schedule)
        # for W_ih x, and for what the cell keeps
        self.gates = xp.empty((D, T, B, self.width * H), self.dtype) if keep or not self.inputs else None
        self.h = xp.empty((D, T + 1, B, P), self.dtype)
        self.c = xp.empty((D, T + 1 if keep else 2, B, H), self.real) if cell.states == 2 else None
        self.output = xp.empty((T, B, D * P), self.dtype)
        self.nbytes = self.h.nbytes + 2 * self.output.nbytes  # with doutput
        self.nbytes += sum(array.nbytes for array in (self.gates, self.c) if array is not None)
        self.products = [(slice(None), xp.empty((D, B, G * H), self.real))]  # rows of W_hh, and W h of these rows
        if self.original:
            self.products = [
                (slice(0, 2 * H), xp.empty((D, B, 2 * H), self.real)),
                (slice(2 * H, None), xp.empty((D, B, 3 * H), self.real)),  # the last third, as a cell sees it
            ]
        self.m = xp.empty((D, B, H), self.dtype) if self.projected else None
        self.lengths = self.order = None
        if ragged:  # order: the longest first, so that the sequences of a block end together
            self.lengths, self.order = xp.empty(B, np.int32), xp.empty(B, np.int32)
        self.biased = not unbiased
        self.hh = self.hr = self.ih = self.x = self.bias_ih = self.bias_hh = None
        self.doutput = self.received = self.dh = None  # made by the first backward

    @property
    def inputs(self):
        """Columns of W_ih whose products the walk makes itself; 0: ``gates`` holds W_ih x when it begins."""
        return self.ways["forward"].inputs

    # ---- what a call brings

    def take(self, x):
        """x (T, B, I) for a walk that multiplies it itself."""
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
                setattr(self, name, given[0][None])
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
                self.c[d, first if self.keep else 0] = state[1]

    def final(self):
        """For each direction its final state."""
        finals = []
        for d, reverse in enumerate(self.directions):
            last = 0 if reverse else self.T
            final = (self.h[d, last].copy(),)
            if self.c is not None:
                final += (self.c[d, last if self.keep else self.T % 2].astype(self.dtype),)
            finals.append(final)
        return finals

    def c_slots(self, d):
        return self.c[d] if self.keep and self.c is not None else None

    # ---- forward

    @property
    def launches(self):
        """Whether there are so many launches that recording them pays."""
        return any(way.schedule == "step" for way in self.ways.values())

    def forward(self):
        self._run("forward", getattr(self, f"_forward_{self.ways['forward'].schedule}"))

    def _forward_grid(self):
        self._or_by_step(self._forward_block, self._forward_step)

    def _backward_grid(self):
        self._or_by_step(self._backward_block, self._backward_step)

    def _or_by_step(self, launch, steps):
        """A launch of all blocks at once, or where the device refuses that, the schedule step now and ever after."""
        self.ops.listen()
        try:
            launch()
        except BackendError as error:
            _log.warning("schedule grid is left alone: %s", str(error))
            self.ops.refuse_cooperation()
            steps()

    def _forward_block(self):
        how = self.width, self.reverse, int(self.keep), self.lengths, self.order, self.hh, self.bias_ih, self.bias_hh
        if self.ways["forward"].schedule == "block":
            how = self.ih.shape[-1] if self.inputs else 0, *how, self.ih if self.inputs else None, self.x
        self._launch_block("forward", *how, self.gates, self.h, self.c, self.output)

    def _forward_step(self):
        for s in range(self.T):
            h_old = self._slots(self.h, s, 0)
            if self.original:
                self._gemm(h_old, self._rows(0, transposed=True), self.products[0][1])
                self._launch("step_reset", self.H, self.width, s, self.reverse, self.lengths, self.bias_ih,
                             self.bias_hh, self.products[0][1], self.gates, self.h)  # fmt: skip
                p = self._steps(self.gates, s)[..., 3 * self.H :]
                self._gemm(p, self._rows(1, transposed=True), self.products[1][1][..., 2 * self.H :])
            else:
                self._gemm(h_old, self._rows(0, transposed=True), self.products[0][1])
            self._launch(
                "step_forward", self.H, self.width, s, self.reverse, int(self.keep), self.lengths, self.bias_ih,
                self.bias_hh, self.products[-1][1], self.gates, None if self.projected else self.h, self.c, self.m,
                None if self.projected else self.output,
            )  # fmt: skip
            if self.projected:
                self._gemm(self.m, self.hr.swapaxes(1, 2), self._slots(self.h, s, 1))
                self._launch("step_project", self.P, s, self.reverse, self.lengths, self.h, self.output)

    # ---- backward

    def backward(self, doutput, dstates):
        """As ``Ops.layer_backward``."""
        xp, D, T, B, H, P = self.ops.xp, self.D, self.T, self.B, self.H, self.P
        if self.dh is None:
            self.dh = xp.empty((D, B, P), self.real)
            self.dc = xp.empty((D, B, H), self.real) if self.cell.states == 2 else None
            self.by_inner = xp.empty((D, B, H), self.real) if self.projected or self.original else None  # dm, d_p
            self.dh_steps = xp.empty((D, T, B, P), self.dtype) if self.projected else None
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
            self.doutput = xp.ascontiguousarray(doutput)
        steps = getattr(self, f"_backward_{self.ways['backward'].schedule}")
        self._run("backward" if doutput is not None else "backward of the state", steps)
        self.doutput = None
        done = []
        for d in range(D):
            dstate = (self.dh[d].astype(self.dtype),)
            if self.dc is not None:
                dstate += (self.dc[d].astype(self.dtype),)
            done.append((dstate, None if self.dh_steps is None else self.dh_steps[d]))
        return done

    def _backward_block(self):
        self._launch_block(
            "backward", self.width, self.reverse, self.lengths, self.order, self.hh, self.gates, self.h, self.c,
            self.doutput, self.dh, self.dc,
        )  # fmt: skip

    def _backward_step(self):
        H, rows = self.H, self.cell.gates * self.H
        for s in reversed(range(self.T)):
            gates = self._steps(self.gates, s)
            if self.projected:
                self._launch("step_project_backward", self.P, s, self.reverse, self.lengths, self.doutput, self.dh,
                             self.dh_steps)  # fmt: skip
                self._gemm(self._steps(self.dh_steps, s), self.hr, self.by_inner)
            self._launch(
                "step_backward", H, self.width, s, self.reverse, self.lengths, self.gates,
                None if self.projected else self.h, self.c, None if self.projected else self.doutput,
                self.by_inner if self.projected else None, None if self.projected else self.dh, self.dc,
            )  # fmt: skip
            if self.original:
                self._gemm(gates[..., 2 * H : rows], self._rows(1), self.by_inner)
                self._launch("step_reset_backward", H, self.width, s, self.reverse, self.gates, self.h, self.by_inner,
                             self.dh)  # fmt: skip
                self._gemm(gates[..., : 2 * H], self._rows(0), self.dh, accumulate=True)
            else:
                self._gemm(gates[..., :rows], self._rows(0), self.dh, accumulate=True)

    # ---- launches

    def _run(self, name, steps):
        if not self.recorded:
            steps()
            return
        if name not in self.graphs:
            try:
                self.graphs[name] = self.ops.device.record(steps)
            except BackendError as error:
                _log.warning("time loops run launch by launch: %s", str(error))
                self.ops.pool.capacity = 0
                self.recorded = False
                steps()
                return
        self.graphs[name].launch()

    def _launch(self, kernel, size, *args):
        if not self.B:
            return
        types = (TYPES[self.dtype.name],)
        if "project" not in kernel:
            types = (self.cell.kernel, *types)
        grid = (-(-size // _BLOCK[0]), -(-self.B // _BLOCK[1]), self.D)
        self.ops.kernels.launch("step.cu", kernel, types, grid, _BLOCK, self.T, self.B, size, *args)

    def _launch_block(self, way, *args):
        block = self.ways[way]
        types = (self.cell.kernel, TYPES[self.dtype.name], *block.types)
        file, kernel = f"{block.kernel}.cu", f"{block.kernel}_{way}"
        args, how = (self.T, self.B, self.H, *args), {"shared": block.shared}
        tiles = -(-self.B // block.rows)
        grid = (tiles, 1, self.D)
        exchange = None
        if block.schedule == "grid" and tiles:
            grid, how["cooperative"] = (block.blocks, block.groups, self.D), True
            exchange = self.ops.exchange()
            numbers = self.D * block.groups * block.words
            if block.kernel == "grid":
                args += exchange.take(numbers, -(-tiles // block.groups) * self.T)
            else:
                args += exchange.empty(numbers)
        self.ops.kernels.launch(file, kernel, types, grid, (block.threads,), *args, **how)
        if exchange:
            exchange.refresh()

    def _gemm(self, a, b, out, accumulate=False):
        if self.D == 1:
            a, b, out = a[0], b[0], out[0]
        self.ops.device.gemm(a, b, out, accumulate=accumulate, tf32=self.ops.tf32)

    def _rows(self, product, transposed=False):
        """The rows of W_hh in the first or second product of a step, (D, rows, P)."""
        hh = self.hh[:, self.products[product][0]]
        return hh.swapaxes(1, 2) if transposed else hh

    def _steps(self, array, s):
        """(D, T, B, F) -> (D, B, F): for each direction the step at which it is, step s of its walk."""
        return self._pick(array, [self.T - 1 - s if reverse else s for reverse in self.directions])

    def _slots(self, array, s, new):
        """(D, T+1, B, F) -> (D, B, F): for each direction the slot it reads (new = 0) or writes (1)."""
        return self._pick(array, [self.T - s - new if reverse else s + new for reverse in self.directions])

    def _pick(self, array, places):
        """One place of each direction as one strided view: the second direction's lies behind the first's."""
        _, count, B, F = array.shape
        places = [d * count + place for d, place in enumerate(places)]
        step = places[-1] - places[0] if self.D == 2 else 1
        return array.reshape(self.D * count, B, F)[places[0] : places[-1] + 1 : step]


class Exchange:
    """Where the blocks of schedule ``grid`` put numbers for one another, on one stream: kernels/exchange.cuh."""

    patience = 1 << 22  # polls of L2, at half a microsecond or more: some seconds

    def __init__(self, device):
        self.xp = device.xp
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

    def gave_up(self):
        """Whether a kernel is known to have given up; one under way may still."""
        return bool(self.seen[0])


class StreamLanes(Lanes):
    """A stream for each layer. They begin when the current stream has come here, and it goes on when they are done.

    Memory returns to the stream it was taken on, which does not know who else still reads it: what one lane has written
    for another has to be held until the end.
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
    def on(self, lane, after=-1):
        if after >= 0:
            self.device.wait(self.streams[lane], self.streams[after])
        with self.streams[lane]:
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
        self.kept = self.kept_bytes = 0

    def take(self, key, make):
        """``(loop, lease)``: a loop for this call. The lease is held by whoever uses the loop's arrays."""
        for number, (held, loop) in list(self.free.items()):  # a copy: a lease may end at any moment
            if held == key and self.free.pop(number, None):
                return loop, self._lend(key, loop)
        again = key in self.seen
        self.seen[key] = None
        self.seen.move_to_end(key)
        if len(self.seen) > _REMEMBERED:
            self.seen.popitem(last=False)
        loop = make()
        if again and self.capacity and loop.launches and loop.nbytes <= self.bytes:
            while not self._fits(loop) and self.free:
                _, (_, dropped) = self.free.popitem(last=False)
                self._count(dropped, -1)
            if self._fits(loop):
                self._count(loop, 1)
                loop.recorded = True
                return loop, self._lend(key, loop)
        return loop, Lease(loop)

    def _fits(self, loop):
        return self.kept < self.capacity and self.kept_bytes + loop.nbytes <= self.bytes

    def _count(self, loop, sign):
        self.kept += sign
        self.kept_bytes += sign * loop.nbytes

    def _lend(self, key, loop):
        lease = Lease(loop)
        weakref.finalize(lease, self._give_back, key, loop).atexit = False
        return lease

    def _give_back(self, key, loop):
        if loop.recorded:
            self.free[id(loop)] = (key, loop)
        else:
            self._count(loop, -1)


class Lease:
    """Holds a loop for as long as its arrays are in use."""

    def __init__(self, loop):
        self.loop = loop
