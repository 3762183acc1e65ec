"""Training: ``fit``, and ``evaluate`` beside it.

Everything that decides the next step is in a checkpoint: weights, optimiser, schedule, loss scale, the counters of
random draws, the carried recurrent state, the position in the data. So a run that was killed at any moment, and
resumed, goes through the same bits as one that was not.

What a model must be: a ``Module`` with

- ``outputs, *state, backward = model.forward(inputs, **context)`` for training, ``outputs`` or, if ``model.stateful``,
  ``outputs, state = model(inputs, **context)`` in evaluation. ``inputs`` is an array of the model's backend, or a tuple
  of them where the batch has a tuple (an encoder-decoder's source and target). ``context`` holds ``state`` if
  ``model.stateful``, and ``lengths`` if ``model.takes_lengths`` and the batch has lengths.
- ``backward(doutputs)``, which adds to ``model.grads``; what it returns is not looked at.

``outputs`` is whatever the loss takes: ``loss(outputs, batch.targets, **batch.loss_options)`` -> (value, backward), a
mean over what ``batch.weight`` counts. ``backward(share)`` gives ``doutputs``.

A run's folder: ``last.json`` and ``best.json`` (checkpoints, see checkpoint.py), ``history.jsonl``, ``history.png``,
and ``gradient_flow.jsonl`` where asked for.
"""

import contextlib
import json
import logging
import math
import os
import signal
import threading
import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from . import rng, run_folder
from .checkpoint import CheckpointError, load_checkpoint, remove_checkpoint, save_checkpoint
from .dtypes import is_float
from .errors import check_choice, check_flag, check_number, check_size
from .files import check_target, make_folder, one_line, open_log
from .folder_lock import locked
from .gradients import record_gradient_flow
from .loss_scale import LossScaler
from .losses import quiet
from .module import Module
from .optim import clip_grad_norm, clip_grad_value, is_square

_log = logging.getLogger("gpurnn")
_BEFORE_SCALERS = object()  # a checkpoint from before there were loss scalers says nothing of one
_LOG_EVERY = 10  # optimiser steps between two records of the history


class TrainingError(RuntimeError):
    """Training cannot go on: the loss or the gradient is not finite. The weights are those before the bad step."""


class Terminated(KeyboardInterrupt):
    """SIGTERM ended a training, after a checkpoint."""


class History(list):
    """The records of a run, in order, each a dict; the lines of ``history.jsonl``.

    kind "step": step, epoch, loss, lr, grad_norm (of the last update; None before the first). kind "epoch": epoch
    (counted from 1), step, train_loss, validation_loss (or None), validation_NAME for each metric, lr, grad_norm,
    seconds since the start. ``stopped``: why training ended, "epochs" or "patience". With a loss scale both have
    loss_scale, and skipped: how many steps so far made no update because their gradients overflowed.
    """

    stopped = None

    @property
    def epochs(self):
        """The records of whole epochs."""
        return [record for record in self if record["kind"] == "epoch"]


