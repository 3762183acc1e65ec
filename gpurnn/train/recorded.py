"""Updates of ``fit`` that run as one CUDA graph each: which are recorded, and what becomes of their numbers.

backends/cuda/recording.py says what a graph is and what can be recorded. The first update with batches of some shapes
runs launch by launch; the next one is recorded. From then on Python copies batches to the GPU and launches a graph.
Losses and norms are fetched every ``RECORD_EVERY`` updates, before a checkpoint and at the end of an epoch, and after
each update where a callback watches them or a loss scale depends on them.

Where something was wrong in an update (a loss that is not finite, an index out of range), the GPU has made neither that
update nor those after it. They are made again launch by launch then, which raises the error that it always did.

Graphs are dropped where something changed that they have frozen: a parameter's memory, a mode, an attribute of a layer,
which parameters are frozen.
"""

from __future__ import annotations

import contextlib
import logging
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

import numpy as np

from .._typing import Array, State
from ..data import Batch
from ..errors import BackendError
from ..optim import clip_grad_norm, clip_grad_value
from .measure import batch_weight, call_loss, model_context, model_inputs, unpack_forward
from .progress import Progress
from .recordable import arrays_of, described, frozen_in, layout_of, leaves, nested, refusal, shapes_of, with_arrays

RECORD_EVERY = 10  # updates between two records of the history, and between two fetches of recorded ones
_GRAPHS = 8  # most graphs of a training, one for each shape of its batches
_SHAPES = 256  # most shapes that are remembered
_log = logging.getLogger("gpurnn")


@dataclass
class _Before:
    """The host's numbers before an update, in case that it must be made again."""

    calls: list[int]
    optimizer: dict[str, Any]
    schedule: dict[str, Any] | None
    index: int
    step: int
    state: State


@dataclass
class _Pending:
    """An update that was launched and whose numbers were not fetched yet. lr: the rate after it."""

    some: list[Batch]
    weights: list[float]
    before: _Before
    lr: float = 0.0


