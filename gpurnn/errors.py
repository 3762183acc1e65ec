"""The errors a user can cause, and the checks that raise them.

Every check runs before anything is computed or changed, and its message names the argument, what was expected and what
came. The classes derive from the built-in ones that a careful caller would catch anyway.
"""

from __future__ import annotations

import difflib
import functools
import inspect
import logging
import re
from collections.abc import Callable, Iterable
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import numpy as np

T = TypeVar("T")
N = TypeVar("N", bound="NamesArguments")

# C0 but for tab and line feed, delete, C1, what turns the direction of writing; a carriage return unless a line ends
_CONTROL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069]|\r(?!\n)")


class ShapeError(ValueError):
    """An array has the wrong rank or size, or lengths do not fit the array they describe."""


class MissingError(KeyError):
    """A KeyError whose message is a sentence, which KeyError itself would show in quotes."""

    def __str__(self) -> str:
        return str(self.args[0])


class DtypeError(TypeError):
    """An array has a data type that the receiving layer or loss does not take."""


class FileError(ValueError):
    """A file is damaged, too large, or not of the kind that is read; the message names it, and the place in it.

    That of a run's folder is a ``CheckpointError``, which derives from this.
    """


class DivergedError(ValueError):
    """A model gives numbers that are not finite: there is nothing to draw, to decode or to forecast."""


class BackendError(RuntimeError):
    """The backend asked for cannot work on this machine, or an array lives on another backend."""


def check_shape(name: str, array: Any, expected: tuple[int | str, ...]) -> None:
    """Raise ShapeError unless ``array.shape`` fits ``expected``.

    ``expected`` is a tuple whose entries are sizes, or strings naming a free axis:
    ``check_shape("x", x, ("T", "B", 5))`` takes any T and B.
    """
    shape = tuple(array.shape)
    fits = len(shape) == len(expected) and all(
        isinstance(want, str) or want == got for want, got in zip(expected, shape, strict=True)
    )
    if not fits:
        wanted = ", ".join(str(size) for size in expected) + ("," if len(expected) == 1 else "")
        raise ShapeError(f"{name}: expected shape ({wanted}), got {shape}")


def check_size(name: str, value: Any, minimum: int = 1) -> int:
    """Return ``value`` as int; raise unless it is a whole number of at least ``minimum``."""
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{name} should be an int, got {type(value).__name__}")
    if value < minimum:
        raise ValueError(f"{name} should be at least {minimum}, got {value}")
    return int(value)


def check_number(
    name: str, value: Any, low: float | None = None, high: float | None = None, *, low_open=False, high_open=False
) -> float:
    """Return ``value`` as float; raise unless it is a finite number between ``low`` and ``high``.

    ``low_open`` / ``high_open`` leave the bound itself out. NaN is always refused.
    """
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} should be a number, got {type(value).__name__}")
    below = low is not None and (value < low or (low_open and value == low))
    above = high is not None and (value > high or (high_open and value == high))
    if not np.isfinite(value) or below or above:
        left, right = ("(" if low_open else "["), (")" if high_open else "]")
        left, right = "(" if low is None else left, ")" if high is None else right
        bounds = f"{left}{'-inf' if low is None else low}, {'inf' if high is None else high}{right}"
        raise ValueError(f"{name} should be a finite number in {bounds}, got {value}")
    return float(value)


def check_choice(name: str, value: T, choices: Iterable[Any]) -> T:
    """Return ``value``; raise ValueError unless it is one of ``choices``."""
    if value not in tuple(choices):  # a list cannot be looked up in a dict
        ours = _CHOICES.get(value) if isinstance(value, str) else None
        more = f": here it is called {ours!r}" if ours and ours in choices else ""
        raise ValueError(f"{name} should be one of {', '.join(map(repr, choices))}, got {value!r}{more}")
    return value


def check_flag(name: str, value: Any) -> bool:
    """Return ``value`` as bool; raise TypeError unless it is True or False."""
    if value is True or value is False or isinstance(value, np.bool_):
        return bool(value)
    raise TypeError(f"{name} should be True or False, got {value!r}")


class checked(Generic[T]):
    """Makes an attribute of a method: what is set goes through it, and what it returns is kept. Reading costs nothing.

    >>> class Dropout:
    ...     @checked
    ...     def rate(self, value):
    ...         return check_number("rate", value, 0, 1)
    """

    def __init__(self, check: Callable[[Any, Any], T]) -> None:
        self._check = check

    if TYPE_CHECKING:  # an attribute is read as what the method returns

        def __get__(self, instance: Any, owner: Any = None) -> T: ...

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    def __set__(self, instance: Any, value: Any) -> None:
        instance.__dict__[self._name] = self._check(instance, value)  # where it is read, as there is no __get__