def fit(
    model,
    loss,
    batches,
    *,
    optimizer,
    epochs,
    validation=None,
    schedule=None,
    schedule_every="epoch",
    clip_norm=None,
    clip_value=None,
    weight_noise=0.0,
    accumulate=1,
    out=None,
    resume=False,
    overwrite=False,
    checkpoint_every=None,
    patience=None,
    metrics=None,
    watch=("loss", "min"),
    progress=True,
    flow=False,
    extra=None,
    loss_scaler="auto",
):
    """Train ``model`` to ``epochs`` epochs in total; returns its ``History``.

    loss: ``loss(outputs, targets)`` -> (value, backward), a mean over valid steps, such as ``gpurnn.cross_entropy``;
        gets the batch's ``loss_options`` by name: ``lengths=`` where a batch has lengths, unless it says otherwise.
    batches, validation: batch sources, see data.py. A batch that carries continues the recurrent state of the one
        before (truncated BPTT: no gradient goes back over the border).
    schedule: its ``step`` is called after every "epoch" (with the validation loss, else the training loss) or "step".
    clip_norm, clip_value: limits of the gradient's global norm and of each of its entries.
    weight_noise: standard deviation of normal noise that is added to every parameter that is not frozen, for the length
        of a training step, and taken away before the update (Graves, "Practical variational inference for neural
        networks", NIPS 2011); a fresh draw for every step, keyed by the model's seed and the step's number.
    accumulate: batches whose gradients make one optimiser step; equal to one large batch of all their steps.
    out: folder of the run; None writes nothing. It is locked meanwhile, see folder_lock.py. resume: go on from the
        last checkpoint there, exactly as if never stopped, or from the best where the last is missing; without one,
        start. overwrite: replace a run that stands there, but no file that is not a run's.
    checkpoint_every: optimiser steps between checkpoints, besides the end of each epoch. extra: JSON-ready, kept in
    them.
    metrics: what to measure on the validation batches besides the loss, see ``measure``.
    watch: what the best checkpoint and ``patience`` go by: "loss" or a metric's name, and whether "min" or "max" is
        good. Without validation batches it is the training loss.
    patience: epochs without a better one before training stops.
    progress: a bar with loss, rate and time left. flow: record the gradient flow at the first step of every epoch.
    loss_scaler: a ``LossScaler``, or None; "auto" is a new one for a float16 model and None for others. A step whose
        gradients overflow makes no update and counts as a step; its loss counts in the epoch's mean.

    Every part of the model trains in the mode that it has: one put into evaluation mode stays in it (a normalisation
    keeps its statistics). A model that is in evaluation mode as a whole is put into training mode, all of it.

    Raises TrainingError where loss or gradient is not finite, CheckpointError for a checkpoint that is damaged or of
    another model, FileExistsError for a folder in use or with files in it, FileError for what is no folder; the last
    good checkpoint stays. Ctrl-C ends the step, saves a checkpoint and raises KeyboardInterrupt; a second one raises at
    once. SIGTERM does the same, and raises Terminated, where nobody else handles it.
    """
    for name, value in (("resume", resume), ("overwrite", overwrite), ("progress", progress), ("flow", flow)):
        check_flag(name, value)
    run = _Run(
        model, loss, batches, optimizer, check_size("epochs", epochs), validation, schedule,
        check_choice("schedule_every", schedule_every, ("epoch", "step")),
        math.inf if clip_norm is None else check_number("clip_norm", clip_norm, 0, low_open=True),
        None if clip_value is None else check_number("clip_value", clip_value, 0, low_open=True),
        check_number("weight_noise", weight_noise, 0), check_size("accumulate", accumulate),
        None if out is None else Path(out),
        None if checkpoint_every is None else check_size("checkpoint_every", checkpoint_every),
        None if patience is None else check_size("patience", patience), metrics or {}, watch, progress, flow, extra,
        _loss_scaler(loss_scaler, model),
    )  # fmt: skip
    check_choice("watch", watch[0], ("loss", *run.metrics))
    check_choice("watch", watch[1], ("min", "max"))
    if patience is not None and validation is None:
        raise ValueError("patience watches the validation loss: give validation batches")
    if optimizer.model is not model:
        raise ValueError("optimizer: was built for another model")
    with _deferred_interrupt() as interrupted:
        try:
            run.open_folder(resume, overwrite)
            run.train(interrupted)
        finally:
            run.close()
    return run.history


def evaluate(model, loss, batches, *, progress=False):
    """Mean loss over all valid steps of a batch source, in evaluation mode; see ``measure``."""
    return measure(model, loss, batches, progress=progress)["loss"]


