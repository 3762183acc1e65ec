"""Exported headers, compiled and run: what the tests of ``gpurnn.interop.c`` share."""

import ctypes
import os
import shutil
import subprocess

import numpy as np
import pytest

from gpurnn import testing
from gpurnn.interop.c import export_c
from gpurnn.layers import Dropout, Embedding
from gpurnn.layers.common import feature_sizes

COMPILER = next((found for name in ("gcc", "clang", "cc") if (found := shutil.which(name))), None)
needs_compiler = pytest.mark.skipif(COMPILER is None or os.name == "nt", reason="needs a C compiler: gcc, clang or cc")
WARNINGS = ["-Wall", "-Wextra", "-Wconversion", "-Wshadow", "-pedantic", "-Werror"]


def compiled(folder, code, *options, compiler=None, language="-std=c99"):
    """Compile C code to a shared library; returns its path. Any warning fails."""
    source, library = folder / "code.c", folder / "code.so"
    source.write_text(code)
    command = [compiler or COMPILER, language, *WARNINGS, "-O1", "-shared", "-fPIC", *options]
    done = subprocess.run([*command, "-o", library, source], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[:4000]
    return library


class Compiled:
    """Models in one library. models: name -> (model, options of ``export_c``)."""

    def __init__(self, folder, models, **how):
        lines = []
        for name, (model, options) in models.items():
            export_c(model, folder / f"{name}.h", **options)
            lines += [f"#define {name.upper()}_IMPLEMENTATION", f'#include "{name}.h"']
            lines += [
                f"size_t size_of_{name}(void);",
                f"size_t size_of_{name}(void) {{ return sizeof({name}_state); }}",
            ]
        self.library = ctypes.CDLL(str(compiled(folder, "\n".join(lines) + "\n", **how)))

    def state(self, name):
        """A prepared state: bytes."""
        size = getattr(self.library, f"size_of_{name}")
        size.restype = ctypes.c_size_t
        state = ctypes.create_string_buffer(b"\xff" * size(), size())
        getattr(self.library, f"{name}_init")(state)
        return state

    def run(self, name, x, outputs, state=None):
        """The outputs (T, F) of float inputs (T, I) or class numbers (T,)."""
        state = self.state(name) if state is None else state
        step, y = getattr(self.library, f"{name}_step"), np.full(outputs, np.nan, np.float32)
        found = []
        for row in np.ascontiguousarray(x, np.float32 if x.dtype.kind == "f" else np.int32):
            given = pointer(row) if x.dtype.kind == "f" else ctypes.c_int32(int(row))
            code = step(state, given, pointer(y))
            assert x.dtype.kind == "f" or code == 0
            found.append(y.copy())
        return np.array(found)

    def reset(self, name, state):
        getattr(self.library, f"{name}_reset")(state)


def pointer(array):
    return array.ctypes.data_as(ctypes.c_void_p)


def inputs(model, T, seed=0):
    """(T, I) floats, or (T,) class numbers."""
    rng = np.random.default_rng(seed)
    layers = [layer for _, layer in model.modules() if not layer.children and not isinstance(layer, Dropout)]
    if isinstance(layers[0], Embedding):
        return rng.integers(0, layers[0].num_embeddings, T)
    size = feature_sizes(layers[0], None)[0]
    return rng.normal(size=(T, size)).astype(np.float32)


def outputs_of(model, x):
    """The outputs (T, F) of a model for one sequence; of one that pools, those of its beginnings."""
    x = x[:, None] if x.dtype.kind != "f" else x[:, None].astype(model.dtype)
    if pools(model):
        return np.concatenate([first(model(x[: t + 1])) for t in range(len(x))])
    x = x.swapaxes(0, 1) if getattr(model, "batch_first", False) else x
    return np.asarray(first(model(x)), np.float64).reshape(-1, first(model(x)).shape[-1])


def first(result):
    return result[0] if isinstance(result, tuple) else result


def pools(model):
    return any(type(layer).__name__ == "Pooling" for _, layer in model.modules())


def assert_as_float64(got, plain, expected, name, terms=None):
    """Errors are those of the plain model at most, twice, and two roundings."""
    share, detail = testing.allowed.worst_error({"y": got}, {"y": plain}, {"y": expected}, "float32", terms)
    assert share <= 1, f"{name}: {detail}"
