"""Weights in blocks of 8 rows and 4 columns, of which only the largest stay: less to store and to multiply."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import numpy as np

from .errors import MissingError, check_number
from .module import Module, refuse_quantized

BLOCK = 8, 4  # rows, columns: what exported C leaves out where they are zero; those of RNNoise, too


def prune(model: Module, density: float, names: Iterable[str] | None = None) -> Pruned:
    """Set the weakest blocks of weights to zero: those of 8 rows and 4 columns with the smallest mean square.

    Parameters
    ----------
    model : Module
        A trained model; its weights change.
    density : float
        The share of blocks of each matrix that stay, above 0, at most 1.
    names : iterable of str, optional
        Parameters to prune. By default all matrices of recurrent layers: those whose last name begins with "weight_".

    Returns
    -------
    Pruned
        Which weights stay; a callback for ``fit`` that sets the others to zero again after each update.

    Raises
    ------
    KeyError
        The model has no parameter of a name.
    ValueError
        The density is not above 0 and at most 1; a parameter is no matrix; there is none to prune.

    Examples
    --------
    >>> model = gpurnn.Sequential(gpurnn.GRU(8, 32), gpurnn.Linear(32, 1))
    >>> pruned = gpurnn.pruning.prune(model, 0.25)
    >>> float((model.params["0.weight_hh_l0"] != 0).mean())
    0.25
    >>> x, y = np.ones((5, 2, 8), "float32"), np.ones((5, 2, 1), "float32")
    >>> options = dict(optimizer="adam", epochs=3, progress=False)
    >>> history = gpurnn.fit(model, gpurnn.mse, [(x, y)], callbacks=[pruned], **options)
    >>> float((model.params["0.weight_hh_l0"] != 0).mean())
    0.25
    """
    if check_number("density", density, 0, 1) == 0:
        raise ValueError("density: expected more than 0: at least one block of each matrix stays")
    refuse_quantized(model, "prune")
    if names is None:
        names = [name for name in model.params if name.rpartition(".")[2].startswith("weight_")]
    names = [names] if isinstance(names, str) else list(names)
    if not names:
        raise ValueError("names: no layer of the model is recurrent: name the parameters to prune")
    for name in names:
        if name not in model.params:
            raise MissingError(f"names: the model has no parameter {name!r}; it has {', '.join(model.params)}")
        if model.params[name].ndim < 2:
            raise ValueError(f"names: {name} is no matrix, its shape is {model.params[name].shape}")
    return Pruned(model, density, names)


class Pruned:
    """Which weights of a model stay; made by ``prune``. A callback for ``fit``.

    Attributes
    ----------
    masks : dict of str to array
        Parameter -> booleans of its shape, False where it is zero.
    """

    masks: dict[str, Any]

    def __init__(self, model: Module, density: float, names: Iterable[str]) -> None:
        self.model, self._density, self._names = model, density, tuple(names)
        self._choose()

    def apply(self) -> None:
        """Set the weights that do not stay to zero. After each update, where a training loop is your own."""
        for name, mask in self.masks.items():
            self.model.params[name] *= mask

    def on_start(self, training: Any) -> None:
        """Training begins. The blocks are chosen anew: a checkpoint may have been loaded since, which had others."""
        self._choose()

    def on_update(self, record: Any, training: Any) -> None:
        """An update was made."""
        self.apply()

    def _choose(self):
        model = self.model
        arrays = {name: model.ops.to_numpy(model.params[name]) for name in self._names}
        self.masks = {name: model.xp.asarray(_mask(array, self._density)) for name, array in arrays.items()}
        self.apply()


def _mask(array, density):
    """Booleans of the shape of weights (..., rows, columns): the blocks of all leading axes are one choice."""
    *heads, rows, columns = array.shape
    padding = [(0, 0), *((0, -size % each) for size, each in zip((rows, columns), BLOCK, strict=True))]
    squares = np.square(array.reshape(-1, rows, columns).astype(np.float64))
    squares = np.pad(squares, padding, constant_values=np.nan)  # which no mean counts
    means = np.nanmean(squares.reshape(len(squares), -1, BLOCK[0], squares.shape[2] // BLOCK[1], BLOCK[1]), axis=(2, 4))
    chosen = np.zeros(means.size, bool)
    chosen[np.argsort(-means, axis=None, kind="stable")[: math.ceil(density * means.size)]] = True
    mask = np.repeat(np.repeat(chosen.reshape(means.shape), BLOCK[0], axis=1), BLOCK[1], axis=2)
    return mask[:, :rows, :columns].reshape(*heads, rows, columns)
