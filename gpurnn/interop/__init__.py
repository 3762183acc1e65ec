"""Models of other libraries, and gpurnn's models in them: each module imports its library when it is used.

Each but C needs an extra of its name. See docs/interop.md, and c.md, jax.md, keras.md, onnx.md and sklearn.md there.
"""
