"""The recurrent layers: RNN, LSTM, GRU and their single-step cells.

A layer is a stack of (layer, direction) passes. A pass is three acts: the input GEMM over all of time, the time
loop (``Ops.layer_forward`` with a cell of cells.py), and in the backward pass the loop in reverse followed by one GEMM
over all of time for each weight. Names, shapes and equations follow ``torch.nn``; weights load unchanged.
"""

import contextlib
import math
import threading
from dataclasses import dataclass, field

import numpy as np

from . import cells, rng
from .arrays import refuse_function
from .backends.cuda.schedules import SCHEDULES, Problem
from .backends.ops import flat
from .dtypes import upcast
from .errors import ShapeError, check_choice, check_flag, check_number, check_shape, check_size, checked, refuse_unknown
from .gradients import StepNorms, active_flow, adding
from .masks import check_lengths
from .module import Module, check_unspent

_CALL = ("x", "state", "lengths", "return_all")  # arguments of a layer's call
INITIALIZERS = ("uniform", "xavier", "orthogonal", "identity")


@dataclass
class Plan:
    """What a call with (T, B) would do, and the bytes it needs.

    schedule, reason: the time loop that runs and why not a faster one. cache_bytes: what forward keeps for backward,
    per (layer, direction) T*B*K*H + (T+1)*B*(P + H where there is a c) numbers (a wavefront adds one step for each of
    its stretches), with K = 1 RNN, 4 GRU and LSTM, 5 LSTM with projection, and one T*B*I for each layer whose input is
    made here (dropout, two directions, a kernel); c is float32 beside 16-bit numbers. output_bytes: the output.
    backward_bytes: largest extra memory of backward, which works inside the cache: dx and the scratch of a step; a
    wavefront holds all dx until the end. packed_bytes: what compiled code on a CPU takes for a while to copy weights,
    inputs and states into the order in which its products read them, the most of any layer. In long calls that are x
    or h of all steps, T*B rows of I or P numbers, each made up to whole vectors: the gradients of the weights are
    products over all of time. Not all of this is there at once: the total is an upper bound.
    """

    schedule: str
    reason: str
    cache_bytes: int
    output_bytes: int
    backward_bytes: int
    packed_bytes: int = 0

    @property
    def total_bytes(self):
        """Bytes of a forward and backward pass together, beyond the inputs and the parameters."""
        return self.cache_bytes + self.output_bytes + self.backward_bytes + self.packed_bytes


@dataclass
class Steps:
    """Everything one layer and direction did: h (T, B, P), c (T, B, H) or None, gates name -> (T, B, H).

    Gates are activated values: LSTM i f g o; GRU r z n, and q = W_hn h + b_hn (``reset_after``) or p = r h (original
    form); the RNN has none. Zero past the end of a sequence.
    """

    h: object
    c: object = None
    gates: dict = field(default_factory=dict)


