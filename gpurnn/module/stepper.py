"""Stepper: a model that reads sequences, one timestep at a time."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable
from operator import is_not
from typing import Any

import numpy as np

from .._typing import Array, State
from ..errors import BackendError, ShapeError, check_size, described
from .step_graph import StepGraph, is_ours


class Stepper:
    """A model that reads ``batch`` sequences, one timestep after another, and owns their states.

    ``model.stepper(batch)`` makes one. ``step`` returns what ``model.step`` does in evaluation mode. On the backend
    "cpu" a whole timestep is one call of compiled code where the model has embeddings, recurrent and linear layers;
    ``compiled`` says whether it is. On the backend "cuda" a timestep becomes one CUDA graph at its second call, where
    it can be recorded, and ``recorded`` says whether it was. Otherwise it is ``model.step``.

    Weights are packed when a stepper is made. Parameters that change later are seen, by ``load_state_dict`` and
    optimizers too; after a write through an array call ``model.changed()``, as a step may mix old and new numbers until
    then. Where a recurrent layer was replaced, make another stepper. Threads may share a stepper: a
    step waits for the one before it. A compiled step does not hold Python's lock. One that is not compiled puts the
    model into evaluation mode meanwhile, so no other thread may train it then. ``copy.deepcopy`` and ``pickle`` copy
    the model, too.

    Parameters
    ----------
    model : Module
        A recurrent layer or a ``Sequential`` that runs forward in time.
    batch : int
        How many sequences there is room for.

    Attributes
    ----------
    batch : int
    compiled, recorded : bool
    free : list of int
        The rows that ``join`` may give away; none until one was given back by ``leave``.

    Raises
    ------
    ValueError
        A layer needs the future (``bidirectional``, ``reverse``), the whole sequence (``Pooling``), or statistics of a
        batch in time (``batch_norm``).
    TypeError
        The model has no state, or a layer with a state of its own kind.

    Examples
    --------
    >>> model = gpurnn.Sequential(gpurnn.LSTM(4, 8, backend="cpu", seed=0), gpurnn.Linear(8, 2, backend="cpu", seed=1))
    >>> stepper = model.stepper(batch=3)
    >>> y = stepper.step(np.ones((3, 4), "float32"))
    >>> y.shape
    (3, 2)
    >>> stepper.reset([1])                       # a new sequence in row 1
    """

    def __init__(self, model: Any, batch: int) -> None:
        self._batch = check_size("batch", batch)
        self._model = model
        self._leaves = _leaves(model, type(model).__name__)
        if not self._leaves:
            raise TypeError(f"stepper: a {type(model).__name__} without a recurrent layer has no state: call it")
        for leaf in self._leaves:
            leaf._check_steppable("stepper")
        self._own_lock, self._process = threading.Lock(), os.getpid()
        self._program, self._made_of = None, None
        self._strands = [leaf._strand_states(None, self.batch) for leaf in self._leaves]
        self._free: set[int] = set()
        self._graph: StepGraph | None = None
        self._graph_refused = not all(is_ours(module) for _, module in model.modules())
        self._before: tuple[Array, Array] | None = None  # input and output of the step before
        self._refresh()

    def __getstate__(self) -> dict[str, Any]:
        return {"model": self._model, "batch": self.batch, "state": self.state, "free": self._free}

    def __setstate__(self, parts: dict[str, Any]) -> None:
        self.__init__(parts["model"], parts["batch"])  # type: ignore[misc]
        self.state, self._free = parts["state"], set(parts["free"])

    def __repr__(self) -> str:
        how = "compiled" if self.compiled else "a CUDA graph" if self.recorded else "array code"
        return f"Stepper({type(self._model).__name__}, batch={self.batch}, {how})"

    @property
    def batch(self) -> int:
        return self._batch

    @property
    def compiled(self) -> bool:
        return self._program is not None

    @property
    def recorded(self) -> bool:
        return self._graph is not None

    @property
    def free(self) -> list[int]:
        return sorted(self._free)

    def step(self, x: Array) -> Array:
        """One timestep of all sequences.

        Parameters
        ----------
        x : Array
            (batch, I), of the model's dtype; for an ``Embedding`` integers (batch,).

        Returns
        -------
        Array
            (batch, F), the output of this timestep, a new array.

        Raises
        ------
        ShapeError, DtypeError, ValueError
            As the model's ``step``; then no state has changed.
        """
        with self._lock:
            self._refresh()
            program = self._program
            if program is None:
                return self._array_step(x)
            if type(x) is not np.ndarray or x.dtype != program.x.dtype:
                x = self._converted(x, program.x)
            if x.shape != program.x.shape:
                raise ShapeError(f"x: expected one timestep of every sequence, {program.x.shape}, got {x.shape}")
            program.x[...] = x
            if not program.run():
                self._array_step(x)  # raises: a number has no row in the table
            return program.y.copy()

    def reset(self, rows: Iterable[int] | None = None) -> None:
        """Begin anew: the states of these rows become the model's initial ones, the learned ones or zeros.

        Parameters
        ----------
        rows : iterable of int, optional
            None for all.

        Raises
        ------
        ValueError
            There is no such row.
        """
        if rows is not None and not isinstance(rows, Iterable):
            raise TypeError(f"rows: expected several, such as [{rows}], got {described(rows)}")
        rows = list(range(self.batch)) if rows is None else [self._row("rows", row) for row in rows]
        with self._lock:
            self._refresh()
            self._reset(rows)

    def join(self) -> int:
        """A row for a new sequence, the first that is free; its state begins anew.

        Raises
        ------
        ValueError
            No row is free: ``leave`` frees one.
        """
        with self._lock:
            self._refresh()
            if not self._free:
                raise ValueError(
                    f"join: none of the {self.batch} rows is free: call leave(row), or make a larger stepper"
                )
            row = min(self._free)
            self._free.remove(row)
            self._reset([row])
            return row

    def leave(self, row: int) -> None:
        """Give a row back to ``join``. Until then its output means nothing; give zeros as its input.

        Raises
        ------
        ValueError
            There is no such row, or it is free already.
        """
        row = self._row("row", row)
        with self._lock:
            if row in self._free:
                raise ValueError(f"leave: row {row} is free already")
            self._free.add(row)

    @property
    def state(self) -> State:
        """The states of all sequences, as ``model.step`` takes and returns them: a copy. May be set."""
        with self._lock:
            self._refresh()
            return self._packed([[tuple(part.copy() for part in one) for one in leaf] for leaf in self._current()])

    @state.setter
    def state(self, state: State) -> None:
        found = _unpacked(self._model, state, self.batch, "state")
        with self._lock:
            self._refresh()
            self._set(found)

    @property
    def _lock(self):
        """The lock of this process: a fork may have copied one that a thread of the parent holds."""
        if self._process != os.getpid():
            self._own_lock, self._process = threading.Lock(), os.getpid()
        return self._own_lock

    # ---- what is not locked

    def _refresh(self):
        """Make the program anew where a parameter has changed since. Raises RuntimeError where a layer has."""
        model = self._model
        made_of = self._made_of
        if made_of is not None and made_of[0] is model.params._arrays and made_of[1] == model._counts:
            return
        leaves = _leaves(model, type(model).__name__)
        if len(leaves) != len(self._leaves) or any(map(is_not, leaves, self._leaves)):
            raise RuntimeError("stepper: recurrent layers of the model were replaced since: make another stepper")
        strands, versions = self._current(), model.versions()  # before the weights are read: they may change meanwhile
        parts = model._step_parts()
        program = None if parts is None else model.ops.step_program(parts, self.batch, model.dtype)
        self._program, self._made_of = program, (model.params._arrays, versions)
        self._graph = self._before = None
        if program is not None:
            self._set(strands)
        else:
            self._strands = [[tuple(part.copy() for part in one) for one in leaf] for leaf in strands]

    def _current(self):
        """For each recurrent layer, for each of its strands the states."""
        if self._program is None:
            return self._strands
        states, found = iter(self._program.states), []
        for leaf in self._leaves:
            found.append([next(states) for _ in range(leaf.num_layers * len(leaf._strands))])
        return found

    def _set(self, found):
        xp = self._model.xp
        for leaf, new in zip(self._current(), found, strict=True):
            for one, given in zip(leaf, new, strict=True):
                for part, value in zip(one, given, strict=True):
                    if part is not value:
                        xp.copyto(part, value)

    def _reset(self, rows):
        for leaf, current in zip(self._leaves, self._current(), strict=True):
            own = leaf._strand_states(None, self.batch)
            for one, first in zip(current, own, strict=True):
                for part, value in zip(one, first, strict=True):
                    part[rows] = value[rows]

    def _packed(self, strands):
        return _nested(
            self._model, iter([leaf._state_of(one) for leaf, one in zip(self._leaves, strands, strict=True)])
        )

    def _array_step(self, x):
        model = self._model
        x = model.ops.asarray(x, "x")
        if x.shape[:1] != (self.batch,):
            raise ShapeError(f"x: expected one timestep of {self.batch} sequences, got shape {x.shape}")
        if self._graph is None and self._before is not None and not self._graph_refused:
            self._record(*self._before)
        if self._graph is not None and self._graph.fits(x):
            y = self._graph.run(x)
            if y is not None:
                return y
        with model.evaluation():
            y, state = model.step(x, self._packed(self._current()))
        self._strands = _unpacked(model, state, self.batch, "state")
        self._graph, self._before = None, (x, y)
        return y

    def _record(self, x, y):
        """Record steps with inputs and outputs like these as a CUDA graph, where the backend can."""
        model, strands = self._model, self._strands
        graphs = model.ops.update_graphs(1, 1)
        if graphs is None:
            self._graph_refused = True
            return

        def step(x, states):
            with model.evaluation():
                y, state = model.step(x, self._packed(_like(strands, states)))
            return y, _flat(_unpacked(model, state, self.batch, "state"))

        try:
            self._graph = StepGraph(graphs, step, x, y, _flat(strands))
        except BackendError as error:
            self._graph_refused = True
            model.ops.note_update(f"step of a {type(model).__name__}, {x.shape} {x.dtype}", str(error))
            return
        model.ops.note_update(f"step of a {type(model).__name__}, {x.shape} {x.dtype}", None)
        self._strands = _like(strands, self._graph.states)

    def _converted(self, x, like):
        """``x`` as the program takes it; raises as the model's ``step`` does."""
        ops = self._model.ops
        if like.dtype.kind != "i":
            return ops.asfloat(x, self._model.dtype, "x")
        x = ops.asarray(x, "x")
        if x.dtype.kind not in "iu" or (x.dtype == np.uint64 and x.size and x.max() > np.iinfo(np.int64).max):
            self._array_step(x)  # raises
        return x.astype(np.int64)

    def _row(self, name, row):
        row = check_size(name, row, minimum=0)
        if row >= self.batch:
            raise ValueError(f"{name}: there is no row {row} among {self.batch}")
        return row


