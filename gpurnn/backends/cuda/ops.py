"""CudaOps: what a hand-written kernel makes faster than the generic code of ``Ops``.

The time loop runs by one of the schedules of schedules/. ``step`` launches a fused kernel (step.cu) and a GEMM with the
recurrent weights for each timestep, and nothing else. Where a shape comes back, the loop is recorded over fixed arrays
as CUDA graphs of up to 64 timesteps and replayed without Python. ``block`` and ``grid`` run the whole time loop in one
launch (block.cu, block_mma.cu, grid.cu, grid_mma.cu). Both directions of a layer share the launches.

Everything that touches the GPU goes through a device: ``CupyDevice`` of device.py, or in tests an emulated one.
"""

import math
import threading
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from ... import rng
from ...cells import Weights
from ...errors import BackendError, ShapeError
from ..ops import UPDATE_STATES, Ops, refuse_uncountable
from ..rebuild import passes_of
from ..records import SavedLayer
from ..streams import ONE_STREAM
from . import schedules
from .cublas import is_matrix
from .exchange import Exchange
from .fused import FusedPass
from .graphs import Lease, LoopPool
from .launch import ALIGNMENT, BY_STEP, Kernels, c_type, kernel_of, signature
from .loop import Loop
from .loop_plan import BLOCK, LoopPlan, LoopShape
from .recording import UpdateGraphs, numbers_of
from .streams import CudaStreams
from .sums import BLOCKS, Sums

_PLANS = 1024  # most shapes whose plans are remembered


class Chosen(NamedTuple):
    """Of "forward" and, where it will follow, "backward": the ``schedules.Problem``, and the candidate for it."""

    problems: dict
    candidates: dict


def array_code(cell, strands):
    """Why the kernels cannot serve a cell, so that it runs as array code over CuPy; None where they can. strands: of a
    layer, its directions times its heads."""
    if strands > 32:
        return "kernels know the directions of 32 heads at most"  # by the bits of a word
    if cell.array_only:
        return f"the cell {cell.name} is array code on every backend, because {cell.array_only}"
    inner = {product.reads for product in cell.products} - {"h"}
    return "the cell has more than two products in a timestep" if len(inner) > 1 else None


