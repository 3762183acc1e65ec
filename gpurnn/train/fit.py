"""Training: ``fit``.

A checkpoint holds everything that decides the next step: weights, optimizer, learning-rate schedule, loss scale, the
counters of random draws, the carried recurrent state, the position in the data. So a run that was killed at any moment,
and resumed, has the same bits as one that was not.

The model must be a ``Module`` with

- ``outputs, *state, backward = model.forward(inputs, **context)`` for training, ``outputs`` or, if ``model.stateful``,
  ``outputs, state = model(inputs, **context)`` in evaluation. ``inputs`` is an array of the model's backend, or a tuple
  of them where the batch has a tuple (an encoder-decoder's source and target). ``context`` holds ``state`` if
  ``model.stateful``, ``lengths`` if ``model.takes_lengths`` and the batch has lengths, and ``reset`` and ``mask`` if
  ``forward`` has arguments of these names and the batch has them.
- ``backward(doutputs)``, which adds to ``model.grads``. ``fit`` ignores what it returns.

``outputs`` is whatever the loss takes: ``loss(outputs, batch.targets, **batch.loss_options)`` -> (value, backward),
where the value is a mean over what ``batch.weight`` counts and ``backward(factor)`` returns ``doutputs``.

A run's folder holds ``last.json`` and ``best.json`` (checkpoints, see checkpoint.py), ``history.jsonl``,
``history.png``, and ``gradient_flow.jsonl`` with ``flow=True``.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from ..data import BatchSource
from ..errors import check_flag
from ..loss_scale import LossScaler
from ..module import Module
from ..optim import Optimizer, Schedule
from .history import History
from .interrupt import deferred_interrupt
from .loop import TrainingLoop
from .parallel import Group
from .settings import FitSettings, explain_foreign_arguments, guard_of


@explain_foreign_arguments
def fit(
    model: Module,
    loss: Callable[..., Any],
    batches: BatchSource | Iterable[Any],
    *,
    optimizer: Optimizer | str,
    lr: float | None = None,
    epochs: int,
    validation: BatchSource | Iterable[Any] | None = None,
    schedule: Schedule | Callable[[Optimizer], Schedule] | None = None,
    schedule_every: str = "epoch",
    clip_norm: float | None = None,
    clip_value: float | None = None,
    weight_noise: float = 0.0,
    accumulate: int = 1,
    out: str | os.PathLike[str] | None = None,
    resume: bool = False,
    overwrite: bool = False,
    checkpoint_every: int | None = None,
    patience: int | None = None,
    metrics: Mapping[str, Callable[..., Any]] | None = None,
    watch: tuple[str, str] = ("loss", "min"),
    callbacks: Iterable[Any] = (),
    progress: bool = True,
    flow: bool = False,
    extra: Any = None,
    loss_scaler: LossScaler | str | None = "auto",
    group: Group | None = None,
    graph: bool | None = None,
) -> History:
    """Train ``model`` until it has had ``epochs`` epochs in total.

    Every layer keeps its mode: one in evaluation mode stays in it (a normalization layer uses its running statistics).
    If the model as a whole is in evaluation mode, all of it is put into training mode.

    Ctrl-C ends the step, saves a checkpoint and raises KeyboardInterrupt; a second one raises at once. SIGTERM does the
    same and raises ``Terminated``, unless the program has a handler of its own. The exception's ``history`` holds the
    records.

    At the end the model has the weights of the last update. Those of the best epoch, by ``watch``, are in ``out``:
    ``load_weights(model, out)`` loads them.

    Parameters
    ----------
    model : Module
        The model to train; gpurnn/train/fit.py says what it must offer.
    loss : callable
        ``loss(outputs, targets)`` -> (value, backward), a mean over valid timesteps, such as ``gpurnn.cross_entropy``.
        It also gets the batch's ``loss_options`` by name: by default the batch's ``lengths`` and ``mask``.
    batches, validation : batch source, or iterable of batches
        A batch source has ``len`` and ``batch(epoch, index)``, see gpurnn/data/batches.py. Or a list of batches, or an
        object that can be iterated over again and again, such as torch's DataLoader. Its batches are ``Batch``, (x, y)
        or (x, y, lengths), see train/sources.py. A batch with ``carry`` continues the recurrent state of the batch
        before it (truncated BPTT: no gradient crosses the border).
    optimizer : Optimizer or str
        Built for ``model``, or "adam", "adamw", "rmsprop" or "sgd".
    lr : float, optional
        Learning rate of an ``optimizer`` that is given by name.
    epochs : int
        Epochs in total, with those before a resume.
    schedule : Schedule, or function of the optimizer that returns one, optional
        Learning-rate schedule.
    schedule_every : {"epoch", "step"}
        When ``schedule.step`` is called: after every epoch, with the validation loss or else the training loss; or
        after every update.
    clip_norm, clip_value : float, optional
        Upper limits of the gradient's global norm and of each of its entries.
    weight_noise : float
        Standard deviation of normal noise that is added to every parameter that is not frozen, and removed before the
        update (Graves, "Practical variational inference for neural networks", NIPS 2011). Each step draws new noise,
        keyed by the model's seed and the step's number.
    accumulate : int
        Batches whose gradients make one update, equal to one large batch of all their timesteps.
    out : path, optional
        Folder of the run; None writes nothing. It is locked while training runs, see folder_lock.py.
    resume : bool
        Continue from the last checkpoint in ``out``, exactly as if never stopped, or from the best if the last is
        missing. Without a checkpoint, start. Arguments that decide the result must be those of the run, but ``epochs``
        and ``patience`` may differ. An ``optimizer`` or a ``schedule`` that is an object takes its numbers from the
        checkpoint. If batches cannot be asked for by number, as with a loader, an epoch that was stopped in the middle
        starts over.
    overwrite : bool
        Replace the run in ``out``, but no file that is not a run's.
    checkpoint_every : int, optional
        Updates between checkpoints, besides those at the end of each epoch.
    patience : int, optional
        Training stops after this many epochs without a better one; it needs ``validation``.
    metrics : mapping, optional
        What to measure on the validation batches besides the loss, see ``measure``.
    watch : pair of str
        What ``best.json`` and ``patience`` compare: "loss" or a metric's name, and whether "min" or "max" is good.
        Without validation batches it is the training loss.
    callbacks : iterable
        Functions of (record, training) that are called after every epoch, and objects with ``on_start``,
        ``on_update``, ``on_epoch`` or ``on_end``: see ``gpurnn.train.callbacks``.
    progress : bool
        Show a line for each epoch, and a bar where standard error is a terminal.
    flow : bool
        Record the gradient flow at the first step of every epoch.
    extra : object, optional
        JSON-ready, stored in the checkpoints.
    loss_scaler : LossScaler, None or "auto"
        "auto" builds one for a float16 model and none for others. A step whose gradients overflow makes no update and
        counts as a step; its loss counts in the epoch's mean.
    group : Group, optional
        The processes that train together, from ``gpurnn.train.parallel.init()``: each computes its part of every batch.
        All call ``fit`` with the same arguments. Process 0 gives the initial weights, writes ``out``, and alone calls
        the callbacks and shows progress. docs/parallel.md has the rest.
    graph : bool, optional
        Whether a whole step (forward, backward, update) becomes one CUDA graph once a shape of batches comes back, so
        that Python takes no part in it; the results have the same bits. Losses and gradient norms are then fetched
        every 10 steps. None: where the backend is "cuda" and the step can be recorded, for layers, losses and
        optimizers of this package. True: it must be, for those of your own too, whose Python then runs once for each
        shape. docs/training.md says what cannot be recorded.

    Returns
    -------
    History
        The records of the training.

    Raises
    ------
    TrainingError
        For a loss or gradient that is not finite. The last good checkpoint stays.
    CheckpointError
        For a checkpoint that is damaged, or that belongs to another model or to a run with other arguments.
    FileExistsError
        For a folder that is in use or holds other files.
    FileError
        If ``out`` is no folder.
    BackendError
        With ``graph=True``, where a step cannot be recorded; the message says why.
    TypeError, ValueError
        For an argument of the wrong type or out of its range.

    Examples
    --------
    >>> text = gpurnn.TextBatches(np.arange(201) % 5, batch_size=4, steps=10)
    >>> model = gpurnn.Sequential(gpurnn.Embedding(5, 8), gpurnn.GRU(8, 16), gpurnn.Linear(16, 5))
    >>> adam = gpurnn.Adam(model, lr=0.01)
    >>> history = gpurnn.fit(model, gpurnn.cross_entropy, text, optimizer=adam, epochs=3, progress=False)
    >>> len(history.epochs), history.stopped
    (3, 'epochs')
    """
    check_flag("resume", resume)
    check_flag("overwrite", overwrite)
    with guard_of(group, out).guarded(), deferred_interrupt() as interrupted:
        settings = FitSettings(
            model=model, loss=loss, batches=batches, optimizer=optimizer, lr=lr, epochs=epochs, validation=validation,
            schedule=schedule, schedule_every=schedule_every, clip_norm=clip_norm, clip_value=clip_value,
            weight_noise=weight_noise, accumulate=accumulate, out=out, checkpoint_every=checkpoint_every,
            patience=patience, metrics=metrics, watch=watch, callbacks=callbacks, progress=progress, flow=flow,
            extra=extra, loss_scaler=loss_scaler, group=group, graph=graph,
        )  # fmt: skip
        loop = TrainingLoop(settings)
        try:
            loop.open_folder(resume, overwrite)
            loop.train(interrupted)
        finally:
            loop.close()
    return loop.history
