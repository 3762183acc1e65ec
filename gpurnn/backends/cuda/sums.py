"""Sums by kernels: over timesteps, of the rows of an embedding, and of softmax cross-entropy."""

import numpy as np

from ..records import flat
from .launch import Rows, c_type
from .loop_plan import DOUBLE, SINGLE

BLOCKS = 65535  # most thread blocks of a launch along y or z (CUDA C++ Programming Guide, compute capabilities)


class Sums:
    """The part of ``CudaOps`` that adds up."""

    def sum_steps(self, d):
        rows = flat(d)
        N, M = rows.shape
        if rows.strides[1] != rows.itemsize or rows.strides[0] < 0:
            rows = self.xp.ascontiguousarray(rows)
        kind = c_type(d.dtype)
        real = DOUBLE if kind == "double" else SINGLE
        if N == 0:
            return self.xp.zeros(M, real)
        chunks = min(-(-N // 256), 256)  # depends on N alone, so that every GPU gives equal bits
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
        if H > BLOCKS * 32:
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
        dlogits = self.derivative_array(logits, rows, out)
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