class CudaOps(Sums, Ops):
    """The primitives with kernels.

    graphs: most recorded loops at once; 0 records none. measured: a ``tuned_table.Table`` of this device, or None.
    """

    def __init__(self, device, graphs=16, measured=None):
        super().__init__(device.xp, "cuda")
        self.device = device
        self.kernels = Kernels(device)
        self.pool = LoopPool(graphs)
        self.measured = measured
        self.exchanges = {}  # queue of the device -> Exchange
        self._lock = threading.Lock()
        self._chosen = {}  # what decides the candidates of a loop -> (problems, candidates)
        self._plans = {}  # (``Cell``, ``LoopShape``, precision) -> LoopPlan
        self._others = {}  # precision -> ``CudaOps``

    def with_precision(self, precision):
        if precision != self.precision and precision not in self._others:
            other = self._others[precision] = object.__new__(type(self))  # device, kernels, pool of loops are shared
            other.__dict__.update(self.__dict__, precision=precision, tf32=precision == "tf32")
        return self if precision == self.precision else self._others[precision]

    def _as_multiplied(self, problem, **more):
        """A ``Problem`` with the precision of these operations."""
        return replace(problem, tf32=self.tf32, fma=self.precision == "fma", **more)

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

    def disable(self, *names):
        """Choose these schedules, where thread blocks wait for one another, no more: "grid", "cluster", "fused"."""
        fields = {"grid": "cooperative", "cluster": "clusters", "fused": "clusters"}
        self.device.limits = replace(self.device.limits, **{fields[name]: False for name in names})

    def exchange(self):
        """The ``Exchange`` of the current stream."""
        queue = self.device.queue
        with self._lock:
            if queue not in self.exchanges:
                self.exchanges[queue] = Exchange(self.device, self.kernels)
            return self.exchanges[queue]

    def raise_if_failed(self):
        """Raise BackendError where schedule ``grid`` or ``cluster`` timed out, and disable both from then on."""
        with self._lock:
            timed_out = any(exchange.timed_out() for exchange in self.exchanges.values())
            if timed_out:
                self.exchanges.clear()
        if timed_out:
            self.disable("grid", "cluster")
            raise BackendError(
                "schedule 'grid' or 'cluster' timed out waiting for another thread block, so results since the last "
                "synchronisation are invalid. Another process may be using this GPU. Both are now disabled in this "
                "process: run the call again"
            )

    def schedule(self, problem, wanted="auto"):
        reason = array_code(problem.cell, problem.directions)
        if reason:
            return "array code", f"one timestep after another over CuPy: {reason}"
        candidate, reason = self.choose(problem, wanted)
        if candidate.schedule in BY_STEP:
            refused = self.pool.refusal(self._as_multiplied(problem))
            launches = f"launch by launch: {refused}" if refused else "recorded as a CUDA graph when a shape comes back"
            work = "one launch" if candidate.schedule == "fused" else "a fused kernel and a cuBLAS product"
            return candidate.schedule, f"{work} for each timestep, {launches}; {reason}"
        return candidate.schedule, f"one launch for the whole sequence: {reason}"

    def packed_bytes(self, problem, P, T, wanted="auto"):
        candidate = None if array_code(problem.cell, problem.directions) else self.choose(problem, wanted)[0]
        return FusedPass.nbytes(candidate, problem) if candidate and candidate.schedule == "fused" else 0

    def recordings(self):
        """Which time loops, and which updates of ``fit``, became CUDA graphs, and why others did not.

        Returns a list of dictionaries with "loop", "pass", "recorded" and "reason".
        """
        return self.pool.recordings()

    def update_graphs(self, rows, width):
        return UpdateGraphs(self, rows, width) if self.pool.capacity else None

    def note_update(self, name, reason):
        """Store for ``recordings`` whether an update of ``fit`` was recorded: None, or why not."""
        self.pool.outcomes[name, "update"] = reason

    def bounded(self, values, stop):
        recording = self.device.recording
        return super().bounded(values, stop) if recording is None else recording.bounded(values, stop)

    def aligned(self, array):
        """``array``, C-contiguous and where kernels may load several numbers at once: itself, or a copy."""
        array = self.xp.ascontiguousarray(array)
        return array.copy() if self.device.address(array) % ALIGNMENT else array

    def choose(self, problem, wanted="auto"):
        """``schedules.choose`` on this device."""
        return schedules.choose(self._as_multiplied(problem), self.device.limits, wanted, self.measured)

    def candidates(self, problem, save, schedule):
        """The ``Chosen`` of a loop: its problems, and the candidates that were chosen for them.

        problem: that of the forward pass, without a precision. save: whether there is a backward pass, too.
        """
        key, known = (problem, save, schedule, self.precision), (self.device.limits, self.measured)
        if any(old is not new for old, new in zip(self._chosen.get("known", ()), known, strict=False)):
            self._chosen.clear()  # another device, or more was measured
        found = self._chosen.get(key)
        if found is None:
            if len(self._chosen) >= 4096:
                self._chosen.clear()
            self._chosen["known"] = known
            problems = {
                name: self._as_multiplied(problem, backward=name == "backward")
                for name in (("forward", "backward") if save else ("forward",))
            }
            chosen = {name: self.candidate(one, schedule) for name, one in problems.items()}
            found = self._chosen[key] = Chosen(problems, chosen)
        return found

    def candidate(self, problem, wanted="auto"):
        """What ``choose`` finds, with fewer weights in registers where the compiler at hand would spill."""
        return self.without_spills(problem, self.choose(problem, wanted)[0])

    def without_spills(self, problem, candidate):
        """``candidate`` with as many weights in registers as compile without spills."""
        less = candidate
        while less is not None and less.schedule != "step":
            spilled = self.device.spills(*kernel_of(problem, less))
            if not spilled:
                break
            less = schedules.hold_less(problem, less, self.device.limits, spilled)
        return less or candidate

    # ---- one layer through time

    def refuse_sizes(self, T, B, layers):
        refuse_uncountable(T, B, self.name)
        most = BLOCKS * BLOCK[1]
        if most < B and any(
            candidate.schedule in BY_STEP
            for problem, save, schedule in layers()
            for candidate in self.candidates(problem, save, schedule).candidates.values()
        ):
            raise ShapeError(
                f"x: B = {B} is more than the {most} sequences that the schedule 'step' of backend 'cuda' takes in one "
                "call: split the batch"
            )

    def loop_plan(self, cell, shape):
        """The ``LoopPlan`` of a cell and a ``LoopShape``, which is made once."""
        key = cell, shape, self.precision
        plan = self._plans.get(key)
        if plan is None or plan.limits is not self.device.limits or plan.measured is not self.measured:
            plan = LoopPlan(self, cell, shape)
            if len(self._plans) >= _PLANS:
                self._plans.clear()
            self._plans[key] = plan
        return plan

    def stacked(self, weights):
        """The ``Weights`` of a single direction with an axis for it, as kernels read them.

        They are views, which are made once, unless BLAS or a kernel could not read the array itself.
        """
        if weights.ready is None:
            names = ("ih", "hh", "bias_ih", "bias_hh", "hr")
            arrays = [getattr(weights, name) for name in names]
            found = [None if array is None else self.aligned(array[None]) for array in arrays]
            stacked, address = Weights(*found), self.device.address
            if any(
                one is not None and address(one) != address(array) for one, array in zip(found, arrays, strict=True)
            ):
                return stacked  # a copy holds only for this call
            weights.ready = stacked
        return weights.ready

    def streams(self, count):
        return ONE_STREAM if count == 1 else CudaStreams(self.device, count)

    def layer_forward(self, cell, x, weights, states, lengths, options):
        if reason := array_code(cell, len(options.directions)):
            if self.device.recording is not None:
                raise BackendError(f"a layer runs one timestep after another over CuPy: {reason}")
            return super().layer_forward(cell, x, weights, states, lengths, options)
        loop, lease = self._loop(cell, x, weights, lengths, options)
        x, rows = self.xp.ascontiguousarray(x), len(weights[0].ih)
        if loop.inputs:
            loop.take(x)
        else:
            for w, gates in zip(weights, loop.gates, strict=True):
                self.multiply_inputs(w.read(x), w.ih, gates[:, :, :rows])
        loop.start(states)
        loop.forward()
        output = loop.output.copy() if options.fresh_output and loop.recorded else loop.output
        return SavedLayer(cell, weights, x, lengths, loop.saved(), lease), loop.final(), output

    def _loop(self, cell, x, weights, lengths, options):
        """The ``Loop`` of a call, with what it reads besides x and states, and its ``Lease``."""
        T, B, I = x.shape if weights[0].reads is None else (*x.shape[:2], 0)  # 0: multiplied before the loop
        H, hh = len(weights[0].ih) // len(cell.gates), weights[0].hh
        shape = LoopShape(
            T, B, I, H, H if hh is None else hh.shape[1], x.dtype, options.directions, options.save,
            lengths is not None, weights[0].bias_ih is not None, "step" if options.flat else options.schedule,
            options.concurrent, options.marks is not None,
        )  # fmt: skip
        plan = self.loop_plan(cell, shape)
        if self.device.recording is not None and plan.by_step:
            self.device.recording.count_steps(T)  # a graph of a whole update holds every launch of its loops
        if plan.by_step and not options.flat and self.device.recording is None:
            # A loop that another stream gave back may still be in use there, so the stream belongs to the key.
            loop, lease = self.pool.take((plan, self.device.queue), lambda: Loop(self, plan))
        else:  # nothing to record
            loop = Loop(self, plan)
            lease = Lease(loop)
        loop.load(weights, lengths, options.masks, options.marks)
        return loop, lease

    def all_states(self, saved):
        states = super().all_states(saved)
        if saved.lease is None or not saved.lease.loop.recorded:
            return states
        return [tuple(part.copy() for part in parts) for parts in states]  # other calls get the arrays of this loop

    def layer_rebuild(self, cell, x, weights, states, lengths, options):
        if array_code(cell, len(options.directions)):
            return super().layer_rebuild(cell, x, weights, states, lengths, options)
        loop, lease = self._loop(cell, x, weights, lengths, options)
        loop.set_states(states)
        passes = passes_of(states, options)
        for part, gates in self.rebuilt_gates(cell, x, weights, passes, lengths):
            for d, steps in enumerate(gates):
                loop.gates[d, part] = steps
        saved = SavedLayer(cell, weights, self.xp.ascontiguousarray(x), lengths, loop.saved(), lease)
        return saved, None, self.output_of(passes, None, fresh=False)

    def time_loop_backward(self, saved, doutput, dstates, hooks):
        if hooks is not None or saved.lease is None:  # only the array code calls hooks
            return super().time_loop_backward(saved, doutput, dstates, hooks)
        later = [one.dreset for one in saved.passes]
        return saved.lease.loop.backward(doutput, dstates, later)  # uses the weights that the forward pass loaded

    # ---- products

    def product(self, a, b, out, accumulate=False):
        a = a if is_matrix(a) else self.xp.ascontiguousarray(a)
        b = b if is_matrix(b) else self.xp.ascontiguousarray(b)
        self.device.gemm(a, b, out, accumulate, self.tf32)

    # ---- updates and norms

    def optimize(self, kernel, params, grads, arrays, scalars, array_code):
        recording = self.device.recording
        if kernel not in UPDATE_STATES:
            if recording is not None:
                raise BackendError("the optimizer's update is array code, whose numbers a graph would freeze")
            super().optimize(kernel, params, grads, arrays, scalars, array_code)
            return
        kind, N = c_type(params.dtype), params.size
        by, go = numbers_of(kernel, scalars, params.dtype), None
        if recording is None:
            by = self.xp.asarray(by)
        else:
            by, go = recording.update(by), recording.go
            if by is None:  # only the numbers were asked for
                return
        given = arrays | {"N": N, "params": params, "grads": grads, "by": by, "go": go}
        args = [given.get(argument.name) for argument in signature("optimize.cu", kernel, (kind,))]
        self.kernels.launch("optimize.cu", kernel, (kind,), (-(-N // 256),), (256,), *args)

    def clip_norm(self, grads, max_norm):
        kind, N = c_type(grads.dtype), grads.size
        chunks = max(1, min(-(-N // 4096), 1024))  # depends on N alone, so that every GPU gives equal bits
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
        threshold, recording = rng.dropout_threshold(rate), self.device.recording
        call, calls = (call, None) if recording is None else recording.draw(call)
        self.kernels.launch(
            "dropout.cu", "dropout_mask", (), (-(-N // 512),), (128,), N, seed, layer & 0xFFFFFFFF, call & 0xFFFFFFFF,
            calls, threshold, mask,
        )  # fmt: skip
        return mask.reshape(shape)
