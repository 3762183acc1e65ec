"""``import_keras``: a model of Keras as layers of gpurnn."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from ..._typing import Backend
from ...backends import get_backend
from ...errors import FileError, check_flag, one_line
from ...layers import Dropout, Embedding, LayerNorm, Linear, Pooling, Sequential
from ...layers.norm import BatchNorm
from ...module import Module
from . import graphs
from . import weights as tables
from .files import Path_, read_keras, read_weights
from .layers import Activation, First, Masked, Merge
from .live import read_live
from .recurrent import read_recurrent, recurrent_layer
from .settings import Settings

_BY_TIMESTEP = ("Dense", "Activation", "ReLU", "Softmax", "LayerNormalization", "Dropout")
_MERGES = ("concat", "sum", "mul", "ave")


def import_keras(
    source: Any,
    *,
    weights: str | os.PathLike[str] | None = None,
    batch_first: bool = True,
    backend: str | Backend | None = "auto",
) -> Sequential:
    """A model of Keras 3 with its weights, as a ``Sequential`` of gpurnn.

    It reads chains of layers: Embedding, Masking, SimpleRNN, LSTM, GRU, Bidirectional, RNN with their cells or
    StackedRNNCells, Dense, Activation, ReLU, Softmax, LayerNormalization, BatchNormalization, Dropout,
    SpatialDropout1D, GlobalAveragePooling1D, GlobalMaxPooling1D, TimeDistributed around some of them, and models of
    these; as Sequential or as a functional model without branches. Nothing in a file is executed, and Keras is not
    needed to read one.

    Parameters
    ----------
    source : path, or layer or model of Keras
        A .keras file, or what is in memory, with weights.
    weights : path, optional
        A .weights.h5 file of the same model, whose weights are taken instead.
    batch_first : bool
        Whether the model takes (B, T, features), as Keras's do, or (T, B, features).
    backend : str or Ops, optional
        As for every layer.

    Returns
    -------
    Sequential
        In evaluation mode, as a call in Keras is. Its layers have Keras's names; one of Keras may be several: an LSTM
        that returns its last output has a Pooling behind it, called ``lstm_last``. With ``mask_zero`` or Masking it is
        a ``Masked``. A call returns ``(y, state)`` where a layer is recurrent.

    Raises
    ------
    ImportError
        Without the package h5py, for a file, or keras, for a model in memory.
    FileError
        The file is damaged or too large, or has layers or settings that gpurnn does not have; the message names them.
    ValueError
        Likewise, for a model in memory; or for a .weights.h5 alone, which ``load_keras_weights`` reads.
    TypeError
        For another object.
    OSError
        The file cannot be read.

    Examples
    --------
    >>> from gpurnn.interop.keras import export_keras, import_keras
    >>> layers = gpurnn.Embedding(50, 8), gpurnn.GRU(8, 16), gpurnn.Linear(16, 50)
    >>> export_keras(gpurnn.Sequential(*layers), "model.keras")
    >>> model = import_keras("model.keras", backend="numpy")
    >>> list(model.children)
    ['embedding', 'gru', 'dense']
    >>> y, state = model(np.zeros((3, 7), int))
    >>> y.shape
    (3, 7, 50)
    """
    options = {"batch_first": check_flag("batch_first", batch_first), "backend": get_backend(backend)}
    live = not isinstance(source, (str, os.PathLike))
    if not live and Path(source).name.endswith(".h5"):
        raise ValueError(
            f"{source}: holds weights alone: gpurnn.interop.keras.load_keras_weights(model, path) reads it"
        )
    config, arrays = read_live(source) if live else read_keras(Path(source))
    place, kind = ("source", ValueError) if live else (source, FileError)
    if weights is not None:
        arrays, place, kind = read_weights(Path(weights)), weights, FileError
    with _naming(place, kind):
        return _Import(arrays, options).model(config)


@contextlib.contextmanager
def _naming(place: Any, kind: type[ValueError]) -> Iterator[None]:
    """A context in which every error of what a file or a model holds is of this kind, and begins with its place."""
    try:
        yield
    except FileError:
        raise
    except (ValueError, TypeError, LookupError, ArithmeticError, RecursionError, AttributeError) as error:
        raise kind(f"{place}: {one_line(error, 2000)}") from error


class _Import:
    """A model in the making: gpurnn's layers by name, and the values of their parameters.

    arrays: of the layers by their places. options: batch_first and backend of all layers.
    """

    def __init__(self, arrays: Any, options: dict[str, Any]) -> None:
        self._arrays, self._options = arrays, options
        self._layers: dict[str, Module] = {}
        self._values: dict[str, np.ndarray] = {}
        self._frozen: list[str] = []
        self._masks: list[float | None] = []  # None: of ids
        self._dtype: str | None = None

    def model(self, config: Any) -> Sequential:
        """The model of Keras's description. Raises ValueError, TypeError and FileError."""
        for path, document in graphs.chain(config):
            settings = Settings(document)
            try:
                self._add(settings, path)
                settings.finish()
            except (ValueError, TypeError, LookupError) as error:
                if isinstance(error, FileError):
                    raise
                raise ValueError(f"{settings.shown}: {error}") from error
        if not self._layers:
            raise ValueError("it has no layers")
        model = Masked(self._layers, mask_value=self._masks[0]) if self._masks else Sequential(self._layers)
        model.load_state_dict(model.state_dict() | self._values)
        if self._frozen:
            model.freeze(*self._frozen)
        return model.eval()

    def _add(self, settings: Settings, path: Path_) -> None:
        reads = _READERS.get(settings.kind)
        if reads is None or settings.custom:
            what = "is a class of its own" if settings.custom else "has no form in gpurnn"
            raise ValueError(f"it {what}: expected one of {', '.join(_READERS)}")
        if settings.kind != "InputLayer":
            dtype = settings.dtype()
            if self._dtype not in (None, dtype):
                raise ValueError(f"dtype: expected {self._dtype}, as the layers before it have, got {dtype}")
            self._dtype = dtype
        reads(self, settings, path)

    def _place(self, settings: Settings, layer: Module, values: dict[str, np.ndarray], suffix: str = "") -> str:
        """Put a layer behind the others. values: of its parameters and buffers by their names. Returns its name."""
        stem = re.sub(r"[^\w-]", "_", settings.name)[:60] + suffix
        name, number = stem, 1
        while name in self._layers:
            number += 1
            name = f"{stem}_{number}"
        self._layers[name] = layer
        self._values |= {f"{name}.{key}": array for key, array in values.items()}
        if settings.config.get("trainable") is False and layer.params:
            self._frozen.append(name)
        return name

    def _with(self, *names: str) -> dict[str, Any]:
        """Arguments of a layer: backend, dtype, and of the others those that are named."""
        return {"backend": self._options["backend"], "dtype": self._dtype} | {
            name: self._options[name] for name in names
        }

    # ---- layers

    def input(self, settings: Settings, path: Path_) -> None:
        settings.only("sparse", (False,))
        settings.only("ragged", (False,))
        settings.only("optional", (False,))

    def masking(self, settings: Settings, path: Path_) -> None:
        if self._layers or self._masks:
            raise ValueError("gpurnn takes masks from the input of a model: it has to be the first layer")
        value = settings.value("mask_value", 0.0)
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise ValueError(f"mask_value: expected a number, got {one_line(repr(value), 60)}")
        self._masks.append(float(value))

    def embedding(self, settings: Settings, path: Path_) -> None:
        settings.only("lora_rank", (None,))
        values = tables.embedding_to_gpurnn(self._arrays.arrays(path))
        sizes = values["weight"].shape
        self._check_sizes(settings, {"input_dim": sizes[0], "output_dim": sizes[1]})
        if settings.flag("mask_zero"):
            if self._layers:
                raise ValueError(
                    "mask_zero: gpurnn takes masks from the input of a model: it has to be the first layer"
                )
            self._masks.append(None)
        self._place(settings, Embedding(*sizes, **self._with()), values)

    def _check_sizes(self, settings, sizes):
        for name, size in sizes.items():
            if settings.size(name) != size:
                raise ValueError(f"{name}: its weights are of size {size}, got {settings.config[name]}")

    def dense(self, settings: Settings, path: Path_) -> None:
        settings.only("lora_rank", (None,))
        bias = settings.flag("use_bias", True)
        values = tables.dense_to_gpurnn(bias, self._arrays.arrays(path))
        outputs, inputs = values["weight"].shape
        self._check_sizes(settings, {"units": outputs})
        function = settings.activation("activation", "linear", {"softmax": "softmax"})
        self._place(settings, Linear(inputs, outputs, bias, **self._with()), values)
        self._activate(settings, function, f"_{function}")

    def _activate(self, settings, function, suffix=""):
        if function != "identity":
            self._place(settings, Activation(function, **self._with()), {}, suffix)

    def activation(self, settings: Settings, path: Path_) -> None:
        self._activate(settings, settings.activation("activation", "linear", {"softmax": "softmax"}))

    def relu(self, settings: Settings, path: Path_) -> None:
        settings.only("negative_slope", (0.0, 0))
        settings.only("threshold", (0.0, 0))
        settings.only("max_value", (None,))
        self._activate(settings, "relu")

    def softmax(self, settings: Settings, path: Path_) -> None:
        settings.last_axis()
        self._activate(settings, "softmax")

    def dropout(self, settings: Settings, path: Path_) -> None:
        shape = settings.value("noise_shape")
        whole = isinstance(shape, (list, tuple)) and len(shape) == 3 and shape[1] == 1
        if shape is not None and not (whole and shape[0] != 1 and shape[2] != 1):
            raise ValueError(f"noise_shape: expected None or [None, 1, None], got {one_line(repr(shape), 60)}")
        self._drop(settings, settings.rate("rate"), whole)

    def spatial_dropout(self, settings: Settings, path: Path_) -> None:
        self._drop(settings, settings.rate("rate"), True)

    def _drop(self, settings, rate, variational, suffix=""):
        self._place(settings, Dropout(rate, variational, **self._with("batch_first")), {}, suffix)

    def layer_norm(self, settings: Settings, path: Path_) -> None:
        settings.last_axis()
        settings.only("rms_scaling", (False,))
        eps = settings.number("epsilon", 1e-3)
        scale, center = settings.flag("scale", True), settings.flag("center", True)
        values = tables.norm_to_gpurnn(tables.norm_names(scale, center, False), self._arrays.arrays(path))
        if not values:
            raise ValueError("scale and center: gpurnn's LayerNorm needs one of them to know its size")
        features = next(iter(values.values())).size
        name = self._place(settings, LayerNorm(features, eps, center, **self._with()), values)
        self._frozen += [] if scale else [f"{name}.weight"]

    def batch_norm(self, settings: Settings, path: Path_) -> None:
        settings.last_axis()
        settings.only("renorm", (False,))
        eps = settings.number("epsilon", 1e-3)
        momentum = round(1 - settings.rate("momentum", 0.99), 12)  # Keras's says how much of the old is left
        scale, center = settings.flag("scale", True), settings.flag("center", True)
        values = tables.norm_to_gpurnn(tables.norm_names(scale, center, True), self._arrays.arrays(path))
        if np.any(values["running_var"] < 0):
            raise ValueError("moving_variance: expected numbers of at least 0")
        layer = BatchNorm(values["running_mean"].size, eps, momentum, scale or center, **self._with("batch_first"))
        name = self._place(settings, layer, values)
        if scale != center:
            self._frozen.append(f"{name}.{'bias' if scale else 'weight'}")

    def pooling(self, settings: Settings, path: Path_) -> None:
        settings.only("keepdims", (False,))
        settings.only("data_format", ("channels_last", None))
        mode = "mean" if settings.kind == "GlobalAveragePooling1D" else "max"
        if mode == "max" and self._masks:
            raise ValueError("it takes the largest of masked timesteps, too, in Keras: gpurnn's Pooling does not")
        self._place(settings, Pooling(self._features(), mode, **self._with("batch_first")), {})

    def _features(self):
        """The features of what comes in, from the layers before. Raises ValueError."""
        size = None
        for layer in self._layers.values():
            for name in ("out_features", "embedding_dim", "features"):
                size = getattr(layer, name, size)
            if hasattr(layer, "hidden_sizes"):
                size = layer.hidden_sizes[-1] * (1 + layer.bidirectional)
        if size is None:
            raise ValueError("it is the first layer, so that its number of features is not known")
        return size

    def time_distributed(self, settings: Settings, path: Path_) -> None:
        """A layer that acts on each timestep by itself, as gpurnn's do anyway."""
        inner = Settings(settings.value("layer") or {})
        if inner.custom or inner.kind not in _BY_TIMESTEP:
            raise ValueError(f"layer: expected one of {', '.join(_BY_TIMESTEP)}, got {inner.shown}")
        inner.check_dtype(settings)
        inner.name = settings.name
        _READERS[inner.kind](self, inner, (*path, "layer"))
        inner.finish()

    def recurrent(self, settings: Settings, path: Path_) -> None:
        """SimpleRNN, LSTM, GRU, RNN, and Bidirectional around one of them."""
        merge = "concat"
        if settings.kind == "Bidirectional":
            merge = settings.value("merge_mode", "concat")
            if merge not in _MERGES:
                raise ValueError(f"merge_mode: expected one of {', '.join(_MERGES)}, got {one_line(repr(merge), 60)}")
        found = read_recurrent(settings, path)
        options = self._with("batch_first")
        for number, cell in enumerate(found.cells):
            suffix = f"_cell_{number}" if len(found.cells) > 1 else ""
            arrays = [self._arrays.arrays(place) for place in cell.paths]
            layer, values = recurrent_layer(cell, arrays, found, options)
            if cell.dropout:
                self._drop(settings, cell.dropout, True, f"{suffix}_input_dropout")
            self._place(settings, layer, values, suffix)
        if not found.sequences:
            features, directions = self._features(), 2 if found.bidirectional else 1
            kind = First(features, **options) if found.reverse else Pooling(features, "last", directions, **options)
            self._place(settings, kind, {}, "_last")
        if merge != "concat":
            self._place(settings, Merge(self._features(), merge, **self._with()), {}, f"_{merge}")


_READERS = {
    "InputLayer": _Import.input, "Masking": _Import.masking, "Embedding": _Import.embedding,
    "SimpleRNN": _Import.recurrent, "LSTM": _Import.recurrent, "GRU": _Import.recurrent, "RNN": _Import.recurrent,
    "Bidirectional": _Import.recurrent, "Dense": _Import.dense, "Activation": _Import.activation,
    "ReLU": _Import.relu, "Softmax": _Import.softmax, "LayerNormalization": _Import.layer_norm,
    "BatchNormalization": _Import.batch_norm, "Dropout": _Import.dropout, "SpatialDropout1D": _Import.spatial_dropout,
    "GlobalAveragePooling1D": _Import.pooling, "GlobalMaxPooling1D": _Import.pooling,
    "TimeDistributed": _Import.time_distributed,
}  # fmt: skip
