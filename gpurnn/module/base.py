"""Module: parameters and gradients as views of one flat buffer each, state dictionaries, modes.

A layer declares its parameters once. A module made of modules moves their parameters into one buffer of its own, so
that an update, a norm or an all-reduce is one operation over one array however deep the model is.
"""

from __future__ import annotations

import re
from typing import Any

import numpy as np

from .. import rng
from .._typing import Array
from ..backends import get_backend
from ..dtypes import check_dtype, compute_dtype
from ..errors import DtypeError, NamesArguments, check_choice, check_flag, checked
from .freezing import Freezing
from .modes import Modes
from .parameters import FlatParameters
from .states import States
from .summary import summary_table
from .versions import Versions
from .views import Views

PRECISIONS = ("float32", "tf32")


def _check_gpu_bfloat16(cupy: str, numpy: str) -> None:
    """Raise DtypeError unless these versions know bfloat16: CuPy has it from 14 on, and needs NumPy 2.1.2 for it."""
    for name, version, least in (("CuPy", cupy, (14,)), ("NumPy", numpy, (2, 1, 2))):
        if tuple(int(part) for part in re.findall(r"\d+", version)[:3]) < least:
            wanted = ".".join(map(str, least))
            raise DtypeError(f"dtype bfloat16 on a GPU needs {name} {wanted} or newer, here is {version}")


class Module(FlatParameters, Freezing, Versions, Modes, States, NamesArguments):
    """Base of every layer and model.

    Parameters must not change between a forward pass and its backward pass: ``backward`` raises RuntimeError, naming
    the parameter, if an optimizer, ``load_state_dict`` or an assignment ``params[name] = ...`` has changed one. A
    write through an array (``params[name][0] = 1``, ``flat_params *= 2``) cannot be seen: call ``changed`` after it.
    Attributes other than sizes may be set at any time, and are checked as the constructor checks its arguments;
    ``backward`` uses those of its forward pass.

    ``copy.deepcopy`` and ``pickle`` make independent copies with equal bits: parameters, gradients, buffers, modes and
    the counters of random draws. A layer in two places, or a table with two uses, stays one. A pickle names its
    backend, and loading it where that backend cannot work raises BackendError. Loading a pickle can run any code; for
    files there is ``gpurnn.save_weights``.

    A layer of your own takes ``versions()`` in ``forward`` and gives it to ``check_versions`` in ``backward``.

    Parameters
    ----------
    backend : str, optional
        Name of the backend; None or "auto" for the current one, see ``gpurnn.use_backend``.
    dtype : str or dtype
        float32, float64, float16 or bfloat16.
    seed : int, optional
        Key of the random draws; None draws one.
    precision : {"float32", "tf32"}
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
        "tf32" lets a GPU round float32 to tf32 (10 bits of mantissa) before it multiplies, as its tensor cores do.
        Sums, states and everything else stay float32, and other backends are exact.
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
    stateful = False  # True where forward takes and returns a recurrent state
    once = False  # True where backward overwrites what forward saved, and so runs once unless ``retain=True``

    def __init__(
        self,
        backend: str | None = None,
        dtype: Any = "float32",
        seed: int | None = None,
        precision: str = "float32",
    ) -> None:
        self.ops = get_backend(backend)
        self.xp = self.ops.xp
        self.dtype = check_dtype(dtype)
        self.precision = check_choice("precision", precision, PRECISIONS)
        if precision == "tf32":
            if self.dtype != np.float32:
                raise ValueError(f"precision: tf32 is a way to multiply float32, got dtype {self.dtype}")
            self.ops = self.ops.with_tf32()
        if self.dtype.name == "bfloat16" and self.xp is not np:
            _check_gpu_bfloat16(self.xp.__version__, np.__version__)
        self.compute_dtype = compute_dtype(self.dtype)
        self.seed = rng.check_seed(seed)
        self.name = ""
        self.key = 0
        self.calls = 0
        self.training = True
        self._evaluations: list[list[bool]] = []  # the active blocks of ``evaluation``: [mode to restore] of each
        self.buffers: dict[str, Array] = {}
        self.children: dict[str, Module] = {}
        self.params, self.grads = Views(), Views()
        # of each layer in here, in the order of modules(): parameter -> number of changes; names of frozen parameters
        self._counts: list[dict[str, int]] = [{}]
        self._frozen: list[set[str]] = [set()]
        self._homes: dict[str, Module] = {}  # children; one that has two names is listed once, under the first
        self._parent = None  # weak reference to the module that holds the parameters
        self._bind(self.xp.zeros(0, self.compute_dtype), self.xp.zeros(0, self.compute_dtype), [])

    @checked
    def training(self, value: bool) -> bool:
        """The mode: True for training."""
        return check_flag("training", value)

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

    def _sizes_text(self) -> str:
        """A layer's sizes, and its options where they differ from the defaults, for ``repr``."""
        return ""

    def __repr__(self) -> str:
        sizes, frozen = self._sizes_text(), sum(self.params[name].size for name in self.frozen)
        count = f"{self.parameter_count} parameters" + (f", {frozen} of them frozen" if frozen else "")
        line = f"{type(self).__name__}({sizes}{'; ' if sizes else ''}{count}, {self.ops.name}, {self.dtype})"
        children = (f"{name}: {child!r}".replace("\n", "\n  ") for name, child in self.children.items())
        return "\n  ".join([line, *children])
