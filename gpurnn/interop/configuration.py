"""Which layer of gpurnn runs in another library: found by a text that goes through compiled and exported graphs.

The text is JSON of the layer's class and arguments. A graph that was exported in another process can thus be run here.
Cells and functions are no JSON: of a layer with one of these the text holds a hash of its equations, and a process
must have built such a layer once before it can run the text.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from .._typing import Array
from ..backends import get_backend
from ..dtypes import compute_dtype
from ..errors import ShapeError
from ..module import Views
from ..recurrent import GRU, LSTM, RNN, Recurrent

KINDS = {"RNN": RNN, "LSTM": LSTM, "GRU": GRU, "Recurrent": Recurrent}
_unwritten: dict[str, Mapping[str, Any]] = {}  # text -> arguments, where these are no JSON


class StatePart(NamedTuple):
    """One array (rows, B, size) of a state. kind: "h", "c"."""

    kind: str
    rows: int
    size: int


class Configuration(NamedTuple):
    """A layer without arrays, and what modules and operators read of it.

    names, shapes: of its parameters. state: for each state of the cell its parts, one for all layers, or one for each
    layer where these differ in size. features: D*P of the output. draws: whether a call draws random masks. backend: as
    it was given.
    """

    layer: Recurrent
    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    state: tuple[tuple[StatePart, ...], ...]
    features: int
    draws: bool
    backend: Any


def nested_state(state: tuple[tuple[StatePart, ...], ...], tensors: Sequence[Any]) -> Any:
    """The parts of a state, in the form in which a layer takes and returns it. state: of a ``Configuration``."""
    groups, start = [], 0
    for parts in state:
        group = tuple(tensors[start : start + len(parts)])
        groups.append(group if len(group) > 1 else group[0])
        start += len(parts)
    return tuple(groups) if len(groups) > 1 else groups[0]


def flat_state(
    state: tuple[tuple[StatePart, ...], ...], given: Any, name: str = "hx", kind: str = "tensor"
) -> list[Any]:
    """The reverse of ``nested_state``. Raises ShapeError for another number of states or layers. name: of the argument;
    kind: of array, both for that error."""
    if len(state) > 1 and not (isinstance(given, (tuple, list)) and len(given) == len(state)):
        kinds = ", ".join(parts[0].kind for parts in state)
        raise ShapeError(f"{name}: expected {len(state)} {kind}s ({kinds}), got {type(given).__name__}")
    found = []
    for parts, group in zip(state, given if len(state) > 1 else [given], strict=True):
        group = group if len(parts) > 1 else [group]
        if not isinstance(group, (tuple, list)) or len(group) != len(parts):
            raise ShapeError(f"{name}: expected one {kind} for each of {len(parts)} layers of unequal size")
        found += group
    return found


def configure(kind: str, arguments: Mapping[str, Any]) -> str:
    """The text of a layer in training mode. Raises what the layer's constructor raises."""
    try:
        text = json.dumps({"layer": kind, "arguments": arguments, "training": True}, sort_keys=True)
        find(text)
        return text
    except TypeError:  # no JSON; or refused, and then it is refused again here
        layer = build(kind, arguments)
    backend = arguments.get("backend")  # an Ops is one for good, as _unwritten holds it
    plain = {name: repr(value) for name, value in arguments.items() if not callable(value) and name != "cell"}
    plain["backend"] = backend if isinstance(backend, str) else id(backend)
    found = repr((sorted(plain.items()), layer.cell.key))
    digest = hashlib.sha256(found.encode()).hexdigest()
    text = json.dumps({"layer": kind, "equations": digest, "training": True}, sort_keys=True)
    _unwritten.setdefault(text, dict(arguments))
    return text


def evaluating(text: str) -> str:
    """The text of the same layer in evaluation mode."""
    return json.dumps(json.loads(text) | {"training": False}, sort_keys=True)