class Settled:
    """Makes an attribute that is set once, when its object is made. Reading costs nothing."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __set__(self, instance: Any, value: Any) -> None:
        if self._name in instance.__dict__:
            raise AttributeError(
                f"{self._name}: parameters and sizes follow from it, so that a {type(instance).__name__} has it for "
                "good: make another one"
            )
        instance.__dict__[self._name] = value  # where it is read, as there is no __get__


# ---- unknown arguments, and values

_CHOICES = {name: "xavier" for name in ("glorot", "glorot_normal", "glorot_uniform", "xavier_normal", "xavier_uniform")}

_WORDS = {  # what other libraries say -> our words, the first that a class knows
    "activation": ("nonlinearity",), "beta_1": ("betas",), "beta_2": ("betas",), "beta1": ("betas",),
    "beta2": ("betas",), "bi": ("bidirectional",), "decay": ("weight_decay",), "device": ("backend",),
    "cifg": ("coupled",), "clip_grad": ("gradient_clip",), "dropconnect": ("weight_dropout",),
    "layernorm": ("layer_norm",),
    "norm": ("layer_norm",), "normalize": ("layer_norm",), "use_peepholes": ("peephole",), "zoneout_prob": ("zoneout",),
    "dim": ("features", "embedding_dim"), "epsilon": ("eps",), "generator": ("seed",), "go_backwards": ("reverse",),
    "h0": ("state",), "h_0": ("state",), "hidden": ("hidden_size",), "hidden_dim": ("hidden_size",),
    "hidden_size": ("hidden",), "hx": ("state",), "in_channels": ("in_features", "input_size"),
    "in_features": ("input_size",), "init_state": ("state",), "initial_state": ("state",),
    "input_dim": ("num_embeddings", "in_features", "input_size"), "input_size": ("in_features",),
    "kernel_initializer": ("init",), "l2": ("weight_decay",), "layers": ("num_layers",), "learning_rate": ("lr",),
    "n_features": ("features",), "n_layers": ("num_layers",), "num_heads": ("heads",), "n_heads": ("heads",),
    "normalized_shape": ("features",),
    "num_classes": ("out_features",), "num_features": ("features",), "num_hiddens": ("hidden_size",),
    "num_units": ("hidden_size", "out_features"), "optimizer": ("opt",), "out_channels": ("out_features",),
    "output_dim": ("embedding_dim", "out_features"), "output_size": ("out_features",), "p": ("rate", "dropout"),
    "params": ("model",), "parameters": ("model",), "prob": ("rate", "dropout"),
    "random_state": ("seed",), "recurrent_initializer": ("init",), "residual_connections": ("residual",),
    "retain_graph": ("retain",), "skip": ("residual",), "variational_dropout": ("variational",),
    "wdrop": ("weight_dropout",), "seq_len": ("lengths",), "seq_lengths": ("lengths",),
    "sequence_length": ("lengths",), "T_max": ("total",), "units": ("hidden_size", "out_features", "hidden"),
    "use_bias": ("bias",), "vocab_size": ("num_embeddings",), "weight_init": ("init",),
}  # fmt: skip
_SENTENCES = {  # what has no word of ours, or one that needs a sentence
    "h0": "The initial state is given to the call, as state",
    "hx": "The initial state is given to the call, as state",
    "initial_state": "The initial state is given to the call, as state",
    "nonlinearity": "RNN has one; LSTM and GRU have activation and recurrent_activation",
    "mask": "It belongs to a call of a recurrent layer or a Sequential: booleans (T, B), True where a timestep happens",
    "key_padding_mask": "Give mask=~key_padding_mask to a recurrent layer's call, or lengths",
    "done": "Give reset to a recurrent layer's call: a timestep before which a sequence begins again, which is the one "
    "behind a done",
    "dones": "Give reset to a recurrent layer's call, True one timestep behind each done",
    "zero_output_for_mask": "It is masked_output: 'zero', or 'repeat' for Keras's False",
    "padding_mask": "Give mask=~padding_mask to a recurrent layer's call, or lengths",
    "reset": "It belongs to a call of a recurrent layer or a Sequential: booleans (T, B), True where a sequence begins",
    "recurrent_activation": "An RNN has no gates; its activation is called nonlinearity",
    "retain": "It belongs to forward(..., retain=True)",
    "retain_graph": "It belongs to forward(..., retain=True)",
    "return_sequences": "The outputs of all steps are always returned; the layer Pooling makes one vector of them",
    "return_state": "The final state is always returned, behind the output",
    "stateful": "Give the state that a call returns to the next one, as state",
    "time_major": "Arrays are time-major, (T, B, ...), unless batch_first=True",
    "training": "Modes are set by train() and eval()",
    "unit_forget_bias": "Give forget_bias=1.0",
    "variational_dropout": 'It is recurrent_dropout with recurrent_dropout_each="sequence", on h inside the time loop',
    "unroll": "There is nothing to unroll: the schedule decides",
}


def refuse_unknown(who, unknown, known, elsewhere=None):
    """Raise TypeError for the first of the arguments ``unknown``, with our word for it, where there are any.

    who: the class. known: the names it takes. elsewhere: a sentence on who does take it, or None.
    """
    for name in unknown:
        ours = next((word for word in _WORDS.get(name, ()) if word in known), None)
        near = difflib.get_close_matches(name, known, 1)
        if elsewhere:
            answer = elsewhere
        elif ours or (near and name not in _SENTENCES):
            answer = f"Here it is called {ours}" if ours else f"Did you mean {near[0]}?"
        elif name in _SENTENCES:
            answer = _SENTENCES[name]
        else:
            answer = f"It takes {', '.join(known)}" if known else "It takes what it takes by position"
        raise TypeError(f"{who}: unknown argument {name!r}. {answer}")


def answers_unknown(method):
    """A decorator: ``method`` answers an unknown argument with our word for it, and shows its own signature."""
    known = tuple(inspect.signature(method).parameters)[1:]
    known_set = frozenset(known)

    @functools.wraps(method)
    def answering(self, *args, **options):
        if options and not known_set.issuperset(options):
            refuse_unknown(type(self).__name__, [name for name in options if name not in known], known)
        return method(self, *args, **options)

    return answering


class NamesArguments:
    """A class whose constructor answers an unknown argument with our word for it."""

    _elsewhere: dict[str, str] = {}  # argument that this class refuses -> a sentence on who takes it
    _hints: dict[str, str] = {}  # attribute that other libraries have -> what to do here

    def __new__(cls: type[N], *args: Any, **options: Any) -> N:
        if options:
            known = _known_arguments(cls)
            if known is not None:
                for name in options:
                    if name not in known:
                        refuse_unknown(cls.__name__, [name], known, cls._hint(name, options[name], known))
        required = _required_arguments(cls) if args or options else ()  # copies give none
        missing = [name for name in required[len(args) :] if name not in options]
        if missing:
            raise TypeError(f"{cls.__name__}: {missing[0]} is missing: {cls.__name__}({', '.join(required)})")
        return super().__new__(cls)

    if not TYPE_CHECKING:  # which would take any name for an attribute

        def __getattr__(self, name):
            hint = f"; {self._hints[name]}" if name in self._hints else ""
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}{hint}")

    @classmethod
    def _hint(cls, name, value, known):
        """A sentence on an argument that this class does not take; None where our word for it is enough."""
        if not known and isinstance(value, NamesArguments):
            return f"Names of layers are given in a dict: {cls.__name__}({{{name!r}: ...}})"
        words = _WORDS.get(name, ())
        if any(word in known for word in words):
            return None
        word = next((word for word in words if word in cls._elsewhere), None)
        if word and name not in cls._elsewhere:
            return f"Here it is called {word}. {cls._elsewhere[word]}"
        return cls._elsewhere.get(name)


@functools.cache
def _known_arguments(cls):
    """The names that the constructor of ``cls`` takes; None where a class that is not ours takes any."""
    known = []
    for owner in cls.__mro__:
        init = vars(owner).get("__init__")
        if init is None:
            continue
        parameters = list(inspect.signature(init).parameters.values())[1:]
        known += [p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
        if not any(p.kind is p.VAR_KEYWORD for p in parameters):
            break
        if owner.__module__.partition(".")[0] != __name__.partition(".")[0]:
            return None
    return tuple(dict.fromkeys(known))


@functools.cache
def _required_arguments(cls):
    """The names of the arguments that the constructor of ``cls`` needs and that may be given by position."""
    parameters = list(inspect.signature(cls.__init__).parameters.values())[1:]
    return tuple(p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD and p.default is p.empty)


# ---- what messages say


def printable(text):
    """``text`` with its control characters as escapes, such as ``\\x1b``, so that a terminal only shows it.

    Tabs, line feeds and the carriage returns before these stay as they are.
    """
    return _CONTROL.sub(lambda match: match[0].encode("unicode_escape").decode(), str(text))


def _escaped(record):
    """A filter of the package's log: a terminal shows its messages, and these name files and quote their lines."""
    record.msg, record.args = printable(record.getMessage()), None
    return True


