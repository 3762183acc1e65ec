"""What a CUDA graph of an update needs to know of a training: whether it can be recorded, and when it holds."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np

from .._typing import Array, State
from ..data import Batch
from ..errors import BackendError
from ..losses.mean import is_one_of
from ..module.step_graph import is_ours


def refusal(training: Any, graphs: Any) -> str | None:
    """Why no update of a training is recorded; None where they may be."""
    settings, model, optimizer = training.settings, training.model, training.optimizer
    if graphs is None:
        return f"the backend {model.ops.name!r} records no updates: that is for 'cuda', with recorded time loops"
    if training.group.size > 1:
        return "several processes add up their gradients outside of it (group)"
    if settings.weight_noise:
        return "the noise of the weights is drawn by array code, which would draw the same again (weight_noise)"
    if optimizer._kernel is None:
        return f"the update of {type(optimizer).__name__} is array code, whose numbers would be frozen"
    if settings.graph is None:
        own = [type(one).__name__ for one in (*dict(model.modules()).values(), optimizer) if not is_ours(one)]
        own += [] if is_one_of(settings.loss) else ["the loss"]
        if own:
            return f"{own[0]} is not of this package, and may change from update to update"
    return None


def arrays_of(batch: Batch) -> list[Array]:
    """The arrays of a batch: inputs, then targets. Raises BackendError for one that has others."""
    if type(batch) is not Batch:
        raise BackendError(f"batches of a class of its own, {type(batch).__name__}")
    options = batch.loss_options or {}
    given = {name: getattr(batch, name) for name in ("lengths", "reset", "mask")} | options
    for name, value in given.items():
        if value is not None and not (name == "lengths" and _is_full(value, batch.inputs)):
            raise BackendError(f"batches with {name}: how many timesteps count is a number that the host must know")
    arrays = [*(batch.inputs if isinstance(batch.inputs, tuple) else (batch.inputs,)), batch.targets]
    for array in arrays:
        if type(array) is not np.ndarray and not (hasattr(array, "dtype") and hasattr(array, "get")):
            raise BackendError(f"inputs and targets must be arrays of NumPy or CuPy, got {type(array).__name__}")
    return arrays


def _is_full(lengths: Any, inputs: Any) -> bool:
    """Whether these lengths are those of sequences of all timesteps, which means the same as none."""
    if type(lengths) is not np.ndarray or lengths.ndim != 1 or len(getattr(inputs, "shape", ())) < 2:
        return False
    T, B = inputs.shape[:2] if inputs.shape[1] == lengths.size else inputs.shape[1::-1]
    return lengths.size == B and lengths.dtype.kind in "iu" and bool((lengths == T).all())


def with_arrays(batch: Batch, arrays: list[Array]) -> Batch:
    """A batch with other arrays; lengths that are those of all timesteps are left out."""
    inputs = tuple(arrays[:-1]) if isinstance(batch.inputs, tuple) else arrays[0]
    return replace(batch, inputs=inputs, targets=arrays[-1], lengths=None, loss_options={})


def shapes_of(batch: Batch) -> Any:
    """What two batches have in common where one graph serves both."""
    return isinstance(batch.inputs, tuple), batch.carry, tuple((a.shape, np.dtype(a.dtype)) for a in arrays_of(batch))


def described(batch: Batch) -> str:
    return " and ".join(f"{array.shape} {array.dtype}" for array in arrays_of(batch))


def frozen_in(training: Any) -> Any:
    """Everything on the host that a graph freezes and that a callback might change."""
    model, optimizer = training.model, training.optimizer
    simple = (int, float, bool, str, type(None))
    layers = [
        (module, getattr(module, "cell", None), {
            name: value for name, value in vars(module).items() if type(value) in simple and name != "calls"
        })
        for _, module in model.modules()
    ]  # fmt: skip
    arrays = [model.flat_params, model.flat_grads, *optimizer._arrays.values()]
    arrays += [array for _, module in model.modules() for array in module.buffers.values()]
    return _Same([*arrays, model.ops, optimizer]), layers, list(model.frozen), dict(optimizer.hyper)


class _Same:
    """Objects that are equal to others only where they are the same ones."""

    __hash__ = None  # type: ignore[assignment]

    def __init__(self, objects: list[Any]) -> None:
        self.objects = objects

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, _Same) or len(self.objects) != len(other.objects):
            return False
        return all(one is another for one, another in zip(self.objects, other.objects, strict=True))


# ---- recurrent states, in nested tuples


def layout_of(state: State) -> Any:
    """The shapes and dtypes of a state, nested as it is."""
    if isinstance(state, (tuple, list)):
        return tuple(layout_of(part) for part in state)
    return None if state is None else _Leaf((tuple(state.shape), np.dtype(state.dtype)))


class _Leaf(tuple):
    """The shape and dtype of one array of a state."""


def leaves(state: Any) -> list[Any]:
    """The arrays of a state, or the shapes of a layout."""
    if isinstance(state, (tuple, list)) and not isinstance(state, _Leaf):
        return [leaf for part in state for leaf in leaves(part)]
    return [] if state is None else [state]


def nested(layout: Any, parts: Iterator[Array]) -> State:
    """A state of this layout."""
    if isinstance(layout, tuple) and not isinstance(layout, _Leaf):
        return tuple(nested(part, parts) for part in layout)
    return None if layout is None else next(parts)