class RecordedUpdates:
    """The recorded updates of one training."""

    def __init__(self, training: Any) -> None:
        self.training, self.settings, self.model = training, training.settings, training.model
        scaled = training.scaler is not None
        watched = any(not isinstance(one, Progress) for one in training.callbacks.updated)
        rows = 1 if scaled or watched else RECORD_EVERY
        off = self.settings.graph is False
        self.graphs = None if off else self.model.ops.update_graphs(rows, self.settings.accumulate)
        self.refused = refusal(training, self.graphs)
        if self.refused and self.settings.graph:
            raise BackendError(f"graph=True: {self.refused}. Leave graph out to run launch by launch")
        if self.refused and self.graphs is not None:
            self.model.ops.note_update(f"updates of a {type(self.model).__name__}", self.refused)
        self._recorded: OrderedDict[Any, _Update | str] = OrderedDict()  # or why there is none
        self._seen: OrderedDict[Any, Any] = OrderedDict()  # shapes -> those of the state that the update left
        self._states: dict[Any, list[Array]] = {}
        self._pending: list[_Pending] = []
        self._frozen: Any = None
        self._coming: Any = None  # the shapes of the update that runs launch by launch now
        self._copies: list[tuple[Array, Array]] = []  # of running statistics, see ``buffers``
        self._dropped: list[Any] = []  # graphs that may still run
        self._said: set[str] = set()

    def update(self, some: list[Batch]) -> bool:
        """Launch the update of these batches where it is recorded; False where the caller must make it."""
        if self.refused or self.settings.graph is False:
            return False
        frozen = frozen_in(self.training)
        if self._frozen != frozen:
            self.settle()
            self._recorded.clear()
            self._seen.clear()
            self._frozen = frozen
        try:
            found = self._find(some)
        except BackendError as error:
            self._say(str(error))
            found = None
        if found is None:
            self.settle()
            return False
        self._launch(found, some)
        return True

    def made(self) -> None:
        """To be called after an update launch by launch: the next one with such batches is recorded."""
        if self._coming is not None:
            self._seen[self._coming] = layout_of(self.training.state)
            while len(self._seen) > _SHAPES:
                self._seen.popitem(last=False)
            self._coming = None

    def settle(self) -> None:
        """Fetch the numbers of all updates that were launched. Raises what they would have raised."""
        pending, self._pending = self._pending, []
        if not pending:
            return
        try:
            rows = self.graphs.fetch(len(pending)).tolist()
        except BackendError:  # schedule grid timed out
            self._restore(pending[0].before)
            raise
        self._dropped.clear()
        for number, (one, (alive, norm, *losses)) in enumerate(zip(pending, rows, strict=True)):
            if not alive:
                self._make_again(pending[number:])
                return
            self._count(one, norm, losses)

    def close(self) -> None:
        """Give back the graphs and their memory."""
        if self._pending:  # something was raised: they may still run
            with contextlib.suppress(BackendError):
                self.graphs.fetch(1)
        self.graphs = None
        for some in (self._pending, self._dropped, self._recorded, self._states, self._copies):
            some.clear()

    # ---- which

    def _find(self, some: list[Batch]) -> _Update | None:
        """The recorded update for these batches; None where it is not recorded yet. Raises BackendError with the reason
        where it cannot be."""
        training = self.training
        if self.settings.flow and training.index == 0:
            return None  # the gradient flow is watched
        try:
            shapes = tuple(shapes_of(batch) for batch in some)
        except BackendError as error:
            self.model.ops.note_update(f"updates of a {type(self.model).__name__}", str(error))
            raise
        carried = self.model.stateful and some[0].carry and training.state is not None
        key = shapes, layout_of(training.state) if carried else None
        found = self._recorded.get(key)
        if found is None and key not in self._seen:
            self._coming = key
            return None
        if found is None:
            found = self._record(key, some, carried)
        if isinstance(found, str):
            raise BackendError(found)
        self._recorded.move_to_end(key)
        return found

    def _record(self, key: Any, some: list[Batch], carried: bool) -> _Update | str:
        try:
            found: _Update | str = _Update(self, some, carried, self._seen[key])
        except BackendError as error:
            found = str(error)
        name = f"update of a {type(self.model).__name__}, {', '.join(map(described, some))}"
        self.model.ops.note_update(name, found if isinstance(found, str) else None)
        self._recorded[key] = found
        while len(self._recorded) > _GRAPHS:
            self._dropped.append(self._recorded.popitem(last=False))
        return found

    def _say(self, reason: str) -> None:
        """Raise BackendError with ``graph=True``; else log why updates are not recorded, once for each reason."""
        if self.settings.graph:
            raise BackendError(f"graph=True: {reason}. Leave graph out to run launch by launch")
        if reason not in self._said:
            self._said.add(reason)
            _log.info("updates run launch by launch: %s", reason)

    def state_arrays(self, layout: Any) -> list[Array]:
        """The arrays in which a carried state of this layout lies between two graphs."""
        if layout not in self._states:
            self._states[layout] = [self.model.xp.zeros(shape, dtype) for shape, dtype in leaves(layout)]
        return self._states[layout]

    # ---- one update

    def _launch(self, recorded: _Update, some: list[Batch]) -> None:
        training, settings = self.training, self.settings
        weights = [batch_weight(settings.loss, batch) for batch in some]
        one = _Pending(some, weights, self._before())
        recorded.launch(len(self._pending), some, weights, training.state)
        self._pending.append(one)
        training.index, training.step, training.state = training.index + len(some), training.step + 1, recorded.state
        if self.graphs.rows > 1:
            self._advance(one)
        if len(self._pending) == self.graphs.rows:
            self.settle()

    def _advance(self, one: _Pending) -> None:
        """The learning-rate schedule goes on."""
        if self.settings.schedule is not None and self.settings.schedule_every == "step":
            self.settings.schedule.step()
        one.lr = self.training.optimizer.lr

    def _count(self, one: _Pending, norm: float, losses: list[float]) -> None:
        """What an update does on the host, after it."""
        training, total, mean = self.training, sum(one.weights), 0.0
        for value, weight in zip(losses, one.weights, strict=False):  # there may be room for more
            mean += value * (weight / total if total else 0.0)
        finite = bool(np.isfinite(norm))
        if training.scaler is None or training.scaler.update(finite):
            training.norm = norm
        else:
            training.optimizer.steps -= 1  # which made no update
        if self.graphs.rows == 1:
            self._advance(one)
        training.count(mean, total, one.before.step + 1, one.lr)

    # ---- and again, where something was wrong

    def _before(self) -> _Before:
        training, optimizer = self.training, self.training.optimizer
        by_step = self.settings.schedule is not None and self.settings.schedule_every == "step"
        return _Before(
            [module.calls for _, module in self.model.modules()],
            {name: getattr(optimizer, name) for name in ("steps", "lr", "_group_factor")},
            self.settings.schedule.state_dict() if by_step else None, training.index, training.step, training.state,
        )  # fmt: skip

    def _restore(self, before: _Before) -> None:
        """Make everything what it was before an update that the GPU has not made."""
        training = self.training
        self.graphs.go_on()
        for copy, array in self.buffers():
            array[...] = copy
        for (_, module), calls in zip(self.model.modules(), before.calls, strict=True):
            module.calls = calls
        if before.schedule is not None:
            self.settings.schedule.load_state_dict(before.schedule)
        for name, value in before.optimizer.items():
            setattr(training.optimizer, name, value)
        training.index, training.step, training.state = before.index, before.step, before.state

    def _make_again(self, pending: list[_Pending]) -> None:
        """Make updates launch by launch that the GPU has not made."""
        self._restore(pending[0].before)
        for one in pending:
            self.training.update(one.some)

    def buffers(self) -> list[tuple[Array, Array]]:
        """(copy, array) of every array of the model that is no parameter and that training changes."""
        arrays = [array for _, module in self.model.modules() for array in module.buffers.values()]
        known = self._copies
        if len(known) != len(arrays) or any(array is not one for (_, one), array in zip(known, arrays, strict=True)):
            known[:] = [(array.copy(), array) for array in arrays]
        return known


