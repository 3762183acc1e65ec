"""How good a model is on a batch source, and what a batch is to a model."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from .._typing import Array, State
from ..data import Batch, BatchSource
from ..errors import check_flag
from ..module import Module


def evaluate(model: Module, loss: Callable[..., Any], batches: BatchSource, *, progress: bool = False) -> float:
    """Mean loss of a model over a batch source, in evaluation mode; ``measure`` adds metrics to it.

    Parameters
    ----------
    model, loss, batches, progress
        As for ``measure``.

    Returns
    -------
    float
        Mean over all valid timesteps, or over whatever ``batch.weight`` counts; nan where nothing counts.

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
    batches: BatchSource,
    metrics: Mapping[str, Callable[..., Any]] | None = None,
    *,
    progress: bool = False,
) -> dict[str, float]:
    """Mean loss and metrics of a model over a batch source, in evaluation mode; ``evaluate`` returns the loss alone.

    The recurrent state is carried as in training, from a zero state. The model's modes are restored afterwards.

    Parameters
    ----------
    model : Module
        As ``fit`` takes it.
    loss : callable
        As ``fit`` takes it.
    batches : batch source
        As ``fit`` takes it, see gpurnn/data/batches.py.
    metrics : mapping, optional
        Name -> function of (outputs, targets, ``**loss_options``) that returns (total, count). The metric is the sum
        of the totals over the sum of the counts: correct answers and answers, for example.
    progress : bool
        Show a progress bar.

    Returns
    -------
    dict
        "loss" and each metric -> float; nan where nothing counts.
    """
    check_flag("progress", progress)
    sums = {name: [0.0, 0.0] for name in ("loss", *(metrics or ()))}

    def add(name, total, count):
        sums[name][0] += float(total)
        sums[name][1] += float(count)

    state = None
    with model.evaluation():
        for index in progress_bar(range(len(batches)), progress, desc="validation", leave=False):
            batch = batches.batch(0, index)
            outputs = model(model_inputs(model, batch), **model_context(model, batch, state))
            if model.stateful:
                outputs, state = outputs
            value, _ = loss(outputs, batch.targets, **batch.loss_options)
            add("loss", float(value) * batch.weight, batch.weight)
            for name, metric in (metrics or {}).items():
                add(name, *metric(outputs, batch.targets, **batch.loss_options))
    return {name: total / count if count else math.nan for name, (total, count) in sums.items()}


def model_inputs(model: Module, batch: Batch) -> Array | tuple[Array, ...]:
    """The batch's inputs as an array, or a tuple of arrays, of the model's backend."""
    if isinstance(batch.inputs, tuple):
        return tuple(model.ops.asarray(array, "inputs") for array in batch.inputs)
    return model.ops.asarray(batch.inputs, "inputs")


def model_context(model: Module, batch: Batch, state: State) -> dict[str, Any]:
    """The arguments of a model's call besides its inputs: the carried state and the lengths, where it takes them."""
    context = {"state": state if batch.carry else None} if model.stateful else {}
    if batch.lengths is not None and getattr(model, "takes_lengths", False):
        context["lengths"] = batch.lengths
    return context


def progress_bar(iterable: Iterable[Any] | None, progress: bool, **options: Any) -> Any:
    """A tqdm bar over batches, at most 80 columns; silent unless ``progress``."""
    from tqdm import tqdm

    columns = min(80, os.get_terminal_size(2).columns) if os.isatty(2) else 80
    return tqdm(iterable, disable=not progress, ncols=columns, unit="batch", dynamic_ncols=False, **options)
