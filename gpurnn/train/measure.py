"""How good a model is on a batch source, and what a batch is to a model."""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from .._typing import Array, State
from ..data import Batch, BatchSource
from ..errors import ShapeError, check_flag
from ..layers.timesteps import Timesteps, accepts
from ..losses.mean import all_options, is_one_of, mean_weight, places_weight
from ..module import Module
from .parallel import Group
from .parallel.parts import Part, part_of
from .parallel.start import add_same, batch_digest
from .progress import progress_bar
from .settings import check_group, check_metrics
from .sources import as_source

_OF_THE_LOSS = ("ignore_index", "batch_first")  # options of a loss that are passed on to metrics


def evaluate(
    model: Module, loss: Callable[..., Any], batches: BatchSource | Iterable[Any], *, progress: bool = False
) -> float:
    """Mean loss of a model over a batch source, in evaluation mode; ``measure`` adds metrics to it.

    Parameters
    ----------
    model, loss, batches, progress
        As for ``measure``.

    Returns
    -------
    float
        Mean over all valid timesteps, or over whatever ``batch.weight`` counts (see ``Batch``); nan where nothing
        counts.

    Examples
    --------
    >>> text = gpurnn.TextBatches(np.arange(41) % 5, batch_size=2, steps=10)
    >>> model = gpurnn.Sequential(gpurnn.Embedding(5, 4), gpurnn.GRU(4, 8), gpurnn.Linear(8, 5))
    >>> 0 < gpurnn.evaluate(model, gpurnn.cross_entropy, text) < 5
    True
    """
    return measure(model, loss, batches, progress=progress)["loss"]


def measure(
    model: Module,
    loss: Callable[..., Any],
    batches: BatchSource | Iterable[Any],
    metrics: Mapping[str, Callable[..., Any]] | None = None,
    *,
    progress: bool = False,
    group: Group | None = None,
) -> dict[str, float]:
    """Mean loss and metrics of a model over a batch source, in evaluation mode; ``evaluate`` returns the loss alone.

    The recurrent state is carried as in training, from a zero state. The model's modes are restored afterwards.

    Parameters
    ----------
    model : Module
        As ``fit`` takes it.
    loss : callable
        As ``fit`` takes it.
    batches : batch source, or iterable of batches
        As ``fit`` takes it.
    metrics : mapping, optional
        Name -> function of (outputs, targets, ``**loss_options``), such as ``gpurnn.accuracy``. It returns (total,
        count), correct answers and answers for example, and the metric is the sum of the totals over the sum of the
        counts. Or it returns a number, which is averaged with the weights of the batches; next to a loss of this
        package, with the number of targets that count by the ``mask`` and ``ignore_index`` that the metric gets. A
        batch for which it is nan does not count. Where the loss is a ``functools.partial`` with ``ignore_index`` or
        ``batch_first``, a metric that takes these gets the same.
    progress : bool
        Show a progress bar, on a terminal.
    group : Group, optional
        The processes that measure together, each its part of every batch; the result is that of all.

    Returns
    -------
    dict
        "loss" and each metric -> float; nan where nothing counts.

    Raises
    ------
    TypeError
        For batches, a loss or a metric of another kind.
    ValueError
        For a metric called "loss".

    Examples
    --------
    >>> model = gpurnn.Sequential(gpurnn.GRU(2, 4), gpurnn.Linear(4, 3))
    >>> batch = np.zeros((5, 8, 2), "float32"), np.zeros((5, 8), int)              # x (T, B, I), y (T, B)
    >>> sorted(gpurnn.train.measure(model, gpurnn.cross_entropy, [batch], {"accuracy": gpurnn.accuracy}))
    ['accuracy', 'loss']
    """
    check_flag("progress", progress)
    source, metrics, group = as_source(batches, "batches"), check_metrics(metrics), check_group(group)
    shared = {name: _options_of(loss, metric) for name, metric in metrics.items()}
    sums = {name: [0.0, 0.0] for name in ("loss", *metrics)}

    def add(name, total, count):
        sums[name][0] += float(total)
        sums[name][1] += float(count)

    state, digest = None, 0
    options = {"desc": "validation", "leave": False, "total": source.count, "unit": "batch"}
    with model.evaluation():
        for whole in progress_bar(source.read(0), progress and group.is_first, **options):
            digest = batch_digest(whole, digest) if group.size > 1 else 0
            part = part_of(group, model, loss, whole)
            if part.empty:
                continue
            batch = part.batch
            outputs = model(model_inputs(model, batch), **model_context(model, batch, state))
            if model.stateful:
                outputs, state = outputs
            value, _ = call_loss(loss, outputs, batch)
            weight = batch_weight(loss, whole) * part.share
            add("loss", float(value) * weight, weight)
            for name, metric in metrics.items():
                add(name, *_measured(name, metric, outputs, part, shared[name], is_one_of(loss)))
    flat = add_same(group, digest, [number for both in sums.values() for number in both])
    sums = dict(zip(sums, zip(flat[::2], flat[1::2], strict=True), strict=True))
    return {name: total / count if count else math.nan for name, (total, count) in sums.items()}


def call_loss(loss: Callable[..., Any], outputs: Any, batch: Batch) -> tuple[Any, Callable[..., Any]]:
    """(value, backward) of a loss on a batch. Raises TypeError for a loss of another kind."""
    _check_takes("loss", loss, batch)
    try:
        result = loss(outputs, batch.targets, **batch.loss_options)
    except ShapeError as error:
        raise ShapeError(f"{error}{_shape_hint(outputs, batch)}") from error
    if not isinstance(result, (tuple, list)) or len(result) != 2 or not callable(result[1]):
        got = type(result).__name__
        if isinstance(result, (tuple, list)):
            got = f"({', '.join(type(part).__name__ for part in result)})"
        raise TypeError(
            "loss: expected it to return (value, backward), where backward(factor) returns the gradient with respect "
            f"to the outputs, got {got}"
        )
    return result


