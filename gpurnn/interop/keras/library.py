"""The packages ``h5py`` and ``keras``, imported when they are needed."""

from __future__ import annotations

from types import ModuleType

OLDEST = 3  # of the major versions of Keras whose files and layers are read: before it, hard_sigmoid was another


def h5py_library() -> ModuleType:
    """The package h5py, for files. Raises ImportError that says how to install it."""
    try:
        import h5py
    except ImportError as error:
        raise ImportError('files of Keras need the package h5py: pip install "gpurnn[keras]"') from error
    return h5py


def keras_library() -> ModuleType:
    """The package keras, for layers in memory. Raises ImportError that says how to install it, or which one it is."""
    try:
        import keras
    except ImportError as error:
        text = "layers of Keras need the package keras and one of its backends: pip install keras torch"
        raise ImportError(f"{text}; KERAS_BACKEND=torch says which") from error
    if int(keras.__version__.partition(".")[0]) < OLDEST:
        raise ImportError(f"keras: expected version 3 or later, got {keras.__version__}: pip install --upgrade keras")
    return keras
