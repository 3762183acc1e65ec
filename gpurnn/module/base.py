"""Module: parameters and gradients as views of one flat buffer each, state dictionaries, modes.

A module made of modules moves their parameters into one buffer of its own, so that an update, a norm or an all-reduce
is one operation over one array however deep the model is.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from .. import rng
from .._typing import Array
from ..backends import get_backend
from ..dtypes import check_dtype, compute_dtype
from ..errors import DtypeError, MissingError, NamesArguments, check_choice, check_flag, checked
from .freezing import Freezing
from .modes import Modes
from .quantized import Quantizing, refuse_quantized
from .registration import Registration
from .states import States
from .stepper import Stepper
from .summary import summary_table
from .versions import Versions
from .views import Views

PRECISIONS = ("float32", "fma", "tf32")
_RESERVED = frozenset({  # what Module.__init__ sets: no layer takes these names
    "ops", "xp", "dtype", "precision", "compute_dtype", "seed", "name", "key", "calls", "training", "buffers",
    "children", "params", "grads", "flat_params", "flat_grads", "parameter_count",
    "_evaluations", "_counts", "_frozen", "_homes", "_own", "_open", "_parent", "_layout", "_drawn_seed",
})  # fmt: skip


def _check_gpu_bfloat16(cupy: str, numpy: str) -> None:
    """Raise DtypeError unless these versions know bfloat16: CuPy has it from 14 on, and needs NumPy 2.1.2 for it."""
    for name, version, least in (("CuPy", cupy, (14,)), ("NumPy", numpy, (2, 1, 2))):
        if tuple(int(part) for part in re.findall(r"\d+", version)[:3]) < least:
            wanted = ".".join(map(str, least))
            raise DtypeError(f"dtype bfloat16 on a GPU needs {name} {wanted} or newer, here is {version}")


class Module(Registration, Freezing, Versions, Modes, States, Quantizing, NamesArguments):
    """Base of every layer and model.

    In a model of your own, call ``super().__init__()`` first. Then a layer that is set as an attribute,
    ``self.lstm = gpurnn.LSTM(...)``, is a part of the model: its parameters, such as "lstm.weight_ih_l0", are in
    ``params``, in the state dictionary, and train with the model. So are the layers of a list, tuple or dict, which
    becomes a ``gpurnn.module.Layers``; layers in a set, a deque or a generator raise TypeError. ``parameter`` makes a
    parameter of the module's own. A layer that takes the place of another, or a deleted one, leaves the other on its
    own; an optimizer of the model must be built anew then. Attributes that are named in the class's ``references``
    hold layers that belong elsewhere.

    ``forward`` returns the outputs and a backward function, ``__call__`` the outputs alone; ``guard_backward`` adds the
    usual checks to a backward function. docs/models.md has an example.

    Parameters must not change between a forward pass and its backward pass: ``backward`` raises RuntimeError, naming
    the parameter, if an optimizer, ``load_state_dict`` or an assignment ``params[name] = ...`` has changed one. A
    write through an array (``params[name][0] = 1``, ``flat_params *= 2``) cannot be seen: call ``changed`` after it.
    Attributes other than sizes may be set at any time, and are checked as the constructor checks its arguments;
    ``backward`` uses those of its forward pass.

    ``copy.deepcopy`` and ``pickle`` make independent copies with equal bits: parameters, gradients, buffers, modes and
    the counters of random draws. A layer in two places, or a table with two uses, stays one. A pickle names its
    backend, and loading it where that backend cannot work raises BackendError. Loading a pickle can run any code; for
    files there is ``gpurnn.save``.

    Parameters
    ----------
    backend : str, optional
        Name of the backend; "auto" for the current one, see ``gpurnn.use_backend``. None follows the first layer that
        is set, or the model that this module is set in, and is the current one until then.
    dtype : str or dtype, optional
        float32, float64, float16 or bfloat16. None follows likewise, and is float32 until then.
    seed : int, optional
        Key of the random draws. None takes that of the first layer in it that was given one, and draws one until then.
    precision : {"float32", "fma", "tf32"}
        See the attribute.

    Attributes
    ----------
    params, grads : Views
        Name -> array; views of ``flat_params`` and ``flat_grads``. In the flat buffers every parameter starts at a
        multiple of 16 numbers; the numbers between parameters are zero.
    parameter_count : int
        Numbers in the parameters, without those between them.
    buffers : dict
        Name -> array that is saved with the state and not trained (running statistics).
    children : dict
        Name -> Module.
    training : bool
        The mode, set by ``train()`` and ``eval()``.
    dtype : dtype
        Of inputs, outputs and activations; float16 and bfloat16 are computed in float32.
    compute_dtype : dtype
        Of parameters, gradients and buffers: float32 with a 16-bit ``dtype``, whose products take a rounded copy of
        the weights; otherwise ``dtype``.
    precision : str
        How a GPU multiplies float32. "float32" may use tensor cores inside the time loop, where each number is the sum
        of three bfloat16 numbers: the error is at most twice that of multiply-adds. "fma" takes multiply-adds only.
        "tf32" rounds to tf32 (10 bits of mantissa) first, in every product. Sums, states and everything else stay
        float32, and other backends are exact.
    name : str
        Dotted place in the model around it, empty for a module on its own.
    seed, key, calls : int
        Key of this module's random draws (see rng.py). ``key`` comes from ``name``; ``calls`` counts the calls in
        training mode that drew, and belongs to ``random_state()``.

    Raises
    ------
    BackendError
        If the backend cannot work on this machine.
    DtypeError, TypeError, ValueError
        For an argument of the wrong type or value.
    """

    ops: Any
    xp: Any
    params: Views
    grads: Views
    dtype: np.dtype[Any]
    compute_dtype: np.dtype[Any]
    precision: str
    seed: int
    calls: int
    children: dict[str, Module]
    _reserved = _RESERVED
    stateful = False  # True where forward takes and returns a recurrent state
    _chain = False  # True where each layer in it reads the output of the one before it
    once = False  # True where backward overwrites what forward saved, and so runs once unless ``retain=True``

    def __init__(
        self,
        backend: str | None = None,
        dtype: Any = None,
        seed: int | None = None,
        precision: str = "float32",
    ) -> None:
        self.ops = get_backend(backend)
        self.xp = self.ops.xp
        self.dtype = check_dtype("float32" if dtype is None else dtype)
        self.precision = check_choice("precision", precision, PRECISIONS)
        if precision != "float32":
            if self.dtype != np.float32:
                raise ValueError(f"precision: {precision} is a way to multiply float32, got dtype {self.dtype}")
            self.ops = self.ops.with_precision(precision)
        if self.dtype.name == "bfloat16" and self.xp is not np:
            _check_gpu_bfloat16(self.xp.__version__, np.__version__)
        self.compute_dtype = compute_dtype(self.dtype)
        self.seed = rng.check_seed(seed)
        self._drawn_seed = self.seed if seed is None else None  # the first seeded layer's takes the place of this one
        self.name = ""
        self.key = 0
        self.calls = 0
        self.training = True
        self._evaluations: list[list[bool]] = []  # the active blocks of ``evaluation``: [mode to restore] of each
        self.buffers: dict[str, Array] = {}
        self.children: dict[str, Module] = {}
        self.params, self.grads = Views(), Views()
        self._own: list[tuple[str, tuple[int, ...]]] = []  # (name, shape) of its own parameters
        # of each module in here, in the order of modules(): own parameter -> number of changes, with "" -> how often
        # layers or parameters were added, where they were; names of frozen parameters
        self._counts: list[dict[str, int]] = [{}]
        self._frozen: list[set[str]] = [set()]
        self._homes: dict[str, Module] = {}  # children; one that has two names is listed once, under the first
        self._parent = None  # weak reference to the module that holds the parameters
        self._open = (backend is None, dtype is None)  # whether the first layer decides on backend and dtype
        self._bind(self.xp.zeros(0, self.compute_dtype), self.xp.zeros(0, self.compute_dtype), [])

    def __call__(self, x: Any, /) -> Any:
        """The outputs alone. Every layer has a call of its own, and so must a model."""
        raise TypeError(
            f"{type(self).__name__} has no __call__, so it cannot be called. A model of your own needs one: "
            "__call__(self, x) returns the outputs alone, forward(self, x) also the backward function"
        )

    @checked
    def training(self, value: bool) -> bool:
        """The mode: True for training."""
        if check_flag("training", value) and self.quantized:
            refuse_quantized(self, "training")
        return bool(value)

    def summary(self, T: int | None = None, B: int | None = None) -> str:
        """A table of the layers, as text of at most 100 columns: output shapes, parameters and their total.

        An output shape is shown where the layers' sizes determine it; ``...`` stands for any axes.

        Parameters
        ----------
        T, B : int, optional
            Timesteps and sequences of a training call. With them the shapes are numbers, and a column says how many
            bytes of activations the recurrent layers save and return, by ``plan``. Other layers are not counted.

        Returns
        -------
        str
            The table.

        Raises
        ------
        ValueError, TypeError
            For only one of ``T`` and ``B``, or one that is not a whole number of at least 1.

        Examples
        --------
        >>> layers = {"table": gpurnn.Embedding(50, 8), "rnn": gpurnn.GRU(8, 16), "head": gpurnn.Linear(16, 50)}
        >>> print(gpurnn.Sequential(layers).summary())
        layer               output      parameters
        Sequential
          table: Embedding  (T, B, 8)          400
          rnn: GRU          (T, B, 16)       1,248
          head: Linear      (T, B, 50)         850
        total                                2,498
        """
        return summary_table(self, T, B)

    def stepper(self, batch: int = 1) -> Stepper:
        """A ``Stepper``: this model reading ``batch`` sequences one timestep at a time, in evaluation mode.

        Parameters
        ----------
        batch : int
            How many sequences there is room for.

        Raises
        ------
        ValueError, TypeError
            The model needs the future, or has no state.

        Examples
        --------
        >>> stepper = gpurnn.GRU(3, 5).stepper(batch=2)
        >>> [stepper.step(np.ones((2, 3), "float32")).shape for _ in range(2)]
        [(2, 5), (2, 5)]
        """
        return Stepper(self, batch)

    def _step_parts(self) -> list[Any] | None:
        """This module in inference as parts of ``backends.steps``, or None where it is none of them."""
        return None

    def _group(self, layers: Sequence[Any] | Mapping[str, Any]) -> Layers:
        """A list, tuple or dict of layers as one module."""
        return Layers(layers)

    def _sizes_text(self) -> str:
        """A layer's sizes, and its options where they differ from the defaults, for ``repr``."""
        return ""

    def __repr__(self) -> str:
        sizes, frozen = self._sizes_text(), sum(self.params[name].size for name in self.frozen)
        count = f"{self.parameter_count} parameters" + (f", {frozen} of them frozen" if frozen else "")
        count += f", {int8} weights{self._and_activations()} in int8" if (int8 := self._int8_count()) else ""
        line = f"{type(self).__name__}({sizes}{'; ' if sizes else ''}{count}, {self.ops.name}, {self.dtype})"
        children = (f"{name}: {child!r}".replace("\n", "\n  ") for name, child in self.children.items())
        return "\n  ".join([line, *children])


