"""What decides a training run: settings that check themselves and become options of the command line."""

import types
import typing
from dataclasses import dataclass, field, fields

from .. import rng
from ..data.encodings import check_encoding
from ..dtypes import DTYPES
from ..errors import check_choice, check_number, check_size
from ..recurrent import LAYERS
from ..train.settings import OPTIMIZERS


def setting(default, help, **limits):
    """A field of ``Settings``: its default, its help, and what it may be.

    choices: for a str. minimum: for an int, 1 where not given. low, high, low_open, high_open: for a float, as in
    ``check_number``. check: a function of the name and a value, which raises. shown: what the help calls a default of
    None. of_model: True where it decides what the model is, its first weights, or what it knows of data (vocabulary,
    columns, scaling): a run that begins from the model cannot change it.
    """
    return field(default=default, metadata={"help": help, **limits})


def encoding_setting():
    """The field of ``Settings`` that says in which encoding a task's text files are."""
    return setting(
        None,
        "Encoding of the files, such as latin-1.",
        shown="UTF-8, or what a byte-order mark says",
        check=check_encoding,
    )


def strict_setting():
    """The field of ``Settings`` that says whether one bad line, or one bad file of a folder, is an error."""
    return setting(False, "Refuse a file with a bad line, instead of skipping the line.")


def changed(settings, name, default, help=None, **limits):
    """A field of the class ``settings`` once more, with another default, and other help or limits where given."""
    old = next(f for f in fields(settings) if f.name == name).metadata
    return field(default=default, metadata={**old, **limits, "help": help or old["help"]})


def kind_of(f):
    """(type, whether None is allowed) of a dataclass field that is annotated ``int``, ``float | None`` and the like."""
    if isinstance(f.type, types.UnionType):
        (kind,) = (part for part in typing.get_args(f.type) if part is not types.NoneType)
        return kind, True
    return f.type, False


@dataclass
class Settings:
    """What decides a training run, whatever the task; a task adds its own in a subclass.

    Every field says its help and its limits by ``setting``: the check of its value and its option on the command line
    are made from them. Raises ValueError and TypeError, naming the setting. seed: None draws one.
    """

    cell: str = setting("lstm", "Recurrent cell.", choices=tuple(LAYERS), of_model=True)
    layers: int = setting(1, "Recurrent layers on top of each other.", of_model=True)
    hidden: int = setting(256, "Hidden units in each layer.", of_model=True)
    dropout: float = setting(0.0, "Share of activations dropped between layers.", low=0, high=1, high_open=True)
    batch: int = setting(32, "Sequences in a batch.")
    optimizer: str = setting("adam", "Optimizer.", choices=tuple(OPTIMIZERS))
    lr: float = setting(4e-3, "Highest learning rate.", low=0, low_open=True)
    weight_decay: float = setting(0.0, "Weight decay.", low=0)
    schedule: str = setting(
        "cosine",
        "How the learning rate falls: cosine to lr/20; step to 0.3 of it, twice; plateau by halves.",
        choices=("constant", "cosine", "step", "plateau"),
    )
    warmup: int = setting(0, "Updates in which the learning rate rises from 0.", minimum=0)
    clip: float = setting(1.0, "Largest norm of the gradient; 0: no limit.", low=0)
    weight_noise: float = setting(0.0, "Standard deviation of the noise added to the weights for each update.", low=0)
    epochs: int = setting(5, "Passes over the data.")
    valid: float = setting(0.1, "Share of the data kept for validation.", low=0, high=1, high_open=True)
    patience: int | None = setting(None, "Stop after this many epochs without a better validation score.")
    accumulate: int = setting(1, "Batches whose gradients make one update.")
    dtype: str = setting("float32", "Precision of activations, and of weights in products.", choices=DTYPES)
    seed: int | None = setting(None, "Seed of all random draws.", minimum=0, shown="a fresh one, shown")

    def __post_init__(self):
        for f in fields(self):
            setattr(self, f.name, _checked(f, getattr(self, f.name)))
        if self.seed is None:
            self.seed = rng.short_seed()
        if self.valid == 0:
            for name, value in (("schedule", "plateau"), ("patience", self.patience)):
                if value and getattr(self, name) == value:
                    raise ValueError(f"{name}={value!r} needs a validation loss: valid should be above 0")
        if self.warmup and self.schedule == "plateau":
            raise ValueError("warmup counts updates, schedule='plateau' counts epochs: choose another schedule")

    def seeds(self):
        """Endless different seeds, the same every time: each layer draws initial values of its own."""
        number = self.seed
        while True:
            yield number
            number = (number + 1) % 2**64


def _checked(f, value):
    kind, optional = kind_of(f)
    limits = f.metadata
    if value is None and optional:
        return None
    if limits.get("choices"):
        return check_choice(f.name, value, limits["choices"])
    if kind is int:
        return check_size(f.name, value, limits.get("minimum", 1))
    if kind is float:
        return check_number(f.name, value, **{k: v for k, v in limits.items() if k.startswith(("low", "high"))})
    if not isinstance(value, kind):
        raise TypeError(f"{f.name} should be {kind.__name__}, got {type(value).__name__}")
    return limits["check"](f.name, value) if "check" in limits else value


def recurrent(settings, input_size, seed, backend=None, **options):
    """The recurrent stack that ``settings`` describe: cell, layers, hidden, dropout between layers, dtype."""
    if settings.layers > 1:
        options["dropout"] = settings.dropout
    if settings.cell == "lstm":
        options.setdefault("forget_bias", 1.0)  # remember at first: Jozefowicz et al., ICML 2015
    return LAYERS[settings.cell](
        input_size, settings.hidden, settings.layers, seed=seed, backend=backend, dtype=settings.dtype, **options
    )