def measure(model, loss, batches, metrics=None, *, progress=False):
    """{"loss": mean loss over all that counts, and a number for each metric} of a batch source, in evaluation mode.

    metrics: name -> function of (outputs, targets, **loss_options) that returns (total, count); the metric is the sum
    of the totals over the sum of the counts: right answers and answers, for instance.

    The recurrent state is carried as in training, from a zero state; the model's modes are restored afterwards, its
    training is not touched. Where nothing counts the number is nan.
    """
    check_flag("progress", progress)
    sums = {name: [0.0, 0.0] for name in ("loss", *(metrics or ()))}

    def add(name, total, count):
        sums[name][0] += float(total)
        sums[name][1] += float(count)

    state = None
    with model.evaluation():
        for index in _bar(range(len(batches)), progress, desc="validation", leave=False):
            batch = batches.batch(0, index)
            outputs = model(_inputs(model, batch), **_context(model, batch, state))
            if model.stateful:
                outputs, state = outputs
            value, _ = loss(outputs, batch.targets, **batch.loss_options)
            add("loss", float(value) * batch.weight, batch.weight)
            for name, metric in (metrics or {}).items():
                add(name, *metric(outputs, batch.targets, **batch.loss_options))
    return {name: total / count if count else math.nan for name, (total, count) in sums.items()}


