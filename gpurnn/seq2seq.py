"""From one sequence to another of a different length: an encoder, a decoder that attends to it, and two ways to decode.

    memory, final = encoder(source)                   bidirectional, H/2 units in each direction
    h_0 = tanh(W_bridge final + b)                    for each state of the decoder (h, and c of the LSTM)
    h = decoder(target one step behind, h_0)
    context = attention(h, memory)                    scores over sqrt(H)
    h~ = tanh(W_c [context; h])                       Luong, Pham, Manning, EMNLP 2015, equation 5
    logits = W h~ + b

The decoder does not see h~ of the step before (Luong's "input feeding"): then each of its layers is one call over the
whole sequence, with one product for the input of all steps, and on a GPU one launch where the schedule allows it. Input
feeding would make every step wait for the attention of the step before.

Entries of both vocabularies: ``PADDING`` past a sequence's end, ``UNKNOWN``, ``START`` before the first target and
``END`` behind the last one.
"""

import math
from dataclasses import dataclass

import numpy as np

from . import rng
from .attention import Attention
from .dtypes import upcast
from .errors import ShapeError, check_choice, check_flag, check_number, check_size, checked
from .layers import Dropout, Embedding, Linear, TiedLinear
from .masks import check_lengths, refuse_no_distribution
from .module import Module
from .recurrent import GRU, LSTM, RNN
from .tokens import END, PADDING, START, UNKNOWN

_NEVER_WRITTEN = [PADDING, UNKNOWN, START]
CELLS = {"lstm": LSTM, "gru": GRU, "rnn": RNN}
SAMPLING = ("linear", "sigmoid")


