"""From the steps of a sequence to one vector."""

from __future__ import annotations

import math
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from .. import rng
from .._typing import Array, Backward, Lengths
from ..dtypes import upcast
from ..errors import ShapeError, check_choice, check_flag, check_size, checked
from ..gradients import adding
from ..masks import check_lengths, check_steps, valid_steps
from ..module import Later, Module, backward_of
from ..per_sample.recording import recording_of
from .common import check_features, check_gradient, rows_of, sizes_text


class _Steps(NamedTuple):
    """Which timesteps of the sequences are there: valid (T, B, 1); how many, the first and the last of them: (B,)."""

    valid: Any
    count: Any
    first: Any
    last: Any


class Pooling(Module):
    """Makes one vector of each sequence, from its valid steps only: x (T, B, features) -> y (B, features).

    - ``"last"``: the last valid step. With ``directions=2`` the second half of the features belongs to the reverse
      direction, which ends at the first step, and is taken from there.
    - ``"mean"``, ``"max"``: over the valid steps, for each feature.
    - ``"attention"``: a weighted mean. The weights are a softmax over the valid steps of ``query . tanh(W x + b)``, and
      the query is learned (Yang et al., "Hierarchical attention networks for document classification", NAACL 2016,
      equations 5 to 7). ``params`` holds ``weight`` (attention_size, features), ``query`` and ``bias``
      (attention_size,).

    A sequence of length 0, or without a timestep by ``mask``, gives zeros. With ``reset``, y has a vector for each of
    the sequences that follow one another in a row.

    Parameters
    ----------
    features : int
        Size of the last axis of x and y.
    mode : str
        "last", "mean", "max" or "attention".
    directions : int
        1, or 2 for the output of a bidirectional layer; matters for "last" only.
    attention_size : int, optional
        Size of the query of "attention"; None means ``features``.
    batch_first : bool
        Whether x is (B, T, features). May be set later.
    backend, dtype, seed
        As in ``Module``. None as seed draws one.

    Raises
    ------
    ValueError
        There is no such mode, or features is not a multiple of directions.

    Examples
    --------
    >>> x = np.array([[[1.0]], [[3.0]], [[99.0]]], "float32")    # (T, B, F); the third step is padding
    >>> gpurnn.Pooling(1, "mean")(x, lengths=[2]).tolist()
    [[2.0]]
    """

    features: int
    mode: str
    directions: int
    attention_size: int
    takes_lengths = True
    _pools = True
    _records_terms = True

    def __init__(
        self,
        features: int,
        mode: str = "last",
        directions: int = 1,
        attention_size: int | None = None,
        *,
        batch_first: bool = False,
        backend: str = "auto",
        dtype: str = "float32",
        seed: int | None = None,
    ) -> None:
        super().__init__(backend, dtype, seed)
        self.features = check_size("features", features)
        self.mode = check_choice("mode", mode, ("last", "mean", "max", "attention"))
        self.directions = check_choice("directions", check_size("directions", directions), (1, 2))
        if self.features % self.directions:
            raise ValueError(f"features should be a multiple of directions {directions}, got {features}")
        self.batch_first = batch_first
        if mode == "attention":
            self.attention_size = (
                self.features if attention_size is None else check_size("attention_size", attention_size)
            )
            shapes = {"weight": (self.attention_size, self.features), "query": (self.attention_size,)}

            def uniform(name, shape):
                drawn = rng.uniform(shape, -1, 1, self.seed, rng.name_key(name), dtype=np.float64)
                return drawn / math.sqrt(shape[-1])

            drawn = {name: Later(shape, partial(uniform, name)) for name, shape in shapes.items()}
            self._declare({**drawn, "bias": Later((self.attention_size,), np.zeros)})

    @checked
    def batch_first(self, value):
        return check_flag("batch_first", value)

    def __call__(
        self, x: Array, lengths: Lengths = None, *, reset: Array | None = None, mask: Array | None = None
    ) -> Array:
        """The output alone, for inference: y (B, features). Arguments and errors are those of ``forward``."""
        return self.forward(x, lengths, reset=reset, mask=mask)[0]

    def forward(
        self,
        x: Array,
        lengths: Lengths = None,
        *,
        reset: Array | None = None,
        mask: Array | None = None,
        retain: bool = False,
    ) -> tuple[Array, Backward]:
        """The output and its backward, for training.

        Parameters
        ----------
        x : Array
            (T, B, features), or (B, T, features) with ``batch_first``; of the layer's dtype.
        lengths : Lengths
            (B,) integers; steps past a sequence's end are not read.
        reset : Array of bool, optional
            (T, B), or (B, T) with ``batch_first``: a new sequence begins at these timesteps, as ``gpurnn.data.pack``
            puts many into one row. What stands before the first one of a row is a sequence, too, if there is any.
        mask : Array of bool, optional
            Likewise: False where no timestep is; these are not read.
        retain : bool
            Accepted by every layer; without effect here.

        Returns
        -------
        y : Array
            (B, features); with ``reset`` (N, features), one for each sequence: those of the first row in the order of
            time, then those of the second one, and so on. This is ``where.order`` of ``gpurnn.data.pack``.
        backward : callable
            ``backward(doutput)`` adds to ``grads`` and returns dx, of x's shape, zero where nothing is read.

        Raises
        ------
        ShapeError, DtypeError
            An argument has another shape or dtype.
        """
        check_flag("retain", retain)
        x, xp = check_features(self, x, self.features), self.xp
        if x.ndim != 3:
            raise ShapeError(f"x: expected (T, B, {self.features}), got {x.shape}")
        x = x.swapaxes(0, 1) if self.batch_first else x
        T, B, F = x.shape
        lengths = None if lengths is None else check_lengths(lengths, T, B, batch_first=self.batch_first)
        reset, mask = (check_steps(self, one, T, B, False, name) for one, name in ((reset, "reset"), (mask, "mask")))
        if T == 0:
            count = B if reset is None else 0
            y, mode_backward = xp.zeros((count, F), x.dtype), lambda dy: xp.zeros((0, B, F), self.compute_dtype)
        elif reset is None:
            y, mode_backward = self._pooled(upcast(x), self._rows(lengths, mask, T, B))
        else:
            y, mode_backward = self._parts(upcast(x), lengths, reset, mask)

        batch_first, shape, versions = self.batch_first, y.shape, self.versions()

        @backward_of(self)
        def backward(doutput):
            dy = upcast(check_gradient(self, doutput, shape))
            self.check_versions(versions)
            dx = mode_backward(dy).astype(self.dtype, copy=False)
            return dx.swapaxes(0, 1) if batch_first else dx

        return y.astype(self.dtype, copy=False), backward

    def _rows(self, lengths, mask, T, B):
        """``_Steps`` where each row is one sequence."""
        xp = self.xp
        valid = None if lengths is None and mask is not None else self._valid(lengths, mask, T, B)
        if mask is None:
            lengths = xp.asarray(np.full(B, T) if lengths is None else lengths)
            return _Steps(valid[:, :, None], lengths, xp.zeros(B, np.int64), xp.maximum(lengths - 1, 0))
        valid = mask if valid is None else valid
        first, last = valid.argmax(axis=0), T - 1 - valid[::-1].argmax(axis=0)
        return _Steps(valid[:, :, None], valid.sum(axis=0), first, last)

    def _valid(self, lengths, mask, T, B):
        """Booleans (T, B): the timesteps that are there."""
        valid = valid_steps(np.full(B, T) if lengths is None else lengths, T, B, self.xp)
        return valid if mask is None else valid & mask

    def _parts(self, x, lengths, reset, mask):
        """y and the function that makes dx of dy, where sequences follow one another in a row.

        Sequences whose lengths have the same number of binary digits are pooled side by side: so less than half of what
        is computed is padding, whatever the lengths are.
        """
        xp, (T, B, F) = self.xp, x.shape
        valid = self.ops.to_numpy(self._valid(lengths, mask, T, B))
        inside = valid_steps(np.full(B, T) if lengths is None else lengths, T, B)
        places, counts = _sequences(self.ops.to_numpy(reset) & inside, valid)
        starts, y, pooled = np.cumsum(counts) - counts, xp.zeros((len(counts), F), x.dtype), []
        flat = x.reshape(T * B, F)
        for digits in np.unique(np.frexp(counts[counts > 0])[1]):
            chosen = np.flatnonzero((np.frexp(counts)[1] == digits) & (counts > 0))
            count = counts[chosen]
            steps = np.arange(count.max())[:, None]
            index = xp.asarray(places[starts[chosen] + np.minimum(steps, count - 1)])
            own = self._rows(count, None, len(steps), len(chosen))
            chosen = xp.asarray(chosen)
            y[chosen], backward = self._pooled(flat[index], own)
            pooled.append((chosen, index, own.valid[:, :, 0], backward))

        def backward_of_all(dy):
            dx = xp.zeros((T * B, F), x.dtype)
            for chosen, index, there, backward in pooled:
                dx[index[there]] = backward(dy[chosen])[there]
            return dx.reshape(T, B, F)

        return y, backward_of_all

    def _pooled(self, x, steps):
        return getattr(self, f"_{self.mode}")(x, steps)

    # Each mode: x (T, B, F) and its ``_Steps`` -> y (B, F), and the function that makes dx of dy.

    def _last(self, x, steps):
        xp, B, cut = self.xp, x.shape[1], self.features // self.directions
        sequences, has_steps = xp.arange(B), (steps.count > 0)[:, None]
        y = xp.concatenate([x[steps.last, sequences, :cut], x[steps.first, sequences, cut:]], axis=1)

        def backward(dy):
            dx = xp.zeros(x.shape, x.dtype)
            dy = xp.where(has_steps, dy, 0)
            dx[steps.last, sequences, :cut] = dy[:, :cut]
            dx[steps.first, sequences, cut:] = dy[:, cut:]
            return dx

        return xp.where(has_steps, y, 0), backward

    def _mean(self, x, steps):
        xp, valid = self.xp, steps.valid
        weight = (1 / xp.maximum(steps.count, 1)).astype(x.dtype)[:, None]
        y = xp.where(valid, x, 0).sum(axis=0, dtype=np.float64).astype(x.dtype) * weight
        return y, lambda dy: xp.where(valid, dy * weight, 0)

    def _max(self, x, steps):
        xp, valid, has_steps = self.xp, steps.valid, (steps.count > 0)[:, None]
        highest = xp.where(valid, x, -np.inf).argmax(axis=0)  # (B, F), the first of equal ones
        T, B, F = x.shape
        y, numbers = x[highest, xp.arange(B)[:, None], xp.arange(F)], xp.arange(T)[:, None, None]
        return xp.where(has_steps, y, 0), lambda dy: xp.where((numbers == highest) & valid, dy, 0)

    def _attention(self, x, steps):
        xp, (T, B, F), query, valid = self.xp, x.shape, self.params["query"], steps.valid
        x, has_steps = xp.where(valid, x, 0), (steps.count > 0)[:, None]
        u = xp.empty((T * B, self.attention_size), x.dtype)
        self.ops.product(rows_of(x), self.params["weight"].T, u)
        u = xp.tanh(u + self.params["bias"]).reshape(T, B, self.attention_size)
        score = xp.where(valid, (u * query).sum(axis=2, keepdims=True), -np.inf)  # (T, B, 1)
        highest = xp.where(has_steps, score.max(axis=0), 0)
        a = xp.exp(score - highest)
        a = a / xp.maximum(a.sum(axis=0), 1)  # the largest term is 1; a sequence of length 0 has zeros only
        y = (a * x).sum(axis=0)

        def backward(dy):
            dy = xp.where(has_steps, dy, 0)
            da = (dy * x).sum(axis=2, keepdims=True)
            dscore = a * (da - (a * da).sum(axis=0))
            du, dquery = dscore * query * (1 - u * u), dscore * u  # (T, B, attention_size)
            self._add_attention(du, dquery, x)
            dx = xp.empty((T * B, F), x.dtype)
            self.ops.product(rows_of(du), self.params["weight"], dx)
            return dx.reshape(T, B, F) + a * dy

        return y, backward

    def _add_attention(self, du, dquery, x):
        """Add the gradients of the parameters, which are summed over all steps of these (T, B, ...) arrays."""
        recording = recording_of(self)
        with adding(self.grads):
            for name, d, read in (("query", dquery, None), ("bias", du, None), ("weight", du, x)):
                if not self._trains(name):
                    continue
                if recording is not None:
                    recording.add(self, name, d, read)
                elif read is None:
                    self.grads[name] += self.ops.sum_steps(rows_of(d))
                else:
                    self.ops.accumulate_product(self.grads[name], rows_of(d), rows_of(read))

    def _sizes_text(self):
        options = {"mode": "last", "directions": 1}
        if self.mode == "attention":
            options["attention_size"] = self.features
        return sizes_text(self, "features", **options, batch_first=False)


def _sequences(reset, valid):
    """``(places, counts)`` of the sequences that follow one another in the rows of ``reset`` and ``valid`` (T, B).

    places: t * B + b of every valid timestep, sequence by sequence. counts: (N,) how many each sequence has.
    """
    B = valid.shape[1]
    number = np.cumsum(reset.T, axis=1)  # (B, T), within the row; 0 stands before the first reset
    last = number[:, -1]
    starts_without = (valid.T & (number == 0)).any(axis=1)
    in_row = last + starts_without
    before = np.cumsum(in_row) - in_row
    rows, steps = valid.T.nonzero()
    sequence = (before - ~starts_without)[rows] + number[rows, steps]
    return steps * B + rows, np.bincount(sequence, minlength=in_row.sum())
