"""FusedPass: the arrays and launches of one pass of a ``Loop`` by the schedule ``fused``."""

import numpy as np

from .launch import EACH, c_type, cell_type, marked_types
from .schedules.fused import PANEL, THREADS
from .step_graphs import run_steps

_MAKERS = 256  # threads of a thread block of to_panels


class FusedPass:
    """A forward or backward pass whose timesteps are one launch each, which multiplies, too (fused.cu).

    weights: W_hh in panels, (bytes,) uint8. vectors: what is multiplied by them in panels, in two slots,
    (2, bytes) uint8. name: "forward" or "backward".
    """

    def __init__(self, loop, name):
        self.loop, self.name, self.tile = loop, name, loop.candidates[name]
        plan, self.backward = loop.plan, name == "backward"
        U, R, _, _, self.parts = self.tile.numbers
        products = len(loop.cell.hidden)
        self.U, self.columns = U, PANEL // (2 if self.parts == 3 else plan.dtype.itemsize)
        of_unit = 1 if self.backward else products
        self.weight_rows, self.vector_rows = -(-loop.H // U) * of_unit * U, -(-loop.B // R) * R
        self.panels = -(-loop.H // self.columns)  # of a gate
        row = self.tile.panels * self.parts * PANEL * loop.D  # bytes of a row, in all directions
        empty = loop.ops.xp.empty
        self.weights, self.vectors = (
            empty(row * self.weight_rows, np.uint8),
            empty((2, row * self.vector_rows), np.uint8),
        )

    @staticmethod
    def nbytes(tile, problem):
        """Bytes of the arrays of such a pass: a ``Fused``, for a ``schedules.Problem``."""
        U, R, _, _, parts = tile.numbers
        row = tile.panels * parts * PANEL * problem.directions
        rows = -(-problem.H // U) * U * (1 if problem.backward else problem.products)
        return row * (rows + 2 * -(-problem.B // R) * R)

    def _start(self):
        """Put the weights into panels, and what the first timestep multiplies: ``h_now``, or zeros in backward."""
        loop, products = self.loop, len(self.loop.cell.hidden)
        self._to_panels(loop.w.hh, products, loop.H, self.U, self.weight_rows, self.weights, self.backward)
        self.vectors[...] = 0  # rows past the last sequence, and columns past the last unit, stay so
        if not self.backward:
            self._to_panels(loop.h_now, 1, loop.B, self.vector_rows, self.vector_rows, self.vectors[0], False)

    def _to_panels(self, matrix, gates, count, units, rows, panels, transposed):
        """Put a matrix of each direction, (D, gates * count, columns), into panels."""
        loop, pieces = self.loop, self.panels * (gates if transposed else 1) * PANEL // 16
        types = c_type(loop.dtype), str(self.parts), str(transposed).lower()
        grid = -(-pieces * rows // _MAKERS), 1, loop.D
        loop.ops.kernels.launch(
            "fused.cu", "to_panels", types, grid, (_MAKERS,), gates, count, loop.H, units, rows, self.panels, matrix,
            panels,
        )  # fmt: skip

    def run(self, name):
        """Run the pass. name: that of its graphs."""
        self._start()
        run_steps(self.loop, name, self._launches)
        if self.backward:
            self._finish()

    def _launches(self, done):
        """What a timestep launches, as ``run_steps`` takes it."""
        loop, tile = self.loop, self.tile
        types = (cell_type(loop.cell), c_type(loop.dtype), *tile.types, *marked_types(loop.plan.shape.marked))
        panels = self.weights, self.vectors, self.panels, self.weight_rows, self.vector_rows, loop.gates, loop.h
        args = [loop.T, loop.B, loop.H, loop.width, EACH, done, loop.reverse]
        if self.backward:
            args += [loop.lengths, *loop.more(), *panels, loop.others, loop.doutput, loop.dh, loop.dothers]
            args += [*loop.marks.read, *loop.marks.sums]
        else:
            args += [int(loop.save), loop.lengths, loop.w.bias_ih, loop.w.bias_hh, *loop.more(), *panels]
            args += [loop.h_now, loop.others, loop.output, *loop.marks.read]
        bind, file, kernel, grid = loop.ops.kernels.bind, "fused.cu", f"fused_{self.name}", (*tile.grid, loop.D)
        how = {"struct": loop.cell.struct, "shared": tile.shared}
        first = bind(file, kernel, types, grid, (THREADS,), *args, **how)
        others = bind(file, kernel, types, grid, (THREADS,), *args, dependent=True, **how)
        return [lambda step: others(step) if step else first(step)]

    def _finish(self):
        """Add the product of the last timestep, the first of the sequence, to ``dh``."""
        loop, rows = self.loop, self.loop.rows
        for d, reverse in enumerate(loop.directions if loop.T and loop.B else ()):
            last = loop.gates[d, loop.T - 1 if reverse else 0, :, :rows]
            loop.ops.device.product(last, loop.w.hh[d], loop.dh[d], True, loop.ops.tf32)()