class _Run:
    """One call of ``fit``: its settings, and the state that a checkpoint holds."""

    def __init__(
        self, model, loss, batches, optimizer, epochs, validation, schedule, schedule_every, clip_norm, clip_value,
        weight_noise, accumulate, out, checkpoint_every, patience, metrics, watch, progress, flow, extra, scaler,
    ):  # fmt: skip
        self.model, self.loss, self.batches, self.optimizer = model, loss, batches, optimizer
        self.epochs, self.validation = epochs, validation
        self.schedule, self.schedule_every = schedule, schedule_every
        self.clip_norm, self.clip_value = clip_norm, clip_value
        self.weight_noise, self.accumulate = weight_noise, accumulate
        self.out, self.checkpoint_every, self.patience = out, checkpoint_every, patience
        self.metrics, self.watch = metrics, watch
        self.progress, self.flow, self.extra = progress, flow, extra
        self.scaler = scaler  # a LossScaler or None
        self.history = History()
        # what a checkpoint holds besides model, optimiser and schedule
        self.epoch, self.index, self.step = 0, 0, 0  # whole epochs done, next batch, optimiser steps
        self.state = None
        self.sums = [0.0, 0]  # loss times weight, weight, over this epoch so far
        self.norm = None
        self.best, self.waited = None, 0
        self.seconds = 0.0
        self._started = time.monotonic()
        self._files, self._sizes = {}, {}  # open logs, and their sizes at the checkpoint that was restored
        self._open = contextlib.ExitStack()  # the logs, and the lock of the folder

    # ---- the loop

    def train(self, interrupted):
        per_epoch = len(self.batches)
        bar = _bar(None, self.progress, total=self.epochs * per_epoch, initial=self.epoch * per_epoch + self.index)
        with bar:
            while self.epoch < self.epochs and not self._out_of_patience():
                bar.set_description(f"epoch {self.epoch + 1}/{self.epochs}")
                if not self.model.training:
                    self.model.train()
                while self.index < per_epoch:
                    done = self._train_step()
                    bar.set_postfix_str(
                        f"loss {self.sums[0] / max(self.sums[1], 1):.4f}, lr {self.optimizer.lr:.2g}", False
                    )
                    bar.update(done)
                    every = self.checkpoint_every
                    stop = interrupted()
                    if stop or (every and self.step % every == 0 and self.index < per_epoch):
                        self.save()
                    if stop:
                        raise stop
                self._end_epoch()
        self.history.stopped = "patience" if self._out_of_patience() and self.epoch < self.epochs else "epochs"
        self._draw()

    def _train_step(self):
        """One optimiser step over ``accumulate`` batches; returns how many there were."""
        model, stop = self.model, min(self.index + self.accumulate, len(self.batches))
        group = [self.batches.batch(self.epoch, index) for index in range(self.index, stop)]
        whole = sum(batch.weight for batch in group)
        watch = self.flow and self.index == 0
        with self._undone_on_error():
            mean, norm, good, state, flow = self._gradients(group, whole, watch)
        if self.scaler is None or self.scaler.update(good):
            if self.clip_value is not None:
                clip_grad_value(model, self.clip_value)
            self.optimizer.step()
            self.norm = norm
        if self.schedule is not None and self.schedule_every == "step":
            self.schedule.step()
        self.state, self.index, self.step = state, stop, self.step + 1
        self.sums[0] += mean * whole
        self.sums[1] += whole
        if self.step % _LOG_EVERY == 0:
            self._record(
                kind="step", step=self.step, epoch=self.epoch + 1, loss=mean, lr=self.optimizer.lr, grad_norm=self.norm
            )
        if watch:
            self._record_flow(flow)
        return len(group)

    def _gradients(self, group, whole, watch):
        """The clipped gradients of these batches, of weight ``whole`` together: (mean loss, norm, whether that is
        finite, recurrent state, gradient flow or None). Raises TrainingError for numbers that no update should see."""
        model, mean, state = self.model, 0.0, self.state
        model.zero_grad()
        with record_gradient_flow() if watch else contextlib.nullcontext() as flow, self._noisy_weights():
            for batch in group:
                outputs, *last, backward = model.forward(_inputs(model, batch), **_context(model, batch, state))
                state = last[0] if last else None
                value, dloss = self.loss(outputs, batch.targets, **batch.loss_options)
                share = batch.weight / whole if whole else 0.0
                with quiet() if self.scaler else contextlib.nullcontext():  # what overflows is skipped below
                    backward(dloss(share * (self.scaler.scale if self.scaler else 1)))
                mean += float(value) * share
        if self.scaler:
            self.scaler.unscale(model)
        norm = float(clip_grad_norm(model, self.clip_norm))
        good = math.isfinite(norm)
        if not math.isfinite(mean) or not (good or (self.scaler and self.scaler.scale > 1)):
            before = "" if self.norm is None else f" (the step before: {self.norm:.3g})"
            scale = f" at a loss scale of {self.scaler.scale:g}" if self.scaler else ""
            raise TrainingError(
                f"epoch {self.epoch + 1}, step {self.step + 1}: loss {mean}, gradient norm {norm:.3g}{before}{scale}. "
                "The weights, running statistics and random draws are those before this step; the last checkpoint "
                f"stays. {self._what_helps(group)}"
            )
        return mean, norm, good, state, flow

    @contextlib.contextmanager
    def _undone_on_error(self):
        """What ends in an error inside leaves running statistics and the counters of random draws as they were."""
        modules = [module for _, module in self.model.modules()]
        calls = [module.calls for module in modules]
        buffers = [(array, array.copy()) for module in modules for array in module.buffers.values()]
        try:
            yield
        except BaseException:
            for module, count in zip(modules, calls, strict=True):
                module.calls = count
            for array, before in buffers:
                array[...] = before
            raise

    def _what_helps(self, group):
        """A sentence for a step that was not finite."""
        if not all(_finite(batch) for batch in group):
            return "This step's data hold values that are not finite: take them out"
        if self.norm is None:
            start = "It is the first step: look at the scale of the data and of the initial values"
        else:
            start = f"A learning rate below {self.optimizer.lr:.3g} usually helps"
        if self.clip_norm < math.inf:
            return f"{start}; gradients are limited already, to a norm of {self.clip_norm:g} (clip_norm)"
        return f"{start}; so does a limit of the gradient's norm (clip_norm)"

    @contextlib.contextmanager
    def _noisy_weights(self):
        """Inside, the parameters are those of this step plus its noise; afterwards they have their old bits again."""
        if not self.weight_noise:
            yield
            return
        model = self.model
        params, clean = model.flat_params, model.flat_params.copy()
        count, key = model.parameter_count, rng.name_key("weight noise")
        noise = self.weight_noise * rng.normal((count,), model.seed, key, self.step, params.dtype, model.xp)
        start, frozen = 0, set(model.frozen)
        for name, array in model.params.items():  # one draw for each number, wherever it lies
            if name not in frozen:
                array += noise[start : start + array.size].reshape(array.shape)
            start += array.size
        model.changed()
        try:
            yield
        finally:
            params[...] = clean
            model.changed()

    def _end_epoch(self):
        train_loss = self.sums[0] / self.sums[1] if self.sums[1] else math.nan
        measured, metrics = None, {}
        if self.validation is not None:
            metrics = measure(self.model, self.loss, self.validation, self.metrics)
            for name, value in metrics.items():
                if not math.isfinite(value):
                    raise TrainingError(
                        f"epoch {self.epoch + 1}, step {self.step}: validation {name} {value}, last gradient norm "
                        f"{math.nan if self.norm is None else self.norm:.3g}. The last checkpoint, of the epoch "
                        "before, stays"
                    )
            measured = metrics.pop("loss")
        if self.schedule is not None and self.schedule_every == "epoch":
            self.schedule.step(train_loss if measured is None else measured)
        name, good = ("loss", "min") if measured is None else self.watch
        watched = metrics.get(name, train_loss if measured is None else measured)
        better = self.best is None or (watched > self.best if good == "max" else watched < self.best)
        self.best, self.waited = (watched, 0) if better else (self.best, self.waited + 1)
        self.epoch, self.index, self.state, self.sums = self.epoch + 1, 0, None, [0.0, 0]
        self._record(
            kind="epoch", epoch=self.epoch, step=self.step, train_loss=train_loss, validation_loss=measured,
            **{f"validation_{name}": value for name, value in metrics.items()},
            lr=self.optimizer.lr, grad_norm=self.norm, seconds=round(self._elapsed(), 3),
        )  # fmt: skip
        if better:
            self.save("best.json")
        self.save()

    def _out_of_patience(self):
        return self.patience is not None and self.waited >= self.patience

    def _elapsed(self):
        return self.seconds + time.monotonic() - self._started

    # ---- files

    def open_folder(self, resume, overwrite):
        """Refuse, clear or continue the run's folder, and open its logs."""
        if self.out is None:
            if resume:
                raise ValueError("resume needs out, the folder of the run")
            return
        make_folder(self.out)
        self._open.enter_context(locked(self.out))
        run_folder.sweep(self.out)
        for name in run_folder.FILES:
            check_target(self.out / name)
        saved = [self.out / name for name in run_folder.CHECKPOINTS if (self.out / name).exists()]
        if resume and saved:
            if saved[0].name != "last.json":
                _log.warning("%s: last.json is missing, training goes on from %s", self.out, saved[0].name)
            self._restore(saved[0])
        else:
            if not (resume or overwrite):
                run_folder.check_free(self.out, FileExistsError, (run_folder.CONFIG,))
            run_folder.check_ours(self.out, (run_folder.CONFIG,))
            for name in run_folder.CHECKPOINTS:
                remove_checkpoint(self.out / name)
        for name in ("history", "gradient_flow"):
            path = self.out / f"{name}.jsonl"
            if name == "history" or self.flow or path.exists():
                self._files[name] = self._open.enter_context(open_log(path))
                self._files[name].truncate(self._end_of(name))

    def _end_of(self, log):
        """Where a log ends that goes on: as at the checkpoint, or behind its last whole line where it was shortened."""
        if not self.step:
            return 0
        size = self._sizes.get(log, 0)
        end = run_folder.whole_lines(self._files[log], size)
        if end < size:
            _log.warning("%s: %s.jsonl was shortened: some of its records are missing", self.out, log)
        return end

    def close(self):
        self._open.close()

    def save(self, name="last.json"):
        """Write a checkpoint of this moment, if there is a folder."""
        if self.out is None:
            return
        sizes = {}
        for log, file in self._files.items():
            file.flush()
            os.fsync(file.fileno())
            sizes[log] = os.fstat(file.fileno()).st_size
        optimizer, structure, arrays = self.optimizer.state_dict(), *_flatten(self.state)
        arrays = {f"state/{key}": self.model.ops.to_numpy(array) for key, array in arrays.items()}
        arrays |= {f"model/{key}": array for key, array in self.model.state_dict().items()}
        arrays |= {f"optimizer/{key}": array for key, array in optimizer["arrays"].items()}
        document = {
            "epoch": self.epoch, "index": self.index, "step": self.step, "sums": self.sums, "norm": self.norm,
            "best": self.best, "waited": self.waited, "seconds": self._elapsed(), "state": structure,
            "optimizer": optimizer["scalars"], "schedule": self.schedule and self.schedule.state_dict(),
            "scaler": self.scaler and self.scaler.state_dict(), "random": self.model.random_state(), "sizes": sizes,
            "frozen": self.model.frozen,
            "data": {"batches": len(self.batches), "accumulate": self.accumulate}, "extra": self.extra,
            "machine": self.model.ops.machine(),
        }  # fmt: skip
        squares = [f"optimizer/{key}" for key in optimizer["arrays"] if is_square(key)]
        save_checkpoint(self.out / name, arrays, document, infinite=squares)

    def _restore(self, path):
        """Take everything from a checkpoint; on an error the model is as it was."""
        arrays, document = load_checkpoint(path)
        if not _is_of_fit(document):
            raise CheckpointError(
                f"{path}: holds no run that could go on: load_weights(model, path) takes the weights that are in it"
            )
        before = self.model.state_dict()
        try:
            data = {"batches": len(self.batches), "accumulate": self.accumulate}
            if document["data"] != data:
                raise ValueError(f"it was made with {document['data']}, this run has {data}")
            if (document["schedule"] is None) != (self.schedule is None):
                raise ValueError("it was made " + ("without a schedule" if self.schedule else "with a schedule"))
            scaler = document.get("scaler", _BEFORE_SCALERS)
            if scaler is not _BEFORE_SCALERS and (scaler is None) != (self.scaler is None):
                raise ValueError(f"it was made {'without' if self.scaler else 'with'} a loss scale (loss_scaler)")
            parts = _by_prefix(arrays)
            self.model.load_state_dict(parts.get("model", {}))
            self.optimizer.load_state_dict({"scalars": document["optimizer"], "arrays": parts.get("optimizer", {})})
            if self.schedule is not None:
                self.schedule.load_state_dict(document["schedule"])
            if self.scaler is not None and scaler is not _BEFORE_SCALERS:
                self.scaler.load_state_dict(scaler)
            self.state = _unflatten(document["state"], parts.get("state", {}), self.model.xp)
            self.model.load_random_state(document["random"])
            self.epoch, self.index, self.step = (check_size(n, document[n], 0) for n in ("epoch", "index", "step"))
            for number in (*document["sums"], document["seconds"], document["norm"] or 0.0, document["best"] or 0.0):
                check_number("sums, seconds, norm and best", number)
            self.sums, self.norm = list(document["sums"]), document["norm"]
            self.best, self.waited, self.seconds = document["best"], document["waited"], document["seconds"]
            self._sizes = {str(log): check_size("sizes", size, 0) for log, size in document["sizes"].items()}
        except (KeyError, ValueError, TypeError, AttributeError, IndexError) as error:
            self.model.load_state_dict(before)
            raise CheckpointError(f"{path}: does not fit this run: {one_line(error, 2000)}") from error
        frozen = document.get("frozen", self.model.frozen)
        if frozen != self.model.frozen:
            then, now = (", ".join(names) or "none" for names in (frozen, self.model.frozen))
            _log.warning("%s was made with frozen parameters: %s; this run has: %s", path, then, now)
        self._warn_of_another_machine(path, document.get("machine"))
        log = self.out / run_folder.HISTORY
        if log.exists():
            self.history.extend(run_folder.read_history(log, self._sizes.get("history", 0)))

    def _warn_of_another_machine(self, path, then):
        """Say what differs from where a checkpoint was made, as far as that decides the last bits."""
        now = self.model.ops.machine()
        other = [name for name in now if isinstance(then, dict) and then.get(name) != now[name]]
        if other:
            differences = ", ".join(f"{name} was {then.get(name)!r} and is {now[name]!r}" for name in other)
            _log.warning(
                "%s: the run goes on, but not to the same bits as without a stop: %s", path, one_line(differences, 2000)
            )

    def _record(self, **record):
        if self.scaler:
            record |= {"loss_scale": self.scaler.scale, "skipped": self.scaler.skipped}
        self.history.append(record)
        self._write("history", record)

    def _record_flow(self, flow):
        def mean(norms):
            return None if norms is None else norms.mean(axis=1).tolist()

        layers = {name: {"dh": mean(norms.dh), "dc": mean(norms.dc)} for name, norms in flow.items()}
        self._write("gradient_flow", {"epoch": self.epoch + 1, "step": self.step, "layers": layers})

    def _write(self, log, record):
        if log in self._files:
            self._files[log].write(json.dumps(record).encode() + b"\n")
            self._files[log].flush()

    def _draw(self):
        if self.out is None:
            return
        from .plots import plot_run

        try:
            plot_run(self.out)
        except ImportError as error:
            _log.info("no history.png: %s", error)


