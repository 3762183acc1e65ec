"""What several layers need: rows of features, checks of inputs and gradients, and how a layer is printed."""

from __future__ import annotations

import math

import numpy as np

from ..arrays import refuse_loss
from ..errors import ShapeError, check_shape


def rows_of(array):
    """(..., F) as (N, F); a view wherever the memory layout allows one."""
    return array.reshape(math.prod(array.shape[:-1]), array.shape[-1])


def sum_rows(array):
    """(..., F) summed to (F,), in float64: NumPy adds rows one by one, and there may be T*B of them."""
    return rows_of(array).sum(axis=0, dtype=np.float64)


def mean_features(array):
    """(..., F) averaged to (..., 1), in float64 for the same reason: F may be the outermost axis in memory."""
    return array.mean(axis=-1, keepdims=True, dtype=np.float64).astype(array.dtype)


def check_features(layer, x, features, name="x"):
    """``x`` as an array of the layer's dtype; raises ShapeError unless its last axis has ``features`` entries."""
    x = layer.ops.asfloat(x, layer.dtype, name)
    if x.ndim == 0 or x.shape[-1] != features:
        raise ShapeError(f"{name}: expected shape (..., {features}), got {x.shape}")
    return x


def check_gradient(layer, doutput, shape):
    """``doutput`` as an array of the layer's dtype; raises ShapeError unless it has the output's ``shape``."""
    refuse_loss("doutput", doutput, shape)
    doutput = layer.ops.asfloat(doutput, layer.dtype, "doutput")
    check_shape("doutput", doutput, shape)
    return doutput


def feature_sizes(layer, size):
    """(features that a layer reads, features of its output) where ``size`` features come in; None: not known.

    It knows the layers of gpurnn only: attributes of others may mean anything.
    """
    if type(layer).__module__.partition(".")[0] != __name__.partition(".")[0] or layer.children:
        return None, None
    if hasattr(layer, "out_features"):
        return layer.in_features, layer.out_features
    if hasattr(layer, "hidden_sizes"):
        return layer.input_size, (layer.proj_size or layer.hidden_sizes[-1]) * (2 if layer.bidirectional else 1)
    if hasattr(layer, "features"):
        return layer.features, layer.features
    if hasattr(layer, "embedding_dim"):
        return None, layer.embedding_dim
    return None, size if hasattr(layer, "rate") else None  # dropout


def sizes_text(layer, *sizes, **defaults):
    """``10, 20, bias=False``: the attributes ``sizes``, then those of ``defaults`` that differ from their default."""
    shown = [repr(getattr(layer, name)) for name in sizes]
    options = {name: getattr(layer, name) for name in defaults}
    return ", ".join(shown + [f"{name}={value!r}" for name, value in options.items() if value != defaults[name]])
