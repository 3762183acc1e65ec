"""Attention: what a decoder reads from the outputs of an encoder, for all of its steps at once.

    context[u, b] = sum over t of weights[u, b, t] memory[t, b]    weights[u, b] = softmax of scores, t < lengths[b]

    score(q, m) = q . m                         "dot"       Luong, Pham, Manning, EMNLP 2015, equation 8
                  q . W m                       "general"   the same
                  v . tanh(W_q q + W_m m)       "additive"  Bahdanau, Cho, Bengio, ICLR 2015, appendix A.1.2

U counts the queries of a sequence: the decoder's steps in training, the beams of a beam search. E is the size of a
memory entry, H that of a query.
"""

import math
from dataclasses import dataclass

import numpy as np

from . import rng
from .backends.ops import flat
from .dtypes import upcast
from .errors import ShapeError, check_choice, check_flag, check_number, check_shape, check_size, checked
from .gradients import adding
from .masks import check_lengths, valid_steps
from .module import Module

SCORES = ("dot", "general", "additive")
_BLOCK = 1 << 20  # numbers of tanh(W_q q + W_m m) held at once by "additive": memory stays bounded for any U


@dataclass
class Memory:
    """What queries are compared with, made once for many calls by ``Attention.remember``.

    values (B, T, E): the memory, zero past the end; keys (B, T, H or A): what the score takes; valid (B, 1, T): True
    where a step counts, or None for everywhere. In the dtype that is computed in.
    """

    values: object
    keys: object
    valid: object = None
    versions: object = None  # of the parameters that made the keys