def save_weights(model, path):
    """Write the weights and running statistics of ``model`` as a checkpoint: ``path``, a .json file, and its arrays
    beside it. Raises CheckpointError as ``save_checkpoint`` does, TypeError for what is no model.

    >>> model = gpurnn.GRU(2, 3)
    >>> gpurnn.save_weights(model, "model.json")
    >>> gpurnn.load_weights(model, "model.json")
    """
    _check_order("save_weights", model, path)
    save_checkpoint(path, model.state_dict(), {"kind": "weights", "model": type(model).__name__})


def load_weights(model, path):
    """Give ``model`` the weights and running statistics of a file.

    path: the .json file of ``save_weights``, of ``save_checkpoint(path, model.state_dict(), ...)`` or of a checkpoint
    of ``fit``; or the folder of a run, for its best checkpoint, else its last.

    Raises CheckpointError for a damaged one or one of another model, ValueError for a file of another kind, saying what
    reads it, TypeError for what is no model; nothing changes then.
    """
    _check_order("load_weights", model, path)
    path = Path(path)
    if path.is_dir():
        folder = path
        path = next((folder / name for name in ("best.json", "last.json") if (folder / name).exists()), None)
        if path is None:
            raise CheckpointError(f"{folder}: holds no best.json and no last.json: it is no folder of a run of fit")
    arrays, document = load_checkpoint(path)
    if _is_of_fit(document):
        arrays = _by_prefix(arrays).get("model", {})
    expected = list(model.state_dict())
    if expected and not set(arrays) & set(expected):
        raise CheckpointError(
            f"{path}: holds no weights of this model: its arrays are {_some(arrays)}, the model's {_some(expected)}. "
            "load_checkpoint(path) reads arrays of any kind"
        )
    try:
        model.load_state_dict(arrays)
    except (KeyError, ValueError, TypeError) as error:
        raise CheckpointError(f"{path}: does not fit this model: {error}") from error


