"""Layers and models of Keras in memory: what they say of themselves, and their arrays."""

from __future__ import annotations

import json
from typing import Any

import numpy as np

from .files import Path_, place_names
from .library import keras_library


class LiveArrays:
    """The arrays of a model in memory, by the places of its layers."""

    def __init__(self, model: Any) -> None:
        self._model = model

    def arrays(self, path: Path_) -> list[np.ndarray]:
        """Those of the layer at ``path``, in Keras's order; numbers of 16 bits as float32. Raises ValueError."""
        found = inside(self._model, path)
        if not getattr(found, "built", True):
            raise ValueError("it has no weights yet: call it once, or build it")
        arrays = [keras_library().ops.convert_to_numpy(variable.value) for variable in found.weights]
        return [array if array.dtype.kind == "f" else array.astype(np.float32) for array in arrays]


class _Single:
    """A layer on its own in the form of a model."""

    def __init__(self, layer: Any) -> None:
        self.layers = [layer]


def inside(model: Any, path: Path_) -> Any:
    """What lies at a place in a model: as in a file, the layers of a list go by their classes."""
    found = model
    for part in path:
        if isinstance(found, (list, tuple)):
            found = dict(zip(place_names([type(one).__name__ for one in found]), found, strict=True))[part]
        else:
            found = getattr(found, part)
    return found


def read_live(source: Any) -> tuple[Any, LiveArrays]:
    """(config, arrays) of a layer or model of Keras. Raises TypeError for anything else."""
    keras = keras_library()
    if not isinstance(source, keras.Layer):
        raise TypeError(f"source: expected a path, or a layer or model of Keras, got {type(source).__name__}")
    config = json.loads(json.dumps(keras.saving.serialize_keras_object(source), default=str))  # as it is in a file
    if isinstance(source, keras.Model):
        return config, LiveArrays(source)
    single = {"module": "keras", "class_name": "Sequential", "config": {"layers": [config]}, "registered_name": None}
    return single, LiveArrays(_Single(source))
