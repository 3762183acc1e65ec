"""Arrays of Keras's layers as gpurnn's parameters, and back.

Keras multiplies by kernels from the right, (I, G*H); gpurnn's weights are (G*H, I). Its gates are i f c o in an LSTM,
as ours are by other names, and z r h in a GRU, where ours are r z n. It has one bias where gpurnn has two, except in a
GRU with ``reset_after``, whose bias is (2, 3*H).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from ...errors import ShapeError, check_shape

Arrays = Sequence[np.ndarray]

BLOCKS = {"SimpleRNN": (0,), "LSTM": (0, 1, 2, 3), "GRU": (1, 0, 2)}  # gpurnn's gates by their places in Keras's
CLASSES = {"SimpleRNN": "RNN", "LSTM": "LSTM", "GRU": "GRU"}  # Keras's layers by gpurnn's names


class Form(NamedTuple):
    """What decides the arrays of a recurrent layer. kind: Keras's name. reset_after: of a GRU."""

    kind: str
    bias: bool
    reset_after: bool = False

    @property
    def two_biases(self) -> bool:
        return self.kind == "GRU" and self.reset_after


def check_count(arrays: Arrays, names: Sequence[str]) -> None:
    """Raise ShapeError unless there is an array for each of ``names``."""
    if len(arrays) != len(names):
        raise ShapeError(f"expected {len(names)} arrays, {', '.join(names) or 'none'}, got {len(arrays)}")


def _blocks(array, kind, H):
    """Rows (G*H, ...) with the gates in the other library's order: the orders are each other's inverse."""
    return array.reshape(len(BLOCKS[kind]), H, *array.shape[1:])[list(BLOCKS[kind])].reshape(array.shape)


def recurrent_sizes(form: Form, arrays: Arrays) -> tuple[int, int]:
    """(I, H) of the arrays of one direction. Raises ShapeError where they do not fit one another."""
    check_count(arrays, ["kernel", "recurrent_kernel", *(["bias"] if form.bias else [])])
    kernel, recurrent, G = arrays[0], arrays[1], len(BLOCKS[form.kind])
    if kernel.ndim != 2 or recurrent.ndim != 2 or not kernel.size or not recurrent.size:
        raise ShapeError(f"kernel and recurrent_kernel: expected 2 axes, got shapes {kernel.shape}, {recurrent.shape}")
    inputs, H = kernel.shape[0], recurrent.shape[0]
    check_shape("recurrent_kernel", recurrent, (H, G * H))
    check_shape("kernel", kernel, (inputs, G * H))
    if form.bias:
        check_shape("bias", arrays[2], (2, G * H) if form.two_biases else (G * H,))
    return inputs, H


def recurrent_to_gpurnn(form: Form, arrays: Arrays) -> dict[str, np.ndarray]:
    """weight_ih, weight_hh, bias_ih and bias_hh of one direction. Raises ShapeError."""
    _, H = recurrent_sizes(form, arrays)
    found = {
        name: _blocks(array.T, form.kind, H) for name, array in zip(("weight_ih", "weight_hh"), arrays, strict=False)
    }
    if form.bias:
        both = arrays[2] if form.two_biases else np.stack([arrays[2], np.zeros_like(arrays[2])])
        found |= {name: _blocks(bias, form.kind, H) for name, bias in zip(("bias_ih", "bias_hh"), both, strict=True)}
    return found


def recurrent_to_keras(form: Form, found: dict[str, np.ndarray]) -> list[np.ndarray]:
    """kernel, recurrent_kernel and bias of one direction."""
    H = found["weight_hh"].shape[1]
    arrays = [_blocks(found[name], form.kind, H).T for name in ("weight_ih", "weight_hh")]
    if form.bias:
        both = [_blocks(found[name], form.kind, H) for name in ("bias_ih", "bias_hh")]
        arrays.append(
            np.stack(both) if form.two_biases else (both[0].astype(np.float64) + both[1]).astype(both[0].dtype)
        )
    return arrays


# ---- layers without a time loop: names of gpurnn's parameters, in the order of Keras's arrays


def dense_to_gpurnn(bias: bool, arrays: Arrays) -> dict[str, np.ndarray]:
    """weight and bias of a Linear. Raises ShapeError."""
    check_count(arrays, ["kernel", *(["bias"] if bias else [])])
    if arrays[0].ndim != 2 or not arrays[0].size:
        raise ShapeError(f"kernel: expected 2 axes, got shape {arrays[0].shape}")
    if bias:
        check_shape("bias", arrays[1], (arrays[0].shape[1],))
    return {"weight": arrays[0].T} | ({"bias": arrays[1]} if bias else {})


def norm_names(scale: bool, center: bool, running: bool) -> dict[str, str]:
    """Keras's name -> gpurnn's, in Keras's order."""
    names = ({"gamma": "weight"} if scale else {}) | ({"beta": "bias"} if center else {})
    return names | ({"moving_mean": "running_mean", "moving_variance": "running_var"} if running else {})


def norm_to_gpurnn(names: dict[str, str], arrays: Arrays) -> dict[str, np.ndarray]:
    """The parameters and buffers of a normalization. Raises ShapeError."""
    check_count(arrays, list(names))
    for name, array in zip(names, arrays, strict=True):
        if array.ndim != 1 or not array.size or array.size != arrays[0].size:
            raise ShapeError(f"{name}: expected one axis, of one size in all arrays, got shape {array.shape}")
    return dict(zip(names.values(), arrays, strict=True))


def embedding_to_gpurnn(arrays: Arrays) -> dict[str, np.ndarray]:
    """The table of an Embedding. Raises ShapeError."""
    check_count(arrays, ["embeddings"])
    if arrays[0].ndim != 2 or not arrays[0].size:
        raise ShapeError(f"embeddings: expected 2 axes, got shape {arrays[0].shape}")
    return {"weight": arrays[0]}