# ---- small parts


def _check_order(function, model, path):
    """Raise TypeError unless ``model`` is one and ``path`` the name of a file."""
    if isinstance(path, Module):
        raise TypeError(f"{function}: expected the model first and then the path: {function}(model, path)")
    if not isinstance(model, Module):
        hint = ". Arrays are what save_checkpoint(path, arrays, document) saves" if isinstance(model, Mapping) else ""
        raise TypeError(f"model: expected a gpurnn layer or model, got {type(model).__name__}{hint}")
    if not isinstance(path, (str, os.PathLike)):
        raise TypeError(f"path: expected the name of a file, got {type(path).__name__}")


def _loss_scaler(scaler, model):
    if scaler is None or isinstance(scaler, LossScaler):
        return scaler
    if not isinstance(scaler, str) or scaler != "auto":
        raise TypeError(f"loss_scaler should be a LossScaler, None or 'auto', got {scaler!r}")
    return LossScaler() if model.dtype == np.float16 else None


def _inputs(model, batch):
    """The batch's inputs as an array, or a tuple of arrays, of the model's backend."""
    if isinstance(batch.inputs, tuple):
        return tuple(model.ops.asarray(array, "inputs") for array in batch.inputs)
    return model.ops.asarray(batch.inputs, "inputs")


