"""A task: what its parts are, and what several of them check."""

import zlib
from dataclasses import dataclass, field

from ..dtypes import check_dtype
from ..errors import check_number
from ..files import check_room
from ..losses import cross_entropy
from ..train.progress import show_loss
from . import get_task
from .settings import Settings

WEIGHT_COST = 96  # bytes of memory for a weight of each of four gates: itself, its gradient, Adam's two, and draws
_ENTRY_COST = 500  # for a character or word of a vocabulary, which config.json holds as well


@dataclass
class Data:
    """What ``Task.read`` makes of the files.

    train, valid: batch sources (data.py), valid None for none. facts: JSON-ready, all that is needed beside settings
    and weights to use the model later: vocabulary, classes, scaling. fingerprint: JSON-ready, what a resumed run
    compares to see that the data are the same; see ``checksum``. summary: one line for people, without the files'
    names. rest: what ``Task.finish`` may want besides, such as a test set. notes: what a user should know about how the
    files were read, a sentence each.
    """

    train: object
    valid: object
    facts: dict
    fingerprint: dict
    summary: str
    rest: object = None
    notes: list = field(default_factory=list)


class Task:
    """A task's parts. A subclass overrides what it needs; an instance of it is the ``TASK`` of its module.

    The first paragraph of its docstring is the help of ``gpurnn train NAME``, ``examples`` the lines below the options.
    """

    name = ""
    Settings = Settings
    shows = "test"  # what ``finish`` makes with the model, for messages
    train_needs_files = evaluate_needs_files = True
    files_help = "FILE"  # the placeholder for a file on the command line
    without_files = (
        "built in (give FILEs for your own)"  # how the command line describes the data if no files are given
    )
    examples = ""
    next = ()  # commands worth a try after training; {run} is the folder
    watch = ("loss", "min")  # what decides the best checkpoint and patience; see fit

    def __deepcopy__(
        self, memo
    ):  # there is one object of each task: copies of a run share it, and pickles hold its name
        return self

    def __reduce__(self):
        return get_task, (self.name,)

    def check_new(self, settings):
        """Raise ValueError for settings that a new run may not have, though old ones may."""

    def read(self, files, settings, facts=None, scratch=None):
        """``Data`` of the files (absolute paths as str); facts: those of the run that is resumed, or whose model is
        trained further, which the data then must fit; scratch: a folder on the disk of the run, for what does not fit
        in memory. Raises ValueError that names the file."""
        raise NotImplementedError

    def build(self, settings, facts, backend=None):
        """The model, a Module."""
        raise NotImplementedError

    def check_facts(self, settings, facts):
        """Raise ValueError, TypeError or LookupError unless ``facts``, from a ``config.json``, are as ``read`` makes
        them. What ``build`` would notice need not be looked at."""

    def sizes(self, settings, facts):
        """Name -> size, of settings and facts: each is at most the longest axis among the arrays of ``build``."""
        return {}

    def loss(self, settings, facts):
        """What ``fit`` takes as ``loss``."""
        return cross_entropy

    def metrics(self, settings, facts):
        """What ``fit`` takes as ``metrics``."""
        return {}

    def uniform_loss(self, settings, facts):
        """The loss of a model for which all answers are equally likely; None if that is not known."""
        return None

    def finish(self, trained, data, history):
        """After training, with the best model: (numbers, text for people); the numbers go to config.json as
        ``result``."""
        best, kind = self.best_record(history), "training" if data.valid is None else "validation"
        loss = best["train_loss"] if best["validation_loss"] is None else best["validation_loss"]
        text = (
            f"Best {kind} loss" if self.watch[0] == "loss" else f"Kept: epoch {best['epoch']}. {kind.capitalize()} loss"
        )
        return {"loss": kind, "best": round(loss, 6)}, f"{text} {show_loss(loss)}."

    def best_record(self, history):
        """The record of the epoch whose model is kept, as ``fit`` chooses it: the first that is best in ``watch``.

        Without validation batches that is the loss in training.
        """
        name, good = self.watch if history.epochs[-1]["validation_loss"] is not None else ("loss", "min")
        sign = 1 if good == "min" else -1

        def badness(record):
            loss = record["train_loss"] if record["validation_loss"] is None else record["validation_loss"]
            return loss if name == "loss" else sign * record[f"validation_{name}"]

        return min(history.epochs, key=badness)

    def next_commands(self, settings):
        """The commands of ``next`` that fit a run with these settings."""
        return self.next

    def result_rows(self, result):
        """Name -> text for people of what ``finish`` gave as numbers, for ``gpurnn info RUN``; None lists them all.

        Raises LookupError, TypeError or ValueError for other numbers.
        """
        return None

    def evaluate(self, trained, files):
        """How good the model is on other files: (numbers, text for people)."""
        raise NotImplementedError


def check_entries(files, count, settings, width, steps=0):
    """Raise FileError where a model of ``count`` characters or words, as many as the files have, would take too much
    memory. Not called where a setting limits their number.

    width: weights that each has. steps: of a batch's sequences whose outputs have a logit for each, 0 where none have.
    """
    logit = 3 * max(4, check_dtype(settings.dtype).itemsize)  # itself, its exponential and its gradient
    each = _ENTRY_COST + WEIGHT_COST // 4 * width + logit * steps * settings.batch
    check_room(_named(files), each * count, f"a model of its {count:,} characters or words")


def facts_for_model(files, known, new, same=(), within=()):
    """The facts of the data: ``new``, as ``read`` made them, or ``known``, those of a model that is trained further.

    same: facts that must be equal in both (of lists, the lengths). within: facts whose entries ``known`` must contain.
    Raises ValueError where the data do not fit the model.
    """
    if known is None:
        return new
    for name in same:
        expected, got = (len(facts[name]) if isinstance(facts[name], list) else facts[name] for facts in (known, new))
        if expected != got:
            raise ValueError(f"{_named(files)}: {name}: expected {expected}, as the model has, got {got}")
    for name in within:
        unknown = sorted(set(new[name]) - set(known[name]))
        if unknown:
            shown = ", ".join(map(repr, unknown[:5])) + (" and more" if len(unknown) > 5 else "")
            raise ValueError(
                f"{_named(files)}: {name}: the model never saw {shown}. Leave out what has it, or train a new model"
            )
    return known


def _named(files):
    return ", ".join(map(str, files)) or "the built-in data"


def unknown_note(count, unit):
    """The note on what a vocabulary lacks, as a tuple of one string, or empty."""
    return (f"{count:,} {unit} of the data are unknown to the model: taken as one and the same",) if count else ()


def check_numbers(name, values, count=None, low=None, high=None):
    """Raise ValueError or TypeError unless ``values`` is a list, of ``count``, of finite numbers."""
    if not isinstance(values, list) or count not in (None, len(values)):
        raise ValueError(f"{name} should be a list of {'numbers' if count is None else f'{count} numbers'}")
    for value in values:
        check_number(name, value, low, high)


def refuse_one(name, texts):
    """Raise TypeError for one text where a list of texts is meant, whose characters would be taken for them."""
    if isinstance(texts, str):
        raise TypeError(f"{name}: expected a list of texts, got one text: give [text]")


def check_strings(name, values):
    """Raise TypeError unless ``values`` is a list of strings."""
    if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
        raise TypeError(f"{name} should be a list of strings")


def checksum(*arrays):
    """CRC-32 over arrays, bytes and strings, one after another; for a fingerprint."""
    value = 0
    for array in arrays:
        value = zlib.crc32(array.encode() if isinstance(array, str) else array, value)
    return value
