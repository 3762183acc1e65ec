"""Models of Keras 3 as models of gpurnn, and back. Files need the package h5py, layers in memory keras itself."""

from .exporting import export_keras, load_keras_weights, to_keras
from .importing import import_keras
from .layers import Activation, First, Masked, Merge

__all__ = ["Activation", "First", "Masked", "Merge", "export_keras", "import_keras", "load_keras_weights", "to_keras"]
