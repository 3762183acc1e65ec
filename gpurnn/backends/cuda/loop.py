"""Loop: the time loop of one layer on the GPU, its arrays and its launches."""

import logging

import numpy as np

from ...cells import Weights
from ...errors import BackendError
from ..records import PassGradients, SavedPass
from .fused import FusedPass
from .launch import EACH, MEANS_THREADS, c_type, cell_type, marked_types, means_units
from .loop_plan import BLOCK
from .marks import NO_MARKS, LoopMarks
from .step_graphs import run_steps

_log = logging.getLogger("gpurnn")


class Loop:
    """The time loop of one layer: its arrays and its launches, for one ``LoopPlan``.

    ``forward`` and ``backward`` run launch by launch, or replay CUDA graphs where ``LoopPool`` chose to record them.
    """

    recorded = False  # whether the arrays are saved, so that launches may be recorded over them
    note = staticmethod(lambda name, reason: None)  # called with why a name is not recorded, or None where it is
    steps_done = None  # device counter: timesteps done before the running graph
    lengths = order = None
    w = x = None  # the ``Weights`` and the input that kernels read; the weights of all directions in each array
    own = masks = None  # likewise: the cell's own parameters (D, N, H) and masks (D, T or 1, B, M*H)
    h_now = ah = d_now = None  # made by the first step of either pass
    doutput = received = dh = None  # made by the first backward

    def __init__(self, ops, plan):
        empty, shape = ops.xp.empty, plan.shape
        self.ops, self.plan, self.cell = ops, plan, plan.cell
        self.T, self.B, self.H, self.P, self.D = shape.T, shape.B, shape.H, shape.P, plan.D
        self.directions, self.save = shape.directions, shape.save
        self.dtype, self.real, self.width, self.reverse = plan.dtype, plan.real, plan.width, plan.reverse
        self.projected, self.rows, self.first_rows = plan.projected, plan.rows, plan.first_rows
        self.problems, self.candidates, self.by_step = plan.problems, plan.candidates, plan.by_step
        self.inputs, self.nbytes = plan.inputs, plan.nbytes
        self.graphs = {}  # name -> CUDA graphs, one after another
        self.fused = {}  # pass -> its ``FusedPass``, where this loop is recorded
        # W_ih x, and what the cell saves
        self.gates = None if plan.gates_shape is None else empty(plan.gates_shape, self.dtype)
        self.h = empty(plan.h_shape, self.dtype)
        self.others = None if plan.others_shape is None else empty(plan.others_shape, self.real)
        if self.cell.vectors:
            self.own = empty((self.D, self.cell.vectors, self.H), self.real)
        self.output = empty(plan.output_shape, self.dtype)
        if shape.ragged:  # order: the longest first, so that the sequences of a block end at about the same time
            self.lengths, self.order = empty(self.B, np.int32), empty(self.B, np.int32)
        self.marks = LoopMarks(self) if shape.marked else NO_MARKS

    # ---- what a call brings

    def take(self, x):
        """Take x (T, B, I), for a kernel that multiplies it itself."""
        if not self.recorded:
            self.x = x
            return
        if self.x is None:
            self.x = self.ops.xp.empty(x.shape, x.dtype)
        self.x[...] = x

    def load(self, weights, lengths, masks=None, marks=None):
        """Take the weights, (D, rows, columns) and (D, rows), masks and marks, for one forward and backward pass.

        A recorded loop reads at fixed addresses, so it copies them. 16-bit copies are refreshed on every call:
        parameters may be written in place, and nothing tells us when.
        """
        views = self.ops.stacked(weights[0]) if self.D == 1 and not self.recorded else None
        if views is not None and self.dtype == self.real:
            self.w = views
        else:
            self._copy(weights, views)
        if self.own is not None:
            for own, w in zip(self.own, weights, strict=True):
                first = 0
                for vectors in (array.reshape(-1, self.H) for array in w.own):
                    own[first : first + len(vectors)] = vectors
                    first += len(vectors)
        if masks is not None and masks[0].size:
            self._load_masks(masks)
        if marks is not None:
            self.marks.load(marks, self.recorded)
        if lengths is not None:
            self.lengths[...] = self.ops.xp.asarray(lengths.astype(np.int32))
            order = np.argsort(-lengths, kind="stable")
            self.order[...] = self.ops.xp.asarray(order.astype(np.int32))

    def _copy(self, weights, views):
        """Copy the weights that kernels read, in their dtypes. views: the ``Weights`` that need no copy, or None."""
        first, loaded = self.w is None, self.plan.loaded
        if first:
            self.w = Weights(None, None)
        for name, dtype in loaded.items():
            arrays = [getattr(w, name) for w in weights]
            if views is not None and dtype == self.real:
                setattr(self.w, name, getattr(views, name))
                continue
            if first:
                setattr(self.w, name, self.ops.xp.empty((self.D, *arrays[0].shape), dtype))
            for copy, array in zip(getattr(self.w, name), arrays, strict=True):
                copy[...] = array

    def _load_masks(self, masks):
        """Take the masks of each direction, (T or 1, B, M*H)."""
        if self.D == 1 and not self.recorded:
            self.masks = self.ops.xp.ascontiguousarray(masks[0])[None]
            return
        if self.masks is None:
            self.masks = self.ops.xp.empty((self.D, *masks[0].shape), np.bool_)
        for copy, mask in zip(self.masks, masks, strict=True):
            copy[...] = mask

    def start(self, states):
        """Write each direction's initial state, h (B, P) and the others (B, H), into its slot."""
        for d, (state, reverse) in enumerate(zip(states, self.directions, strict=True)):
            first = self.T if reverse else 0
            self.h[d, first] = state[0]
            for k, other in enumerate(state[1:]):
                self.others[d, k, first if self.save else 0] = other

    def set_states(self, states):
        """Write all states of each direction, as ``Ops.all_states`` returns them, instead of a forward pass."""
        for d, (h, *others) in enumerate(states):
            self.h[d] = h
            for k, other in enumerate(others):
                self.others[d, k] = other

    def final(self):
        """Copies of each direction's final state."""
        finals = []
        for d, reverse in enumerate(self.directions):
            last = 0 if reverse else self.T
            others = () if self.others is None else self.others[d]
            slot = last if self.save else self.T % 2
            finals.append((self.h[d, last].copy(), *(other[slot].copy() for other in others)))
        return finals

    def saved(self):
        """A ``SavedPass`` of each direction."""
        passes = []
        for d, reverse in enumerate(self.directions):
            others = tuple(self.others[d]) if self.save and self.others is not None else ()
            gates, masks = self.gates[d] if self.save else None, None if self.masks is None else self.masks[d]
            marks = self.marks.given and self.marks.given[d]
            passes.append(SavedPass(gates, self.h[d], others, reverse, masks, marks=marks))
        return passes

    # ---- forward

    def forward(self):
        """Run the forward pass over what ``load``, ``take`` and ``start`` have set."""
        self._run_schedule("forward", self._forward_block, self._forward_step, self._forward_fused)

    def _run_schedule(self, name, block, step, fused):
        """Run a pass: by ``step``, by ``fused``, or by ``block``, the one launch for the whole sequence.

        Where the device refuses to run thread blocks at once that wait for one another, run the schedule step.
        """
        schedule = self.candidates[name].schedule
        run = {"step": step, "fused": fused}.get(schedule, block)
        if not self.candidates[name].waits:
            run()
        else:
            self.ops.raise_if_failed()
            try:
                run()
            except BackendError as error:
                _log.warning("schedule '%s' is disabled in this process: %s", schedule, str(error))
                self.ops.disable(schedule)
                step()

    def _forward_block(self):
        w, ragged = self.w, (self.lengths, self.order)
        how = self.width, self.reverse, int(self.save), *ragged, w.hh, w.bias_ih, w.bias_hh, *self.more()
        if self.candidates["forward"].schedule == "block":
            how = w.ih.shape[-1] if self.inputs else 0, *how, w.ih if self.inputs else None, self.x
        self._launch_block("forward", *how, self.gates, self.h, self.others, self.output, marks=self.marks.read)

    def more(self):
        """The arguments that every kernel of a cell takes for own parameters and masks."""
        return self.own, 1 if self.masks is None else self.masks.shape[1], self.masks

    def _forward_step(self):
        xp, D, B, H, P = self.ops.xp, self.D, self.B, self.H, self.P
        if self.h_now is None or (self.rows and self.ah is None):
            self.ah = xp.empty((D, B, self.rows), self.real) if self.rows else None
            if self.first_rows < self.rows:
                self.inner_now = xp.empty((D, B, H), self.dtype)
            if self.projected:
                self.m, self.projection = xp.empty((D, B, H), self.dtype), xp.empty((D, B, P), self.dtype)
        self._start_h_now()
        run_steps(self, "forward", self._forward_launches)

    def _start_h_now(self):
        """Make ``h_now`` what the first timestep reads."""
        if self.h_now is None:
            self.h_now = self.ops.xp.empty((self.D, self.B, self.P), self.dtype)
        for d, reverse in enumerate(self.directions):
            self.h_now[d] = self.h[d, self.T if reverse else 0]
        self.marks.reset_first(self.h_now)

    def _forward_fused(self):
        self._start_h_now()
        self._fused("forward").run("forward")

    def _fused(self, which):
        """The ``FusedPass`` of this run: where nothing is recorded, its arrays are needed no longer."""
        if not self.recorded:
            return FusedPass(self, which)
        if which not in self.fused:
            self.fused[which] = FusedPass(self, which)
        return self.fused[which]

    def _forward_launches(self, done):
        """What a timestep launches, in order: functions of the timestep, counted from ``done`` on."""
        w, first, launches, marks = self.w, self.first_rows, [], self.marks.read
        how = (
            self.H, self.width, EACH, done, self.reverse, int(self.save), self.lengths, w.bias_ih, w.bias_hh,
            *self.more(), self.ah, self.gates,
        )  # fmt: skip
        if first:
            launches.append(self._product(self.h_now, w.hh[:, :first].swapaxes(1, 2), self.ah[..., :first]))
        if first < self.rows:
            launches += [
                self._bind("step_inner", *how, self.h_now, self.others, self.inner_now, *marks),
                self._product(self.inner_now, w.hh[:, first:].swapaxes(1, 2), self.ah[..., first:]),
            ]
        if not self.projected:
            to = self.h, self.h_now, self.others, None, self.output
            return [*launches, self._bind("step_forward", *how, *to, *marks)]
        return [
            *launches,
            self._bind("step_forward", *how, None, None, self.others, self.m, None, *marks),
            self._product(self.m, self.w.hr.swapaxes(1, 2), self.projection),
            self._bind("step_project", self.P, EACH, done, self.reverse, self.lengths, self.projection, self.h,
                       self.h_now, self.output, *marks[:2]),
        ]  # fmt: skip

    # ---- backward

    def backward(self, doutput, dstates, later):
        """As ``Ops.time_loop_backward``. later: ``SavedPass.dreset`` of each direction."""
        xp, D, T, B, H, P = self.ops.xp, self.D, self.T, self.B, self.H, self.P
        if self.dh is None or not self.recorded:  # the caller takes those of a loop that is not recorded
            self.dh = xp.empty((D, B, P), self.real)
            self.dothers = None if self.others is None else xp.empty((D, self.others.shape[1], B, H), self.real)
            inner = self.projected or self.first_rows < self.rows
            self.d_inner = xp.empty((D, B, H), self.real) if inner else None  # of what W_hr or a second product reads
            self.dh_steps = xp.empty((D, T, B, P), self.dtype) if self.projected else None
            self.dh_now = xp.empty((D, B, P), self.dtype) if self.projected else None
        self.marks.start_backward(self.recorded, later)
        running = [(self.dh[d], *(() if self.dothers is None else self.dothers[d])) for d in range(D)]
        for gradients, dstate in zip(running, dstates, strict=True):
            for gradient, final in zip(gradients, dstate or (None,) * len(gradients), strict=True):
                gradient[...] = 0 if final is None else final
        if doutput is None:
            self.doutput = None
        elif self.recorded:  # a recorded loop reads at fixed addresses
            if self.received is None:
                self.received = xp.empty((T, B, D * P), self.dtype)
            self.doutput = self.received
            self.doutput[...] = doutput
        else:
            self.doutput = self.ops.aligned(doutput)
        self._run_schedule("backward", self._backward_block, self._backward_step, self._backward_fused)
        self.doutput = None
        done = []
        for d in range(D):
            dstate = tuple(part.copy() for part in running[d]) if self.recorded else running[d]
            dh_steps = None if self.dh_steps is None else self.dh_steps[d]
            done.append(PassGradients(self.gates[d], dstate, dh_steps, self.marks.gradients(d, self.recorded)))
        return done

    def _backward_block(self):
        self._launch_block(
            "backward", self.width, self.reverse, self.lengths, self.order, self.w.hh, self.gates, self.h, self.others,
            *self.more(), self.doutput, self.dh, self.dothers, marks=(*self.marks.read, *self.marks.sums),
        )  # fmt: skip

    def _backward_step(self):
        if self.d_now is None and self.rows:
            self.d_now = self.ops.xp.empty((self.D, self.B, self.rows), self.dtype)
        run_steps(self, self._backward_name(), self._backward_launches)
        self.marks.reset_last(self.dh, self.dothers)

    def _backward_name(self):
        return "backward" if self.doutput is not None else "backward of the state"

    def _backward_fused(self):
        self._fused("backward").run(self._backward_name())
        self.marks.reset_last(self.dh, self.dothers)

    def _backward_launches(self, done):
        """As ``_forward_launches``."""
        H, hh, first, launches = self.H, self.w.hh, self.first_rows, []
        marks, sums = self.marks.read, self.marks.sums
        how = H, self.width, EACH, done, self.reverse, self.lengths, *self.more(), self.gates
        if self.projected:
            launches = [
                self._bind("step_project_backward", self.P, EACH, done, self.reverse, self.lengths, self.doutput,
                           self.dh, self.dh_steps, self.dh_now, marks[0], sums[0]),
                self._product(self.dh_now, self.w.hr, self.d_inner),
                self._bind("step_backward", *how, None, self.others, None, self.d_inner, None, self.dothers,
                           self.d_now, *marks, *sums),
            ]  # fmt: skip
        else:
            to = self.doutput, None, self.dh, self.dothers, self.d_now, *marks, *sums
            launches = [self._bind("step_backward", *how, self.h, self.others, *to)]
        if first < self.rows:
            to = self.d_inner, self.dh, self.dothers, self.d_now, *marks
            launches += [
                self._product(self.d_now[..., first:], hh[:, first:], self.d_inner),
                self._bind("step_inner_backward", *how, self.h, self.others, *to),
            ]
        if first:
            launches.append(self._product(self.d_now[..., :first], hh[:, :first], self.dh, accumulate=True))
        return launches

    # ---- launches

    def _bind(self, kernel, size, *args):
        """``Kernels.bind`` of a kernel of step.cu, or of its like in step_means.cu; EACH stands for the timestep."""
        file, types, struct = "step.cu", (c_type(self.dtype),), None
        grid, block = (-(-size // BLOCK[0]), -(-self.B // BLOCK[1]), self.D), BLOCK
        if "project" not in kernel:
            types, struct = (cell_type(self.cell), *types), self.cell.struct
            if self.cell.means:
                file, kernel, types = (
                    "step_means.cu",
                    kernel.replace("step", "step_means"),
                    (*types, str(means_units(size))),
                )
                grid, block = (self.B, 1, self.D), (MEANS_THREADS,)
        types += marked_types(self.plan.shape.marked)
        return self.ops.kernels.bind(file, kernel, types, grid, block, self.T, self.B, size, *args, struct=struct)

    def _product(self, a, b, out, accumulate=False):
        """A matrix product with the same operands in every timestep, as a function of the timestep."""
        if self.D == 1:
            a, b, out = a[0], b[0], out[0]
        run = self.ops.device.product(a, b, out, accumulate, self.ops.tf32)
        return lambda step: run()

    def __str__(self):
        """The loop in a message: cell, sizes and dtype."""
        both = ", both directions" if self.D == 2 else ""
        return f"{self.cell.name} T {self.T}, B {self.B}, H {self.H}, {self.dtype}{both}"

    def _launch_block(self, which, *args, marks):
        """Launch the one kernel of a ``block``, ``grid`` or ``cluster`` candidate for the whole sequence.

        marks: its last arguments.
        """
        first, options, words, epochs = self.plan.launches[which]
        launch, sizes = self.ops.kernels.launch, (self.T, self.B, self.H)
        if words is None:
            launch(*first, *sizes, *args, *marks, **options)
            return
        exchange = self.ops.exchange()
        with exchange.lock:  # no other launch comes between preparing the exchange and the kernel that uses it
            if not words:
                args += exchange.watched()
            else:
                args += exchange.empty(words) if epochs is None else exchange.take(words)
            launch(*first, *sizes, *args, *marks, **options)
            exchange.done(epochs)