class EncoderDecoder(Module):
    """Encoder, attention and decoder; see the module's text for the equations.

    source_size, target_size: entries of the vocabularies. hidden: H, even. embedding: size of a word's vector, None is
    H. layers: L, of the encoder and of the decoder. cell: "lstm", "gru" or "rnn". score: see ``Attention``. dropout: of
    embeddings, of h~ and between layers. tied: the target embedding is the output's weight too (Press & Wolf, EACL
    2017); h~ then has the embedding's size, else H.

    ``logits = model((source, target), lengths=None)`` and ``logits, backward = model.forward(...)``, ``backward(
    dlogits)``: source (T, B) and target (U, B) are integers, the target being what the decoder reads: ``START``, then
    the words but the last. lengths: a pair of (B,) integers, of source and target, or None. logits: (U, B,
    target_size); past the target's end dlogits may hold anything. source and target are kept by reference until
    ``backward``, which runs once, or more often after ``forward(..., retain=True)``.

    sampling: None, or a ``Sampling``: in training some of the target's words are then replaced by the model's own.

    Embeddings start at U(-0.1, 0.1), as in Luong et al., the LSTM's forget gates at bias 1, all else as the layers do.
    """

    takes_lengths = True
    once = True

    def __init__(
        self, source_size, target_size, hidden, *, embedding=None, layers=1, cell="lstm", score="general", dropout=0.0,
        tied=False, backend="auto", dtype="float32", seed=None,
    ):  # fmt: skip
        super().__init__(backend, dtype, seed)
        H, L = check_size("hidden", hidden, 2), check_size("layers", layers)
        if H % 2:
            raise ValueError(f"hidden should be even, half of it for each direction of the encoder; got {hidden}")
        E = H if embedding is None else check_size("embedding", embedding)
        check_choice("cell", cell, CELLS)
        source_size, target_size = (
            check_size(name, size, END + 1)
            for name, size in (("source_size", source_size), ("target_size", target_size))
        )
        self.layers, self.hidden, self.tied = L, H, check_flag("tied", tied)
        self.sampling = None
        out = E if tied else H
        shared = {"backend": self.ops, "dtype": dtype}
        number = iter(range(20))

        def options(**more):
            return shared | {"seed": (self.seed + next(number)) % 2**64} | more

        stack = {"dropout": dropout if L > 1 else 0.0} | ({"forget_bias": 1.0} if cell == "lstm" else {})
        children = {
            "source_embedding": Embedding(source_size, E, **options()),
            "target_embedding": Embedding(target_size, E, **options()),
            "encoder": CELLS[cell](E, H // 2, L, bidirectional=True, **options(**stack)),
        }
        self._kinds = ("h", "c") if cell == "lstm" else ("h",)
        children |= {f"bridge_{kind}": Linear(L * H, L * H, **options()) for kind in self._kinds}
        children |= {
            "decoder": CELLS[cell](E, H, L, **options(**stack)),
            "attention": Attention(H, H, score, **options(scale=H**-0.5)),
            "combine": Linear(2 * H, out, bias=False, **options()),
        }
        if tied:
            children["output"] = TiedLinear(children["target_embedding"])
        else:
            children["output"] = Linear(H, target_size, **options())
        children |= {f"{name}_dropout": Dropout(dropout, **options()) for name in ("source", "target", "output")}
        for name in ("source_embedding", "target_embedding"):
            weight = children[name].params["weight"]
            start = rng.uniform(weight.shape, -0.1, 0.1, children[name].seed, rng.name_key("weight"), dtype=np.float64)
            weight[...] = self.xp.asarray(start, dtype=self.compute_dtype)
        self._adopt(children)

    @checked
    def sampling(self, value):
        if value is not None and not isinstance(value, Sampling):
            raise TypeError(f"sampling should be a Sampling or None, got {value!r}")
        return value

    def __call__(self, inputs, lengths=None):
        source, target, (source_lengths, target_lengths) = self._check(inputs, lengths)
        memory, state, _ = self._encode(source, source_lengths, save=False)
        return self._decode(target, target_lengths, memory, state, source_lengths)

    def forward(self, inputs, lengths=None, *, retain=False):
        check_flag("retain", retain)
        source, target, (source_lengths, target_lengths) = self._check(inputs, lengths)
        memory, state, encode_backward = self._encode(source, source_lengths, save=True, retain=retain)
        if self.training and self.sampling is not None:
            target = self._sampled(target, target_lengths, memory, state, source_lengths)
        layer = self.children
        x, embedding_backward = layer["target_embedding"].forward(target)
        x, target_dropout_backward = layer["target_dropout"].forward(x)
        h, _, decoder_backward = layer["decoder"].forward(x, state, target_lengths, retain=retain)
        context, _, attention_backward = layer["attention"].forward(h, memory, source_lengths)
        y, combine_backward = layer["combine"].forward(self.xp.concatenate([context, h], axis=2))
        y = self.xp.tanh(y)
        dropped, output_dropout_backward = layer["output_dropout"].forward(y)
        logits, output_backward = layer["output"].forward(dropped)
        H = self.hidden

        def backward(dlogits):
            if target_lengths is not None:
                dlogits = self.ops.zero_past_end(dlogits.copy(), target_lengths)
            dy = output_dropout_backward(output_backward(dlogits))
            dy *= 1 - y * y
            dboth = combine_backward(dy)
            dcontext, dh = dboth[..., :H], dboth[..., H:]
            dqueries, dmemory = attention_backward(dcontext)
            dx, dstate = decoder_backward(dh + dqueries)
            embedding_backward(target_dropout_backward(dx))
            encode_backward(dmemory, dstate)

        return logits, self._guarded(backward, "dlogits", logits, retain)

    # ---- one step at a time

    def start(self, source, lengths=None, beams=1):
        """(Memory, state) for ``next``: source (T, B) read, the decoder's state before its first step.

        beams: K; each sequence is decoded K times side by side, the states being (L, K*B, H), beam by beam.
        """
        source, _, (lengths, _) = self._check((source, self.xp.zeros((0, source.shape[1]), np.int64)), (lengths, None))
        memory, state, _ = self._encode(source, lengths, save=False)
        parts = state if isinstance(state, tuple) else (state,)
        parts = tuple(self.xp.concatenate([part] * beams, axis=1) for part in parts)
        return self.children["attention"].remember(memory, lengths), parts if len(parts) == 2 else parts[0]

    def next(self, ids, memory, state):
        """One step of the decoder: ids (K, B), the words before -> logits (K, B, V), state, weights (K, B, T)."""
        layer, (K, B) = self.children, ids.shape
        x = layer["target_embedding"](ids.reshape(K * B))
        h, state = layer["decoder"].step(x, state)
        h = h.reshape(K, B, -1)
        context, weights = layer["attention"].attend(h, memory)
        return self._logits(context, h), state, weights

    # ---- the parts

    def _encode(self, source, lengths, save, retain=False):
        """Memory (T, B, H), the decoder's initial state, and where ``save`` the backward of both."""
        layer, xp, L, H = self.children, self.xp, self.layers, self.hidden
        if not save:
            x = layer["source_dropout"](layer["source_embedding"](source))
            memory, final = layer["encoder"](x, None, lengths)
        else:
            x, embedding_backward = layer["source_embedding"].forward(source)
            x, dropout_backward = layer["source_dropout"].forward(x)
            memory, final, encoder_backward = layer["encoder"].forward(x, None, lengths, retain=retain)
        B = source.shape[1]
        state, bridges = [], []
        for kind, part in zip(self._kinds, final if len(self._kinds) == 2 else (final,), strict=True):
            # layers and directions of a sequence side by side; c of 16-bit layers is float32
            flat = part.transpose(1, 0, 2).reshape(B, L * H).astype(self.dtype, copy=False)
            bridge = layer[f"bridge_{kind}"]
            y, bridge_backward = bridge.forward(flat) if save else (bridge(flat), None)
            y = xp.tanh(y)
            bridges.append((y, bridge_backward))
            state.append(xp.ascontiguousarray(y.reshape(B, L, H).transpose(1, 0, 2)))
        state = tuple(state) if len(state) == 2 else state[0]
        if not save:
            return memory, state, None

        def backward(dmemory, dstate):
            dfinal = []
            for (y, bridge_backward), part in zip(bridges, dstate if len(bridges) == 2 else (dstate,), strict=True):
                dy = part.transpose(1, 0, 2).reshape(B, L * H) * (1 - y * y)
                dflat = bridge_backward(dy.astype(self.dtype, copy=False))
                dfinal.append(xp.ascontiguousarray(dflat.reshape(B, 2 * L, H // 2).transpose(1, 0, 2)))
            dx, _ = encoder_backward(dmemory, tuple(dfinal) if len(dfinal) == 2 else dfinal[0])
            embedding_backward(dropout_backward(dx))

        return memory, state, backward

    def _decode(self, target, target_lengths, memory, state, source_lengths):
        """Logits (U, B, V) of a whole target, without a backward."""
        layer = self.children
        x = layer["target_dropout"](layer["target_embedding"](target))
        h, _ = layer["decoder"](x, state, target_lengths)
        return self._logits(layer["attention"](h, memory, source_lengths)[0], h)

    def _logits(self, context, h):
        y = self.xp.tanh(self.children["combine"](self.xp.concatenate([context, h], axis=2)))
        return self.children["output"](self.children["output_dropout"](y))

    def _sampled(self, target, target_lengths, memory, state, source_lengths):
        """The target with some of its words replaced by the model's own guesses; see ``Sampling``."""
        xp, rate = self.xp, self.sampling.rate_at(self.calls)
        if rate > 0 and len(target) > 1:
            key = rng.name_key(f"{self.name}.sampling")
            mask = self.ops.dropout_mask((len(target) - 1, target.shape[1]), rate, self.seed, key, self.calls)
            logits = self._decode(target, target_lengths, memory, state, source_lengths)
            logits[..., [*_NEVER_WRITTEN, END]] = -np.inf
            guesses = logits[:-1].argmax(axis=2)
            target = xp.concatenate([target[:1], xp.where(mask, target[1:], guesses)])
        self.calls += 1
        return target

    def _check(self, inputs, lengths):
        if not isinstance(inputs, (tuple, list)) or len(inputs) != 2:
            raise ShapeError(f"inputs: expected a pair (source, target), got {type(inputs).__name__}")
        source, target = (
            self.children[f"{name}_embedding"]._check(ids, name)
            for ids, name in zip(inputs, ("source", "target"), strict=True)
        )
        for name, ids in (("source", source), ("target", target)):
            if ids.ndim != 2 or ids.shape[1] != source.shape[-1]:
                raise ShapeError(f"{name}: expected shape ({'TU'[name == 'target']}, B), got {ids.shape}")
        lengths = (None, None) if lengths is None else lengths
        if not isinstance(lengths, (tuple, list)) or len(lengths) != 2:
            raise ShapeError("lengths: expected a pair, one array for the source and one for the target, or None")
        checked = [
            None if given is None else check_lengths(given, *ids.shape, f"lengths of the {name}")
            for given, ids, name in zip(lengths, (source, target), ("source", "target"), strict=True)
        ]
        return source, target, checked


@dataclass
class Sampling:
    """Scheduled sampling (Bengio et al., NIPS 2015): words of the target are replaced by the model's own guesses, with
    a probability that rises from 0 to ``rate`` over ``steps`` training calls.

    kind: "linear", or "sigmoid": Bengio's inverse sigmoid decay of the share that stays, k / (k + exp(i / k)) at call
    i, whose k puts one half at steps / 2.

    Whole sequences at once, as in Mihaylova & Martins, "Scheduled sampling for transformers", ACL SRW 2019: a first
    pass over the true target gives the model's likeliest word at every place, a second pass reads the mixture, and
    gradients go through the second only. Each has dropout masks of its own, past the encoder, which runs once. What is
    replaced depends on (seed, number of the call) alone, so a resumed run draws what it would have drawn.
    """

    rate: float
    steps: int
    kind: str = "linear"

    def __post_init__(self):
        check_number("rate", self.rate, 0, 1)
        check_size("steps", self.steps)
        check_choice("kind", self.kind, SAMPLING)
        half, k = max(self.steps, 6) / 2, 3.0
        for _ in range(200):  # k ln k = half, by bisection in effect: the mean of k and half / ln k converges for k > e
            k = (k + half / math.log(k)) / 2
        self._k = k

    def rate_at(self, call):
        """The probability at a training call, counted from 0."""
        if self.kind == "linear":
            return self.rate * min(1.0, call / self.steps)
        return self.rate * (1 - self._k / (self._k + math.exp(min(call / self._k, 700.0))))


# ---- decoding


@dataclass
class Hypothesis:
    """One decoded sequence: ids (N,) without ``START`` and ``END``; score: its log-probability, ``END`` included, over
    the length penalty; weights (N + 1, T): what each step, the one of ``END`` last, read of the source."""

    ids: np.ndarray
    score: float
    weights: np.ndarray


def length_penalty(length, alpha):
    """((5 + length) / 6)^alpha, which divides a log-probability (Wu et al. 2016, arXiv:1609.08144, equation 14)."""
    return ((5 + length) / 6) ** alpha


def greedy_search(model, source, lengths=None, *, max_length=None, alpha=0.0):
    """The likeliest word at every step, until ``END``; a list of B ``Hypothesis``.

    source: (T, B) integers; lengths: (B,) or None. max_length: words at most, a number or one for each sequence (B,);
    None: twice the source's length and 10. A sequence that reaches it is ended there. ``PADDING``, ``UNKNOWN`` and
    ``START`` are never written. alpha: of the length penalty in the scores. The model should be in evaluation mode.
    Raises ValueError where the model's logits are NaN or infinite.
    """
    xp, B, limits = model.xp, source.shape[1], _limits(source, lengths, max_length)
    memory, state = model.start(source, lengths)
    ids, active = xp.asarray(np.full((1, B), START)), np.ones(B, bool)
    words, ends, totals, read = [], np.zeros(B, np.int64), np.zeros(B), []
    for step in range(int(limits.max(initial=-1)) + 1):
        logits, state, weights = model.next(ids, memory, state)
        logits, shift = _written(logits, model.ops)
        logits = xp.where(xp.asarray(step >= limits)[:, None] & (xp.arange(logits.shape[2]) != END), -np.inf, logits)
        ids = logits.argmax(axis=2)
        gained = model.ops.to_numpy(xp.take_along_axis(logits, ids[..., None], axis=2)[..., 0] - shift)[0]
        words.append(model.ops.to_numpy(ids)[0])
        read.append(model.ops.to_numpy(weights)[0])
        totals[active] += gained[active]
        ends[active] = step
        active &= words[-1] != END
        if not active.any():
            break
    return [
        Hypothesis(
            np.array([row[b] for row in words[: ends[b]]], np.int64),
            float(totals[b] / length_penalty(ends[b] + 1, alpha)),
            np.stack([row[b] for row in read[: ends[b] + 1]]),
        )
        for b in range(B)
    ]


def beam_search(model, source, lengths=None, *, beam=5, alpha=0.6, max_length=None):
    """The ``beam`` best hypotheses found for each sequence: a list of B lists of ``Hypothesis``, best first.

    Every step extends the ``beam`` likeliest unfinished hypotheses of each sequence, all sequences side by side. Among
    all extensions the ``beam`` best count: those that end are finished and kept; the best that do not end go on.
    A sequence is done when no unfinished hypothesis could overtake the best finished one at any length, or when
    ``beam`` are finished and none that is not is ahead of the best of them (with ``beam=1`` as soon as one is finished,
    which makes it equal to ``greedy_search``). Scores are log-probabilities over the length penalty of words and
    ``END``; alpha: its strength, 0 for none, at least 0. Other arguments as ``greedy_search``.
    """
    K = check_size("beam", beam)
    check_number("alpha", alpha, 0)
    xp, ops, B, limits = model.xp, model.ops, source.shape[1], _limits(source, lengths, max_length)
    memory, state = model.start(source, lengths, K)
    everyone = np.arange(B)
    scores = np.full((B, K), -np.inf)  # of the unfinished hypotheses, best first
    scores[:, 0] = 0  # all beams are one at first
    ids = np.full((K, B), START)
    parents, words, read = [], [], []  # of each step (B, K), (B, K) and (K, B, T)
    finished = [[] for _ in range(B)]  # (score, step, beam) of each
    done = np.zeros(B, bool)
    for step in range(int(limits.max(initial=-1)) + 1):
        logits, state, weights = model.next(xp.asarray(ids), memory, state)
        read.append(ops.to_numpy(weights))
        logits, shift = _written(logits, ops)
        ending = ops.to_numpy(logits[..., END] - shift).T  # (B, K)
        logits[..., END] = -np.inf
        best, gained = (ops.to_numpy(array).transpose(1, 0, 2) for array in _likeliest(logits, K, xp))  # (B, K, K)
        gained = gained - ops.to_numpy(shift).T[..., None]
        gained[step >= limits] = -np.inf  # at the limit nothing is left but to end
        ending = scores + ending
        going_on = (scores[..., None] + gained).reshape(B, -1)

        order = np.argsort(-np.concatenate([ending, going_on], axis=1), axis=1, kind="stable")[:, :K]
        for b, place in zip(*np.nonzero((order < K) & ~done[:, None]), strict=True):
            k = order[b, place]
            if np.isfinite(ending[b, k]):
                finished[b].append((ending[b, k] / length_penalty(step + 1, alpha), step, k))
        order = np.argsort(-going_on, axis=1, kind="stable")[:, :K]
        scores = np.take_along_axis(going_on, order, axis=1)
        parents.append(order // best.shape[2])
        words.append(np.take_along_axis(best.reshape(B, -1), order, axis=1))
        next_score, last_score = (scores[:, 0] / length_penalty(n, alpha) for n in (step + 2, limits + 1))
        for b in np.flatnonzero(~done):
            best_end = max(finished[b], default=(-np.inf,))[0]
            enough = len(finished[b]) >= K and (K == 1 or best_end >= next_score[b])
            done[b] = enough or (finished[b] and best_end >= last_score[b])  # else it may still end better
        if done.all():
            break
        ids = words[-1].T
        rows = xp.asarray((parents[-1] * B + everyone[:, None]).T.reshape(-1))
        state = tuple(part[:, rows] for part in state) if isinstance(state, tuple) else state[:, rows]
    return [
        [_traced(hypothesis, b, parents, words, read) for hypothesis in sorted(finished[b], key=lambda f: -f[0])[:K]]
        for b in range(B)
    ]


def _traced(hypothesis, b, parents, words, read):
    """The ``Hypothesis`` of sequence b that ended in beam k of a step: followed back to its start."""
    score, step, k = hypothesis
    ids, weights = [], [read[step][k, b]]
    for t in range(step - 1, -1, -1):
        ids.append(words[t][b, k])
        k = parents[t][b, k]
        weights.append(read[t][k, b])
    return Hypothesis(np.array(ids[::-1], np.int64), float(score), np.stack(weights[::-1]))


def _limits(source, lengths, max_length):
    """Words at most for each sequence, (B,)."""
    T, B = source.shape
    if max_length is None:
        return 2 * (np.full(B, T) if lengths is None else check_lengths(lengths, T, B)) + 10
    limits = np.asarray(max_length)
    if limits.dtype.kind not in "iu" or limits.shape not in ((), (B,)) or (limits < 0).any():
        raise ValueError(f"max_length: expected a whole number, or one for each of {B} sequences, got {max_length!r}")
    return np.broadcast_to(limits, (B,)).astype(np.int64)


def _written(logits, ops):
    """Logits (K, B, V), computed wide, -inf for what is never written, and log(sum(exp)) of them all (K, B).

    Raises ValueError where they are NaN or infinite."""
    xp, logits = ops.xp, upcast(logits)
    highest = logits.max(axis=2)
    refuse_no_distribution(ops.to_numpy(highest))
    shift = highest + xp.log(xp.exp(logits - highest[..., None]).sum(axis=2))
    logits = logits.copy()
    logits[..., _NEVER_WRITTEN] = -np.inf
    return logits, shift


def _likeliest(logits, count, xp):
    """The ``count`` highest of logits (K, B, V), or all, best first: their places and themselves, (K, B, count)."""
    V = logits.shape[2]
    if count == 1:  # of equal ones the first, as argmax in a greedy search
        places = logits.argmax(axis=2)[..., None]
    elif count < V:
        places = xp.argpartition(-logits, count - 1, axis=2)[..., :count]
    else:
        places = xp.broadcast_to(xp.arange(V), logits.shape)
    values = xp.take_along_axis(logits, places, axis=2)
    order = xp.argsort(-values, axis=2)
    return xp.take_along_axis(places, order, axis=2), xp.take_along_axis(values, order, axis=2)
