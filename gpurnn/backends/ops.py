"""Ops: the primitives that layers call, written once over ``xp`` (NumPy or CuPy).

A method belongs here only if NumPy and CuPy differ in interface or determinism, or if compiled code makes it faster.
Everything else is array code in the layer that needs it. ``CpuOps`` and ``CudaOps`` override what they do faster.
"""

import math

import numpy as np

from .. import rng
from ..arrays import as_array, check_float
from ..dtypes import compute_dtype, upcast
from ..errors import ShapeError
from .blocks import blocks
from .chunks import InChunks
from .machine import host_machine
from .rebuild import FromStates
from .records import PassOptions, SavedLayer, flat
from .streams import ONE_STREAM, Streams
from .time_loop import hidden_weights, input_bias, sequence_backward, sequence_forward
from .weight_gradients import add_weight_gradients, weight_terms

_MOST = (1 << 31) - 1  # most timesteps or sequences that compiled code counts: an int
_FEATURE_MAJOR_FROM = 8  # batch size from which NumPy's arrays of the time loop are feature-major

# The state arrays of each compiled rule of an optimizer. CPU code numbers rules and arrays in this order.
UPDATE_STATES = {
    "sgd": ("momentum_buffer",),
    "rmsprop": ("square_avg", "grad_avg", "momentum_buffer"),
    "adam": ("exp_avg", "exp_avg_sq", "max_exp_avg_sq"),
}


