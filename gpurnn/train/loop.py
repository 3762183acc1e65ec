"""The training loop of ``fit``: epochs, updates, validation."""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .. import rng
from .._typing import State
from ..arrays import host_array
from ..data import Batch
from ..dtypes import is_float
from ..gradients import GradientFlow, record_gradient_flow
from ..losses import quiet
from ..module import Module
from ..optim import clip_grad_norm, clip_grad_value
from ..shards import computing
from .callbacks import Callbacks
from .history import StopTraining, TrainingError
from .measure import batch_weight, call_loss, measure, model_context, model_inputs, unpack_forward
from .members import Members
from .parallel.parts import Part, part_of, zeros_like
from .progress import Progress
from .recorded import RECORD_EVERY, RecordedUpdates
from .settings import FitSettings
from .snapshot import restore_snapshot, save_snapshot
from .state import TrainingState


@dataclass
class Gradients:
    """The results of the forward and backward passes of one update, besides the gradients in the model.

    loss: mean over the batches. norm: of all gradients, before clipping. finite: whether the norm is. state: the last
    recurrent state, or None. flow: the recorded gradient flow, or None.
    """

    loss: float
    norm: float
    finite: bool
    state: State
    flow: GradientFlow | None


class TrainingLoop(TrainingState):
    """One call of ``fit``, in memory. (A task's ``Run`` is a folder of files: data, settings, and such a training.)"""

    def __init__(self, settings: FitSettings) -> None:
        super().__init__(settings)
        given = [*settings.callbacks, *([Progress()] if settings.progress else [])] if self.group.is_first else []
        self.callbacks = Callbacks(given)
        self.members = Members(self)
        self.recorded = RecordedUpdates(self)

    # ---- the loop

    def train(self, interrupted: Callable[[], type[BaseException] | None]) -> None:
        """Train until all epochs are done, patience is used up, or a callback stops it.

        interrupted: returns an exception to raise after the current update, or None.
        """
        interrupted = self.members.agreed(interrupted)
        try:
            self._train(interrupted)
            if stop := interrupted():  # at the last epoch's end, or as a callback stopped the training
                raise stop
        except BaseException as error:
            self._ended_by(error)
            raise
        finally:
            self.callbacks.end(self)
        if self.history:
            self.files.draw()
        if stop := interrupted():  # since then
            error = stop()
            self._ended_by(error)
            raise error

    def _ended_by(self, error: BaseException) -> None:
        """Note why training ended, and give the exception the history."""
        self.history.stopped = "interrupt" if isinstance(error, KeyboardInterrupt) else "error"
        with contextlib.suppress(AttributeError):  # an exception without attributes
            error.history = self.history

    def _train(self, interrupted: Callable[[], type[BaseException] | None]) -> None:
        epochs = self.settings.epochs
        try:
            self.members.call(lambda: self.callbacks.start(self), "the callbacks of the start", compare=True)
            while self.epoch < epochs and not self._out_of_patience():
                if not self.model.training:
                    self.model.train()
                batches = self.settings.batches.read(self.epoch, self.index)
                while some := list(itertools.islice(batches, self.settings.accumulate)):
                    self._train_batches(some, interrupted)
                self._end_epoch()
                if stop := interrupted():
                    raise stop
        except StopTraining as stop:
            self.save()
            self.history.stopped, self.history.reason = "callback", str(stop)
            return
        self.history.stopped = "patience" if self._out_of_patience() and self.epoch < epochs else "epochs"

    def _train_batches(self, some: list[Batch], interrupted: Callable[[], type[BaseException] | None]) -> None:
        """Make one update, show it, and save a checkpoint if one is due or a signal came."""
        if not self.recorded.update(some):
            self.update(some)
            self.recorded.made()
        every, stop = self.settings.checkpoint_every, interrupted()
        if stop or (every and self.step % every == 0 and self.index != self.settings.batches.count):
            self.recorded.settle()
            self.save()
        if stop:
            raise stop

    def update(self, some: list[Batch]) -> None:
        """Make one update from these batches."""
        settings = self.settings
        weights = [batch_weight(settings.loss, batch) for batch in some]
        weight = sum(weights)
        with _undone_on_error(self.model):
            made = self._gradients(some, weights, settings.flow and self.index == 0)
        if self.scaler is None or self.scaler.update(made.finite):
            if settings.clip_value is not None:
                clip_grad_value(self.model, settings.clip_value)
            self.optimizer.step()
            self.norm = made.norm
        if settings.schedule is not None and settings.schedule_every == "step":
            settings.schedule.step()
        self.state, self.index, self.step = made.state, self.index + len(some), self.step + 1
        self.count(made.loss, weight, self.step, self.optimizer.lr, made.flow)

    def count(self, loss: float, weight: float, step: int, lr: float, flow: GradientFlow | None = None) -> None:
        """Add the loss of an update to that of the epoch, record the update and show it."""
        self.sums[0] += loss * weight
        self.sums[1] += weight
        record = self._with_scale(kind="step", step=step, epoch=self.epoch + 1, loss=loss, lr=lr, grad_norm=self.norm)
        if step % RECORD_EVERY == 0:
            self._record(record)
        if flow is not None:
            self._record_flow(flow)
        self.members.after_update(record)

    def _gradients(self, some: list[Batch], weights: list[float], watch: bool) -> Gradients:
        """Make the clipped gradients of the mean over these batches, which have these weights.

        Raises TrainingError for numbers that must not reach the weights.
        """
        model, mean, state, total = self.model, 0.0, self.state, sum(weights)
        scale = self.scaler.scale if self.scaler else 1
        model.zero_grad()
        noise = noisy_weights(model, self.settings.weight_noise, self.step)
        with record_gradient_flow() if watch else contextlib.nullcontext() as flow, noise:
            for batch, weight in zip(some, weights, strict=True):
                part = part_of(self.group, model, self.settings.loss, batch)
                with computing(part.shard):
                    loss, state = self._pass(part, state, (weight / total if total else 0.0) * part.share, scale)
                mean += loss
        mean = self.members.reduce(mean, some)
        if self.scaler:
            self.scaler.unscale(model)
        norm = float(clip_grad_norm(model, self.settings.clip_norm))
        finite = math.isfinite(norm)
        if not math.isfinite(mean) or not (finite or (self.scaler and self.scaler.scale > 1)):
            raise TrainingError(self._what_happened(mean, norm, some))
        return Gradients(mean, norm, finite, state, flow)

    def _pass(self, part: Part, state: State, fraction: float, scale: float) -> tuple[float, State]:
        """Forward and backward pass of a batch, or of this process's part; returns its loss times ``fraction``."""
        model, batch = self.model, part.batch
        made = model.forward(model_inputs(model, batch), **model_context(model, batch, state))
        outputs, state, backward = unpack_forward(model, made)
        if part.empty:  # the layers count the call and take part in what all processes add
            backward(zeros_like(model.xp, outputs))
            return 0.0, state
        value, dloss = call_loss(self.settings.loss, outputs, batch)
        with quiet() if self.scaler else contextlib.nullcontext():  # an overflow skips the update
            backward(dloss(fraction * scale))
        return float(value) * fraction, state

    # ---- numbers that are not finite

    def _what_happened(self, mean: float, norm: float, some: list[Batch]) -> str:
        """The message for a loss or gradient that is not finite."""
        before = "" if self.norm is None else f" (the step before: {self.norm:.3g})"
        scale = f" at a loss scale of {self.scaler.scale:g}" if self.scaler else ""
        return (
            f"epoch {self.epoch + 1}, step {self.step + 1}: loss {mean}, gradient norm {norm:.3g}{before}{scale}. "
            "The weights, running statistics and random draws are those before this step; the last checkpoint "
            f"stays. {self._what_helps(some)}"
        )

    def _what_helps(self, some: list[Batch]) -> str:
        """Advice for a step that was not finite."""
        if not all(_is_finite(batch) for batch in some):
            return "This step's data hold values that are not finite: take them out"
        if self.norm is None:
            start = "It is the first step: look at the scale of the data and of the initial values"
        else:
            start = f"A learning rate below {self.optimizer.lr:.3g} usually helps"
        if self.settings.clip_norm < math.inf:
            limit = self.settings.clip_norm
            return f"{start}; gradients are limited already, to a norm of {limit:g} (clip_norm)"
        return f"{start}; so does a limit of the gradient's norm (clip_norm)"

    # ---- the end of an epoch

    def _end_epoch(self) -> None:
        """Validate, advance the schedule, record, and save checkpoints."""
        self.recorded.settle()
        settings = self.settings
        train_loss = self.sums[0] / self.sums[1] if self.sums[1] else math.nan
        metrics = self._validate()
        validation_loss = metrics.pop("loss", None)
        loss = train_loss if validation_loss is None else validation_loss
        if settings.schedule is not None and settings.schedule_every == "epoch":
            settings.schedule.step(loss)
        name, good = ("loss", "min") if validation_loss is None else settings.watch
        watched = metrics.get(name, loss)
        better = self.best is None or (watched > self.best if good == "max" else watched < self.best)
        self.best, self.waited = (watched, 0) if better else (self.best, self.waited + 1)
        self.epoch, self.index, self.state, self.sums = self.epoch + 1, 0, None, [0.0, 0]
        record = self._with_scale(
            kind="epoch", epoch=self.epoch, step=self.step, train_loss=train_loss, validation_loss=validation_loss,
            **{f"validation_{name}": value for name, value in metrics.items()},
            lr=self.optimizer.lr, grad_norm=self.norm, seconds=round(self.elapsed(), 3),
        )  # fmt: skip
        self._record(record)
        stop = None
        try:
            what = f"the callbacks of epoch {self.epoch}"
            self.members.call(lambda: self.callbacks.epoch(record, self), what, compare=True)
        except StopTraining as stopped:
            stop = stopped
        if better:
            self.save("best.json")
        self.save()
        if stop is not None:
            raise stop

    def _validate(self) -> dict[str, float]:
        """Loss and metrics on the validation batches; empty without them. Raises TrainingError unless finite."""
        if self.settings.validation is None:
            return {}
        metrics = measure(
            self.model, self.settings.loss, self.settings.validation, self.settings.metrics, group=self.group
        )
        for name, value in metrics.items():
            if not math.isfinite(value):
                norm = math.nan if self.norm is None else self.norm
                raise TrainingError(
                    f"epoch {self.epoch + 1}, step {self.step}: validation {name} {value}, last gradient norm "
                    f"{norm:.3g}. The last checkpoint, of the epoch before, stays"
                )
        return metrics

    def _out_of_patience(self) -> bool:
        return self.settings.patience is not None and self.waited >= self.settings.patience

    # ---- files

    def open_folder(self, resume: bool, overwrite: bool) -> None:
        """Lock the run's folder, refuse, clear or continue what is in it, and open its logs."""
        what = "the start of fit"
        path = self.group.first(lambda: self.files.claim(resume, overwrite), what)
        path = self.group.send(path and str(path), what)
        self.members.meet()
        if path is not None:
            restore_snapshot(self, Path(path))
        self.group.first(lambda: self.files.open_logs(self.log_sizes if self.step else None), what)

    def close(self) -> None:
        """Close the logs and release the folder."""
        self.recorded.close()
        self.files.close()

    def save(self, name: str = "last.json") -> None:
        """Write a checkpoint of this moment, if there is a folder."""
        if self.members.saves:
            save_snapshot(self, (self.files.out or Path()) / name)

    def _with_scale(self, **record: Any) -> dict[str, Any]:
        """A record, with the loss scale where there is one."""
        if self.scaler:
            record |= {"loss_scale": self.scaler.scale, "skipped": self.scaler.skipped}
        return record

    def _record(self, record: dict[str, Any]) -> None:
        """Append a record to the history, in memory and in its log."""
        self.history.append(record)
        self.files.write("history", record)

    def _record_flow(self, flow: GradientFlow) -> None:
        """Append the mean norms over the batch to the log of the gradient flow."""

        def mean(norms):
            return None if norms is None else self.members.mean(norms).tolist()

        layers = {name: {"dh": mean(norms.dh), "dc": mean(norms.dc)} for name, norms in flow.items()}
        self.files.write("gradient_flow", {"epoch": self.epoch + 1, "step": self.step, "layers": layers})


