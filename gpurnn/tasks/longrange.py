"""Long-range problems: what a recurrent network carries over hundreds of steps. ``gpurnn train longrange``.

    adding     add the two marked numbers of a sequence (Hochreiter & Schmidhuber 1997)
    copy       repeat ten symbols after T blanks (Arjovsky, Shah, Bengio 2016)
    rows       name the class of an image that is read row by row: MNIST is 28 steps of 28 numbers
    pixels     the same, pixel by pixel: MNIST is 784 steps (Le, Jaitly, Hinton 2015)
    permuted   pixel by pixel, all images in one and the same random order (ibid.)

The sequences of adding and copy are drawn when they are needed. Batch n of a seed is the same on every backend and in
every run, no batch occurs twice, and the sequences for validation and test are the same in all runs. Each problem has a
trivial answer that needs no memory; its error is printed beside the model's.

>>> from gpurnn.tasks.run import prepare
>>> run = prepare("longrange", [], "runs/adding", problem="adding", steps=10, sequences=64, hidden=8, epochs=1)
>>> result, text = run.finish(run.train())
"""

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .. import rng
from ..backends import array_ops
from ..data import Batch, SequenceBatches, adding_problem, check_index, copy_memory
from ..data.images import read_images
from ..dtypes import check_dtype
from ..errors import DivergedError, ShapeError, check_size
from ..files import check_room
from ..layers import Dropout, Linear, Pooling, Sequential
from ..losses import cross_entropy, mse
from ..metrics import accuracy
from ..recurrent import INITIALIZERS
from ..train import measure
from .seen import remember, say_seen
from .settings import Settings, changed, recurrent, setting
from .task import WEIGHT_COST, Data, Task, check_numbers, checksum, facts_for_model

DRAWN, IMAGES = ("adding", "copy"), ("rows", "pixels", "permuted")
USUAL = {  # problem -> the values of settings that are not given
    "adding": {"steps": 200, "sequences": 3_000, "hidden": 32, "batch": 20, "lr": 2e-2},
    "copy": {"steps": 100, "sequences": 10_000, "hidden": 64, "batch": 10, "lr": 2e-2},
    **dict.fromkeys(IMAGES, {"hidden": 128, "batch": 100, "lr": 2e-3}),
}
SYMBOLS, LENGTH = 8, 10  # of copy: different symbols, and how many there are to repeat
_STEP_COST = 500  # bytes of memory for a step of a sequence at least: states of one sequence, and what is saved of them
HELD_OUT = {"valid": 1 << 31, "test": 3 << 30}  # number of the first call that draws them; training starts from 0


@dataclass
class LongSettings(Settings):
    """What decides a run; chrono, forget_bias, init and learn_state are options of the recurrent layers.

    steps: T of adding, the number of blanks of copy. sequences: how many an epoch has. chrono: 0 for none. A setting
    that is None takes the value in ``USUAL``.
    """

    problem: str = setting("adding", "The problem.", choices=(*DRAWN, *IMAGES), of_model=True)
    steps: int | None = setting(
        None, "adding: length of a sequence; copy: number of blanks.", minimum=2, shown="adding 200, copy 100"
    )
    sequences: int | None = setting(None, "Sequences in an epoch.", shown="adding 3000, copy 10000, images all")
    shrink: int = setting(1, "Images: replace each block of N x N pixels by its mean.", of_model=True)
    permutation: int = setting(0, "permuted: seed of the order of the pixels.", minimum=0)
    init: str = setting(
        "orthogonal", "Initial weights; identity with relu is the IRNN.", choices=INITIALIZERS, of_model=True
    )
    activation: str = setting("tanh", "Activation of the cell rnn.", choices=("tanh", "relu"), of_model=True)
    chrono: int | None = setting(
        None,
        "Initial biases of lstm and gru for memories of up to this many steps; 0: off.",
        minimum=0,
        shown="drawn sequences: their length; images: off",
        of_model=True,
    )
    forget_bias: float = setting(1.0, "Initial bias of lstm's forget gate without --chrono.", of_model=True)
    learn_state: bool = setting(False, "Learn the initial state.", of_model=True)
    hidden: int | None = changed(Settings, "hidden", None, shown="adding 32, copy 64, images 128")
    batch: int | None = changed(Settings, "batch", None, shown="adding 20, copy 10, images 100")
    lr: float | None = changed(Settings, "lr", None, shown="drawn 0.02, images 0.002; rnn 0.001")

    def __post_init__(self):
        super().__post_init__()
        if self.problem in IMAGES and self.steps:
            raise ValueError(f"steps: {self.problem} has as many as the images give; leave it out")
        if self.cell == "rnn":
            if self.chrono:
                raise ValueError("chrono sets the biases of gates: it needs cell lstm or gru")
            self.lr = self.lr or 1e-3
        for name, value in USUAL[self.problem].items():
            if getattr(self, name) is None:
                setattr(self, name, value)