class _Recurrent(Module):
    """The part that the three layers share; see ``LSTM`` for the arguments."""

    stateful = True
    takes_lengths = True
    once = True

    def __init__(
        self,
        cell,
        /,
        input_size,
        hidden_size,
        num_layers=1,
        bias=True,
        batch_first=False,
        dropout=0.0,
        bidirectional=False,
        proj_size=0,
        *,
        reverse=False,
        learn_state=False,
        init="uniform",
        forget_bias=None,
        chrono=None,
        schedule="auto",
        wavefront=0,
        backend="auto",
        dtype="float32",
        precision="float32",
        seed=None,
    ):
        super().__init__(backend, dtype, seed, precision)
        self.bias, self.batch_first = check_flag("bias", bias), batch_first
        self.bidirectional, self.reverse = check_flag("bidirectional", bidirectional), check_flag("reverse", reverse)
        self.learn_state = check_flag("learn_state", learn_state)
        self.cell = cell
        self.schedule = schedule
        self.input_size = check_size("input_size", input_size)
        self.num_layers = check_size("num_layers", num_layers)
        if isinstance(hidden_size, (list, tuple)):
            if len(hidden_size) != self.num_layers:
                raise ValueError(f"hidden_size: expected one size for each of {num_layers} layers, got {hidden_size}")
            self.hidden_sizes = tuple(check_size("hidden_size", size) for size in hidden_size)
        else:
            self.hidden_sizes = (check_size("hidden_size", hidden_size),) * self.num_layers
        self.hidden_size = hidden_size
        self.dropout = dropout
        if bidirectional and reverse:
            raise ValueError("reverse means one direction, backwards in time: it excludes bidirectional")
        self.wavefront = wavefront
        self.proj_size = check_size("proj_size", proj_size, minimum=0)
        if self.proj_size and self.proj_size >= min(self.hidden_sizes):
            raise ValueError(f"proj_size has to be smaller than hidden_size, got {proj_size} and {hidden_size}")
        if forget_bias is not None and chrono is not None:
            raise ValueError("forget_bias and chrono both set the forget gate's bias: give one of them")
        for name, value in (("forget_bias", forget_bias), ("chrono", chrono)):
            if value is not None and not bias:
                raise ValueError(f"{name} needs bias=True")
        self.init = check_choice("init", init, INITIALIZERS)
        self._directions = (False, True) if bidirectional else (self.reverse,)
        self._by_layer = None, []  # a buffer, and the weights that ``_weights`` has made of it
        self._declare(self._initial_values(forget_bias, chrono))

    # ---- what may be set later

    @checked
    def batch_first(self, value):
        return check_flag("batch_first", value)

    @checked
    def schedule(self, value):
        return check_choice("schedule", value, SCHEDULES)

    @checked
    def dropout(self, value):
        value = check_number("dropout", value, 0, 1)
        if value and self.num_layers == 1:
            raise ValueError(
                "dropout acts between recurrent layers: it needs num_layers > 1; put a Dropout layer behind"
            )
        return value

    @checked
    def wavefront(self, value):
        value = check_size("wavefront", value, minimum=0)
        if value and self.bidirectional:
            raise ValueError(
                "wavefront: with two directions a layer needs the whole of the one below before it can begin"
            )
        return value

    # ---- parameters

    def __getstate__(self):
        return super().__getstate__() | {"_by_layer": (None, [])}

    def _passes(self):
        """(index in the state, layer, runs in reverse, name suffix) of every pass, in the order of the state."""
        D = len(self._directions)
        for layer in range(self.num_layers):
            for d, reverse in enumerate(self._directions):
                yield layer * D + d, layer, reverse, self._suffix(layer, d)

    def _suffix(self, layer, direction):
        return f"_l{layer}" + ("_reverse" if direction else "")

    def _sizes(self, layer):
        """(input, hidden, output) sizes of a layer's passes."""
        D = len(self._directions)
        inside = self.input_size if layer == 0 else D * (self.proj_size or self.hidden_sizes[layer - 1])
        return inside, self.hidden_sizes[layer], self.proj_size or self.hidden_sizes[layer]

    def _initial_values(self, forget_bias, chrono):
        """Name -> initial NumPy array of every parameter, in torch's order."""
        values = {}
        G = self.cell.gates
        for _, layer, _, suffix in self._passes():
            inside, H, P = self._sizes(layer)
            blocks = {"weight_ih": (G, H, inside), "weight_hh": (G, H, P)}
            if self.bias:
                blocks |= {"bias_ih": (G, H), "bias_hh": (G, H)}
            if self.proj_size:
                blocks["weight_hr"] = (1, P, H)
            for name, shape in blocks.items():
                block = self._draw(name + suffix, shape, H)
                if name.startswith("bias"):
                    self._set_memory(block, name + suffix, forget_bias, chrono)
                values[name + suffix] = block.reshape(-1, *shape[2:])
            if self.learn_state:
                values["initial_h" + suffix] = np.zeros(P)
                if self.cell.states == 2:
                    values["initial_c" + suffix] = np.zeros(H)
        return values

    def _set_memory(self, block, name, forget_bias, chrono):
        """Overwrite, in a bias (G, H), the gate that keeps the past: f of the LSTM, z of the GRU, both second."""
        first = name.startswith("bias_ih")  # b_hh, its addend, is then zero
        if forget_bias is not None:
            block[1] = check_number("forget_bias", forget_bias) if first else 0.0
        elif chrono is not None:
            segment = check_size("chrono", chrono, 2) - 1
            drawn = rng.uniform(block[1].shape, 1, segment, self.seed, rng.name_key("chrono" + name), dtype=np.float64)
            block[1] = np.log(drawn) if first else 0.0
            if self.cell.states == 2:
                block[0] = -block[1]

    def _draw(self, name, shape, H):
        """Initial float64 values of one parameter, gate by gate: shape (G, rows, columns) or (G, rows)."""
        key = rng.name_key(name)
        if self.init == "uniform":  # torch's: U(-1/sqrt(H), 1/sqrt(H)) for everything
            bound = 1 / math.sqrt(H)
            return rng.uniform(shape, -bound, bound, self.seed, key, dtype=np.float64)
        if len(shape) == 2:
            return np.zeros(shape)
        if self.init == "orthogonal" and not name.startswith("weight_ih"):
            return np.stack([cells.init_orthogonal(m) for m in rng.normal(shape, self.seed, key, dtype=np.float64)])
        if self.init == "identity":
            if name.startswith("weight_ih"):
                return 0.001 * rng.normal(shape, self.seed, key, dtype=np.float64)
            return np.broadcast_to(np.eye(*shape[1:]), shape).copy()
        bound = math.sqrt(6 / (shape[1] + shape[2]))  # Glorot & Bengio 2010, for each gate
        return rng.uniform(shape, -bound, bound, self.seed, key, dtype=np.float64)

    def _weights(self, layer):
        """The ``cells.Weights`` of a layer's directions."""
        buffer, by_layer = self._by_layer
        if buffer is not self.flat_params:  # new where the layer has moved into a model
            names = ("weight_ih", "weight_hh", "bias_ih", "bias_hh", "weight_hr")
            buffer, directions = self.flat_params, range(len(self._directions))
            by_layer = [
                [cells.Weights(*(self.params.get(name + self._suffix(k, d)) for name in names)) for d in directions]
                for k in range(self.num_layers)
            ]
            self._by_layer = buffer, by_layer  # both at once: other threads may ask, too
        return by_layer[layer]

    # ---- calling

    def __call__(self, x, state=None, lengths=None, *, return_all=False, **unknown):
        """Outputs and final state; keeps nothing for backward.

        x: (T, B, I), or (B, T, I) with ``batch_first``, or (T, I) for one sequence; the layer's dtype.
        state: (L*D, B, P), the LSTM's a pair (h (L*D, B, P), c (L*D, B, H)); without the B axis for one sequence; where
            layers differ in size, a tuple of (D, B, P) arrays, one for each layer (the LSTM: a pair of such tuples).
            None means the learned initial state, or zeros. Of a 16-bit layer c is float32 wherever it is returned, and
            so is the derivative by it: a sequence in pieces is what it is in one call. The layer's dtype is taken, too.
        lengths: (B,) integers 0..T in any order, host or device, or None. Outputs past the end are zero, the final
            state is that at each sequence's true end, the reverse direction starts there. The final state of a sequence
            of length 0 is its initial state (ONNX Runtime gives zeros), and outputs past the end are never repeated (as
            TensorFlow does). What stands in x past the end, or in the derivatives there, is not read.

        Returns (output (T, B, D*P), state), and with ``return_all`` a third: a list of ``Steps``, one for each layer
        and direction. Raises ShapeError, DtypeError, BackendError before anything is computed.
        """
        if unknown:
            refuse_unknown(type(self).__name__, unknown, _CALL)
        return self._forward(x, state, lengths, return_all, save=False)

    def forward(self, x, state=None, lengths=None, *, return_all=False, retain=False, **unknown):
        """As calling the layer, for training: returns (output, state, backward), with ``return_all`` the steps last.

        ``dx, dstate = backward(doutput=None, dstate=None)``: derivatives of the loss by output and final state in, by x
        and initial state out, shaped alike; None means zeros, also for one of the LSTM's pair. Parameter gradients
        accumulate into ``grads``; with ``state=None`` and ``learn_state`` also those of the initial state. ``backward``
        works inside what forward kept and may run once; the layer itself may run many times before. With ``retain``
        backward may run many times: it then puts a copy of what it spends aside while it runs (``Plan.cache_bytes`` at
        most). Threads that call one ``backward`` take turns. x is kept by reference: leave it as it is until then.
        """
        if unknown:
            refuse_unknown(type(self).__name__, unknown, (*_CALL, "retain"))
        return self._forward(x, state, lengths, return_all, save=True, retain=retain)

    def step(self, x, state=None, **unknown):
        """One timestep for streaming: x (B, I) or (I,) -> (output (B, P), state), as the sequence form would give.
        In training mode each step draws the masks of a call of its own.

        Raises ValueError for layers that look into the future (bidirectional, reverse).
        """
        if unknown:
            refuse_unknown(type(self).__name__, unknown, _CALL[:2])
        if True in self._directions:
            raise ValueError("step: a layer that runs backwards in time needs the whole sequence")
        x = self.ops.asfloat(x, self.dtype, "x")
        if x.ndim not in (1, 2):
            raise ShapeError(f"x: expected one step, (B, {self.input_size}) or ({self.input_size},), got {x.shape}")
        axis = 1 if self.batch_first and x.ndim == 2 else 0
        output, state = self(self.xp.expand_dims(x, axis), state)
        return output.squeeze(axis), state

    def plan(self, T, B):
        """``Plan`` of a training call with x (T, B, I). Raises ShapeError for sizes that the call refuses."""
        T, B, D = check_size("T", T, 0), check_size("B", B, 0), len(self._directions)
        self.ops.refuse_sizes(T, B, lambda: self._loop_sizes(T, B, True))
        size, compute_size = self.dtype.itemsize, self.compute_dtype.itemsize
        segments = self._segments(T, watched=False)
        longest = max(segment.stop - segment.start for segment in segments)
        concurrent = self.num_layers if len(segments) > 1 else 1
        cache, slots = 0, T + len(segments)
        for _, layer, _, _ in self._passes():
            _, H, P = self._sizes(layer)
            cache += T * B * self.cell.saved_blocks * H * size + slots * B * P * size
            cache += slots * B * H * compute_size if self.cell.states == 2 else 0
        for layer in range(1, self.num_layers):
            if D == 2 or self.dropout or self.ops.name == "cuda":  # the kernel writes an output beside the states
                cache += T * B * self._sizes(layer)[0] * size
        widest = max(self._sizes(layer)[0] for layer in range(self.num_layers))
        H = max(self.hidden_sizes)
        scratch = B * H * (2 * self.cell.saved_blocks + 4) + min(T * B * H, 1 << 18)
        schedules, packed = {}, 0
        for layer in range(self.num_layers):
            for backward in (False, True):
                inputs, H, P = self._sizes(layer)
                problem = Problem(
                    self.cell.kernel, self.cell.gates, H, longest, B, D, self.dtype.name, projected=P != H,
                    backward=backward, I=inputs, concurrent=concurrent,
                )  # fmt: skip
                packed = max(packed, self.ops.packed_bytes(problem, P, longest))
                name, why = self.ops.schedule(problem, self.schedule)
                schedules.setdefault((name, why), []).append(f"layer {layer} {'backward' if backward else 'forward'}")
        schedule = ", ".join(dict.fromkeys(name for name, _ in schedules))
        lines = [f"{', '.join(who)}: {name}, {why}" for (name, why), who in schedules.items()]
        reason = "; ".join(lines) if len(schedules) > 1 else why
        if concurrent > 1:
            reason = f"{self.num_layers} layers side by side, each {longest} timesteps behind the one below; {reason}"
        return Plan(
            schedule=schedule,
            reason=reason,
            cache_bytes=cache,
            output_bytes=T * B * D * self._sizes(self.num_layers - 1)[2] * size,
            backward_bytes=T * B * widest * D * size + scratch * compute_size,
            packed_bytes=packed,
        )

    # ---- forward

    def _forward(self, x, state, lengths, return_all, save, retain=False):
        return_all, retain = check_flag("return_all", return_all), check_flag("retain", retain)
        x, single = self._check_input(x)
        T, B, _ = x.shape
        self.ops.refuse_sizes(T, B, lambda: self._loop_sizes(T, B, save))
        state_given = state is not None
        initial = given = self._initial_state(state, B, single)
        if lengths is not None:
            lengths = check_lengths([lengths] if single and np.ndim(lengths) == 0 else lengths, T, B)
            if bool((lengths == T).all()):
                lengths = None
            else:  # padding may hold anything, even NaN, and must not reach the weights' gradient
                x = self.ops.zero_past_end(x.copy(), lengths)
                if state_given:
                    initial = self._without_unused(given, lengths)
        L, D, call = self.num_layers, len(self._directions), self.calls
        masks = [None] * L  # of the dropout behind each layer
        if self.training and self.dropout > 0:
            masks[:-1] = [self._mask(layer, (T, B, self._sizes(layer + 1)[0]), call) for layer in range(L - 1)]
        segments = self._segments(T, return_all or active_flow() is not None)
        at = [initial[layer * D : (layer + 1) * D] for layer in range(L)]  # the state that each layer has come to
        passes, steps, outputs = [], [], []
        with self.ops.streams(L if len(segments) > 1 else 1) as streams:
            for segment in segments:
                y, part = x if len(segments) == 1 else x[segment], _of_segment(lengths, segment)
                passes.append([])
                for layer in range(L):
                    with streams.on(layer, after=layer - 1):
                        all_saved, at[layer], y = self.ops.layer_forward(
                            self.cell, y, self._weights(layer), at[layer], part, self._directions, save or return_all,
                            fresh_output=layer == L - 1, schedule=self.schedule, concurrent=streams.count,
                        )  # fmt: skip
                        if return_all:
                            steps += [self._steps(w, r, part) for w, r in zip(all_saved, self._directions, strict=True)]
                        if masks[layer] is not None:
                            y = self._drop(y, masks[layer][segment])
                    if save or streams.count > 1:  # a stream may still read what another has written
                        passes[-1].append(all_saved)
                outputs.append(y)
        if L > 1 and masks[0] is not None:
            self.calls += 1
        y, final = self._joined(outputs), [state for states in at for state in states]
        if initial is not given:
            final = self._with_unused(final, given, lengths)
        returned = [self._outward(y, single), self._pack_state(final, single)]
        if save:
            returned.append(self._make_backward(segments, passes, masks, state_given, lengths, y.shape, single, retain))
        if return_all:
            returned.append([self._steps_outward(s, single) for s in steps])
        return tuple(returned)

    def _loop_sizes(self, T, B, save):
        """For each layer the arguments of ``CudaOps.candidates`` in a call with (T, B)."""
        segments = self._segments(T, watched=False)
        longest, concurrent = (
            max(segment.stop - segment.start for segment in segments),
            self.num_layers if len(segments) > 1 else 1,
        )
        for layer in range(self.num_layers):
            inputs, H, P = self._sizes(layer)
            yield (
                save, self.schedule, self.cell.kernel, self.cell.gates, H, longest, B, len(self._directions),
                self.dtype.name, P != H, inputs, concurrent,
            )  # fmt: skip

    def _segments(self, T, watched):
        """The stretches of time after each of which the next layer may begin, in the order of the time loop. watched:
        whether somebody wants to see all of time at once."""
        size = self.wavefront
        if not size or watched or self.num_layers == 1 or size >= T:
            return [slice(0, T)]
        segments = [slice(t, min(t + size, T)) for t in range(0, T, size)]
        return segments[::-1] if self.reverse else segments

    def _joined(self, parts):
        """One array of those of all spans."""
        if len(parts) == 1:
            return parts[0]
        return self.xp.concatenate(parts[::-1] if self.reverse else parts)

    def _mask(self, layer, shape, call):
        """Which of a layer's outputs the next one sees, in the memory order of these outputs."""
        mask = self.ops.dropout_mask(shape, self.dropout, self.seed, rng.name_key(f"{self.name}.between{layer}"), call)
        placed = self.ops.empty_steps(*shape, mask.dtype)
        if placed.strides == mask.strides:
            return mask
        self.ops.copy_steps(placed, mask)
        return placed

    def _drop(self, x, mask):
        scale = 0.0 if self.dropout == 1 else 1 / (1 - self.dropout)
        out = self.ops.empty_steps(*x.shape, self.dtype)
        self.xp.multiply(x, mask, out=out)
        self.xp.multiply(out, self.dtype.type(scale), out=out)
        return out

    def _steps(self, saved, reverse, lengths):
        H = saved.gates.shape[2] // self.cell.saved_blocks

        def own(array):
            whole = self.ops.side_by_side([array], self.ops.empty)
            return self.ops.zero_past_end(whole, lengths)

        c = None if saved.c is None else own(saved.states("c", reverse))
        gates = {name: own(saved.gates[:, :, k * H : (k + 1) * H]) for k, name in enumerate(self.cell.names)}
        return Steps(own(saved.states("h", reverse)), c, gates)

    def _steps_outward(self, steps, single):
        gates = {name: self._outward(gate, single) for name, gate in steps.gates.items()}
        c = None if steps.c is None else self._outward(steps.c, single)
        return Steps(self._outward(steps.h, single), c, gates)

    # ---- backward

    def _make_backward(self, segments, passes, masks, state_given, lengths, output_shape, single, retain):
        cache, spent, then, versions = [passes], [], self._as_now(), self.versions()
        turn = threading.Lock()  # backward works inside what forward kept: one thread at a time

        def check(dstate, name="dstate"):
            """``dstate`` for each pass; raises, before anything is changed, where backward cannot run."""
            if len(segments) > 1 and active_flow() is not None:
                raise RuntimeError("gradient flow: forward ran as a wavefront. Call forward, too, while it is recorded")
            if dstate is None:
                return [None] * (then.num_layers * len(then._directions))
            return then._unpack_state(dstate, output_shape[1], single, name)

        def backward(doutput=None, dstate=None):
            if doutput is not None:
                doutput = then._check_doutput(doutput, output_shape, single)
            dfinal = given = check(dstate)
            if dstate is not None and lengths is not None:
                dfinal = then._without_unused(given, lengths)
            then.check_versions(versions)
            with turn:
                check_unspent(spent)
                if not retain:
                    spent.append(True)
                with _retained(cache[0]) if retain else contextlib.nullcontext(cache.pop()) as passes:
                    dx, dinitial = then._backward(segments, passes, masks, doutput, dfinal, lengths)
            if dfinal is not given:
                dinitial = then._with_unused(dinitial, given, lengths)
            if then.learn_state and not state_given:
                for (_, _, _, suffix), parts in zip(then._passes(), dinitial, strict=True):
                    for name, part in zip(("initial_h", "initial_c"), parts, strict=False):
                        if then._trains(name + suffix):
                            with adding(then.grads):
                                then.grads[name + suffix] += upcast(part).sum(axis=0)
            return then._outward(dx, single), then._pack_state(dinitial, single)

        backward.check = check
        return backward

    def _backward(self, segments, passes, masks, doutput, dfinal, lengths):
        L, D = self.num_layers, len(self._directions)
        at = [dfinal[layer * D : (layer + 1) * D] for layer in range(L)]  # by the state that each layer has come to
        dxs, held = [], []
        with self.ops.streams(L if len(segments) > 1 else 1) as streams:
            for segment in reversed(segments):
                dy, part, stack = doutput, _of_segment(lengths, segment), passes.pop()
                if dy is not None and len(segments) > 1:
                    dy = dy[segment]
                for layer in reversed(range(L)):
                    all_saved = stack.pop()
                    with streams.on(layer, after=layer + 1 if layer < L - 1 else -1):
                        if masks[layer] is not None:
                            dy = self._drop(dy, masks[layer][segment])
                        dy, at[layer] = self._layer_backward(layer, all_saved, dy, at[layer], part)
                    if streams.count > 1:  # a stream may still read what another has written
                        held.append((all_saved, dy))
                dxs.append(dy)
        return self._joined(dxs[::-1]), [state for states in at for state in states]

    def _layer_backward(self, layer, all_saved, doutput, dstates, lengths):
        """The derivatives by a layer's input and by its initial state; those of its weights are added to ``grads``."""
        weights, suffixes = self._weights(layer), [self._suffix(layer, d) for d in range(len(all_saved))]
        hooks = [self._observer(s, saved.h.shape) for s, saved in zip(suffixes, all_saved, strict=True)]
        done = self.ops.layer_backward(
            self.cell, all_saved, weights, doutput, dstates, lengths, self._directions, hooks
        )
        dx = None
        for d, (saved, (_, dh_steps)) in enumerate(zip(all_saved, done, strict=True)):
            with adding(self.grads):
                self._weight_gradients(saved, self._directions[d], dh_steps, layer, suffixes[d])
            saved.c = None  # freed before dx is made
            dx = self._input_gradient(saved, layer, weights[d].ih.astype(self.dtype, copy=False), dx)
        return dx, [dstate for dstate, _ in done]

    def _weight_gradients(self, saved, reverse, dh_steps, layer, suffix):
        """The gradients of one direction's weights, each one GEMM over all of time; then ``saved.gates`` holds
        the gradients of ax first."""
        ops, grads, cell, H = self.ops, self.grads, self.cell, self._sizes(layer)[1]
        h_old, rows = saved.old_h(reverse), cell.gates * H
        d, rest = saved.gates[:, :, :rows], saved.gates[:, :, rows:]
        dweight_hh = grads["weight_hh" + suffix]
        if not self._trains("weight_hh" + suffix):
            pass
        elif self._original_gru:  # n sees p = r h instead of h
            ops.accumulate_product(dweight_hh[: 2 * H], d[:, :, : 2 * H], h_old)
            ops.accumulate_product(dweight_hh[2 * H :], d[:, :, 2 * H :], rest)
        else:
            ops.accumulate_product(dweight_hh, d, h_old)
        if dh_steps is not None and self._trains("weight_hr" + suffix):
            ops.accumulate_product(grads["weight_hr" + suffix], dh_steps, rest)
        inner, outer = (self.bias and self._trains(name + suffix) for name in ("bias_hh", "bias_ih"))
        if inner or outer:
            dbias = ops.sum_steps(d)
        if inner:
            grads["bias_hh" + suffix] += dbias
        if self._reset_after:  # from here on by ax_n instead of q
            d[:, :, 2 * H :] = rest
            if outer:
                dbias[2 * H :] = ops.sum_steps(rest)
        if outer:
            grads["bias_ih" + suffix] += dbias
        if self._trains("weight_ih" + suffix):
            ops.accumulate_product(grads["weight_ih" + suffix], d, saved.x)

    def _input_gradient(self, saved, layer, weight_ih, dx):
        """``dx`` (None for the first direction) plus the derivative by a layer's input, (T, B, I)."""
        T, B, inside = saved.x.shape
        d = flat(saved.gates[:, :, : self.cell.gates * self._sizes(layer)[1]])
        if dx is None:
            dx = (self.ops.empty_steps if layer else self.ops.empty)(T, B, inside, self.dtype)
            self.ops.product(d, weight_ih, flat(dx))
        else:
            self.ops.product(d, weight_ih, flat(dx), accumulate=True)
        return dx

    def _observer(self, suffix, slots):
        """The hook that records the gradient flow in the backward pass, or None where nobody asked for it."""
        flow = active_flow()
        if flow is None:
            return None
        xp, (T, B, _) = self.xp, slots
        norms = [xp.zeros((T - 1, B)) for _ in range(self.cell.states)]
        name = f"{self.name}.{suffix[1:]}" if self.name else suffix[1:]

        def hook(t, *derivatives):
            for norm, derivative in zip(norms, derivatives, strict=False):
                norm[t] = xp.sqrt(xp.square(derivative.astype(np.float64)).sum(axis=0))
            if t == last:
                flow[name] = StepNorms(*(self.ops.to_numpy(norm) for norm in norms))

        last = T - 2 if name.endswith("_reverse") or self.reverse else 0
        return hook

    # ---- arrays in and out

    def _check_input(self, x):
        """``x`` as (T, B, I) and whether it came as a single sequence (T, I)."""
        x = self.ops.asfloat(x, self.dtype, "x")
        if x.ndim not in (2, 3):
            raise ShapeError(f"x: expected 2-D (one sequence) or 3-D (a batch), got {x.ndim}-D {x.shape}")
        if x.shape[-1] != self.input_size:
            raise ShapeError(f"x: last axis must be equal to input_size. Expected {self.input_size}, got {x.shape[-1]}")
        single = x.ndim == 2
        if single:
            x = x[:, None, :]
        elif self.batch_first:
            x = x.transpose(1, 0, 2)
        return x, single

    def _check_doutput(self, doutput, shape, single):
        """``doutput`` as (T, B, D*P)."""
        doutput = self.ops.asfloat(doutput, self.dtype, "doutput")
        T, B, F = shape
        check_shape("doutput", doutput, (T, F) if single else (B, T, F) if self.batch_first else shape)
        if single:
            return doutput[:, None, :]
        return doutput.transpose(1, 0, 2) if self.batch_first else doutput

    def _outward(self, array, single):
        """(T, B, F) as the caller knows it."""
        if single:
            return array[:, 0]
        return array.transpose(1, 0, 2) if self.batch_first else array

    def _state_kinds(self):
        """(name, size in each layer) of h, and of c for the LSTM."""
        sizes = [self._sizes(layer) for layer in range(self.num_layers)]
        kinds = [("h", [P for _, _, P in sizes]), ("c", [H for _, H, _ in sizes])]
        return kinds[: self.cell.states]

    def _state_dtype(self, kind):
        """What a state is stored in, within a call and at its borders: h is rounded to the layer's dtype in every step,
        c adds up over time."""
        return self.compute_dtype if kind == "c" else self.dtype

    def _as_state(self, array, kind, name):
        """``array`` as a state, or the derivative by one: in what it is stored in, or in the layer's dtype."""
        given = self.ops.asarray(array, name)
        return given if given.dtype == self._state_dtype(kind) else self.ops.asfloat(array, self.dtype, name)

    def _initial_state(self, state, B, single):
        """For each pass the initial state as a tuple of (B, size) arrays, or of zeros."""
        if state is not None:
            return self._unpack_state(state, B, single, "state")
        initial = []
        for _, _, _, suffix in self._passes():
            if self.learn_state:
                rows = [
                    self.params[f"initial_{kind}{suffix}"].astype(self._state_dtype(kind), copy=False)
                    for kind, _ in self._state_kinds()
                ]
                initial.append(tuple(self.xp.broadcast_to(row, (B, row.size)) for row in rows))
            else:
                initial.append((0.0,) * self.cell.states)
        return initial

    def _without_unused(self, initial, lengths):
        """The initial states, zero for the sequences of length 0: no step reads theirs, but times the zero derivative
        of such a step a NaN would reach the weights. The same for the derivatives by their final states."""
        if lengths.all():
            return initial
        unused = self.xp.asarray(lengths == 0)[:, None]
        zeroed = [tuple(None if part is None else part.copy() for part in parts) for parts in initial]
        for part in (part for parts in zeroed for part in parts if part is not None):
            self.xp.copyto(part, 0, where=unused)
        return zeroed

    def _with_unused(self, final, given, lengths):
        """The final states, those of the sequences of length 0 as they came in; or derivatives, the other way round."""
        unused = self.xp.asarray(lengths == 0)[:, None]
        final = [tuple(part.copy() for part in parts) for parts in final]  # what backward reads keeps its zeros
        for parts, firsts in zip(final, given, strict=True):
            for part, first in zip(parts, firsts, strict=True):
                self.xp.copyto(part, 0 if first is None else first, where=unused)
        return final

    def _unpack_state(self, state, B, single, name):
        """A state as the caller knows it -> for each pass a tuple of (B, size) arrays, of derivatives also None for
        zeros; raises ShapeError."""
        D = len(self._directions)
        kinds = self._state_kinds()
        parts = _pair(state, name) if len(kinds) == 2 else (state,)
        unpacked = [() for _ in range(self.num_layers * D)]
        for (kind, sizes), part in zip(kinds, parts, strict=True):
            what = f"{name} {kind}" if len(kinds) == 2 else name
            if part is None and name.startswith("dstate"):
                rows = [None] * len(unpacked)
            elif len(set(sizes)) == 1:
                shape = (self.num_layers * D, B, sizes[0])
                rows = list(self._checked_state(part, kind, what, shape, single))
            else:
                refuse_function(what, part)
                if not isinstance(part, (tuple, list)) or len(part) != self.num_layers:
                    raise ShapeError(f"{what}: expected one array for each of {self.num_layers} layers of unequal size")
                rows = []
                for layer, array in enumerate(part):
                    if array is None and name.startswith("dstate"):
                        rows += [None] * D
                        continue
                    rows += list(self._checked_state(array, kind, f"{what}[{layer}]", (D, B, sizes[layer]), single))
            unpacked = [done + (row,) for done, row in zip(unpacked, rows, strict=True)]
        return unpacked

    def _checked_state(self, array, kind, name, shape, single):
        array = self._as_state(array, kind, name)
        check_shape(name, array, shape[::2] if single else shape)
        return array[:, None] if single else array

    def _pack_state(self, parts, single):
        """For each pass a tuple of (B, size) arrays -> the state as the caller knows it."""
        D = len(self._directions)
        packed = []
        for k, (kind, sizes) in enumerate(self._state_kinds()):
            dtype = self._state_dtype(kind)
            rows = [(part[k][0] if single else part[k]).astype(dtype, copy=False) for part in parts]
            if len(rows) == 1:
                packed.append(rows[0][None])
            elif len(set(sizes)) == 1:
                packed.append(self.xp.stack(rows))
            else:
                layers = range(self.num_layers)
                packed.append(tuple(self.xp.stack(rows[layer * D : (layer + 1) * D]) for layer in layers))
        return tuple(packed) if len(packed) == 2 else packed[0]

    @property
    def _reset_after(self):
        return isinstance(self.cell, cells.GRUStep) and self.cell.reset_after

    @property
    def _original_gru(self):
        return isinstance(self.cell, cells.GRUStep) and not self.cell.reset_after