class Layers(Module):
    """Layers of a list, tuple or dict, as a part of a model. It runs none of them: that is up to the model.

    A model makes it where a list, tuple or dict of layers is set as an attribute. It is read like a list; the layers of
    a dict are also read by name. Set ``layers[name]`` to replace or to add a layer;
    ``del layers[name]`` takes one out.

    Parameters
    ----------
    layers : list, tuple or dict of Module
        In a list the layers are called "0", "1", ...; they may be lists themselves.

    Examples
    --------
    >>> model = gpurnn.Module()
    >>> model.blocks = [gpurnn.Linear(3, 3) for _ in range(2)]
    >>> list(model.params)
    ['blocks.0.weight', 'blocks.0.bias', 'blocks.1.weight', 'blocks.1.bias']
    >>> len(model.blocks), model.blocks[1]
    (2, Linear(3, 3; 12 parameters, cpu, float32))
    """

    _hints = Module._hints | dict.fromkeys(
        ("append", "extend", "insert", "update"),
        "set a new list or dict of all layers, or layers[name] = layer for one",
    )

    def __init__(self, layers: Sequence[Any] | Mapping[str, Any]) -> None:
        named = dict(layers) if isinstance(layers, Mapping) else {str(n): layer for n, layer in enumerate(layers)}
        super().__init__()
        self.add_layers(named)

    def __getitem__(self, key: str | int) -> Module:
        """The layer of this name, or at this place."""
        return self.children[key] if isinstance(key, str) else list(self.children.values())[key]

    def __setitem__(self, key: str | int, layer: Module) -> None:
        """Put another layer in the place of this one; a new name is added at the end."""
        self.add_layers({key if isinstance(key, str) else list(self.children)[key]: layer})

    def __delitem__(self, key: str | int) -> None:
        """Take out the layer of this name, or at this place; in a list, those after it move up."""
        names = list(self.children)
        gone = key if isinstance(key, str) else names[operator.index(key)]
        if gone not in names:
            raise MissingError(f"{gone}: no layer is called so, there are {', '.join(names)}")
        rest = {name: child for name, child in self.children.items() if name != gone}
        is_list = names == [str(number) for number in range(len(names))]
        self._set_children({str(number): child for number, child in enumerate(rest.values())} if is_list else rest)

    def __len__(self) -> int:
        return len(self.children)

    def __iter__(self) -> Iterator[Module]:
        return iter(self.children.values())

    def items(self) -> Iterator[tuple[str, Module]]:
        """(name, layer) of each layer."""
        return iter(self.children.items())