logging.getLogger("gpurnn").addFilter(_escaped)


def described(value):
    """What a value is, for a message that expected an array: "None", "'abc'", "a list of str"."""
    if value is None or isinstance(value, (str, bytes)):
        text = repr(value)
        return text if len(text) <= 40 else text[:37] + "..."
    if isinstance(value, (list, tuple)):
        inside = next((type(part).__name__ for part in value if not isinstance(part, (int, float))), "numbers")
        return f"a {type(value).__name__} of {inside}"
    return type(value).__name__


def one_line(error, longest=200):
    """What an exception says, in one line of at most ``longest`` characters."""
    if isinstance(error, UnicodeDecodeError):
        return f"not {error.encoding} text: byte {error.start} is {error.object[error.start]:#04x}"
    if isinstance(error, KeyError) and error.args:
        text = f"{error.args[0]!r} is missing" if re.fullmatch(r"[\w/.]+", str(error.args[0])) else str(error.args[0])
    elif isinstance(error, EOFError):
        text = str(error) or "it ends too early"
    elif isinstance(error, RecursionError):
        text = "it is nested too deeply"
    else:
        text = str(error) or type(error).__name__
    text = printable(" ".join(text.split()))
    return text if len(text) <= longest else text[: longest - 3] + "..."


def show_size(count):
    """A number of bytes for people: "3.2 GB"."""
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:,.3g} {unit}" if count < 1e15 else "more than 1,000 TB"
    return f"{count} bytes"