class LongTask(Task):
    """Train on a problem that needs long memory: adding, copy, or images row by row or pixel by pixel.

    adding and copy draw random sequences and take no FILE. rows, pixels and permuted take MNIST, or images like it: one
    .npz with x_train, y_train, x_test and y_test, or the four IDX files, compressed or not.
    """

    name = "longrange"
    Settings = LongSettings
    train_needs_files = evaluate_needs_files = False
    next = ("gpurnn evaluate {run}",)
    examples = """
  gpurnn train longrange                       adding, 200 steps, 20 seconds
  gpurnn train longrange --cell rnn                            does not learn
  gpurnn train longrange --problem copy --cell gru
  gpurnn train longrange mnist.npz --problem rows
  gpurnn train longrange *-ubyte.gz --problem permuted --epochs 20"""
    without_files = "drawn by number"

    def read(self, files, settings, facts=None, scratch=None):
        if settings.problem in DRAWN:
            return _draw(files, settings)
        parts = read_images(files)
        (images, labels), classes = parts["train"], _count_classes(parts["train"][1])
        rows, columns = (size // settings.shrink for size in images.shape[1:])
        steps, inputs = (rows, columns) if settings.problem == "rows" else (rows * columns, 1)
        check_room(", ".join(files), _STEP_COST * steps, f"sequences of {steps:,} steps")
        check_room(", ".join(files), WEIGHT_COST * settings.hidden * inputs, f"a layer for rows of {inputs:,} pixels")
        images, labels = images[: settings.sequences], labels[: settings.sequences]
        held = round(settings.valid * len(labels))
        if held == len(labels) or (settings.valid and not held):
            raise ValueError(f"valid: {settings.valid:g} of {len(labels)} images leaves none to train or to validate")
        sequences = _as_sequences(images, settings)
        part = len(labels) - held
        mean, deviation = _moments(sequences[:part])
        new = {"shape": list(images.shape[1:]), "steps": sequences.shape[1], "inputs": sequences.shape[2]}
        new |= {"outputs": classes, "mean": mean, "deviation": deviation}
        trained_on = remember(map(bytes, sequences[:part]), facts)
        facts = facts_for_model(files, facts, new, ("steps", "inputs", "outputs")) | {"trained_on": trained_on}
        return Data(
            ImageBatches(sequences[:part], labels[:part], settings, facts, shuffle=True),
            ImageBatches(sequences[part:], labels[part:], settings, facts) if held else None,
            facts=facts,
            fingerprint={"images": len(labels), "crc32": checksum(sequences, labels)},
            summary=f"{settings.problem}, {len(labels):,} images of {classes} classes, {sequences.shape[1]} steps",
            rest=_image_test(*parts["test"], settings, facts),
        )

    def build(self, settings, facts, backend=None):
        """``Sequential`` of recurrent layers, their last state (but for copy), dropout and linear layer."""
        options = {"init": settings.init, "learn_state": settings.learn_state}
        chrono = settings.chrono
        if chrono is None and settings.problem in DRAWN:
            chrono = facts["steps"]
        if settings.cell == "rnn":
            options["nonlinearity"] = settings.activation
        elif chrono:
            options["chrono"] = chrono
        if settings.cell == "lstm":
            options["forget_bias"] = None if chrono else settings.forget_bias
        shared, seeds = {"backend": backend, "dtype": settings.dtype}, settings.seeds()
        layers = {
            "recurrent": recurrent(settings, facts["inputs"], next(seeds), backend, **options),
            "last": Pooling(settings.hidden, "last", **shared),
            "dropout": Dropout(settings.dropout, seed=next(seeds), **shared),
            "linear": Linear(settings.hidden, facts["outputs"], seed=next(seeds), **shared),
        }
        if settings.problem == "copy":
            del layers["last"]
        if not settings.dropout:
            del layers["dropout"]
        return Sequential(layers)

    def check_facts(self, settings, facts):
        for name in ("steps", "inputs", "outputs"):
            check_size(name, facts[name])
        if settings.problem in IMAGES:
            check_numbers("shape", facts["shape"], 2, 1)
            check_numbers("mean and deviation", [facts["mean"], facts["deviation"]], 2)

    def sizes(self, settings, facts):
        return {name: facts[name] for name in ("inputs", "outputs")}

    def loss(self, settings, facts):
        return mse if settings.problem == "adding" else cross_entropy

    def metrics(self, settings, facts):
        return {"adding": {"close": _close}, "copy": {"recall": _recalled}}.get(settings.problem, {"accuracy": _right})

    def finish(self, trained, data, history):
        return self._test(trained, data.rest, {})

    def next_commands(self, settings):
        return self.next if settings.problem in DRAWN else ("gpurnn evaluate {run} mnist.npz",)

    def evaluate(self, trained, files):
        """The test once more, for images also class by class; files: the test images; none for adding and copy."""
        settings, facts = trained.settings, trained.facts
        if settings.problem in DRAWN:
            return self._test(trained, _draw(files, settings).rest, {})
        test = _image_test(*read_images(files, ("test",))["test"], settings, facts)
        by_class = {f"accuracy_{label}": _right_of(label) for label in range(facts["outputs"])}
        numbers, text = self._test(trained, test, by_class)
        seen, sentence = say_seen(facts, map(bytes, test.pixels), "images")
        return numbers | seen, "\n".join([text, *sentence])

    def _test(self, trained, batches, by_class):
        """(numbers, text) of a test: the loss, the metrics, and those of the trivial answer."""
        settings, facts = trained.settings, trained.facts
        metrics = self.metrics(settings, facts) | by_class
        found = measure(trained.model, self.loss(settings, facts), batches, metrics)
        if not math.isfinite(found["loss"]):
            raise DivergedError(f"the loss of the test is {found['loss']}. The model has diverged: train it anew")
        numbers = {f"test_{name}": None if math.isnan(value) else value for name, value in found.items()}
        if settings.problem == "adding":
            numbers["trivial_loss"] = trivial = 1 / 6
            lines = (
                f"1,000 test sequences:\n  squared error  {found['loss']:.5f}; always answering 1: {trivial:.5f}",
                f"  right to 0.04  {found['close']:.1%}",
            )
        elif settings.problem == "copy":
            numbers["trivial_loss"] = trivial = LENGTH * math.log(SYMBOLS) / (settings.steps + 2 * LENGTH)
            lines = (
                f"1,000 test sequences:\n  cross-entropy  {found['loss']:.5f} nats a step; guessing: {trivial:.5f}",
                f"  recalled       {found['recall']:.1%} of the symbols; guessing: {1 / SYMBOLS:.1%}",
            )
        else:
            counts = np.bincount(batches.targets, minlength=facts["outputs"])
            numbers["trivial_accuracy"] = trivial = float(counts.max() / counts.sum())
            lines = (
                f"{counts.sum():,} test images:",
                f"  right          {found['accuracy']:.2%}; always the commonest class: {trivial:.2%}",
                f"  cross-entropy  {found['loss']:.4f} nats",
                *(f"  class {k:<8} {found[name]:.2%} of {counts[k]:,}" for k, name in enumerate(by_class)),
            )
        return numbers, "\n".join(lines)


# ---- metrics: (how many are right, how many there are)


def _close(outputs, targets):
    """Sums with an error below 0.04, the criterion of Hochreiter & Schmidhuber 1997."""
    return (np.abs(array_ops(outputs).to_numpy(outputs) - targets) < 0.04).sum(), targets.size


def _recalled(outputs, targets):
    return _right(outputs[-LENGTH:], targets[-LENGTH:])


def _right(outputs, targets):
    return accuracy(outputs, targets) * targets.size, targets.size


def _right_of(label):
    def right(outputs, targets):
        mask = targets == label
        count = int(mask.sum())
        return accuracy(outputs, targets, mask) * count if count else 0, count

    return right


# ---- sequences that are drawn


class DrawnBatches:
    """Batches of adding or copy, drawn by number.

    All batches to train on are new. The parts "valid" and "test" have 1000 sequences each, the same in every epoch and
    for every seed.
    """

    def __init__(self, settings, part="train"):
        self.problem, self.steps, self.dtype = settings.problem, settings.steps, check_dtype(settings.dtype)
        self.fresh = part == "train"
        self.seed, self.first = (settings.seed, 0) if self.fresh else (0, HELD_OUT[part])
        self.batch_size = settings.batch if self.fresh else 100
        self.batches = max(1, settings.sequences // settings.batch) if self.fresh else 10

    def __len__(self):
        return self.batches

    def batch(self, epoch, index):
        call = self.first + check_index(self, index) + (epoch * self.batches if self.fresh else 0)
        if self.problem == "adding":
            inputs, targets = adding_problem(self.batch_size, self.steps, self.seed, call)
            targets = targets.astype(self.dtype)
        else:
            ids, targets = copy_memory(self.batch_size, self.steps, SYMBOLS, LENGTH, self.seed, call)
            inputs = math.sqrt(SYMBOLS + 2) * np.eye(SYMBOLS + 2)[ids]  # one of ten, with a mean square of 1
        per_step = self.problem != "adding"
        return Batch(inputs.astype(self.dtype), targets, weight=self.batch_size, per_step=per_step)


def _draw(files, settings):
    """``Data`` of adding or copy."""
    if files:
        raise ValueError(f"{Path(files[0]).name}: {settings.problem} draws its sequences and takes no file")
    adding, T = settings.problem == "adding", settings.steps
    sizes = (T, 2, 1) if adding else (T + 2 * LENGTH, SYMBOLS + 2, SYMBOLS + 2)
    return Data(
        DrawnBatches(settings),
        DrawnBatches(settings, "valid") if settings.valid else None,
        facts=dict(zip(("steps", "inputs", "outputs"), sizes, strict=True)),
        fingerprint={},
        summary=f"{settings.problem}, {T} {'steps' if adding else 'blanks'}",
        rest=DrawnBatches(settings, "test"),
    )


# ---- images


class ImageBatches(SequenceBatches):
    """Sequences (N, T, I) of uint8 pixels and their classes (N,).

    The pixels are scaled by the mean and deviation of the training part.
    """

    def __init__(self, sequences, labels, settings, facts, shuffle=False):
        size = settings.batch if shuffle else 250
        super().__init__(sequences, labels, size, per_step=False, shuffle=shuffle, bucket=False, seed=settings.seed)
        self.pixels = sequences
        values = (np.arange(256) - facts["mean"]) / facts["deviation"]
        self.scaled = values.astype(check_dtype(settings.dtype))  # what a pixel of 0 .. 255 becomes

    def collate(self, chosen, epoch):
        inputs = self.scaled[self.pixels[chosen].transpose(1, 0, 2)]
        return Batch(inputs, self.targets[chosen], weight=len(chosen), per_step=False)


def _image_test(images, labels, settings, facts):
    """The ``ImageBatches`` of a test. Raises ShapeError and ValueError if it does not fit the training part."""
    if list(images.shape[1:]) != facts["shape"]:
        raise ShapeError(f"test images: expected (N, {facts['shape'][0]}, {facts['shape'][1]}), got {images.shape}")
    if labels.max() >= facts["outputs"]:
        raise ValueError(
            f"test labels: {labels.max()} was never seen in training, whose labels are 0 to {facts['outputs'] - 1}"
        )
    return ImageBatches(_as_sequences(images, settings), labels, settings, facts)


def _as_sequences(images, settings):
    """Images (N, R, C) uint8 as sequences (N, T, I) uint8."""
    N, R, C = images.shape
    k = settings.shrink
    if R % k or C % k:
        raise ValueError(f"shrink: {k} does not divide the images' {R} x {C} pixels")
    if k > 1:
        blocks = images.reshape(N, R // k, k, C // k, k)
        images = np.rint(blocks.mean(axis=(2, 4), dtype=np.float32)).astype(np.uint8)
    if settings.problem == "rows":
        return images
    pixels = images.reshape(N, -1, 1)
    if settings.problem == "permuted":
        drawn = rng.words(pixels.shape[1], settings.permutation, rng.name_key("permutation"))
        pixels = np.take(pixels, np.argsort(drawn, kind="stable"), axis=1)  # C-contiguous, indexing is not
    return pixels


def _moments(pixels):
    """Mean and standard deviation of uint8 pixels, 1 instead of 0; counted in pieces, as there may be 10^8."""
    counts = sum(np.bincount(piece.ravel(), minlength=256) for piece in np.array_split(pixels, 1 + len(pixels) // 1000))
    values = np.arange(256)
    mean = float(values @ counts / counts.sum())
    return mean, math.sqrt((values - mean) ** 2 @ counts / counts.sum()) or 1.0


def _count_classes(labels):
    """V of labels 0 .. V - 1. Raises ValueError if one does not occur: then the labels are most likely wrong."""
    classes = int(labels.max()) + 1
    empty = np.flatnonzero(np.bincount(labels, minlength=classes) == 0)
    if len(empty):
        raise ValueError(
            f"training labels: expected the numbers 0 to V - 1 of V classes; {classes - 1} occurs, {empty[0]} does not"
        )
    return classes


TASK = LongTask()