def _pair(state, name):
    """``state``, a pair (h, c); raises ShapeError for another number of parts."""
    refuse_function(name, state)
    if not isinstance(state, (tuple, list)):
        raise ShapeError(f"{name}: expected a pair (h, c), got {type(state).__name__}")
    if len(state) != 2:
        raise ShapeError(f"{name}: expected a pair (h, c), got a {type(state).__name__} of {len(state)}")
    return state


@contextlib.contextmanager
def _retained(passes):
    """Lists of the same ``Saved``s for a backward to spend; afterwards these are what they were."""
    all_saved = [saved for layers in passes for directions in layers for saved in directions]
    copies = [(saved, saved.gates.copy(), saved.c) for saved in all_saved]
    try:
        yield [list(layers) for layers in passes]
    finally:
        for saved, gates, c in copies:
            saved.gates[...], saved.c = gates, c


def _of_segment(lengths, segment):
    """What lengths (B,) or None are within a stretch of time; None where all sequences last longer."""
    if lengths is None or (lengths >= segment.stop).all():
        return None
    return np.clip(lengths - segment.start, 0, segment.stop - segment.start)


class RNN(_Recurrent):
    """Elman network, h_t = act(W_ih x_t + b_ih + W_hh h_(t-1) + b_hh), with act tanh or relu (``torch.nn.RNN``).

    nonlinearity: "tanh" or "relu". The other arguments are ``LSTM``'s, without proj_size, forget_bias and chrono. With
    relu and ``init="identity"`` it is the IRNN (Le, Jaitly, Hinton 2015).
    """

    _elsewhere = ("proj_size", "forget_bias", "chrono")

    def __init__(
        self, input_size, hidden_size, num_layers=1, nonlinearity="tanh", bias=True, batch_first=False, dropout=0.0,
        bidirectional=False, **options,
    ):  # fmt: skip
        check_choice("nonlinearity", nonlinearity, ("tanh", "relu"))
        self.nonlinearity = nonlinearity
        _refuse(self, options, RNN._elsewhere, "It has no gates and no projection, as LSTM has")
        super().__init__(
            cells.RNNStep(nonlinearity), input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional,
            **options,
        )  # fmt: skip


