"""A table of vectors, looked up by number."""

from __future__ import annotations

import numpy as np

from .. import rng
from .._typing import Array, Backward
from ..backends.steps import TableStep
from ..dtypes import upcast
from ..errors import DtypeError, check_flag, check_number, check_size
from ..gradients import adding
from ..module import Later, Module, backward_of
from ..per_sample.recording import recording_of
from .common import check_gradient, rows_of, sizes_text


class Embedding(Module):
    """The rows of a table, looked up by number, as ``torch.nn.Embedding``.

    ``params`` holds ``weight`` (num_embeddings, embedding_dim), which starts at N(0, std^2). The gradient of the table
    is summed in a fixed order, so it has the same bits in every run.

    Parameters
    ----------
    num_embeddings, embedding_dim : int
        Rows and columns of the table.
    padding_idx : int, optional
        A row that starts at zero and receives no gradient.
    std : float
        Standard deviation of the initial values.
    backend, dtype, seed
        As in ``Module``. None as seed draws one.

    Raises
    ------
    ValueError
        ``padding_idx`` is not a row of the table.

    Examples
    --------
    >>> layer = gpurnn.Embedding(10, 4, padding_idx=0)
    >>> layer([[1, 2, 0], [3, 0, 0]]).shape
    (2, 3, 4)
    """

    num_embeddings: int
    embedding_dim: int
    padding_idx: int | None
    _records_terms = True

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        padding_idx: int | None = None,
        *,
        std: float = 1.0,
        backend: str = "auto",
        dtype: str = "float32",
        seed: int | None = None,
    ) -> None:
        super().__init__(backend, dtype, seed)
        self.num_embeddings = check_size("num_embeddings", num_embeddings)
        self.embedding_dim = check_size("embedding_dim", embedding_dim)
        if padding_idx is not None:
            padding_idx = check_size("padding_idx", padding_idx, minimum=0)
            if padding_idx >= self.num_embeddings:
                raise ValueError(f"padding_idx should be below num_embeddings {num_embeddings}, got {padding_idx}")
        self.padding_idx = padding_idx
        std = check_number("std", std, 0)

        def normal(shape):
            weight = rng.normal(shape, self.seed, rng.name_key("weight"), dtype=np.float64) * std
            if padding_idx is not None:
                weight[padding_idx] = 0
            return weight

        self._declare({"weight": Later((self.num_embeddings, self.embedding_dim), normal)})

    def __call__(self, ids: Array) -> Array:
        """The output alone, for inference.

        Parameters
        ----------
        ids : Array
            Integers of any shape, 0 to num_embeddings - 1.

        Returns
        -------
        Array
            y (*ids.shape, embedding_dim), of the layer's dtype.

        Raises
        ------
        DtypeError
            ids are not integers.
        ValueError
            An id is not a row of the table; the message names it.
        """
        return self.params["weight"][self._check(ids)].astype(self.dtype, copy=False)

    def forward(self, ids: Array, *, retain: bool = False) -> tuple[Array, Backward]:
        """The output and its backward, for training. Saves ids by reference.

        Parameters
        ----------
        ids : Array
            Integers of any shape, 0 to num_embeddings - 1.
        retain : bool
            Accepted by every layer; without effect here.

        Returns
        -------
        y : Array
            (*ids.shape, embedding_dim), of the layer's dtype.
        backward : callable
            ``backward(doutput)`` adds to ``grads`` and returns None: integers have no gradient.

        Raises
        ------
        DtypeError, ValueError
            As for a call.
        """
        check_flag("retain", retain)
        ids = self._check(ids)
        y = self.params["weight"][ids].astype(self.dtype, copy=False)
        shape, padding_idx, versions = y.shape, self.padding_idx, self.versions()

        @backward_of(self)
        def backward(doutput):
            dy_steps = check_gradient(self, doutput, shape)
            self.check_versions(versions)
            if not self._trains("weight"):
                return
            recording = recording_of(self)
            if recording is not None:
                if padding_idx is not None:
                    dy_steps = self.xp.where(ids[..., None] == padding_idx, 0, upcast(dy_steps))
                recording.add_any(self, "weight", ids[..., None], dy_steps)
                return
            dy, index = rows_of(dy_steps), ids.reshape(-1)
            if padding_idx is not None:
                counted = self.xp.flatnonzero(index != padding_idx)
                dy, index = dy[counted], index[counted]
            with adding(self.grads["weight"]):  # a TiedLinear adds to it, too
                self.ops.accumulate_rows(self.grads["weight"], index, dy)

        return y, backward

    def _step_parts(self):
        return None if type(self) is not Embedding else [TableStep(self.params["weight"])]

    def _check(self, ids, name="ids"):
        ids = self.ops.asarray(ids, name)
        if ids.dtype.kind not in "iu":
            raise DtypeError(f"{name}: expected integers, got {ids.dtype}")
        ids, wrong = self.ops.bounded(ids, self.num_embeddings)
        if wrong is not None:
            low, high = int(wrong.min()), int(wrong.max())
            one = low if low < 0 else high
            raise ValueError(f"{name}: expected numbers from 0 to {self.num_embeddings - 1}, got {one}")
        return ids

    def _sizes_text(self):
        return sizes_text(self, "num_embeddings", "embedding_dim", padding_idx=None)
