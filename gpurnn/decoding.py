"""Greedy search and beam search: how an ``EncoderDecoder`` writes a sequence, one word at a time.

A model has ``start(source, lengths, beams)`` and ``next(ids, memory, state)``; see ``EncoderDecoder``. K counts the
beams of a sequence. ``PADDING``, ``UNKNOWN`` and ``START`` are never written.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ._typing import Array, Lengths
from .data.tokens import END, PADDING, START, UNKNOWN
from .dtypes import upcast
from .errors import check_number, check_size
from .masks import check_lengths, refuse_no_distribution

if TYPE_CHECKING:
    from .module import Module

NEVER_WRITTEN = [PADDING, UNKNOWN, START]


@dataclass
class Hypothesis:
    """One decoded sequence of N words.

    Attributes
    ----------
    ids : numpy.ndarray
        (N,) integers, without ``START`` and ``END``.
    score : float
        The log-probability in nats, that of ``END`` included, divided by the length penalty.
    weights : numpy.ndarray
        (N + 1, T): the attention weights of each step over the source; the last row belongs to ``END``.
    """

    ids: np.ndarray
    score: float
    weights: np.ndarray


def length_penalty(length: float | Array, alpha: float) -> float | Array:
    """((5 + length) / 6)^alpha, which divides a log-probability (Wu et al. 2016, arXiv:1609.08144, equation 14)."""
    return ((5 + length) / 6) ** alpha


# ---- greedy search


def greedy_search(
    model: Module,
    source: Array,
    lengths: Lengths = None,
    *,
    max_length: int | Array | None = None,
    alpha: float = 0.0,
) -> list[Hypothesis]:
    """Write the likeliest word at every step, until ``END``.

    Parameters
    ----------
    model : EncoderDecoder
        Should be in evaluation mode.
    source : Array
        (T, B) integers.
    lengths : Lengths
        (B,) integers: the valid steps of each source.
    max_length : int or Array, optional
        The most words, one number or (B,). A sequence that reaches it is ended there. None means twice the source's
        length plus 10.
    alpha : float
        Exponent of the length penalty in the scores; 0 for none.

    Returns
    -------
    list of Hypothesis
        One for each of the B sequences.

    Raises
    ------
    ValueError
        ``max_length`` does not fit; as DivergedError, if the model's logits are NaN or infinite.

    Examples
    --------
    >>> model = gpurnn.EncoderDecoder(20, 30, 8, seed=1).eval()
    >>> found = gpurnn.greedy_search(model, np.full((5, 2), 7), max_length=4)
    >>> len(found), len(found[0].ids) <= 4
    (2, True)
    """
    xp, B, limits = model.xp, source.shape[1], _limits(source, lengths, max_length)
    memory, state = model.start(source, lengths)
    ids, active = xp.asarray(np.full((1, B), START)), np.ones(B, bool)
    words, ends, totals, attention = [], np.zeros(B, np.int64), np.zeros(B), []
    for step in range(int(limits.max(initial=-1)) + 1):
        logits, state, weights = model.next(ids, memory, state)
        logits, log_sum = _allowed(logits, model.ops)
        logits = xp.where(xp.asarray(step >= limits)[:, None] & (xp.arange(logits.shape[2]) != END), -np.inf, logits)
        ids = logits.argmax(axis=2)
        gained = model.ops.to_numpy(xp.take_along_axis(logits, ids[..., None], axis=2)[..., 0] - log_sum)[0]
        words.append(model.ops.to_numpy(ids)[0])
        attention.append(model.ops.to_numpy(weights)[0])
        totals[active] += gained[active]
        ends[active] = step
        active &= words[-1] != END
        if not active.any():
            break
    scores = totals / length_penalty(ends + 1, alpha)
    return [_greedy_hypothesis(b, ends[b], scores[b], words, attention) for b in range(B)]


def _greedy_hypothesis(b, end, score, words, attention):
    """The ``Hypothesis`` of sequence b, whose ``END`` was written at step ``end``."""
    ids = np.array([row[b] for row in words[:end]], np.int64)
    return Hypothesis(ids, float(score), np.stack([row[b] for row in attention[: end + 1]]))


# ---- beam search


def beam_search(
    model: Module,
    source: Array,
    lengths: Lengths = None,
    *,
    beam: int = 5,
    alpha: float = 0.6,
    max_length: int | Array | None = None,
) -> list[list[Hypothesis]]:
    """Find the ``beam`` best hypotheses for each sequence.

    Every step extends the ``beam`` likeliest unfinished hypotheses of each sequence, all sequences side by side. Of all
    extensions, those among the ``beam`` best that end are finished. The ``beam`` best that do not end go on.

    A sequence is done when no unfinished hypothesis could overtake the best finished one at any length. It is also done
    when ``beam`` hypotheses are finished and no unfinished one is ahead of the best of them; with ``beam=1`` this is as
    soon as one is finished, which makes the result that of ``greedy_search``.

    Parameters
    ----------
    model, source, lengths, max_length
        As in ``greedy_search``.
    beam : int
        K, the number of hypotheses.
    alpha : float
        Exponent of the length penalty, at least 0; 0 for none. The length counts the words and ``END``.

    Returns
    -------
    list of list of Hypothesis
        For each of the B sequences up to ``beam`` hypotheses, best first.

    Raises
    ------
    ValueError
        As in ``greedy_search``.

    Examples
    --------
    >>> model = gpurnn.EncoderDecoder(20, 30, 8, seed=1).eval()
    >>> found = gpurnn.beam_search(model, np.full((5, 2), 7), beam=3, max_length=4)
    >>> len(found), found[0][0].score >= found[0][-1].score
    (2, True)
    """
    K = check_size("beam", beam)
    check_number("alpha", alpha, 0)
    xp, ops, B, limits = model.xp, model.ops, source.shape[1], _limits(source, lengths, max_length)
    memory, state = model.start(source, lengths, K)
    search, ids = _BeamSearch(K, alpha, limits), np.full((K, B), START)
    for step in range(int(limits.max(initial=-1)) + 1):
        logits, state, weights = model.next(xp.asarray(ids), memory, state)
        ending, best, gained = _extensions(logits, K, ops)
        gained[step >= limits] = -np.inf  # at the limit a hypothesis can only end
        search.extend(step, ending, best, gained, ops.to_numpy(weights))
        if search.done.all():
            break
        ids = search.words[-1].T
        rows = xp.asarray((search.parents[-1] * B + np.arange(B)[:, None]).T.reshape(-1))
        state = tuple(part[:, rows] for part in state) if isinstance(state, tuple) else state[:, rows]
    return [search.hypotheses(b) for b in range(B)]


def _extensions(logits, K, ops):
    """What may follow each beam, on the host, from logits (K, B, V).

    Returns (B, K), the log-probability of ``END``, and (B, K, count) each, the likeliest other words and their
    log-probabilities.
    """
    logits, log_sum = _allowed(logits, ops)
    ending = ops.to_numpy(logits[..., END] - log_sum).T
    logits[..., END] = -np.inf
    best, gained = (ops.to_numpy(array).transpose(1, 0, 2) for array in _likeliest(logits, K, ops.xp))
    return ending, best, gained - ops.to_numpy(log_sum).T[..., None]


class _BeamSearch:
    """The hypotheses of B sequences, K of each, as they grow.

    scores: (B, K), log-probabilities of the unfinished ones, best first. words, parents: for each step (B, K), the new
    word, and the beam of the step before that it extends. attention: for each step (K, B, T). finished: for each
    sequence a list of (score, step, beam). done: (B,), whether the search of a sequence is over.
    """

    def __init__(self, K, alpha, limits):
        B = len(limits)
        self.K, self.alpha, self.limits = K, alpha, limits
        self.scores = np.full((B, K), -np.inf)
        self.scores[:, 0] = 0  # at first all beams are the same one
        self.parents, self.words, self.attention = [], [], []
        self.finished = [[] for _ in range(B)]
        self.done = np.zeros(B, bool)

    def extend(self, step, ending, best, gained, weights):
        """Take one step.

        ending, best, gained: see ``_extensions``. weights: (K, B, T), the attention weights of this step.
        """
        B = len(self.done)
        self.attention.append(weights)
        ending = self.scores + ending
        going_on = (self.scores[..., None] + gained).reshape(B, -1)
        self._finish(step, ending, going_on)
        order = np.argsort(-going_on, axis=1, kind="stable")[:, : self.K]
        self.scores = np.take_along_axis(going_on, order, axis=1)
        self.parents.append(order // best.shape[2])
        self.words.append(np.take_along_axis(best.reshape(B, -1), order, axis=1))
        self._stop(step)

    def _finish(self, step, ending, going_on):
        """Finish the hypotheses that end and are among the K best of all extensions."""
        K = self.K
        order = np.argsort(-np.concatenate([ending, going_on], axis=1), axis=1, kind="stable")[:, :K]
        for b, place in zip(*np.nonzero((order < K) & ~self.done[:, None]), strict=True):
            k = order[b, place]
            if np.isfinite(ending[b, k]):
                self.finished[b].append((ending[b, k] / length_penalty(step + 1, self.alpha), step, k))

    def _stop(self, step):
        """Mark the sequences that are done; see ``beam_search``."""
        K = self.K
        next_score, last_score = (
            self.scores[:, 0] / length_penalty(length, self.alpha) for length in (step + 2, self.limits + 1)
        )
        for b in np.flatnonzero(~self.done):
            best_end = max(self.finished[b], default=(-np.inf,))[0]
            enough = len(self.finished[b]) >= K and (K == 1 or best_end >= next_score[b])
            # a score divided by the penalty of the greatest length is the best that an unfinished one can reach
            self.done[b] = enough or (self.finished[b] and best_end >= last_score[b])

    def hypotheses(self, b):
        """The finished hypotheses of sequence b, best first, at most K."""
        return [self._traced(b, *end) for end in sorted(self.finished[b], key=lambda end: -end[0])[: self.K]]

    def _traced(self, b, score, step, k):
        """The ``Hypothesis`` that ended in beam k of a step, traced back to its start."""
        ids, weights = [], [self.attention[step][k, b]]
        for t in range(step - 1, -1, -1):
            ids.append(self.words[t][b, k])
            k = self.parents[t][b, k]
            weights.append(self.attention[t][k, b])
        return Hypothesis(np.array(ids[::-1], np.int64), float(score), np.stack(weights[::-1]))


# ---- for both


def _limits(source, lengths, max_length):
    """The most words of each sequence, (B,)."""
    T, B = source.shape
    if max_length is None:
        return 2 * (np.full(B, T) if lengths is None else check_lengths(lengths, T, B)) + 10
    limits = np.asarray(max_length)
    if limits.dtype.kind not in "iu" or limits.shape not in ((), (B,)) or (limits < 0).any():
        raise ValueError(f"max_length: expected a whole number, or one for each of {B} sequences, got {max_length!r}")
    return np.broadcast_to(limits, (B,)).astype(np.int64)


def _allowed(logits, ops):
    """Logits (K, B, V) in the compute dtype, -inf for ``NEVER_WRITTEN``, and log(sum(exp)) of all V of them, (K, B).

    Raises DivergedError where they are NaN or infinite.
    """
    xp, logits = ops.xp, upcast(logits)
    highest = logits.max(axis=2)
    refuse_no_distribution(ops.to_numpy(highest))
    log_sum = highest + xp.log(xp.exp(logits - highest[..., None]).sum(axis=2))
    logits = logits.copy()
    logits[..., NEVER_WRITTEN] = -np.inf
    return logits, log_sum


def _likeliest(logits, count, xp):
    """The ``count`` highest of logits (K, B, V), best first: indices and values (K, B, count), or all if V is less."""
    V = logits.shape[2]
    if count == 1:  # the first of equal ones, as argmax in a greedy search
        places = logits.argmax(axis=2)[..., None]
    elif count < V:
        places = xp.argpartition(-logits, count - 1, axis=2)[..., :count]
    else:
        places = xp.broadcast_to(xp.arange(V), logits.shape)
    values = xp.take_along_axis(logits, places, axis=2)
    order = xp.argsort(-values, axis=2)
    return xp.take_along_axis(places, order, axis=2), xp.take_along_axis(values, order, axis=2)
