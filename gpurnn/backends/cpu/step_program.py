"""One timestep of a whole model in one call of the compiled library, which neither allocates nor copies for Python.

Every recurrent layer has two slots for each state. A timestep reads one and writes the other, and the next timestep the
other way around: as a loop of one timestep does that runs backwards in time. So there are two programs, used in turn.
"""

from __future__ import annotations

import ctypes
from itertools import count

import numpy as np

from ...dtypes import compute_dtype
from ..int8 import Int8Matrix, parts_of
from ..records import SavedLayer, SavedPass
from ..steps import LinearStep, LoopStep, TableStep
from . import sharing
from .native import Pass, Stage, address, dtype_number
from .packing import pack, pack_linear, packed_linear

_TABLE, _LOOP, _LINEAR = range(3)
NO_ROW = 4  # what the library returns for a number that the table has no row for


class StepProgram:
    """One timestep of ``steps`` for ``B`` sequences, in inference, with weights that are packed at the beginning.

    x: what to write before ``run``, (B, I), or int64 (B,) for a table. y: (B, F), what ``run`` writes.
    """

    def __init__(self, ops, steps, B, dtype):
        self._ops, self._B, self._dtype = ops, B, dtype
        self._slots = []  # for each strand, for each state the array (2, B, size)
        self._alive = []  # what only compiled code reads
        self._now = 0
        table = isinstance(steps[0], TableStep)
        I = None if table else steps[0].weight.shape[1] if isinstance(steps[0], LinearStep) else _width(steps[0])
        self.x = np.zeros(B, np.int64) if table else np.zeros((B, I), dtype)
        x, stages = self.x, ([], [])
        for step in steps:
            make = {TableStep: self._lookup, LinearStep: self._linear, LoopStep: self._loop}[type(step)]
            x, both = make(step, x)
            self._alive += [step, x]
            for program, stage in zip(stages, both, strict=True):
                program.append(stage)
        self.y = x
        self._programs = [(Stage * len(steps))(*program) for program in stages]
        self._call = ops.library.gpurnn_native_step

    def run(self):
        """Run the timestep; False where ``x`` has a number that the table has no row for, and nothing was changed."""
        problem = self._call(self._programs[self._now], len(self._programs[0]), self._ops.level)
        if problem == NO_ROW:
            return False
        if problem:
            self._ops._raise(problem, "step", sharing.thread_count())
        self._now = 1 - self._now
        return True

    @property
    def states(self):
        """For each strand a tuple of its states, views (B, size) that are valid until the next ``run``."""
        return [tuple(slots[self._now] for slots in strand) for strand in self._slots]

    def _stage(self, kind, x, y, **more):
        return Stage(kind, dtype_number(self._dtype), self._B, x=address(x), y=address(y), **more)

    def _lookup(self, step, x):
        y = np.empty((self._B, step.weight.shape[1]), self._dtype)
        rows, F = step.weight.shape
        stage = self._stage(_TABLE, x, y, in_=rows, out=F, weight=address(step.weight))
        return y, (stage, stage)

    def _linear(self, step, x):
        F, I = step.weight.shape
        y = np.empty((self._B, F), self._dtype)
        weight, scales = map(address, parts_of(step.weight))
        stage = self._stage(_LINEAR, x, y, in_=I, out=F, weight=weight, scales=scales, bias=address(step.bias))
        if scales is None:
            packed = pack_linear(self._ops, stage)
        else:
            stage.bits, packed = step.weight.bits, packed_linear(self._ops, step.weight, self._dtype)
        stage.packed = address(packed)
        self._alive.append(packed)
        return y, (stage, stage)

    def _loop(self, step, x):
        """The strands of one recurrent layer."""
        cell, D, dtype, B = step.cell, len(step.weights), self._dtype, self._B
        strands = [self._arrays(cell, w) for w in step.weights]
        packed = [None] * D
        P = strands[0][1].shape[2]
        y = np.empty((B, D * P), dtype)
        stages = []
        for slot in (0, 1):
            saved, jobs = SavedLayer(cell, step.weights, x[None], None, []), []
            for d, w, (gates, h, others) in zip(count(), step.weights, strands, strict=False):
                job = self._ops._pass(saved, w, SavedPass(gates, h, others, reverse=slot == 1), save=True)
                job.x, job.I = address(x), x.shape[1]
                job.output, job.output_row = address(y) + d * P * dtype.itemsize, D * P
                jobs.append(job)
            H = jobs[0].H
            work = sharing.multiplications(cell, B * H, P, x.shape[1])
            threads, by_units = sharing.share(1, B, sharing.units_to_share(cell, P != H, H), work, D)
            for d, job in enumerate(jobs):
                job.by_units = by_units
                packed[d] = packed[d] or pack(self._ops, cell, job)
                job.packed = packed[d].address
            passes = (Pass * D)(*jobs)
            self._alive += [jobs, passes, packed]
            library = self._ops._generated(cell, dtype)
            generated = library and ctypes.cast(library.time_loop, ctypes.c_void_p).value
            stages.append(self._stage(_LOOP, x, y, directions=D, threads=threads, passes=passes, generated=generated))
        self._slots += [(h, *others) for _, h, others in strands]
        return y, stages

    def _arrays(self, cell, w):
        """gates, h and the other states of one strand."""
        H, B, dtype = len(w.ih) // len(cell.gates), self._B, self._dtype
        P = H if w.hr is None else len(w.hr)
        gates = np.zeros((1, B, cell.saved_blocks * H), dtype)
        return gates, np.zeros((2, B, P), dtype), self._ops._state_slots(cell, 2, B, H, compute_dtype(dtype))


def _width(step):
    return step.weights[0].ih.shape[1]


def refused(ops, steps, dtype):
    """Whether some of ``steps`` are not compiled."""
    if not steps:
        return True
    for number, step in enumerate(steps):
        if isinstance(step, LoopStep):
            if not ops._compiled(step.cell, dtype) or any(w.reads is not None for w in step.weights):
                return True
        elif isinstance(step, TableStep) and number:
            return True
        if not isinstance(step, LoopStep) and not all(
            array is None
            or isinstance(array, Int8Matrix)
            or (array.flags.c_contiguous and array.dtype == compute_dtype(dtype))
            for array in step
        ):
            return True
    return False