def _context(model, batch, state):
    """What a model's call takes besides x: the state where it has one and the batch carries it, and the lengths."""
    context = {"state": state if batch.carry else None} if model.stateful else {}
    if batch.lengths is not None and getattr(model, "takes_lengths", False):
        context["lengths"] = batch.lengths
    return context


def _is_of_fit(document):
    """Whether a checkpoint's document is one that ``fit`` wrote."""
    return isinstance(document, dict) and {"epoch", "step", "optimizer", "random", "data"} <= set(document)


def _some(names):
    """The first of some names, in words."""
    names = list(names)
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "") if names else "none"


def _finite(batch):
    """Whether inputs and targets hold finite numbers alone, as far as they are arrays; padding may hold anything."""
    arrays = batch.inputs if isinstance(batch.inputs, tuple) else (batch.inputs,)
    for array in (*arrays, batch.targets):
        array = array.get() if hasattr(array, "get") and not isinstance(array, np.ndarray) else array
        if not isinstance(array, np.ndarray) or not is_float(array.dtype):
            continue
        padded = batch.lengths is not None and not isinstance(batch.lengths, tuple) and array.ndim > 1
        if padded and array.shape[1] == len(batch.lengths):
            array = array[np.arange(len(array))[:, None] < np.asarray(batch.lengths)]
        if not np.isfinite(array).all():
            return False
    return True