class Attention(Module):
    """Attention of queries over a memory; see the module's text for the equations.

    query_size, memory_size: H and E; "dot" needs them equal. attention_size: A, the units of "additive"; None is H.
    scale: what scores are multiplied with before the softmax. The papers have 1. With 1/sqrt(H) (Vaswani et al.,
    NeurIPS 2017) Adam, whose steps have one size for all weights, does not drive them at once to where one place of the
    memory has all the weight and the softmax no gradient.

    ``context, weights = attention(queries, memory, lengths=None)`` is inference,
    ``context, weights, backward = attention.forward(queries, memory, lengths=None)`` is training, with
    ``dqueries, dmemory = backward(dcontext, dweights=None)``; None means zeros for either. ``backward`` may run again,
    with or without ``forward(..., retain=True)``. queries and memory are kept by reference until then, the memory also
    by ``remember``: do not write to them before.

    queries: (U, B, H), memory: (T, B, E), of the layer's dtype; lengths: (B,) integers 0..T in any order, or None.
    context: (U, B, E); weights: (U, B, T), zero past a sequence's end, else adding up to 1. A sequence of length 0
    gives a zero context, zero weights and no gradient. What the memory holds past the end is not read.

    Parameters start at U(+-1/sqrt(inputs)) and have no bias, as in the papers: "general" has ``weight`` (H, E),
    "additive" ``weight_query`` (A, H), ``weight_memory`` (A, E) and ``weight_score`` (A,).

    Raises ShapeError, DtypeError, ValueError before anything is computed.

    >>> attention = gpurnn.Attention(4, 6, "general", backend="cpu")
    >>> context, weights = attention(np.zeros((3, 2, 4), "float32"), np.ones((5, 2, 6), "float32"), lengths=[5, 0])
    >>> context.shape, weights[0, :, 0].tolist()
    ((3, 2, 6), [0.20000000298023224, 0.0])
    """

    def __init__(
        self, query_size, memory_size, score="general", attention_size=None, *, scale=1.0, backend="auto",
        dtype="float32", precision="float32", seed=None,
    ):  # fmt: skip
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
        values = {}
        for name, shape in shapes.items():
            bound = 1 / math.sqrt(shape[-1])
            values[name] = rng.uniform(shape, -bound, bound, self.seed, rng.name_key(name), dtype=np.float64)
        self._declare(values)

    @checked
    def scale(self, value):
        return check_number("scale", value, 0, low_open=True)

    def __call__(self, queries, memory, lengths=None):
        return self.attend(queries, self.remember(memory, lengths))

    def remember(self, memory, lengths=None):
        """``memory`` (T, B, E) made ready for many calls of ``attend``, as a step-by-step decoder makes.

        It is kept by reference unless a sequence is shorter than T: do not write to it before the last call.
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

    def attend(self, queries, memory):
        """(context (U, B, E), weights (U, B, T)) of queries (U, B, H) over a ``Memory``.

        Raises RuntimeError where parameters were changed since ``remember`` made the memory.
        """
        if memory.versions is not None:
            self.check_versions(memory.versions, "attend", "remember")
        context, weights, _ = self._attend(self._check_queries(queries, memory), memory)
        return self._outward(context), self._outward(weights)

    def forward(self, queries, memory, lengths=None, *, retain=False):
        check_flag("retain", retain)
        ready = self.remember(memory, lengths)
        queries = self._check_queries(queries, ready)
        context, weights, projected = self._attend(queries, ready)
        then, xp, (B, U, T) = self._as_now(), self.xp, weights.shape

        def backward(dcontext=None, dweights=None):
            if dcontext is None:
                dcontext = xp.zeros((U, B, then.memory_size), then.dtype)
            dcontext = then.ops.asfloat(dcontext, then.dtype, "dcontext")
            check_shape("dcontext", dcontext, (U, B, then.memory_size))
            dcontext = _by_sequence(upcast(dcontext))
            if ready.valid is not None:  # nothing to read: no derivative, whatever it may be
                dcontext = xp.where(ready.valid.any(axis=2, keepdims=True), dcontext, 0)
            d = dcontext @ ready.values.transpose(0, 2, 1)
            if dweights is not None:
                dweights = then.ops.asfloat(dweights, then.dtype, "dweights")
                check_shape("dweights", dweights, (U, B, T))
                dweights = _by_sequence(upcast(dweights))
                d += dweights if ready.valid is None else xp.where(ready.valid, dweights, 0)
            then.check_versions(ready.versions)
            # through softmax; weights of 0 past the end let nothing through
            dscores = weights * (d - (weights * d).sum(axis=2, keepdims=True))
            dscores *= then.scale
            dvalues = weights.transpose(0, 2, 1) @ dcontext
            if then.score == "additive":
                dprojected, dkeys = then._score_backward(dscores, projected, ready.keys)
            else:
                dprojected = dscores @ ready.keys
                dkeys = dscores.transpose(0, 2, 1) @ projected
            dqueries, dmemory = then._outward(dprojected), dvalues.transpose(1, 0, 2)
            if then.score == "additive":
                dqueries = then._project_backward(dqueries, queries, "weight_query")
            if then.score == "dot":
                dmemory = dmemory + dkeys.transpose(1, 0, 2)
            else:
                name = "weight" if then.score == "general" else "weight_memory"
                values = then._outward(ready.values)
                dmemory = dmemory + upcast(then._project_backward(then._outward(dkeys), values, name))
            return dqueries, xp.ascontiguousarray(dmemory).astype(then.dtype, copy=False)

        return self._outward(context), self._outward(weights.copy()), backward  # the caller may write to his

    # ---- the parts, with the batch outermost: arrays (B, U, ...) and (B, T, ...) in what is computed in

    def _attend(self, queries, memory):
        """context (B, U, E), weights (B, U, T), and the queries as the score takes them, (B, U, H or A)."""
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
            weights /= xp.where(total > 0, total, 1)  # nothing to read: no weight at all
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
        """Derivatives of "additive" by ``queries`` and ``keys``; adds that by v to its gradient."""
        v = upcast(self._rounded("weight_score"))
        dqueries, dkeys = self.xp.empty(queries.shape, queries.dtype), self.xp.zeros(keys.shape, keys.dtype)
        for part in self._query_blocks(queries.shape[1], keys):
            y, d = self._tanh(queries[:, part], keys), dscores[:, part, :, None]
            if self._trains("weight_score"):
                with adding(self.grads):
                    self.grads["weight_score"] += d.reshape(-1) @ y.reshape(-1, y.shape[-1])
            y = (1 - y * y) * v * d
            dqueries[:, part] = y.sum(axis=2)
            dkeys += y.sum(axis=1)
        return dqueries, dkeys

    def _tanh(self, queries, keys):
        return self.xp.tanh(queries[:, :, None] + keys[:, None])

    def _query_blocks(self, U, keys):
        size = max(1, _BLOCK // max(1, keys.size))
        return [slice(start, start + size) for start in range(0, U, size)]

    def _rounded(self, name):
        return self.params[name].astype(self.dtype, copy=False)

    def _project(self, x, name):
        """x (N, B, F) by a weight (M, F): (N, B, M) in the layer's dtype."""
        weight = self._rounded(name)
        y = self.xp.empty((*x.shape[:2], len(weight)), self.compute_dtype)
        self.ops.product(flat(x), weight.T, flat(y))
        return y.astype(self.dtype, copy=False)

    def _project_backward(self, dy, x, name):
        """The derivative by x; adds that by the weight to its gradient."""
        if self._trains(name):
            with adding(self.grads):
                self.ops.accumulate_product(self.grads[name], dy, x)
        dx = self.xp.empty(x.shape, self.dtype)
        self.ops.product(flat(dy), self._rounded(name), flat(dx))
        return dx

    def _check_queries(self, queries, memory):
        queries = self.ops.asfloat(queries, self.dtype, "queries")
        if queries.ndim != 3 or queries.shape[1:] != (len(memory.values), self.query_size):
            raise ShapeError(
                f"queries: expected shape (U, {len(memory.values)}, {self.query_size}) beside a memory of "
                f"{len(memory.values)} sequences, got {queries.shape}"
            )
        return queries

    def _outward(self, array):
        """(B, U, F) as (U, B, F), contiguous, in the layer's dtype."""
        return self.xp.ascontiguousarray(array.transpose(1, 0, 2)).astype(self.dtype, copy=False)


def _by_sequence(array):
    """(N, B, F) as (B, N, F): a view."""
    return array.transpose(1, 0, 2)
