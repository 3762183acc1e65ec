"""Models of other libraries, and gpurnn's models in them: each module imports its library when it is used.

Each needs an extra of its name. See docs/interop.md, and docs/jax.md, keras.md, onnx.md and sklearn.md beside it.
"""