class Ops(InChunks, FromStates):
    """The primitives over ``xp``; the reference for every other backend."""

    precision = "float32"  # how float32 is multiplied, as ``Module.precision`` says it
    tf32 = False  # whether it may be multiplied as tf32

    def __init__(self, xp, name):
        self.xp = xp
        self.name = name

    def __repr__(self):
        return f"Ops({self.name!r})"

    # There is one object per backend, so a copy is the same one. It is pickled by name (switch.py).

    def __copy__(self):
        return self

    def __deepcopy__(self, memo):
        return self

    def with_precision(self, precision):
        """The ``Ops`` of a layer with this ``precision``. Only CUDA kernels differ by it."""
        return self

    # ---- arrays in and out

    def asarray(self, value, name="array"):
        """``value`` as an array of this backend, without a copy where it already is one.

        Takes NumPy and CuPy arrays, nested lists, and objects with DLPack (torch tensors) or
        ``__cuda_array_interface__``. Arrays of the other byte order or at unaligned addresses are copied. Raises
        BackendError for a GPU array given to the NumPy backend, DtypeError for masked arrays and for what DLPack cannot
        hand over (bfloat16, sparse), TypeError for a tensor that requires grad; all name the argument.
        """
        return as_array(self.xp, self.name, value, name)

    def asfloat(self, value, dtype, name):
        """As ``asarray``, and raise DtypeError, which says how to convert, unless the dtype is ``dtype``."""
        return check_float(self.asarray(value, name), value, dtype, name)

    def to_numpy(self, array):
        """``array`` on the host."""
        return array.get() if hasattr(array, "get") and not isinstance(array, np.ndarray) else np.asarray(array)

    def bounded(self, values, stop):
        """``(values, wrong)``: integers, and those of them that are not at least 0 and below ``stop``, or None.

        It waits for a GPU; in an update that is recorded, where nobody may, all are made to fit and noted instead.
        """
        wrong = (values < 0) | (values >= stop)
        return values, values[wrong] if wrong.any() else None

    def update_graphs(self, rows, width):
        """As the ``UpdateGraphs`` of backends/cuda/recording.py; None where this backend records no updates."""

    def refuse_sizes(self, T, B, layers):
        """Raise ShapeError where a recurrent layer cannot take T timesteps or B sequences.

        It is called before anything is computed. Array code is limited by memory only. layers: a function that returns
        for each layer its ``schedules.Problem``, whether a backward pass follows, and the argument ``schedule``.
        """

    def synchronize(self):
        """Wait until everything launched so far is done (nothing to wait for on NumPy)."""
        if self.xp is not np:
            self.xp.cuda.get_current_stream().synchronize()

    def machine(self):
        """What decides the bits of this backend's results besides the code: a dictionary for JSON."""
        return host_machine(self.name)

    def empty_cache(self):
        """Return memory that is held for later calls to the system."""

    # ---- arrays of the time loop

    def empty_steps(self, T, B, F, dtype):
        """An uninitialised array (T, B, F) in the memory order that suits this backend's time loop.

        NumPy with a batch: feature-major, F outermost, so that ``steps[t].T`` (F, B) has contiguous rows, gates are
        contiguous blocks and a large GEMM still reads one matrix. Otherwise C order. ``gpurnn bench`` measured which.
        """
        if self.xp is np and B >= _FEATURE_MAJOR_FROM:
            return np.empty((F, T, B), dtype).transpose(1, 2, 0)
        return self.xp.empty((T, B, F), dtype)

    def schedule(self, problem, wanted="auto"):
        """``(name, reason)`` of the time loop for a ``schedules.Problem``. wanted: a layer's argument ``schedule``."""
        return "array code", "one timestep after another; fused kernels need the 'cuda' backend"

    def packed_bytes(self, problem, P, T, wanted="auto"):
        """Bytes that a layer's calls allocate for a while, besides the arrays that they return or save.

        They hold weights, inputs and states in the order in which matrix products read them. problem: a
        ``schedules.Problem``. P: size of h. T: timesteps. wanted: as in ``schedule``.
        """
        return 0

    # ---- one layer: W_ih x, then the time loop; the time loop in reverse, then the gradients of weights and of x

    def streams(self, count):
        """``Streams`` for ``count`` layers at once."""
        return ONE_STREAM if count == 1 else Streams(count)

    def layer_forward(self, cell, x, weights, states, lengths, options):
        """Run one layer with all its directions.

        cell: a ``cells.Cell``. x: (T, B, I). weights: for each direction its ``cells.Weights``. states: for each
        direction its initial state, h (B, P) and the other states (B, H), arrays or numbers. lengths: NumPy integers
        (B,) or None. options: ``RunOptions``.

        Returns a ``SavedLayer``, a list of final states, and the output (T, B, D*P).
        """
        passes, finals = [], []
        T, B, _ = x.shape
        nothing = (None,) * len(weights)
        by_direction = (each or nothing for each in (options.masks, options.statistics, options.marks))
        rest = zip(*by_direction, strict=True)
        for w, state, reverse, more in zip(weights, states, options.directions, rest, strict=True):
            rows, G = len(w.ih), len(cell.gates)
            ax = self.empty_steps(T, B, rows // G * (cell.saved_blocks if options.save else G), x.dtype)
            self.multiply_inputs(w.read(x), w.ih, ax[:, :, :rows])
            if w.bias_ih is not None:
                ax[:, :, :rows] += input_bias(cell, w).astype(x.dtype, copy=False)
            inner = hidden_weights(cell, w, x.dtype)
            how = PassOptions(reverse, options.save, *more)
            saved, final = sequence_forward(self, cell, ax, inner, state, lengths, how)
            passes.append(saved)
            finals.append(final)
        saved = SavedLayer(cell, weights, x, lengths, passes)
        return saved, finals, self.output_of(passes, lengths, options.fresh_output)

    def reads_int8(self, cell, dtype):
        """Whether weights of a layer of this dtype may be an ``Int8Matrix``; cell: None for ``int8_product``."""

    def step_program(self, parts, B, dtype):
        """One timestep of ``parts`` for B sequences in one call, or None: see backends/steps.py."""

    def layer_backward(self, saved, grads, doutput, dstates, hooks=None, fresh_dx=True, dx=None):
        """The backward pass of ``layer_forward``: its mirror.

        saved: the ``SavedLayer``, which is used up. grads: the ``Gradients`` to add to. doutput: (T, B, D*P) or None.
        dstates: for each direction the gradients with respect to its final state, or None. hooks: None, or for each
        direction a ``hook`` as in ``sequence_backward``. fresh_dx: return a C-contiguous dx; otherwise it has the
        memory order of ``empty_steps``. dx: an array to add dx to instead, or None; False where nobody wants dx.

        Returns dx (T, B, I) or False, and for each direction the gradients with respect to its initial state, float32
        for 16-bit layers; and those with respect to the state that resets give, or None.
        """
        done = self.time_loop_backward(saved, doutput, dstates, hooks)
        if dx is None and saved.weights[0].reads is not None:
            dx = self.xp.zeros(saved.x.shape, saved.x.dtype)
        for d, (one, weights, gradients) in enumerate(zip(saved.passes, saved.weights, done, strict=True)):
            if grads.record is None:
                with grads.lock:
                    dax = add_weight_gradients(self, saved, one, grads.weights[d], gradients)
            else:
                dax, terms = weight_terms(self, saved, one, grads.weights[d], gradients)
                grads.record(d, terms)
            one.others = ()  # freed before dx is made
            if dx is False:
                continue
            weight_ih, accumulate = self.rounded(weights.ih, saved.x.dtype), dx is not None
            if not accumulate:
                dx = (self.empty if fresh_dx else self.empty_steps)(*saved.x.shape, saved.x.dtype)
            for chunk in self.time_chunks(*dx.shape[:2]):
                self.product(flat(dax[chunk]), weight_ih, flat(weights.read(dx[chunk])), accumulate)
        return dx, [gradients.dstate for gradients in done], [gradients.dreset for gradients in done]

    def time_loop_backward(self, saved, doutput, dstates, hooks):
        """The part of ``layer_backward`` that goes through time: ``PassGradients`` for each direction."""
        done, P = [], saved.passes[0].h.shape[2]
        for d, (one, weights) in enumerate(zip(saved.passes, saved.weights, strict=True)):
            part = None if doutput is None else doutput[:, :, d * P : (d + 1) * P]
            inner, hook = hidden_weights(saved.cell, weights, one.gates.dtype), None if hooks is None else hooks[d]
            done.append(sequence_backward(self, saved.cell, one, inner, part, dstates[d], saved.lengths, hook))
        return done

    def side_by_side(self, outputs, empty):
        """The outputs of all directions, each (T, B, P), as one (T, B, D*P) made by ``empty``."""
        T, B, P = outputs[0].shape
        whole = empty(T, B, P * len(outputs), outputs[0].dtype)
        for d, part in enumerate(outputs):
            self.copy_steps(whole[:, :, d * P : (d + 1) * P], part)
        return whole

    def zero_past_end(self, steps, lengths):
        """Set ``steps`` (T, B, F) to zero in place where a sequence is past its end, even where it is NaN; return it.

        It does not use ``where``, because CuPy's turns bfloat16 into float32.
        """
        return steps if lengths is None else self._zero(steps, np.arange(len(steps))[:, None] >= lengths)

    def zero_silent(self, steps, lengths, marks):
        """Set ``steps`` (T, B, F) to zero in place where an output is zero; return it. marks: of any direction."""
        return self.zero_past_end(steps, lengths) if marks is None else self._zero(steps, marks.silent())

    def _zero(self, steps, where):
        """``steps`` (T, B, F), zero ``where`` (T, B)."""
        if self.xp is np:
            steps[where] = 0
        else:  # CuPy waits for the GPU to count the booleans of an index
            self.xp.copyto(steps, 0, where=self.xp.asarray(where)[:, :, None])
        return steps

    def empty(self, T, B, F, dtype):
        """An uninitialised array (T, B, F) in C order."""
        return self.xp.empty((T, B, F), dtype)

    # ---- matrix products, and accumulation into gradients

    def product(self, a, b, out, accumulate=False):
        """``out = a @ b``, or ``out += a @ b``, for matrices of any memory order.

        a and b have the same dtype. out has it too, or is float32 where a and b have 16 bits; these are multiplied and
        added in float32.
        """
        if accumulate:
            out += (upcast(a) @ upcast(b)).astype(out.dtype, copy=False)
        elif out.dtype == a.dtype == compute_dtype(a.dtype):
            self.xp.matmul(a, b, out=out)
        else:
            out[...] = upcast(a) @ upcast(b)

    def rounded(self, array, dtype):
        """``array`` in ``dtype``, as products of 16-bit layers take their parameters; itself where it has it."""
        return array.astype(dtype, copy=False)

    def accumulate_product(self, grad, d, x):
        """``grad += d^T x`` summed over all steps: one GEMM. grad: (M, N); d: (T, B, M) or (T*B, M); x alike."""
        self.product(flat(d).T, flat(x), grad, accumulate=True)

    def sum_steps(self, d):
        """The sum of d, (T, B, M) or (T*B, M), over all steps, in a fixed order: (M,).

        NumPy sums pairwise along contiguous steps. Along rows it adds one by one, so these are summed in float64.
        """
        rows = upcast(flat(d))
        contiguous = rows.strides[0] == rows.itemsize
        return rows.sum(axis=0, dtype=None if contiguous else np.float64).astype(rows.dtype, copy=False)

    # ---- softmax cross-entropy

    def softmax_forward(self, logits, rows, labels, smoothing):
        """The cross-entropy of each row that counts.

        logits: (N, V) float32 or float64. rows: int64 (count,), the rows that count, or None for all. labels: int64
        (count,). smoothing: of the labels, from 0 to 1.

        Returns the losses, float64 (count,), and for the backward pass the highest logit of each row (count,) and the
        sum of exp(logits - highest), float64 (count,).
        """
        # Softmax as exp(logits - highest) / total: the shift prevents exp from overflowing, and two separate factors
        # are more exact than exp(logits - log_sum_exp) where the logits are large.
        xp, count, V = self.xp, labels.size, logits.shape[1]
        highest, total = xp.empty((count, 1), logits.dtype), xp.empty((count, 1), np.float64)
        losses = xp.empty(count, np.float64)
        for part, index in blocks(rows, count, V, xp):
            z = logits[index]
            highest[part] = z.max(axis=1, keepdims=True)
            z = z - highest[part]
            log_odds = z[xp.arange(len(z)), labels[part]].astype(np.float64)
            if smoothing:
                log_odds = (1 - smoothing) * log_odds + smoothing * z.mean(axis=1, dtype=np.float64)
            total[part] = xp.exp(z, out=z).sum(axis=1, dtype=np.float64, keepdims=True)
            losses[part] = xp.log(total[part, 0]) - log_odds
        return losses, highest[:, 0], total[:, 0]

    def softmax_backward(self, logits, rows, labels, smoothing, highest, total, dlosses, out=None):
        """The gradient with respect to the logits, (N, V), zero in rows that do not count.

        dlosses: (N, 1), the gradients with respect to the rows' losses. out: the array to write to, which may be
        ``logits``, or None for a fresh one. The others are those of ``softmax_forward``.
        """
        xp, dtype, V = self.xp, logits.dtype, logits.shape[1]
        dlogits = self.derivative_array(logits, rows, out)
        for part, index in blocks(rows, labels.size, V, xp):
            scale = dlosses[index]
            d = logits[index] - highest[part, None]
            xp.exp(d, out=d)
            d *= (scale / total[part, None]).astype(dtype)
            if smoothing:
                d -= scale * dtype.type(smoothing / V)
            d[xp.arange(len(d)), labels[part]] -= scale[:, 0] * dtype.type(1 - smoothing)
            dlogits[index] = d
        return dlogits

    def derivative_array(self, logits, rows, out):
        """``out``, or a fresh array like ``logits``, with zeros in the rows that do not count."""
        if out is None:
            return (self.xp.empty if rows is None else self.xp.zeros)(logits.shape, logits.dtype)
        if rows is not None:
            rest = self.xp.ones(len(logits), dtype=bool)
            rest[rows] = False
            out[rest] = 0
        return out

    def optimize(self, kernel, params, grads, arrays, scalars, array_code):
        """Make an optimizer's update of a part of the flat buffers, in place.

        kernel: the rule, one of ``UPDATE_STATES``, or None or another name where no backend has compiled it. params,
        grads: (N,). arrays: the optimizer's state arrays by name. scalars: its numbers by name, in the order of
        kernels/sums/optimize.cu. array_code: the same update as a function of ``params``, ``grads`` and ``arrays``;
        backends with compiled updates call it for other rules alone.
        """
        array_code(params, grads, arrays)

    def clip_norm(self, grads, max_norm):
        """Scale the flat ``grads`` in place so that their norm is at most ``max_norm``.

        Returns the norm before, as a scalar of this backend in float64. Where it is not finite, ``grads`` stay as they
        are.
        """
        xp = self.xp
        norm = xp.sqrt(self.sum_squares(grads))
        if max_norm != math.inf:
            scale = xp.where(xp.isfinite(norm), xp.minimum(max_norm / (norm + 1e-6), 1.0), 1.0)
            if xp is not np or scale < 1:  # asking would wait for a GPU
                xp.multiply(grads, scale.astype(grads.dtype), out=grads)
        return norm

    def sum_squares(self, grads):
        """The sum of the squares of ``grads`` (N,) in float64, in a fixed order."""
        xp = self.xp
        block = max(1, min(grads.size, 1 << 14 if xp is np else 1 << 22))
        squares, total = xp.empty(block, np.float64), xp.zeros((), np.float64)
        with np.errstate(over="ignore"):  # a float64 gradient beyond 1e154 gives the norm inf
            for start in range(0, grads.size, block):
                g = grads[start : start + block]
                total += xp.multiply(g, g, out=squares[: g.size], dtype=np.float64).sum()
        return total

    def dropout_mask(self, shape, rate, seed, layer, call):
        """``rng.dropout_mask`` as an array of this backend."""
        return rng.dropout_mask(shape, rate, seed, layer, call, self.xp)

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
        stops = xp.concatenate([starts[1:], xp.asarray([index.size])])
        d = upcast(d[order])
        if xp is np:  # add.reduceat works column by column and takes up to 5 times as long as this loop over the ids
            for row, start, stop in zip(rows[starts].tolist(), starts.tolist(), stops.tolist(), strict=True):
                grad[row] += d[start] if stop == start + 1 else np.add.reduce(d[start:stop])
        else:  # CuPy has no reduceat: take differences of a float64 prefix sum, whose order is fixed
            sums = xp.cumsum(d, axis=0, dtype=np.float64)
            totals = sums[stops - 1]
            totals[1:] -= sums[stops[:-1] - 1]
            grad[rows[starts]] += totals.astype(grad.dtype)


def refuse_uncountable(T, B, backend):
    """Raise ShapeError for more timesteps or sequences than an ``int`` of compiled code holds."""
    for name, count, most in (("T", T, _MOST - 1), ("B", B, _MOST)):  # there is one more state than timesteps
        if count > most:
            raise ShapeError(f"x: {name} = {count} is more than the {most} that backend {backend!r} takes in one call")