class _Update:
    """One recorded update: its graph, and the arrays from which it reads batches. state: what it carries on."""

    def __init__(self, owner: RecordedUpdates, some: list[Batch], carried: bool, layout: Any) -> None:
        self.settings, self.model, self.optimizer = owner.settings, owner.model, owner.training.optimizer
        self.scaler, ops = owner.training.scaler, owner.model.ops
        arrays = [[ops.asarray(array, "batch").copy() for array in arrays_of(batch)] for batch in some]
        self._inputs = [[owner.graphs.input(array) for array in those] for those in arrays]
        self._batches = [with_arrays(batch, those) for batch, those in zip(some, arrays, strict=True)]
        self._carried, self._between = carried, owner.state_arrays(layout)
        self.state = nested(layout, iter(self._between))
        self._buffers, modules = owner.buffers(), [module for _, module in self.model.modules()]
        steps = self.optimizer.steps
        owner.graphs.load(self.optimizer._kernel, self.model.compute_dtype)
        try:
            self._graph = owner.graphs.record(self._run, modules)
        finally:
            self.optimizer.steps = steps

    def _run(self, graph: Any) -> None:
        """Forward and backward passes and the update, as ``TrainingLoop.update`` makes them."""
        model, settings = self.model, self.settings
        factors, self._factors = graph.recording.numbers(len(self._batches), np.float64)
        graph.begin(self._buffers)
        model.zero_grad()
        state = self.state if self._carried else None
        for number, batch in enumerate(self._batches):
            made = model.forward(model_inputs(model, batch), **model_context(model, batch, state))
            outputs, state, backward = unpack_forward(model, made)
            value, dloss = call_loss(settings.loss, outputs, batch)
            backward(dloss(factors[number]))
            graph.losses[number : number + 1] = value
        if self.scaler:
            grads = model.flat_grads
            by, self._unscale = graph.recording.numbers(1, grads.dtype)
            model.xp.multiply(grads, by, out=grads)
        graph.judge(clip_grad_norm(model, settings.clip_norm))
        if settings.clip_value is not None:
            clip_grad_value(model, settings.clip_value)
        self.optimizer.step()
        graph.carry(self._between, leaves(state))

    def launch(self, row: int, some: list[Batch], weights: list[float], state: State) -> None:
        """Run it with these batches; ``row``: where its numbers go."""
        total, scale = sum(weights), self.scaler.scale if self.scaler else 1
        self._factors[...] = [(weight / total if total else 0.0) * scale for weight in weights]
        if self.scaler:
            self._unscale[...] = 1 / scale
        for batch, inputs in zip(some, self._inputs, strict=True):
            for given, value in zip(inputs, arrays_of(batch), strict=True):
                given.write(row, value)
        if self._carried and state is not self.state:
            for array, value in zip(self._between, leaves(state), strict=True):
                if array is not value:
                    array[...] = value
        self._graph.launch(row, bool(self.scaler) and scale > 1, self.optimizer.step)