def _by_prefix(arrays):
    """{"model/a": x} -> {"model": {"a": x}}."""
    parts = {}
    for name, array in arrays.items():
        prefix, _, rest = name.partition("/")
        parts.setdefault(prefix, {})[rest] = array
    return parts


def _flatten(state, path="s"):
    """A recurrent state as (JSON-ready structure whose leaves are keys or None, key -> array)."""
    if state is None:
        return None, {}
    if isinstance(state, (tuple, list)):
        structure, arrays = [], {}
        for number, part in enumerate(state):
            inner, more = _flatten(part, f"{path}.{number}")
            structure.append(inner)
            arrays |= more
        return structure, arrays
    return path, {path: state}


def _unflatten(structure, arrays, xp):
    if structure is None:
        return None
    if isinstance(structure, list):
        return tuple(_unflatten(part, arrays, xp) for part in structure)
    return xp.asarray(np.asarray(arrays[structure]))


def _bar(iterable, progress, **options):
    from tqdm import tqdm

    columns = min(80, os.get_terminal_size(2).columns) if os.isatty(2) else 80
    return tqdm(iterable, disable=not progress, ncols=columns, unit="batch", dynamic_ncols=False, **options)


@contextlib.contextmanager
def _deferred_interrupt():
    """Inside, the first Ctrl-C or SIGTERM is only noted; a second one raises at once.

    The yielded function returns the exception to raise, or None as long as there was no signal. A signal that somebody
    else handles stays theirs.
    """
    noted = []
    kinds = {signal.SIGINT: KeyboardInterrupt, signal.SIGTERM: Terminated}
    usual = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}
    if threading.current_thread() is not threading.main_thread():
        usual = {}

    def handler(number, frame):
        if noted:
            raise kinds[number]
        noted.append(kinds[number])

    changed = [number for number, before in usual.items() if signal.getsignal(number) is before]
    for number in changed:
        signal.signal(number, handler)
    try:
        yield lambda: noted[0] if noted else None
    finally:
        for number in changed:
            signal.signal(number, usual[number])
