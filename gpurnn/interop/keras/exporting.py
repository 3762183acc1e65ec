"""``export_keras``, ``to_keras`` and ``load_keras_weights``: a model of gpurnn as one of Keras."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ...errors import FileError, one_line
from ...module import Module, float_model
from .chains import Chain
from .files import read_keras, read_weights, write_keras, write_weights
from .library import keras_library
from .live import inside

_ENDS = (".keras", ".weights.h5")


def export_keras(model: Module, path: str | os.PathLike[str]) -> None:
    """Write a model to a file that Keras 3 loads. Keras is not needed.

    Parameters
    ----------
    model : Module
        A layer or a Sequential of layers that Keras has: Embedding, RNN, LSTM, GRU, Linear, LayerNorm, BatchNorm,
        Dropout, Pooling, and those of ``gpurnn.interop.keras``. Keras's model takes (B, T, ...), whatever
        ``batch_first`` says here. What acts in training alone and Keras has not (weight dropout, clipped gradients,
        recurrent dropout for each timestep) is left out.
    path : path
        Ends with ``.keras``: a model, for ``keras.saving.load_model``. With ``.weights.h5``: weights alone, for
        ``load_weights`` of a Keras model with the same layers.

    Raises
    ------
    ImportError
        Without the package h5py.
    ValueError
        A layer or one of its options has no form in Keras, and the message names it; or the path ends otherwise.
    TypeError
        The model is no Module.

    Examples
    --------
    >>> from gpurnn.interop.keras import export_keras, import_keras
    >>> model = gpurnn.Sequential(gpurnn.LSTM(4, 8, bidirectional=True), gpurnn.Pooling(16, "last", 2))
    >>> export_keras(model, "model.keras")
    >>> import_keras("model.keras", backend="numpy")
    Sequential(896 parameters, numpy, float32)
      bidirectional: LSTM(4, 8, batch_first=True, bidirectional=True; 896 parameters, numpy, float32)
      bidirectional_last: Pooling(16, directions=2, batch_first=True; 0 parameters, numpy, float32)
    """
    chain, name = Chain(float_model(model) if isinstance(model, Module) else model), Path(path).name
    if name.endswith(".weights.h5"):
        write_weights(path, chain.arrays())
    elif name.endswith(".keras"):
        write_keras(path, chain.document(), chain.arrays())
    else:
        raise ValueError(f"path: expected a name that ends with {' or '.join(_ENDS)}, got {name}")


def to_keras(model: Module) -> Any:
    """A model as a ``keras.Sequential`` in memory, with its weights.

    Parameters
    ----------
    model : Module
        As of ``export_keras``.

    Returns
    -------
    keras.Sequential
        On the backend that Keras runs with.

    Raises
    ------
    ImportError
        Without the package keras.
    ValueError, TypeError
        As ``export_keras``.
    """
    chain, keras = Chain(model), keras_library()
    made = keras.saving.deserialize_keras_object(chain.document())
    for part in chain.parts():
        inside(made, part.path).set_weights(part.write())
    return made


def load_keras_weights(model: Module, path: str | os.PathLike[str]) -> None:
    """Load the weights in a .weights.h5 or .keras file into a model that has the layers of Keras's.

    A .weights.h5 holds arrays alone, so the model has to be there: one whose layers ``export_keras`` would write as
    those of the file. Of models inside models and cells inside RNN, ``import_keras(model, weights=path)`` knows more.

    Parameters
    ----------
    model : Module
        As of ``export_keras``. It stays as it is on an error.
    path : path
        The file.

    Raises
    ------
    ImportError
        Without the package h5py.
    FileError
        The file is damaged or too large, or its arrays are not those of such a model; the message names the layer.
    ValueError, TypeError
        The model has no form in Keras.
    OSError
        The file cannot be read.

    Examples
    --------
    >>> from gpurnn.interop.keras import export_keras, load_keras_weights
    >>> first, second = gpurnn.GRU(4, 8, seed=1), gpurnn.GRU(4, 8, seed=2)
    >>> export_keras(first, "gru.weights.h5")
    >>> load_keras_weights(second, "gru.weights.h5")
    >>> bool((first.params["weight_hh_l0"] == second.params["weight_hh_l0"]).all())
    True
    """
    chain, path = Chain(model), Path(path)
    arrays = read_keras(path)[1] if path.name.endswith(".keras") else read_weights(path)
    state = model.state_dict()
    try:
        model.load_state_dict(state | _values(chain, arrays, state))
    except FileError:
        raise
    except (ValueError, LookupError) as error:
        raise FileError(f"{path}: {one_line(error, 2000)}") from error


def _values(chain: Chain, arrays: Any, state: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The values of a model's parameters in the arrays of a file. Raises ValueError."""
    found: dict[str, np.ndarray] = {}
    for part in chain.parts():
        try:
            values = part.read(arrays.arrays(part.path))
            for name, array in values.items():
                if array.shape != state[name].shape:
                    raise ValueError(f"{name}: expected shape {state[name].shape}, got {array.shape}")
        except FileError:
            raise
        except ValueError as error:
            raise ValueError(f"{'/'.join(part.path)}: {error}") from error
        found |= values
    return found