class LSTM(_Recurrent):
    """Long short-term memory; equations and parameters of ``torch.nn.LSTM``, gates in the order i f g o.

    Parameters
    ----------
    input_size, hidden_size : I and H; hidden_size may be a list with one size for each layer.
    num_layers : L. bias : two bias vectors, as cuDNN has. batch_first : x and output are (B, T, ...); states never are.
    dropout : rate of the dropout between layers, in training mode, where every call draws new masks, as the layer
        ``Dropout`` does. bidirectional : D = 2.
    proj_size : P > 0 projects h to P < H units (Sak 2014); 0 leaves P = H.
    reverse : one direction, from each sequence's true end to its start; outputs stay at their steps.
    learn_state : the initial state is learned: parameters ``initial_h_l0`` (P,), ``initial_c_l0`` (H,), ...
    init : "uniform" (torch's U(+-1/sqrt(H))), "xavier" (Glorot for each gate, zero bias), "orthogonal" (W_hh, W_hr
        orthogonal for each gate, W_ih Glorot, zero bias), "identity" (W_hh, W_hr ones on the diagonal for each gate,
        W_ih N(0, 0.001^2), zero bias: Le, Jaitly, Hinton 2015).
    forget_bias : start of b_ih's forget block (b_hh's is then 0), 1 is customary; None leaves it to ``init``.
    chrono : the longest time T_max >= 2 that should be remembered: b_f starts as log U(1, T_max - 1), b_i as -b_f, so
        that the units forget at all paces up to it (Tallec & Ollivier 2018); excludes forget_bias.
    schedule : the way through time on the ``cuda`` backend: "auto", "step" (any size), "block" (small H) or "grid" (an
        H that the whole GPU can hold), which take one launch for the whole sequence; ValueError at the first call where
        one does not fit. ``plan`` says which and why.
    wavefront : timesteps, 0 for all: after so many of one layer the next begins, on a stream of its own, so that the
        layers of a stack run at once (GPU only). It pays where that many steps of a layer take longer than Python
        needs for a call, about 0.1 ms; not with bidirectional. The same numbers but for the order of sums over time.
    backend, dtype, precision, seed : see ``Module``; seed None draws one.

    Parameters are ``weight_ih_l0`` (4H, I), ``weight_hh_l0`` (4H, P), ``bias_ih_l0``, ``bias_hh_l0`` (4H,),
    ``weight_hr_l0`` (P, H), with ``_reverse`` behind for the second direction.

    >>> lstm = gpurnn.LSTM(10, 20, num_layers=2, bidirectional=True, backend="cpu")
    >>> output, (h, c) = lstm(np.zeros((5, 3, 10), "float32"), lengths=[5, 0, 2])
    >>> output.shape, h.shape
    ((5, 3, 40), (4, 3, 20))
    """

    def __init__(
        self, input_size, hidden_size, num_layers=1, bias=True, batch_first=False, dropout=0.0, bidirectional=False,
        proj_size=0, **options,
    ):  # fmt: skip
        super().__init__(
            cells.LSTMStep(bool(proj_size)), input_size, hidden_size, num_layers, bias, batch_first, dropout,
            bidirectional, proj_size, **options,
        )  # fmt: skip