def _shape_hint(outputs: Any, batch: Batch) -> str:
    """What to do where a batch seems to have the sequences first, from its inputs and one target for each, or where
    the model gives more or fewer features than the targets have; else ""."""
    inputs, targets, made = (getattr(array, "shape", ()) for array in (batch.inputs, batch.targets, outputs))
    if len(made) == len(targets) > 1 and made[:-1] == targets[:-1]:
        return f". End the model with {targets[-1]} features, as gpurnn.Linear({made[-1]}, {targets[-1]}) makes them"
    if len(inputs) != 3 or len(targets) != 1 or inputs[0] != targets[0] or inputs[1] == targets[0]:
        return ""
    return (
        f". Arrays are time-major, (T, B, ...): for (B, T, ...), here {inputs}, build the layers with batch_first=True"
    )


def unpack_forward(model: Module, made: Any) -> tuple[Any, State, Callable[..., Any]]:
    """(outputs, state, backward) of what ``model.forward`` returned, the state None where it has none.

    Raises TypeError where it returned something else, as that of a model of one's own may.
    """
    if not isinstance(made, tuple) or len(made) not in (2, 3) or not callable(made[-1]):
        got = f"({', '.join(type(part).__name__ for part in made)})" if isinstance(made, tuple) else type(made).__name__
        raise TypeError(
            f"{type(model).__name__}.forward: expected it to return (outputs, backward), or (outputs, state, backward) "
            f"of a stateful model, got {got}. docs/models.md shows a model of one's own"
        )
    return made[0], made[1] if len(made) == 3 else None, made[-1]


def batch_weight(loss: Callable[..., Any], batch: Batch) -> float:
    """The weight of a batch's loss in a mean over batches: see ``Batch``."""
    counted = None if batch.weight_is_given else mean_weight(loss, batch.targets, batch.loss_options)
    return batch.weight if counted is None else counted


def _measured(
    name: str, metric: Callable[..., Any], outputs: Any, part: Part, shared: dict[str, Any], known: bool
) -> tuple[float, float]:
    """(total, count) of a metric on a batch. known: whether the options are those of this package's losses."""
    batch = part.batch
    _check_takes(f"metrics[{name!r}]", metric, batch)
    options = shared | batch.loss_options
    result = metric(outputs, batch.targets, **options)
    if isinstance(result, (tuple, list)) and len(result) == 2:
        return float(result[0]), float(result[1])
    try:
        value = float(result)
    except (TypeError, ValueError):
        raise TypeError(
            f"metrics[{name!r}]: expected it to return a number or (total, count), got {type(result).__name__}"
        ) from None
    if math.isnan(value):
        return 0.0, 0.0
    counts = known and not batch.weight_is_given
    counted = places_weight(batch.targets, all_options(metric, options)) if counts else None
    weight = batch.weight * part.share if counted is None else counted
    return value * weight, weight


def _check_takes(name: str, function: Callable[..., Any], batch: Batch) -> None:
    """Raise TypeError where a function does not take the batch's ``loss_options``."""
    parameters = _parameters(function) if batch.loss_options else None
    for option in batch.loss_options if parameters is not None else ():
        if option not in parameters:
            raise TypeError(
                f"{name}: takes no argument {option}, and this batch has {option}. Give it one, {option}=None, or give "
                "batches with loss_options={}"
            )


def _options_of(loss: Callable[..., Any], metric: Callable[..., Any]) -> dict[str, Any]:
    """What a partial loss has fixed and a metric should have in common with it."""
    fixed = loss.keywords if isinstance(loss, functools.partial) else {}
    own = metric.keywords if isinstance(metric, functools.partial) else {}
    taken = _parameters(metric) or ()
    return {name: fixed[name] for name in _OF_THE_LOSS if name in fixed and name in taken and name not in own}


def _parameters(function: Callable[..., Any]) -> frozenset[str] | None:
    """The names that a function takes; None if it takes any, or if they are not known."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return None
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        return None
    return frozenset(p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY))


def model_inputs(model: Module, batch: Batch) -> Array | tuple[Array, ...]:
    """The batch's inputs as an array, or a tuple of arrays, of the model's backend."""
    if isinstance(batch.inputs, tuple):
        return tuple(model.ops.asarray(array, "inputs") for array in batch.inputs)
    return model.ops.asarray(batch.inputs, "inputs")


def model_context(model: Module, batch: Batch, state: State) -> dict[str, Any]:
    """The arguments of a model's call besides its inputs: the carried state, and where it takes them lengths, resets
    and mask.

    Raises TypeError for resets, and for a mask, that a model should take and does not; ValueError where a reset would
    give the carried state again.
    """
    if batch.carry and batch.reset is not None:
        for name, layer in model.modules():
            if getattr(layer, "reset_to", "initial") == "given":
                raise ValueError(
                    f"reset: {name or 'the model'} would be reset to the state that is carried from the batch before. "
                    'Build the layer with reset_to="initial"'
                )
    context = {"state": state if batch.carry else None} if model.stateful else {}
    given = Timesteps(batch.lengths, batch.reset, batch.mask)
    given.check_taken({"model": model})
    return context | given.given_to(model, taken=accepts)
