"""Attention: what a decoder reads from the outputs of an encoder, for all of its steps at once.

    context[u, b] = sum over t of weights[u, b, t] memory[t, b]    weights[u, b] = softmax of scores, t < lengths[b]

    score(q, m) = q . m                         "dot"       Luong, Pham, Manning, EMNLP 2015, equation 8
                  q . W m                       "general"   the same
                  v . tanh(W_q q + W_m m)       "additive"  Bahdanau, Cho, Bengio, ICLR 2015, appendix A.1.2

U counts the queries of a sequence: the decoder's steps in training, the beams of a beam search. E is the size of a
memory entry, H that of a query, and A the units of "additive".
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial

import numpy as np

from . import rng
from ._typing import Array, Backward, Lengths
from .backends.ops import flat
from .dtypes import upcast
from .errors import ShapeError, check_choice, check_flag, check_number, check_shape, check_size, checked
from .gradients import adding
from .layers.common import sizes_text
from .masks import check_lengths, valid_steps
from .module import Later, Module
from .per_sample.recording import recording_of

SCORES = ("dot", "general", "additive")
_BLOCK = 1 << 20  # numbers of tanh(W_q q + W_m m) that "additive" holds at once: memory stays bounded for any U


@dataclass
class Memory:
    """What queries are compared with; ``Attention.remember`` makes it once for many calls of ``attend``.

    Attributes
    ----------
    values : Array
        (B, T, E), in the compute dtype: the memory, zero past each sequence's end.
    keys : Array
        (B, T, H), or (B, T, A) with "additive": what the score takes.
    valid : Array, optional
        (B, 1, T) booleans: True where a step counts. None if all do.
    versions : list, optional
        Those of the parameters that made the keys, see ``Module.versions``.
    """

    values: Array
    keys: Array
    valid: Array | None = None
    versions: list[dict[str, int]] | None = None


class Attention(Module):
    """Attention of queries over a memory; the module's text has the equations.

    Parameters start uniform in +-1/sqrt(inputs) and there is no bias, as in the papers. ``params`` holds ``weight``
    (H, E) for "general"; ``weight_query`` (A, H), ``weight_memory`` (A, E) and ``weight_score`` (A,) for "additive".

    Parameters
    ----------
    query_size, memory_size : int
        H and E; "dot" needs them equal.
    score : str
        "dot", "general" or "additive".
    attention_size : int, optional
        A, for "additive" only; None means H.
    scale : float
        Scores are multiplied by it before the softmax; above 0. May be set later. The papers have 1. With 1/sqrt(H)
        (Vaswani et al., NeurIPS 2017) scores stay small at first. Otherwise Adam, whose updates have about the same
        size for all weights, soon drives them to where one place has all the weight and the softmax no gradient.
    backend, dtype, precision, seed
        As in ``Module``. None as seed draws one.

    Raises
    ------
    ValueError
        There is no such score, or a size does not go with it.

    Examples
    --------
    >>> attention = gpurnn.Attention(4, 6, "general", backend="cpu")
    >>> context, weights = attention(np.zeros((3, 2, 4), "float32"), np.ones((5, 2, 6), "float32"), lengths=[5, 0])
    >>> context.shape, weights[0, :, 0].tolist()
    ((3, 2, 6), [0.20000000298023224, 0.0])
    """

    query_size: int
    memory_size: int
    attention_size: int
    score: str
    _records_terms = True

    def __init__(
        self,
        query_size: int,
        memory_size: int,
        score: str = "general",
        attention_size: int | None = None,
        *,
        scale: float = 1.0,
        backend: str = "auto",
        dtype: str = "float32",
        precision: str = "float32",
        seed: int | None = None,
    ) -> None:
        super().__init__(backend, dtype, seed, precision)
        self.scale = scale
        self.query_size = check_size("query_size", query_size)
        self.memory_size = check_size("memory_size", memory_size)
        self.score = check_choice("score", score, SCORES)
        if score == "dot" and query_size != memory_size:
            raise ValueError(
                f"score 'dot' needs queries and memory of one size, got {query_size} and {memory_size}: "
                "'general' and 'additive' take any"
            )
        if attention_size is not None and score != "additive":
            raise ValueError(f"attention_size belongs to score 'additive', got score {score!r}")
        self.attention_size = (
            self.query_size if attention_size is None else check_size("attention_size", attention_size)
        )
        H, E, A = self.query_size, self.memory_size, self.attention_size
        shapes = {
            "dot": {},
            "general": {"weight": (H, E)},
            "additive": {"weight_query": (A, H), "weight_memory": (A, E), "weight_score": (A,)},
        }[score]

        def uniform(name, shape):
            bound = 1 / math.sqrt(shape[-1])
            return rng.uniform(shape, -bound, bound, self.seed, rng.name_key(name), dtype=np.float64)

        self._declare({name: Later(shape, partial(uniform, name)) for name, shape in shapes.items()})

    @checked
    def scale(self, value):
        return check_number("scale", value, 0, low_open=True)

    def __call__(self, queries: Array, memory: Array, lengths: Lengths = None) -> tuple[Array, Array]:
        """The context and the weights, for inference. Takes and raises what ``forward`` does."""
        return self.attend(queries, self.remember(memory, lengths))

    def remember(self, memory: Array, lengths: Lengths = None) -> Memory:
        """Prepare a memory for many calls of ``attend``, such as those of a decoder that runs step by step.

        Parameters
        ----------
        memory : Array
            (T, B, E), of the layer's dtype. Unless a sequence is shorter than T it is saved by reference: do not write
            to it before the last call of ``attend``.
        lengths : Lengths
            (B,) integers from 0 to T, in any order.

        Raises
        ------
        ShapeError, DtypeError
            The memory has another shape or dtype, or lengths do not fit it.
        """
        memory = self.ops.asfloat(memory, self.dtype, "memory")
        check_shape("memory", memory, ("T", "B", self.memory_size))
        T, B, _ = memory.shape
        valid = None
        if lengths is not None:
            lengths = check_lengths(lengths, T, B)
            if not bool((lengths == T).all()):
                valid = valid_steps(lengths, T, B, self.xp).T[:, None, :]
                memory = self.ops.zero_past_end(memory.copy(), lengths)
        keys = memory
        if self.score != "dot":
            keys = self._project(memory, "weight" if self.score == "general" else "weight_memory")
        return Memory(_by_sequence(upcast(memory)), _by_sequence(upcast(keys)), valid, self.versions())

    def attend(self, queries: Array, memory: Memory) -> tuple[Array, Array]:
        """Context (U, B, E) and weights (U, B, T) of queries (U, B, H) over what ``remember`` made.

        Raises
        ------
        ShapeError, DtypeError
            The queries have another shape or dtype.
        RuntimeError
            Parameters have changed since ``remember`` made the memory.
        """
        if memory.versions is not None:
            self.check_versions(memory.versions, "attend", "remember")
        context, weights, _ = self._attend(self._check_queries(queries, memory), memory)
        return self._outward(context), self._outward(weights)

    def forward(
        self, queries: Array, memory: Array, lengths: Lengths = None, *, retain: bool = False
    ) -> tuple[Array, Array, Backward]:
        """The context, the weights and their backward, for training. Saves queries and memory by reference.

        Parameters
        ----------
        queries : Array
            (U, B, H), of the layer's dtype.
        memory : Array
            (T, B, E), of the layer's dtype. What it holds past a sequence's end is not read.
        lengths : Lengths
            (B,) integers from 0 to T, in any order.
        retain : bool
            Accepted by every layer; without effect here, where ``backward`` may always be called again.

        Returns
        -------
        context : Array
            (U, B, E). A sequence of length 0 has a zero context, zero weights and no gradient.
        weights : Array
            (U, B, T): they add up to 1 over a sequence and are zero past its end.
        backward : callable
            ``dqueries, dmemory = backward(dcontext, dweights=None)`` adds to ``grads``; None means zeros for either.

        Raises
        ------
        ShapeError, DtypeError
            An argument has another shape or dtype, or lengths do not fit the memory.
        """
        check_flag("retain", retain)
        ready = self.remember(memory, lengths)
        queries = self._check_queries(queries, ready)
        context, weights, projected = self._attend(queries, ready)
        then = self._as_now()

        def backward(dcontext=None, dweights=None):
            dcontext, dweights = then._check_gradients(dcontext, dweights, ready, weights.shape)
            then.check_versions(ready.versions)
            return then._backward(dcontext, dweights, queries, ready, weights, projected)

        return self._outward(context), self._outward(weights.copy()), backward  # the caller may write to what it gets

    # ---- the parts, with the batch outermost: arrays (B, U, ...) and (B, T, ...) in the compute dtype

    def _check_gradients(self, dcontext, dweights, memory, shape):
        """dcontext (B, U, E) and dweights, (B, U, T) or None, zero where there is nothing to read."""
        xp, (B, U, T) = self.xp, shape
        if dcontext is None:
            dcontext = xp.zeros((U, B, self.memory_size), self.dtype)
        dcontext = self.ops.asfloat(dcontext, self.dtype, "dcontext")
        check_shape("dcontext", dcontext, (U, B, self.memory_size))
        dcontext = _by_sequence(upcast(dcontext))
        if memory.valid is not None:  # the gradient of a sequence of length 0 is zero, whatever dcontext holds
            dcontext = xp.where(memory.valid.any(axis=2, keepdims=True), dcontext, 0)
        if dweights is not None:
            dweights = self.ops.asfloat(dweights, self.dtype, "dweights")
            check_shape("dweights", dweights, (U, B, T))
            dweights = _by_sequence(upcast(dweights))
            dweights = dweights if memory.valid is None else xp.where(memory.valid, dweights, 0)
        return dcontext, dweights

    def _backward(self, dcontext, dweights, queries, memory, weights, projected):
        """dqueries (U, B, H) and dmemory (T, B, E), in the layer's dtype; adds to the gradients of the parameters."""
        total = dcontext @ memory.values.transpose(0, 2, 1)  # the whole gradient with respect to the weights
        if dweights is not None:
            total += dweights
        # through the softmax; a weight of 0 past the end passes nothing on
        dscores = weights * (total - (weights * total).sum(axis=2, keepdims=True))
        dscores *= self.scale
        dvalues = weights.transpose(0, 2, 1) @ dcontext
        if self.score == "additive":
            dprojected, dkeys = self._score_backward(dscores, projected, memory.keys)
        else:
            dprojected = dscores @ memory.keys
            dkeys = dscores.transpose(0, 2, 1) @ projected
        dqueries, dmemory = self._outward(dprojected), dvalues.transpose(1, 0, 2)
        if self.score == "additive":
            dqueries = self._project_backward(dqueries, queries, "weight_query")
        if self.score == "dot":
            dmemory = dmemory + dkeys.transpose(1, 0, 2)
        else:
            name = "weight" if self.score == "general" else "weight_memory"
            values = self._outward(memory.values)
            dmemory = dmemory + upcast(self._project_backward(self._outward(dkeys), values, name))
        return dqueries, self.xp.ascontiguousarray(dmemory).astype(self.dtype, copy=False)

    def _attend(self, queries, memory):
        """context (B, U, E), weights (B, U, T), and the queries that the score takes, (B, U, H or A)."""
        xp = self.xp
        projected = self._project(queries, "weight_query") if self.score == "additive" else queries
        projected = _by_sequence(upcast(projected))
        if self.score == "additive":
            scores = self._additive(projected, memory.keys)
        else:
            scores = projected @ memory.keys.transpose(0, 2, 1)
        scores *= self.scale
        if memory.valid is not None:
            scores = xp.where(memory.valid, scores, -np.inf)
        if scores.shape[2]:
            highest = scores.max(axis=2, keepdims=True)
            weights = xp.exp(scores - xp.where(xp.isfinite(highest), highest, 0))
            total = weights.sum(axis=2, keepdims=True)
            weights /= xp.where(total > 0, total, 1)  # a sequence of length 0 has no weight at all
        else:
            weights = scores
        return weights @ memory.values, weights, projected

    def _additive(self, queries, keys):
        """v . tanh(queries + keys), (B, U, T)."""
        (B, U, _), T = queries.shape, keys.shape[1]
        v = upcast(self._rounded("weight_score"))
        scores = self.xp.empty((B, U, T), queries.dtype)
        for part in self._query_blocks(U, keys):
            scores[:, part] = self._tanh(queries[:, part], keys) @ v
        return scores

    def _score_backward(self, dscores, queries, keys):
        """Gradients of "additive" with respect to ``queries`` and ``keys``; adds to the gradient of v."""
        v = upcast(self._rounded("weight_score"))
        dqueries, dkeys = self.xp.empty(queries.shape, queries.dtype), self.xp.zeros(keys.shape, keys.dtype)
        for part in self._query_blocks(queries.shape[1], keys):
            y, dscore = self._tanh(queries[:, part], keys), dscores[:, part, :, None]
            if self._trains("weight_score"):
                self._add_score(dscore, y)
            dsum = (1 - y * y) * v * dscore
            dqueries[:, part] = dsum.sum(axis=2)
            dkeys += dsum.sum(axis=1)
        return dqueries, dkeys

    def _add_score(self, dscore, y):
        """Add to the gradient of v. dscore: (B, U, T, 1). y: (B, U, T, A)."""
        recording = recording_of(self)
        if recording is not None:
            recording.add_any(self, "weight_score", (dscore * y).sum(axis=(1, 2)))
            return
        with adding(self.grads):
            self.grads["weight_score"] += dscore.reshape(-1) @ y.reshape(-1, y.shape[-1])

    def _tanh(self, queries, keys):
        """tanh(queries + keys), (B, U, T, A)."""
        return self.xp.tanh(queries[:, :, None] + keys[:, None])

    def _query_blocks(self, U, keys):
        """Slices of the U queries, each with at most about ``_BLOCK`` numbers of ``_tanh``."""
        size = max(1, _BLOCK // max(1, keys.size))
        return [slice(start, start + size) for start in range(0, U, size)]

    def _rounded(self, name):
        """A parameter in the layer's dtype."""
        return self.ops.rounded(self.params[name], self.dtype)

    def _project(self, x, name):
        """x (N, B, F) times a weight (M, F): (N, B, M), in the layer's dtype."""
        weight = self._rounded(name)
        y = self.xp.empty((*x.shape[:2], len(weight)), self.compute_dtype)
        self.ops.product(flat(x), weight.T, flat(y))
        return y.astype(self.dtype, copy=False)

    def _project_backward(self, dy, x, name):
        """The gradient with respect to x; adds to that of the weight."""
        recording = recording_of(self)
        if self._trains(name) and recording is not None:
            recording.add(self, name, dy, x)
        elif self._trains(name):
            with adding(self.grads):
                self.ops.accumulate_product(self.grads[name], dy, x)
        dx = self.xp.empty(x.shape, self.dtype)
        self.ops.product(flat(dy), self._rounded(name), flat(dx))
        return dx

    def _check_queries(self, queries, memory):
        queries = self.ops.asfloat(queries, self.dtype, "queries")
        if queries.ndim != 3 or queries.shape[1:] != (len(memory.values), self.query_size):
            raise ShapeError(
                f"queries: expected shape (U, {len(memory.values)}, {self.query_size}) with a memory of "
                f"{len(memory.values)} sequences, got {queries.shape}"
            )
        return queries

    def _outward(self, array):
        """(B, U, F) as (U, B, F), contiguous, in the layer's dtype."""
        return self.xp.ascontiguousarray(array.transpose(1, 0, 2)).astype(self.dtype, copy=False)

    def _sizes_text(self):
        sizes = {"attention_size": self.query_size} if self.score == "additive" else {}
        return sizes_text(self, "query_size", "memory_size", score="general", **sizes, scale=1.0)


def _by_sequence(array):
    """(N, B, F) as (B, N, F): a view."""
    return array.transpose(1, 0, 2)
