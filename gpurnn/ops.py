"""Ops: the primitives that layers and backends agree on, written once over ``xp`` (NumPy or CuPy).

A method belongs here only if NumPy and CuPy differ in interface or determinism, or if a kernel pays; everything else is
generic ``xp`` code in the layer that needs it. ``CudaOps`` will override what a kernel makes faster.
"""

import numpy as np

from .errors import BackendError, DtypeError


class Ops:
    """The primitives over ``xp``; the reference for every other backend."""

    def __init__(self, xp, name):
        self.xp = xp
        self.name = name

    def __repr__(self):
        return f"Ops({self.name!r})"

    # ---- arrays in and out

    def asarray(self, value, name="array"):
        """``value`` as an array of this backend, without a copy where it already is one.

        Takes NumPy and CuPy arrays, nested lists, and objects with ``__cuda_array_interface__`` or DLPack. Raises
        BackendError for a GPU array given to the NumPy backend, naming the argument.
        """
        xp = self.xp
        if isinstance(value, xp.ndarray):
            return value
        if xp is np and (hasattr(value, "__cuda_array_interface__") or type(value).__module__.startswith("cupy")):
            raise BackendError(f"{name}: is on a GPU, but the layer's backend is 'numpy'. Move it to the host first")
        if not isinstance(value, (np.ndarray, list, tuple)) and hasattr(value, "__dlpack__"):
            if hasattr(value, "detach"):
                value = value.detach()
            return xp.from_dlpack(value)
        return xp.asarray(value)

    def asfloat(self, value, dtype, name):
        """``asarray`` that also checks the dtype: raises DtypeError, with the conversion, unless it is ``dtype``."""
        array = self.asarray(value, name)
        if array.dtype != dtype:
            raise DtypeError(
                f"{name}: dtype ({array.dtype}) does not match the layer's ({dtype}). "
                f"Convert it: {name} = {name}.astype({str(dtype)!r})"
            )
        return array

    def to_numpy(self, array):
        """``array`` on the host."""
        return array.get() if hasattr(array, "get") and not isinstance(array, np.ndarray) else np.asarray(array)

    def synchronize(self):
        """Wait until everything launched so far is done (nothing to wait for on NumPy)."""
        if self.xp is not np:
            self.xp.cuda.get_current_stream().synchronize()

    # ---- accumulation into gradients

    def accumulate_rows(self, grad, index, d):
        """``grad[index[n]] += d[n]`` for every n, in a fixed order: the gradient of an embedding.

        grad: (V, H), in and out; index: integers (N,); d: (N, H).
        """
        if index.size == 0:
            return
        xp = self.xp
        order = xp.argsort(index, kind="stable")
        rows = index[order]
        first = xp.concatenate([xp.ones(1, dtype=bool), rows[1:] != rows[:-1]])
        starts = xp.flatnonzero(first)
        if xp is np:
            grad[rows[starts]] += np.add.reduceat(d[order], starts, axis=0)
        else:  # CuPy has no reduceat: differences of a float64 prefix sum, whose order is fixed
            sums = xp.cumsum(d[order], axis=0, dtype=np.float64)
            ends = xp.concatenate([starts[1:], xp.asarray([index.size])]) - 1
            totals = sums[ends]
            totals[1:] -= sums[ends[:-1]]
            grad[rows[starts]] += totals.astype(grad.dtype)
