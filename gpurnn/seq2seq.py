"""From one sequence to another of a different length: an encoder, and a decoder that attends to it.

    memory, final = encoder(source)                   bidirectional, H/2 units in each direction
    h_0 = tanh(W_bridge final + b)                    for each state of the decoder (h, and c of the LSTM)
    h = decoder(target delayed by one step, h_0)
    context = attention(h, memory)                    scores over sqrt(H)
    h~ = tanh(W_c [context; h])                       Luong, Pham, Manning, EMNLP 2015, equation 5
    logits = W h~ + b

The decoder does not read h~ of the step before (Luong's "input feeding"). Each of its layers is therefore one call over
the whole sequence, with one product for the input of all steps, and on a GPU one launch where the schedule allows it.
With input feeding every step would wait for the attention of the step before.

Both vocabularies begin with ``PADDING``, which stands past a sequence's end, ``UNKNOWN``, ``START``, which stands
before the first target, and ``END``, which follows the last one. decoding.py has greedy search and beam search.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from . import rng, shards
from ._typing import Array, Backward, Lengths, State
from .attention import Attention, Memory
from .data.tokens import END, PADDING, START, UNKNOWN
from .decoding import NEVER_WRITTEN, Hypothesis, beam_search, greedy_search, length_penalty
from .errors import ShapeError, answers_unknown, check_choice, check_flag, check_number, check_size, checked
from .layers import Dropout, Embedding, Linear, TiedLinear
from .masks import check_lengths
from .module import Module
from .recurrent import LAYERS

__all__ = [
    "END", "PADDING", "START", "UNKNOWN", "EncoderDecoder", "Hypothesis", "Sampling", "beam_search", "greedy_search",
    "length_penalty",
]  # fmt: skip

SAMPLING = ("linear", "sigmoid")


class EncoderDecoder(Module):
    """Encoder, attention and decoder; the module's text has the equations.

    Embeddings start uniform in +-0.1, as in Luong et al., and the LSTM's forget gates at bias 1. All else starts as the
    layers do.

    The attribute ``sampling`` is None, or a ``Sampling``: in training some of the target's words are then replaced by
    the model's own.

    Parameters
    ----------
    source_size, target_size : int
        Entries of the two vocabularies.
    hidden : int
        H, even.
    embedding : int, optional
        Size of a word's vector; None means H.
    layers : int
        Layers of the encoder, and of the decoder.
    cell : str
        "lstm", "gru" or "rnn".
    score : str
        As in ``Attention``.
    dropout : float
        Rate of the dropout of embeddings, of h~ and between layers.
    tied : bool
        Whether the target embedding is the output's weight too (Press & Wolf, EACL 2017). h~ then has the embedding's
        size instead of H.
    backend, dtype, seed
        As in ``Module``. None as seed draws one.

    Raises
    ------
    ValueError
        hidden is odd, or a size or a choice does not fit.

    Examples
    --------
    >>> model = gpurnn.EncoderDecoder(20, 30, 8)
    >>> source, target = np.full((5, 2), 7), np.full((4, 2), 9)
    >>> logits, backward = model.forward((source, target), lengths=([5, 3], [4, 4]))
    >>> logits.shape
    (4, 2, 30)
    """

    layers: int
    hidden: int
    tied: bool
    calls: int
    takes_lengths = True
    once = True

    def __init__(
        self,
        source_size: int,
        target_size: int,
        hidden: int,
        *,
        embedding: int | None = None,
        layers: int = 1,
        cell: str = "lstm",
        score: str = "general",
        dropout: float = 0.0,
        tied: bool = False,
        backend: str = "auto",
        dtype: str = "float32",
        seed: int | None = None,
    ) -> None:
        super().__init__(backend, dtype, seed)
        H, L = check_size("hidden", hidden, 2), check_size("layers", layers)
        if H % 2:
            raise ValueError(f"hidden should be even, half of it for each direction of the encoder; got {hidden}")
        E = H if embedding is None else check_size("embedding", embedding)
        check_choice("cell", cell, LAYERS)
        sizes = [
            check_size(name, size, END + 1)
            for name, size in (("source_size", source_size), ("target_size", target_size))
        ]
        self.layers, self.hidden, self.tied = L, H, check_flag("tied", tied)
        self.sampling = None
        self._kinds = ("h", "c") if cell == "lstm" else ("h",)
        children = self._make_children(*sizes, E, cell, score, dropout)
        for name in ("source_embedding", "target_embedding"):
            weight = children[name].params["weight"]
            start = rng.uniform(weight.shape, -0.1, 0.1, children[name].seed, rng.name_key("weight"), dtype=np.float64)
            weight[...] = self.xp.asarray(start, dtype=self.compute_dtype)
        self.add_layers(children)

    def _make_children(self, source_size, target_size, E, cell, score, dropout):
        """The layers by name. Each has its own seed, by its place in the order in which they are made here."""
        H, L, number = self.hidden, self.layers, iter(range(20))

        def options(**more):
            seed = (self.seed + next(number)) % 2**64
            return {"backend": self.ops, "dtype": self.dtype, "seed": seed} | more

        stack = {"dropout": dropout if L > 1 else 0.0} | ({"forget_bias": 1.0} if cell == "lstm" else {})
        children = {
            "source_embedding": Embedding(source_size, E, **options()),
            "target_embedding": Embedding(target_size, E, **options()),
            "encoder": LAYERS[cell](E, H // 2, L, bidirectional=True, **options(**stack)),
        }
        children |= {f"bridge_{kind}": Linear(L * H, L * H, **options()) for kind in self._kinds}
        children |= {
            "decoder": LAYERS[cell](E, H, L, **options(**stack)),
            "attention": Attention(H, H, score, **options(scale=H**-0.5)),
            "combine": Linear(2 * H, E if self.tied else H, bias=False, **options()),
        }
        if self.tied:
            children["output"] = TiedLinear(children["target_embedding"])
        else:
            children["output"] = Linear(H, target_size, **options())
        return children | {f"{name}_dropout": Dropout(dropout, **options()) for name in ("source", "target", "output")}

    @checked
    def sampling(self, value):
        if value is not None and not isinstance(value, Sampling):
            raise TypeError(f"sampling should be a Sampling or None, got {value!r}")
        return value

    @answers_unknown
    def __call__(self, inputs: tuple[Array, Array], lengths: tuple[Lengths, Lengths] | None = None) -> Array:
        """Logits (U, B, target_size) of a whole target, for inference. Takes and raises what ``forward`` does."""
        source, target, (source_lengths, target_lengths) = self._check(inputs, lengths)
        memory, state, _ = self._encode(source, source_lengths, save=False)
        return self._decode(target, target_lengths, memory, state, source_lengths)

    @answers_unknown
    def forward(
        self, inputs: tuple[Array, Array], lengths: tuple[Lengths, Lengths] | None = None, *, retain: bool = False
    ) -> tuple[Array, Backward]:
        """Logits and their backward, for training. Saves source and target by reference.

        Parameters
        ----------
        inputs : pair of Array
            ``(source, target)``: integers (T, B) and (U, B). The target is what the decoder reads: ``START``, then all
            words but the last.
        lengths : pair of Lengths, optional
            (B,) integers for the source and (B,) for the target; either may be None.
        retain : bool
            Whether ``backward`` may be called more than once.

        Returns
        -------
        logits : Array
            (U, B, target_size).
        backward : callable
            ``backward(dlogits)`` adds to ``grads`` and returns None. Past the target's end dlogits may hold anything.

        Raises
        ------
        ShapeError, DtypeError, ValueError
            The arrays are no pair of integers (T, B) and (U, B), lengths do not fit, or an id is not in a vocabulary.
        """
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

        return logits, self.guard_backward(backward, logits, "dlogits", retain)

    # ---- one step at a time

    def start(self, source: Array, lengths: Lengths = None, beams: int = 1) -> tuple[Memory, State]:
        """Read the source, for ``next``.

        Parameters
        ----------
        source : Array
            (T, B) integers.
        lengths : Lengths
            (B,) integers: the valid steps of each source.
        beams : int
            K: each sequence is decoded K times side by side.

        Returns
        -------
        memory : Memory
            What the attention reads.
        state : State
            The decoder's state before its first step. Its arrays are (L, K*B, H), beam by beam.
        """
        source, _, (lengths, _) = self._check((source, self.xp.zeros((0, source.shape[1]), np.int64)), (lengths, None))
        memory, state, _ = self._encode(source, lengths, save=False)
        parts = state if isinstance(state, tuple) else (state,)
        parts = tuple(self.xp.concatenate([part] * beams, axis=1) for part in parts)
        return self.children["attention"].remember(memory, lengths), parts if len(parts) == 2 else parts[0]

    def next(self, ids: Array, memory: Memory, state: State) -> tuple[Array, State, Array]:
        """One step of the decoder: from the words before, ids (K, B), to logits (K, B, V), state, weights (K, B, T)."""
        layer, (K, B) = self.children, ids.shape
        x = layer["target_embedding"](ids.reshape(K * B))
        h, state = layer["decoder"].step(x, state)
        h = h.reshape(K, B, -1)
        context, weights = layer["attention"].attend(h, memory)
        return self._logits(context, h), state, weights

    # ---- the parts

    def _encode(self, source, lengths, save, retain=False):
        """Memory (T, B, H), the decoder's initial state, and the backward of both, or None unless ``save``."""
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
            # one row holds all layers and directions of a sequence; c of 16-bit layers is float32
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
            shape = (len(target) - 1, target.shape[1])
            mask = shards.dropout_mask(self.ops, shape, rate, self.seed, key, self.calls, axis=1)
            logits = self._decode(target, target_lengths, memory, state, source_lengths)
            logits[..., [*NEVER_WRITTEN, END]] = -np.inf
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
        for name, ids, steps in (("source", source, "T"), ("target", target, "U")):
            if ids.ndim != 2 or ids.shape[1] != source.shape[-1]:
                raise ShapeError(f"{name}: expected shape ({steps}, B), got {ids.shape}")
        lengths = (None, None) if lengths is None else lengths
        if not isinstance(lengths, (tuple, list)) or len(lengths) != 2:
            raise ShapeError("lengths: expected a pair, one array for the source and one for the target, or None")
        checked = [
            None if given is None else check_lengths(given, *ids.shape, f"lengths of the {name}")
            for given, ids, name in zip(lengths, (source, target), ("source", "target"), strict=True)
        ]
        return source, target, checked

    def _sizes_text(self):
        sizes = [self.children[f"{name}_embedding"].num_embeddings for name in ("source", "target")]
        return f"{sizes[0]}, {sizes[1]}, {self.hidden}"


