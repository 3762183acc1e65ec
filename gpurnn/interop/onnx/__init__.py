"""Models as ONNX files, both ways: ``export_onnx`` and ``import_onnx``. Needs the package onnx."""

from .export import export_onnx
from .twin import Twin, import_onnx

__all__ = ["Twin", "export_onnx", "import_onnx"]
