"""The package ``onnx``, imported when it is needed."""

from __future__ import annotations

from types import ModuleType

OLDEST = 7  # of the opsets that are read: before it, operators broadcast by other rules
OPSET = 17  # of the files that are written: the first one with LayerNormalization
IR_VERSION = 8  # the file format that came with this opset


def onnx_library() -> ModuleType:
    """The package. Raises ImportError that says how to install it."""
    try:
        import onnx
        import onnx.checker
        import onnx.defs
        import onnx.helper
        import onnx.numpy_helper
        import onnx.shape_inference
    except ImportError as error:
        raise ImportError('ONNX files need the package onnx: pip install "gpurnn[onnx]"') from error
    return onnx