@dataclass
class Sampling:
    """Scheduled sampling (Bengio et al., NIPS 2015): words of the target are replaced by the model's own guesses.

    The probability rises from 0 to ``rate`` over ``steps`` training calls. The whole sequence is sampled at once, as in
    Mihaylova & Martins, "Scheduled sampling for transformers", ACL SRW 2019. A first pass over the true target gives
    the model's likeliest word at every place. A second pass reads the mixture, and gradients go through this one only.
    The encoder runs once; after it each pass has its own dropout masks. What is replaced depends on (seed, number of
    the call) alone, so a resumed run draws what it would have drawn.

    Parameters
    ----------
    rate : float
        Final probability, from 0 to 1.
    steps : int
        Training calls until then.
    kind : str
        "linear", or "sigmoid": Bengio's inverse sigmoid decay of the share of true words, k / (k + exp(i / k)) at call
        i, with the k that makes it one half at steps / 2.

    Raises
    ------
    TypeError, ValueError
        A number is out of range, or there is no such kind.

    Examples
    --------
    >>> gpurnn.seq2seq.Sampling(0.5, steps=100).rate_at(50)
    0.25
    """

    rate: float
    steps: int
    kind: str = "linear"

    def __post_init__(self) -> None:
        check_number("rate", self.rate, 0, 1)
        check_size("steps", self.steps)
        check_choice("kind", self.kind, SAMPLING)
        half, k = max(self.steps, 6) / 2, 3.0
        for _ in range(200):  # solves k ln k = half: the mean of k and half / ln k converges for k > e
            k = (k + half / math.log(k)) / 2
        self._k = k

    def rate_at(self, call: int) -> float:
        """The probability at training call ``call``, counted from 0."""
        if self.kind == "linear":
            return self.rate * min(1.0, call / self.steps)
        return self.rate * (1 - self._k / (self._k + math.exp(min(call / self._k, 700.0))))