@contextlib.contextmanager
def _undone_on_error(model: Module) -> Iterator[None]:
    """If the block raises, restore running statistics and the counters of random draws."""
    modules = [module for _, module in model.modules()]
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


@contextlib.contextmanager
def noisy_weights(model: Module, deviation: float, step: int) -> Iterator[None]:
    """Inside the block, normal noise is added to the parameters; afterwards they have their old bits again.

    The noise has the standard deviation ``deviation`` and is a function of the model's seed and of ``step``.
    """
    if not deviation:
        yield
        return
    params, clean = model.flat_params, model.flat_params.copy()
    count, key = model.parameter_count, rng.name_key("weight noise")
    noise = deviation * rng.normal((count,), model.seed, key, step, params.dtype, model.xp)
    start, frozen = 0, set(model.frozen)
    for name, array in model.params.items():  # one draw for each number, so that it does not depend on the padding
        if name not in frozen:
            array += noise[start : start + array.size].reshape(array.shape)
        start += array.size
    model.changed()
    try:
        yield
    finally:
        params[...] = clean
        model.changed()


def _is_finite(batch: Batch) -> bool:
    """Whether inputs and targets, where they are arrays, hold only finite numbers; padding may hold anything."""
    arrays = batch.inputs if isinstance(batch.inputs, tuple) else (batch.inputs,)
    for array in (*arrays, batch.targets):
        array = array.get() if hasattr(array, "get") and not isinstance(array, np.ndarray) else array
        if not isinstance(array, np.ndarray) or not is_float(array.dtype):
            continue
        if not np.isfinite(array if array.ndim < 2 else array[_counted(batch, array.shape[:2])]).all():
            return False
    return True


def _counted(batch: Batch, axes: tuple[int, ...]) -> Any:
    """Booleans (T, B) = ``axes``: the timesteps that lengths and mask of a batch leave, where they fit."""
    counted = np.ones(axes, bool)
    if batch.lengths is not None and not isinstance(batch.lengths, tuple) and axes[1] == len(batch.lengths):
        counted &= np.arange(axes[0])[:, None] < host_array(batch.lengths, "lengths")
    mask = None if batch.mask is None else host_array(batch.mask, "mask")
    return counted & mask if mask is not None and mask.shape == axes else counted
