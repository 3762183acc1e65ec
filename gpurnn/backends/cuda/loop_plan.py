"""LoopPlan: what the shape of a call decides for its time loop on the GPU, once for all calls of that shape."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from ...dtypes import dtype_name
from .fused import FusedPass
from .launch import BY_STEP, c_type, cell_type, marked_types
from .schedules import Problem

BLOCK = (32, 4)  # units, sequences: a warp reads along the units
SINGLE, DOUBLE = np.dtype("float32"), np.dtype("float64")


class LoopShape(NamedTuple):
    """What two calls of a cell share where they can use the same ``Loop``, one after another.

    directions: for each, whether it runs backwards in time. save: whether a backward pass will follow. ragged: whether
    sequences differ in length. biased: whether there are biases. schedule, concurrent: as in ``RunOptions``. marked:
    whether there are ``Marks``.
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
    marked: bool = False


class Launch(NamedTuple):
    """The one launch of a ``block``, ``grid`` or ``cluster`` candidate, for the whole sequence.

    first: what ``Kernels.launch`` takes before the kernel's own arguments: file, kernel, types, grid, block. options:
    what it takes by name. words: how many the kernel needs of an ``Exchange``: 0 where its blocks wait for one another
    without any, None where they do not wait. epochs: how many it needs with them, or None where it needs empty words.
    """

    first: tuple
    options: dict
    words: int | None = None
    epochs: int | None = None


class LoopPlan:
    """What a cell and a ``LoopShape`` decide for every loop of that shape: candidates, sizes and launches.

    It holds for the limits of the device and the measured table that it was made with.
    """

    def __init__(self, ops, cell, shape):
        T, B, I, H, P, dtype, directions, save, ragged, biased, schedule, concurrent, marked = shape
        self.cell, self.shape, self.D, G = cell, shape, len(directions), len(cell.gates)
        self.limits, self.measured = ops.device.limits, ops.measured
        self.projected, self.first_rows, self.rows = P != H, cell.first * H, len(cell.hidden) * H
        self.dtype = np.dtype(dtype)
        self.real = DOUBLE if self.dtype == DOUBLE else SINGLE
        self.width = cell.saved_blocks if save else G
        forward = self.D - sum(directions)  # those that run backwards in time come behind them
        self.reverse = -1 << forward if forward < self.D else 0
        name = dtype_name(self.dtype)
        problem = Problem(cell, H, T, B, self.D, name, self.projected, False, I=I, concurrent=concurrent, marked=marked)
        self.problems, candidates = ops.candidates(problem, save, schedule)
        self.use(candidates)
        # columns of W_ih that the kernel multiplies itself. With 0, ``gates`` holds W_ih x when it begins
        self.inputs = self.candidates["forward"].inputs
        self.loaded = {"hh": self.dtype} if self.rows else {}  # the weights that kernels read, and in which dtype
        if self.projected:
            self.loaded["hr"] = self.dtype
        if self.inputs:
            self.loaded["ih"] = self.dtype
        if biased:
            self.loaded |= {"bias_ih": self.real, "bias_hh": self.real}
        self.gates_shape = (self.D, T, B, self.width * H) if save or not self.inputs else None
        self.h_shape, self.output_shape = (self.D, T + 1, B, P), (T, B, self.D * P)
        others = len(cell.states) - 1
        self.others_shape = (self.D, others, T + 1 if save else 2, B, H) if others else None
        numbers = math.prod(self.h_shape) + 2 * math.prod(self.output_shape) + math.prod(self.gates_shape or (0,))
        self.nbytes = numbers * self.dtype.itemsize  # with doutput, which is as large as the output
        self.nbytes += math.prod(self.others_shape or (0,)) * self.real.itemsize
        # one byte for each mask; drawn for every timestep unless all are drawn once
        self.mask_steps = T if any(draw.each == "timestep" for draw in cell.draws) else min(T, 1)
        self.nbytes += self.D * self.mask_steps * B * len(cell.draws) * H
        for name, candidate in self.candidates.items():
            if candidate.schedule == "fused":
                self.nbytes += FusedPass.nbytes(candidate, self.problems[name])
        if marked:  # for each state that resets give the sum of its gradients, too
            self.nbytes += self.D * B * (T + P * self.dtype.itemsize + (P + 2 * others * H) * self.real.itemsize)

    def use(self, candidates):
        """Run each pass by its candidate, "forward" or "backward" -> ``schedules.Candidate``."""
        self.candidates = candidates
        self.by_step = [name for name, candidate in candidates.items() if candidate.schedule in BY_STEP]
        blocks = {name: candidate for name, candidate in candidates.items() if name not in self.by_step}
        self.launches = {name: self._launch(name, block) for name, block in blocks.items()}

    def _launch(self, which, block):
        """The ``Launch`` of one pass."""
        T, B = self.shape.T, self.shape.B
        types = (cell_type(self.cell), c_type(self.dtype), *block.types, *marked_types(self.shape.marked))
        tiles, options = -(-B // block.rows), {"shared": block.shared, "struct": self.cell.struct}
        where = f"{block.kernel}.cu", f"{block.kernel}_{which}", types
        if block.schedule == "block" or not tiles:
            return Launch((*where, (tiles, block.parts, self.D), (block.threads,)), options)
        if block.schedule == "cluster":
            return Launch((*where, (self.D, block.blocks, block.groups), (block.threads,)), options, 0)
        # blocks go along y, where there are two or more: CuPy silently shrinks a grid that is 1 along y and z
        grid, options["cooperative"] = (self.D, block.blocks, block.groups), True
        epochs = -(-tiles // block.groups) * T if block.kernel == "grid" else None
        words = self.D * block.groups * block.words
        return Launch((*where, grid, (block.threads,)), options, words, epochs)