class GRU(_Recurrent):
    """Gated recurrent unit; ``torch.nn.GRU`` with ``reset_after=True``, gates in the order r z n.

    reset_after : True for n = tanh(ax_n + r (W_hn h + b_hn)), as cuDNN; False for the original form (Cho 2014),
        n = tanh(ax_n + W_hn (r h) + b_hn), which needs two products a step. Others: as ``LSTM``, without proj_size and
        forget_bias; ``chrono`` sets b_z, the gate that keeps the old state here.
    """

    _elsewhere = ("proj_size", "forget_bias")

    def __init__(
        self, input_size, hidden_size, num_layers=1, bias=True, batch_first=False, dropout=0.0, bidirectional=False, *,
        reset_after=True, **options,
    ):  # fmt: skip
        _refuse(self, options, GRU._elsewhere, "LSTM has it; GRU has chrono, and no projection")
        self.reset_after = check_flag("reset_after", reset_after)
        super().__init__(
            cells.GRUStep(self.reset_after), input_size, hidden_size, num_layers, bias, batch_first, dropout,
            bidirectional, **options,
        )  # fmt: skip


_STACK_OPTIONS = ("num_layers", "batch_first", "dropout", "bidirectional", "reverse")


class _SingleStep:
    """Turns a layer into torch's cell: one step, parameters without a layer's suffix, (B, I) and (B, H) arrays."""

    def _suffix(self, layer, direction):
        return ""

    def __call__(self, x, state=None, **unknown):
        """x (B, I) or (I,), state (B, H) or the pair (h, c), None for zeros -> the new state."""
        if unknown:
            refuse_unknown(type(self).__name__, unknown, _CALL[:2])
        x, state = self._lift(x, state)
        return self._lower(super().__call__(x, state)[1])

    def forward(self, x, state=None, *, retain=False, **unknown):
        """For training: (new state, backward) with ``dx, dstate = backward(dnew_state)``; None means zeros, also for
        one of the LSTM's pair. ``retain`` as in a layer's ``forward``."""
        if unknown:
            refuse_unknown(type(self).__name__, unknown, (*_CALL[:2], "retain"))
        x, state = self._lift(x, state)
        _, new, inner = super().forward(x, state, retain=retain)

        def backward(dstate):
            dx, dold = inner(None, None if dstate is None else self._raise_state(dstate, "dstate"))
            return dx[0], self._lower(dold)

        return self._lower(new), backward

    def step(self, x, state=None):
        """(output, state) as a layer's ``step``: the output is h."""
        state = self(x, state)
        return (state[0] if self.cell.states == 2 else state), state

    def _lift(self, x, state):
        x = self.ops.asfloat(x, self.dtype, "x")
        if x.ndim not in (1, 2):
            raise ShapeError(f"x: expected (B, {self.input_size}) or ({self.input_size},), got {x.shape}")
        return x[None], None if state is None else self._raise_state(state, "state")

    def _raise_state(self, state, name):
        if self.cell.states == 1:
            return self._as_state(state, "h", name)[None]

        def raised(part, kind):
            if part is None and name == "dstate":
                return None
            return self._as_state(part, kind, f"{name} {kind}")[None]

        return tuple(raised(part, kind) for kind, part in zip("hc", _pair(state, name), strict=True))

    def _lower(self, state):
        return tuple(part[0] for part in state) if self.cell.states == 2 else state[0]


