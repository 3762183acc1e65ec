"""Loop: the time loop of one layer on the GPU, its arrays and its launches."""

from __future__ import annotations

import logging
from typing import NamedTuple

import numpy as np

from ...dtypes import dtype_name
from ...errors import BackendError
from ..records import PassGradients, SavedPass
from .launch import EACH, c_type

BLOCK = (32, 4)  # units, sequences: a warp reads along the units
SINGLE, DOUBLE = np.dtype("float32"), np.dtype("float64")
_RECORDED = 64  # timesteps of a graph: longer sequences launch it again
_log = logging.getLogger("gpurnn")


class LoopShape(NamedTuple):
    """What two calls of a cell share where they can use the same ``Loop``, one after another.

    directions: for each, whether it runs backwards in time. save: whether a backward pass will follow. ragged: whether
    sequences differ in length. biased: whether there are biases. schedule, concurrent: as in ``RunOptions``.
    """

    T: int
    B: int
    I: int
    H: int
    P: int
    dtype: np.dtype
    directions: tuple[bool, ...]
    save: bool
    ragged: bool
    biased: bool
    schedule: str
    concurrent: int = 1


class Loop:
    """The time loop of one layer: its arrays and its launches, for one shape and one set of options.

    ``forward`` and ``backward`` run launch by launch, or replay CUDA graphs where ``LoopPool`` chose to record them.
    """

    def __init__(self, ops, cell, shape):
        xp = ops.xp
        T, B, _, H, P, _, directions, save, ragged, biased, schedule, concurrent = shape
        self.ops, self.cell, self.directions, self.save = ops, cell, directions, save
        self.T, self.B, self.H, self.P, self.D = T, B, H, P, len(directions)
        D, G = self.D, len(cell.gates)
        self.projected, self.two_products = P != H, len(cell.products) == 2
        self.first_rows = len(cell.products[0].rows) * H  # rows of W_hh in the first product of a timestep
        self.dtype = np.dtype(shape.dtype)
        self.real = DOUBLE if self.dtype == DOUBLE else SINGLE
        self.width = cell.saved_blocks if save else G
        self.reverse = sum(reverse << d for d, reverse in enumerate(directions))
        self.recorded = False  # whether the arrays are saved, so that launches may be recorded over them
        self.graphs = {}  # name -> CUDA graphs, one after another
        self.note = lambda name, reason: None  # called with why a name is not recorded, or None where it is
        self.problems, self.candidates = ops.candidates(
            save, schedule, cell.kernel, G, H, T, B, D, dtype_name(self.dtype), self.projected, shape.I, concurrent
        )
        # W_ih x, and what the cell saves
        self.gates = xp.empty((D, T, B, self.width * H), self.dtype) if save or not self.inputs else None
        self.h = xp.empty((D, T + 1, B, P), self.dtype)
        self.c = xp.empty((D, T + 1 if save else 2, B, H), self.real) if "c" in cell.states else None
        self.output = xp.empty((T, B, D * P), self.dtype)
        self.nbytes = self.h.nbytes + 2 * self.output.nbytes  # with doutput
        self.nbytes += sum(array.nbytes for array in (self.gates, self.c) if array is not None)
        self.steps_done = None  # device counter: timesteps done before the running graph
        self.lengths = self.order = None
        if ragged:  # order: the longest first, so that the sequences of a block end at about the same time
            self.lengths, self.order = xp.empty(B, np.int32), xp.empty(B, np.int32)
        self.biased = biased
        self.hh = self.hr = self.ih = self.x = self.bias_ih = self.bias_hh = None
        self.h_now = self.d_now = None  # made by the first step of either pass
        self.doutput = self.received = self.dh = None  # made by the first backward

    @property
    def inputs(self):
        """Columns of W_ih that the kernel multiplies itself. With 0, ``gates`` holds W_ih x when it begins."""
        return self.candidates["forward"].inputs

    # ---- what a call brings

    def take(self, x):
        """Take x (T, B, I), for a kernel that multiplies it itself."""
        if not self.recorded:
            self.x = x
            return
        if self.x is None:
            self.x = self.ops.xp.empty(x.shape, x.dtype)
        self.x[...] = x

    def load(self, weights, lengths):
        """Take the weights, (D, rows, columns) and (D, rows), for one forward and backward pass.

        A recorded loop reads at fixed addresses, so it copies them. 16-bit copies are refreshed on every call:
        parameters may be written in place, and nothing tells us when.
        """
        names = {"hh": self.dtype}
        if self.projected:
            names["hr"] = self.dtype
        if self.inputs:
            names["ih"] = self.dtype
        if self.biased:
            names |= {"bias_ih": self.real, "bias_hh": self.real}
        for name, dtype in names.items():
            arrays = [getattr(w, name) for w in weights]
            if self.D == 1 and arrays[0].dtype == dtype and not self.recorded:
                setattr(self, name, self.ops.aligned(arrays[0][None]))
                continue
            if getattr(self, name) is None:
                setattr(self, name, self.ops.xp.empty((self.D, *arrays[0].shape), dtype))
            for copy, array in zip(getattr(self, name), arrays, strict=True):
                copy[...] = array
        if lengths is not None:
            self.lengths[...] = self.ops.xp.asarray(lengths.astype(np.int32))
            order = np.argsort(-lengths, kind="stable")
            self.order[...] = self.ops.xp.asarray(order.astype(np.int32))

    def start(self, states):
        """Write each direction's initial state, (h (B, P),) or (h, c (B, H)), into its slot."""
        for d, (state, reverse) in enumerate(zip(states, self.directions, strict=True)):
            first = self.T if reverse else 0
            self.h[d, first] = state[0]
            if self.c is not None:
                self.c[d, first if self.save else 0] = state[1]

    def final(self):
        """Copies of each direction's final state."""
        finals = []
        for d, reverse in enumerate(self.directions):
            last = 0 if reverse else self.T
            final = (self.h[d, last].copy(),)
            if self.c is not None:
                final += (self.c[d, last if self.save else self.T % 2].copy(),)
            finals.append(final)
        return finals

    def saved(self):
        """A ``SavedPass`` of each direction."""
        passes = []
        for d, reverse in enumerate(self.directions):
            c = self.c[d] if self.save and self.c is not None else None
            passes.append(SavedPass(self.gates[d] if self.save else None, self.h[d], c, reverse))
        return passes

    @property
    def by_step(self):
        """The passes that launch every timestep, so that recording pays."""
        return [name for name, candidate in self.candidates.items() if candidate.schedule == "step"]

    # ---- forward

    def forward(self):
        """Run the forward pass over what ``load``, ``take`` and ``start`` have set."""
        getattr(self, f"_forward_{self.candidates['forward'].schedule}")()

    def _forward_grid(self):
        self._or_by_step(self._forward_block, self._forward_step)

    def _backward_grid(self):
        self._or_by_step(self._backward_block, self._backward_step)

    def _or_by_step(self, launch, steps):
        """Launch all blocks at once. Where the device refuses that, run the schedule step from now on."""
        self.ops.raise_if_failed()
        try:
            launch()
        except BackendError as error:
            _log.warning("schedule 'grid' is disabled in this process: %s", str(error))
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
            self.ah = xp.empty((D, B, len(self.cell.gates) * H), self.real)
            if self.two_products:
                first = xp.empty((D, B, self.first_rows), self.real)
                self.first_ah, self.p_now = first, xp.empty((D, B, H), self.dtype)
            if self.projected:
                self.m, self.projection = xp.empty((D, B, H), self.dtype), xp.empty((D, B, P), self.dtype)
        for d, reverse in enumerate(self.directions):
            self.h_now[d] = self.h[d, self.T if reverse else 0]
        self._run("forward", self._forward_launches)

    def _forward_launches(self, done):
        """What a timestep launches, in order: functions of the timestep, counted from ``done`` on."""
        save, transposed, launches = int(self.save), self.hh.swapaxes(1, 2), []
        biases = self.lengths, self.bias_ih, self.bias_hh
        if self.two_products:
            first = self.first_rows
            launches += [
                self._product(self.h_now, transposed[..., :first], self.first_ah),
                self._bind("step_reset", self.H, self.width, EACH, done, self.reverse, save, *biases, self.first_ah,
                           self.gates, self.h_now, self.p_now),
                self._product(self.p_now, transposed[..., first:], self.ah[..., first:]),
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
        """As ``Ops.time_loop_backward``."""
        xp, D, T, B, H, P = self.ops.xp, self.D, self.T, self.B, self.H, self.P
        if self.dh is None:
            self.dh = xp.empty((D, B, P), self.real)
            self.dc = xp.empty((D, B, H), self.real) if "c" in self.cell.states else None
            self.by_inner = xp.empty((D, B, H), self.real) if self.projected or self.two_products else None  # dm, d_p
            self.dh_steps = xp.empty((D, T, B, P), self.dtype) if self.projected else None
            self.dh_now = xp.empty((D, B, P), self.dtype) if self.projected else None
        for d, dstate in enumerate(dstates):
            for gradient, initial in zip((self.dh, self.dc), dstate or (None, None), strict=False):
                if gradient is not None:
                    gradient[d] = 0 if initial is None else initial
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
            dh_steps = None if self.dh_steps is None else self.dh_steps[d]
            done.append(PassGradients(self.gates[d], dstate, dh_steps))
        return done

    def _backward_block(self):
        self._launch_block(
            "backward", self.width, self.reverse, self.lengths, self.order, self.hh, self.gates, self.h, self.c,
            self.doutput, self.dh, self.dc,
        )  # fmt: skip

    def _backward_step(self):
        if self.d_now is None:
            self.d_now = self.ops.xp.empty((self.D, self.B, len(self.cell.gates) * self.H), self.dtype)
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
        first = self.first_rows
        if not self.two_products:
            return [*launches, self._product(self.d_now, self.hh, self.dh, accumulate=True)]
        return [
            *launches,
            self._product(self.d_now[..., first:], self.hh[:, first:], self.by_inner),
            self._bind("step_reset_backward", H, self.width, EACH, done, self.reverse, self.gates, self.h,
                       self.by_inner, self.dh, self.d_now),
            self._product(self.d_now[..., :first], self.hh[:, :first], self.dh, accumulate=True),
        ]  # fmt: skip

    # ---- launches

    def _run(self, name, launches_of):
        """Run all timesteps, by graphs where this loop is recorded. launches_of: makes what one timestep launches."""
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
        except BaseException:  # also Ctrl-C: the next call must begin at the first timestep
            if self.steps_done is not None:
                self.steps_done.fill(0)
            raise

    def _record(self, name, launches_of):
        """The graphs of all timesteps, of which equal ones are shared, or None where recording fails."""
        whole, rest = divmod(self.T, _RECORDED)
        one = whole + (rest > 0) < 2
        if not one and self.steps_done is None:
            self.steps_done = self.ops.xp.zeros(1, np.int32)
            self._done(0)  # load the kernel now: a capture may not
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
        """Launch what adds ``count`` to the device counter of timesteps."""
        self.ops.kernels.launch("step.cu", "step_done", (), (1,), (1,), self.T, count, self.steps_done)

    @staticmethod
    def _launch_steps(launches, count):
        for step in range(count):
            for launch in launches:
                launch(step)

    def _bind(self, kernel, size, *args):
        """``Kernels.bind`` of a kernel of step.cu; EACH stands for the timestep."""
        types = (c_type(self.dtype),)
        if "project" not in kernel:
            types = (self.cell.kernel, *types)
        grid = (-(-size // BLOCK[0]), -(-self.B // BLOCK[1]), self.D)
        return self.ops.kernels.bind("step.cu", kernel, types, grid, BLOCK, self.T, self.B, size, *args)

    def _product(self, a, b, out, accumulate=False):
        """A matrix product with the same operands in every timestep, as a function of the timestep."""
        if self.D == 1:
            a, b, out = a[0], b[0], out[0]
        run = self.ops.device.product(a, b, out, accumulate, self.ops.tf32)
        return lambda step: run()

    def __str__(self):
        """The loop in a message: cell, sizes and dtype."""
        both = ", both directions" if self.D == 2 else ""
        return f"{self.cell.kernel} T {self.T}, B {self.B}, H {self.H}, {self.dtype}{both}"

    def _launch_block(self, which, *args):
        """Launch the one kernel of a ``block`` or ``grid`` candidate for the whole sequence."""
        block = self.candidates[which]
        types = (self.cell.kernel, c_type(self.dtype), *block.types)
        file, kernel = f"{block.kernel}.cu", f"{block.kernel}_{which}"
        args, how = (self.T, self.B, self.H, *args), {"shared": block.shared}
        tiles = -(-self.B // block.rows)
        if block.schedule != "grid" or not tiles:
            grid = (tiles, 1, self.D)
            self.ops.kernels.launch(file, kernel, types, grid, (block.threads,), *args, **how)
            return
        # blocks go along y, where there are two or more: CuPy silently shrinks a grid that is 1 along y and z
        grid, how["cooperative"] = (self.D, block.blocks, block.groups), True
        exchange, numbers = self.ops.exchange(), self.D * block.groups * block.words
        with exchange.lock:  # no other launch comes between preparing the exchange and the kernel that uses it
            if block.kernel == "grid":
                args += exchange.take(numbers, -(-tiles // block.groups) * self.T)
            else:
                args += exchange.empty(numbers)
            self.ops.kernels.launch(file, kernel, types, grid, (block.threads,), *args, **how)
            exchange.refresh()