def build(kind: str, arguments: Mapping[str, Any], seed: int = 0, **options: Any) -> Recurrent:
    """The layer with its initial values, on NumPy; ``options`` replace arguments."""
    lists = {name: tuple(value) for name, value in arguments.items() if isinstance(value, list)}
    layer = KINDS[kind](**{**arguments, **lists, "backend": "numpy", "seed": seed, **options})
    if layer.cell.over_batch:
        raise ValueError(
            "batch_norm: running statistics are no part of a layer in another library yet; use layer_norm, or a layer "
            "of gpurnn"
        )
    return layer


def arguments_of(text: str) -> tuple[str, Mapping[str, Any]]:
    """The class and the arguments of a text. Raises RuntimeError where its equations are unknown in this process."""
    read = json.loads(text)
    if "arguments" in read:
        return read["layer"], read["arguments"]
    found = _unwritten.get(json.dumps(read | {"training": True}, sort_keys=True))
    if found is None:
        raise RuntimeError(
            "this graph has a layer with a cell or a function of one's own, which no graph can hold: build one with "
            "the same cell and arguments in this process first"
        )
    return read["layer"], found


@functools.cache
def find(text: str) -> Configuration:
    """The ``Configuration`` of a text from ``configure`` or ``evaluating``."""
    read = json.loads(text)
    if not read["training"]:
        found = find(json.dumps(read | {"training": True}, sort_keys=True))
        layer = found.layer._as_now()
        layer.training = False
        return found._replace(layer=layer, draws=bool(layer.cell.draws))
    kind, arguments = arguments_of(text)
    backend = arguments.get("backend", "auto")
    get_backend(backend)  # raises for a wrong name
    layer = build(kind, arguments)
    D, state = len(layer._directions), []
    for name, sizes, equal in layer._state_kinds:
        each = [(D * len(sizes), sizes[0])] if equal else [(D, size) for size in sizes]
        state.append(tuple(StatePart(name, *one) for one in each))
    names, shapes = zip(*layer._layout, strict=True)
    layer.params, layer.grads = Views(), Views()  # each call brings its own
    layer.flat_params = layer.flat_grads = layer.xp.zeros(0, layer.compute_dtype)
    draws = bool(layer.cell.draws) or (layer.dropout > 0 and layer.num_layers > 1) or layer.weight_dropout > 0
    return Configuration(layer, names, shapes, tuple(state), D * layer._layer_sizes[-1][2], draws, backend)


def initial_values(text: str, seed: int) -> dict[str, Any]:
    """Name -> float64 array of each parameter, as a new layer of gpurnn with this seed has them."""
    kind, arguments = arguments_of(text)
    return dict(build(kind, arguments, seed, dtype="float64", precision="float32").params)


def uniform_bound(text: str) -> float | None:
    """Where all parameters begin as torch's do, uniform up to plus and minus this number; else None."""
    arguments, layer = arguments_of(text)[1], find(text).layer
    set_gates = any(arguments.get(name) is not None for name in ("forget_bias", "chrono"))
    others = bool(layer.cell.parameters) or layer.learn_state or layer.heads > 1 or len(set(layer.hidden_sizes)) > 1
    return None if set_gates or others or layer.init != "uniform" else 1 / math.sqrt(layer.hidden_sizes[0])


def stand_in(found: Configuration, ops: Any, dtype: Any, weights: Sequence[Array], seed: int) -> Recurrent:
    """The configured layer for one call, with these arrays as its parameters and this key of its random draws."""
    layer = found.layer._as_now()
    params = Views()
    params._arrays = dict(zip(found.names, weights, strict=True))
    layer.__dict__.update(
        ops=ops.with_precision(layer.precision), xp=ops.xp, dtype=dtype,
        compute_dtype=compute_dtype(dtype), params=params, grads=Views(), seed=seed, calls=0, _made={}, _frozen=[set()],
    )  # fmt: skip
    return layer
