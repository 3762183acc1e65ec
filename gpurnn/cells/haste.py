"""Weights of Haste's layers (https://github.com/lmnt-com/haste), which has the same layer normalization."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from ..arrays import without_torch
from ..errors import ShapeError, check_shape

_ORDER = {4: (0, 2, 1, 3), 3: (1, 0, 2)}  # Haste's gates i g f o and z r n -> the places of i f g o and r z n
_NAMES = {"kernel", "recurrent_kernel", "bias", "recurrent_bias", "gamma", "gamma_h", "beta_h"}


def weights_from_haste(arrays: Mapping[str, Any], suffix: str = "_l0") -> dict[str, np.ndarray]:
    """Parameters for ``LSTM``, ``GRU``, or these with ``layer_norm=True``, from those of one layer of Haste.

    Parameters
    ----------
    arrays : mapping
        Name -> array: kernel (I, G*H), recurrent_kernel (H, G*H), bias (G*H,), of a GRU recurrent_bias (3H,); with
        layer normalization gamma (2, G*H), of an LSTM also gamma_h and beta_h (H,). Such as the ``state_dict`` of a
        LayerNormLSTM; tensors of torch are taken, too.
    suffix : str
        Of the layer and direction.

    Returns
    -------
    dict
        Name -> array, for ``load_state_dict``.

    Raises
    ------
    ValueError
        For names that Haste does not have, or where the kernels, or gamma_h and beta_h, are missing.
    ShapeError
        For other shapes than these.

    Examples
    --------
    >>> given = {"kernel": np.ones((3, 16)), "recurrent_kernel": np.ones((4, 16)), "bias": np.arange(16.0)}
    >>> ours = gpurnn.cells.weights_from_haste(given)
    >>> ours["bias_ih_l0"][::4].tolist()         # Haste's order is i g f o
    [0.0, 8.0, 4.0, 12.0]
    >>> layer = gpurnn.LSTM(3, 4, backend="numpy", dtype="float64")
    >>> layer.load_state_dict(ours)
    """
    given = {name: np.asarray(without_torch(array)) for name, array in arrays.items()}
    unknown = sorted(set(given) - _NAMES)
    if unknown or not {"kernel", "recurrent_kernel"} <= set(given):
        problem = f"does not have {unknown[0]!r}" if unknown else "has kernel and recurrent_kernel, which are missing"
        raise ValueError(f"arrays: a layer of Haste {problem}")
    H, columns = (*given["recurrent_kernel"].shape, 0, 0)[:2]
    if given["recurrent_kernel"].ndim != 2 or not H or columns not in (3 * H, 4 * H):
        raise ShapeError(f"recurrent_kernel: expected (H, 3H) or (H, 4H), got {given['recurrent_kernel'].shape}")
    G = columns // H
    if "gamma" in given and G == 4 and not {"gamma_h", "beta_h"} <= set(given):
        raise ValueError("arrays: a LayerNormLSTM of Haste has gamma_h and beta_h besides gamma, which are missing")
    shapes = {"kernel": ("I", columns), "recurrent_kernel": (H, columns), "gamma": (2, columns)}
    shapes |= dict.fromkeys(("bias", "recurrent_bias"), (columns,)) | dict.fromkeys(("gamma_h", "beta_h"), (H,))
    for name, array in given.items():
        check_shape(name, array, shapes[name])

    def by_gate(array):
        """The last axis in our order of gates."""
        blocks = np.split(array, G, axis=-1)
        return np.concatenate([blocks[k] for k in _ORDER[G]], axis=-1)

    found = {"weight_ih": by_gate(given["kernel"]).T, "weight_hh": by_gate(given["recurrent_kernel"]).T}
    if "gamma" in given:
        found["gain_ih"], found["gain_hh"] = by_gate(given["gamma"])
        if G == 4:
            found["gain_c"], found["bias_c"] = given["gamma_h"], given["beta_h"]
    if "bias" in given:
        found["bias_ih"] = by_gate(given["bias"])
        found["bias_hh"] = by_gate(given["recurrent_bias"]) if "recurrent_bias" in given else np.zeros(columns)
    return {name + suffix: np.ascontiguousarray(array) for name, array in found.items()}