class RNNCell(_SingleStep, RNN):
    """One step of ``RNN`` (``torch.nn.RNNCell``): parameters weight_ih, weight_hh, bias_ih, bias_hh."""

    _elsewhere = RNN._elsewhere + _STACK_OPTIONS

    def __init__(self, input_size, hidden_size, bias=True, nonlinearity="tanh", **options):
        _refuse(self, options, _STACK_OPTIONS, "It is a single step; RNN, LSTM and GRU have stacks and directions")
        super().__init__(input_size, hidden_size, bias=bias, nonlinearity=nonlinearity, **options)


class LSTMCell(_SingleStep, LSTM):
    """One step of ``LSTM`` (``torch.nn.LSTMCell``), state (h, c); takes proj_size and forget_bias too."""

    _elsewhere = _STACK_OPTIONS

    def __init__(self, input_size, hidden_size, bias=True, **options):
        _refuse(self, options, _STACK_OPTIONS, "It is a single step; RNN, LSTM and GRU have stacks and directions")
        super().__init__(input_size, hidden_size, bias=bias, **options)


class GRUCell(_SingleStep, GRU):
    """One step of ``GRU`` (``torch.nn.GRUCell``); takes reset_after too."""

    _elsewhere = GRU._elsewhere + _STACK_OPTIONS

    def __init__(self, input_size, hidden_size, bias=True, **options):
        _refuse(self, options, _STACK_OPTIONS, "It is a single step; RNN, LSTM and GRU have stacks and directions")
        super().__init__(input_size, hidden_size, bias=bias, **options)


def _refuse(layer, options, names, elsewhere):
    """Raise TypeError for an option that another layer has; ``elsewhere`` says which."""
    refuse_unknown(type(layer).__name__, [name for name in names if name in options], (), elsewhere)
