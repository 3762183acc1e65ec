"""Models as ONNX files, both ways: ``export_onnx`` and ``import_onnx``. Needs the package onnx."""

from .twin import Twin, import_onnx

__all__ = ["Twin", "import_onnx"]
