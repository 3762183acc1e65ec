"""Calls of a recurrent layer: for inference, for training, of one timestep; and what a call would do."""

from __future__ import annotations

from typing import Any

from .._typing import Array, Lengths, State
from ..backends.steps import LoopStep
from ..errors import ShapeError, answers_unknown
from ..masks import lift_step
from .forward import Given, run_forward
from .plan import Plan, make_plan
from .state import own_arrays, pack_state, unpack_state


class Calls:
    """The part of a layer that runs it."""

    _records_terms = True

    @answers_unknown
    def __call__(
        self,
        x: Array,
        state: State = None,
        lengths: Lengths = None,
        *,
        reset: Array | None = None,
        mask: Array | None = None,
        return_all: bool = False,
    ) -> tuple[Any, ...]:
        """Output and final state. Nothing is saved for backward.

        Parameters
        ----------
        x : Array
            (T, B, I), or (B, T, I) with ``batch_first``, or (T, I) for one sequence; of the layer's dtype. What it
            holds past the end of a sequence is not read.
        state : Array or pair of Arrays, optional
            Initial state: (L*D, B, P), the LSTM's a pair (h (L*D, B, P), c (L*D, B, H)); without the B axis for one
            sequence. Where layers differ in size, a tuple of (D, B, P) arrays, one for each layer (the LSTM: a pair of
            such tuples). None: the learned initial state, or zeros. c of a 16-bit layer, and the gradient with respect
            to it, are returned as float32, so that a sequence in pieces is what it is in one call; they are also taken
            in the layer's dtype.
        lengths : sequence of int, optional
            (B,), each 0..T in any order, on the host or the device. None: all sequences have T timesteps.
        reset : Array of bool, optional
            (T, B), with the axes of x: before these timesteps the state becomes the initial state: the one given, or
            the learned one, or zeros (``reset_to="initial"``: never the one given). It is a border between two
            timesteps, so the reverse direction resets before the timestep on its other side. In a stack it holds for
            all layers. Past the end of a sequence it means nothing.
        mask : Array of bool, optional
            (T, B) likewise: where it is False, the timestep does not happen. The state stays as it is, x is not read,
            and the output is zero, or h with ``masked_output="repeat"``. Holes, padding on the left, and sequences
            without a timestep are all right.
        return_all : bool
            Return every h, c and gate, too.

        Returns
        -------
        output : Array
            (T, B, D*P), with the axes of x; zero past the end of a sequence (TensorFlow repeats the last output).
        state : Array or pair of Arrays
            The state at each sequence's end, where the reverse direction begins; shaped as the initial state. Of a
            sequence of length 0 it is the initial state (ONNX Runtime returns zeros).
        steps : list of Steps
            Only with ``return_all``: one ``Steps`` for each layer and direction.

        Raises
        ------
        ShapeError, DtypeError, BackendError
            Before anything is computed.
        """
        return run_forward(self, x, Given(state, lengths, reset, mask), return_all, save=False)

    @answers_unknown
    def forward(
        self,
        x: Array,
        state: State = None,
        lengths: Lengths = None,
        *,
        reset: Array | None = None,
        mask: Array | None = None,
        return_all: bool = False,
        retain: bool = False,
    ) -> tuple[Any, ...]:
        """As calling the layer, for training: saves what backward needs.

        ``dx, dstate = backward(doutput=None, dstate=None)`` takes the gradients of the loss with respect to output and
        final state, and returns those with respect to x and initial state, shaped alike. None means zeros, also for one
        of the LSTM's pair. Gradients of parameters are added to ``grads``; with ``state=None`` and ``learn_state`` also
        those of the initial state. No gradient crosses a reset: it goes to the state that the reset gives.

        ``backward`` works inside what forward saved, so it may run once; the layer itself may run many times before.
        Threads that call one ``backward`` take turns. x is saved by reference: do not change it until then.

        Parameters
        ----------
        x, state, lengths, reset, mask, return_all :
            As in a call of the layer.
        retain : bool
            Allow backward to run many times. It then copies what it overwrites while it runs, ``Plan.cache_bytes`` at
            most.

        Returns
        -------
        output, state :
            As from a call of the layer.
        backward : function
            See above.
        steps : list of Steps
            Only with ``return_all``.

        Raises
        ------
        ShapeError, DtypeError, BackendError
            Before anything is computed.
        RuntimeError
            From backward: where it ran already, or a parameter was changed since forward.
        """
        return run_forward(self, x, Given(state, lengths, reset, mask), return_all, save=True, retain=retain)

    @answers_unknown
    def step(
        self, x: Array, state: State = None, *, reset: Array | None = None, mask: Array | None = None
    ) -> tuple[Array, State]:
        """One timestep, for streaming: what a call with a sequence of this one timestep returns.

        In training mode each step draws dropout masks, as each call does.

        Parameters
        ----------
        x : Array
            (B, I) or (I,), of the layer's dtype.
        state :
            As in a call of the layer.
        reset : Array of bool, optional
            (B,), or a bool for one sequence: before this timestep the state becomes the layer's own initial state, the
            learned one or zeros, whatever was given.
        mask : Array of bool, optional
            Likewise: False for sequences that this timestep leaves as they are.

        Returns
        -------
        output : Array
            (B, P), or (P,).
        state :
            For the next step.

        Raises
        ------
        ValueError
            For layers that need the future (``bidirectional``, ``reverse``).
        ShapeError, DtypeError
            As a call of the layer.
        """
        self._check_steppable("step")
        x = self.ops.asfloat(x, self.dtype, "x")
        if x.ndim not in (1, 2):
            raise ShapeError(f"x: expected one step, (B, {self.input_size}) or ({self.input_size},), got {x.shape}")
        lifted = self.batch_first and x.ndim == 2  # to (B, 1, I), otherwise (1, B, I) or (1, I)
        place = (slice(None), None) if lifted else None
        marks = {"reset": reset, "mask": mask}
        marks = {name: lift_step(self, one, x.shape[:-1], place, name) for name, one in marks.items()}
        output, state = run_forward(self, x[place], Given(state, **marks), False, save=False, reset_to="initial")
        return output[:, 0] if lifted else output[0], state

    def _check_steppable(self, what):
        """Raise ValueError where a timestep alone says too little. what: the caller's function."""
        if True in self._directions:
            raise ValueError(f"{what}: a layer that runs backwards in time needs the whole sequence")
        if self._cell.over_batch:
            raise ValueError(
                f"{what}: batch_norm has statistics of each timestep of a call, and a step alone is the first"
            )

    def _step_parts(self):
        if type(self).step is not Calls.step or type(self).__call__ is not Calls.__call__:
            return None
        if self.residual and self.num_layers > 1:
            return None
        return [LoopStep(self._cell.evaluating, self._weights(k)) for k in range(self.num_layers)]

    def _strand_states(self, state, B, name="state"):
        """For each strand its states, arrays (B, size): those given, or where that is None the layer's own."""
        if state is not None:
            return unpack_state(self, state, B, False, name)
        return own_arrays(self, B)

    def _state_of(self, strands):
        """The layer's state from those of its strands, as a call returns it."""
        return pack_state(self, strands, False)

    def plan(self, T: int, B: int, *, marked: bool = False) -> Plan:
        """The ``Plan`` of a training call with x (T, B, I): its schedule and the memory it needs.

        marked: whether the call has lengths, resets or masks, for which x is copied.

        Raises ShapeError for sizes that the call refuses.

        >>> plan = gpurnn.LSTM(10, 20, backend="cpu").plan(T=100, B=16)
        >>> plan.output_bytes          # 100 * 16 * 20 numbers of 4 bytes
        128000
        """
        return make_plan(self, T, B, marked)