def _flat(strands):
    """The arrays of strands, in one list."""
    return [part for leaf in strands for one in leaf for part in one]


def _like(strands, parts):
    """Other arrays in the places of those of ``strands``."""
    parts = iter(parts)
    return [[tuple(next(parts) for _ in one) for one in leaf] for leaf in strands]


def _leaves(model, name):
    """The recurrent layers in ``model``, in order. Raises TypeError for another layer that has a state, ValueError for
    one that needs all timesteps."""
    if getattr(model, "_pools", False):
        raise ValueError(f"stepper: {name}: a {type(model).__name__} needs the whole sequence")
    if model._chain:
        return [leaf for child in model.children.values() for leaf in _leaves(child, f"{name}.{child.name}")]
    if not model.stateful:
        return []
    if not hasattr(model, "_strand_states"):
        raise TypeError(f"stepper: {name}: a {type(model).__name__} has a state of its own kind: call its step")
    return [model]


def _nested(model, states):
    """The state of ``model`` from those of its recurrent layers, an iterator."""
    if not model._chain:
        return next(states)
    return tuple(_nested(child, states) for child in model.children.values() if child.stateful)


def _unpacked(model, state, B, name):
    """For each recurrent layer, for each of its strands the states. Raises ShapeError."""
    if not model._chain:
        return [model._strand_states(state, B, name)]
    stateful = [child for child in model.children.values() if child.stateful]
    parts = model._unpack(state, name)
    places = [f"{name}[{n}]" for n in range(len(parts))]
    return [
        leaf
        for one, part, place in zip(stateful, parts, places, strict=True)
        for leaf in _unpacked(one, part, B, place)
    ]
