"""The encoder-decoder against torch and finite differences; scheduled sampling; greedy and beam search against all
sequences there are."""

import itertools
import math

import numpy as np
import pytest
from helpers import assert_close, cuda_ops
from optional import optional

from gpurnn import DtypeError, ShapeError, cross_entropy, get_backend, losses
from gpurnn.module import Module
from gpurnn.rng import name_key
from gpurnn.seq2seq import END, PADDING, START, UNKNOWN, EncoderDecoder, Sampling, beam_search, greedy_search
from gpurnn.seq2seq import length_penalty as penalty
from gpurnn.testing import check_gradients, count_terms

torch = optional("torch")
translation = optional("bench.translation")

F64 = {"backend": "cpu", "dtype": "float64", "seed": 3}
V_SOURCE, V_TARGET, T, U, B = 9, 11, 6, 5, 4
SOURCE_LENGTHS, TARGET_LENGTHS = [6, 1, 3, 5], [2, 5, 1, 4]
VARIANTS = [
    {"cell": cell, "score": score, "layers": layers, "embedding": embedding, "tied": tied}
    for cell, score, layers, embedding, tied in (
        ("lstm", "general", 1, None, False),
        ("lstm", "additive", 2, 5, True),
        ("gru", "dot", 2, 7, False),
        ("gru", "general", 1, None, True),
        ("rnn", "additive", 1, 3, False),
    )
]


def make(seed=3, **options):
    return EncoderDecoder(V_SOURCE, V_TARGET, 6, **(F64 | {"seed": seed} | options))


def spread(model, factor=8):
    """The same model, in evaluation mode, with weights so large that every part matters and probabilities differ."""
    model.flat_params *= factor
    return model.eval()


def ids(high, *shape, seed=0):
    return np.random.default_rng(seed).integers(START, high, shape)


def batch():
    return (
        (ids(V_SOURCE, T, B), ids(V_TARGET, U, B, seed=1)),
        (SOURCE_LENGTHS, TARGET_LENGTHS),
        ids(V_TARGET, U, B, seed=2),
    )


@pytest.mark.parametrize("options", VARIANTS)
def test_equals_torch(options):
    model = make(**options)
    twin = translation.Twin(V_SOURCE, V_TARGET, 6, **options).double()
    twin.load_state_dict({n: torch.from_numpy(p) for n, p in model.state_dict().items()}, strict=not options["tied"])
    inputs, lengths, targets = batch()
    logits, backward = model.forward(inputs, lengths)
    np.testing.assert_array_equal(model(inputs, lengths), logits)
    loss, dloss = cross_entropy(logits, targets, lengths=lengths[1], label_smoothing=0.1)
    backward(dloss())
    theirs = twin(*map(torch.from_numpy, inputs), torch.tensor(SOURCE_LENGTHS))
    valid = np.arange(U)[:, None] < TARGET_LENGTHS
    smoothed = torch.nn.CrossEntropyLoss(label_smoothing=0.1)
    smoothed(theirs[torch.from_numpy(valid)], torch.from_numpy(targets[valid])).backward()
    assert_close(logits[valid], theirs.detach().numpy()[valid], count_terms(model, T + U))
    gradients = dict(twin.named_parameters())
    assert set(twin.weights()) == set(model.params)
    for name, grad in model.grads.items():
        assert_close(grad, gradients[name].grad.numpy(), count_terms(model, T + U), name)


class WithLoss(Module):
    """A model and its loss as one layer."""

    def __init__(self, model):
        super().__init__(model.ops, model.dtype)
        self._adopt({"model": model})

    def forward(self, inputs, lengths, targets):
        logits, backward = self.children["model"].forward(inputs, lengths)
        loss, dlogits = cross_entropy(logits, targets, lengths=lengths[1])
        return loss, lambda dloss: backward(dlogits(dloss))


@pytest.mark.parametrize("options", VARIANTS)
def test_finite_differences(options):
    check_gradients(WithLoss(spread(make(**options), 4)), *batch())


@pytest.mark.long
@pytest.mark.parametrize("part", ["encoder", "bridge_h", "attention", "target_embedding"])
def test_a_broken_gradient_is_seen(part, monkeypatch):
    model = spread(make(), 4)
    layer = model.children[part]
    forward = layer.forward

    def broken(*arguments, **options):
        *outputs, backward = forward(*arguments, **options)

        def wrong(*gradients):
            result = backward(*gradients)
            layer.flat_grads *= 1.05
            return result

        return (*outputs, wrong)

    monkeypatch.setattr(layer, "forward", broken)
    with pytest.raises(AssertionError, match=rf"^model\.{part}.*: the derivative .* off by"):
        check_gradients(WithLoss(model), *batch())


def test_padding_changes_nothing():
    """Longer arrays with anything past the ends: same logits, same gradients."""
    model = make(layers=2)
    inputs, lengths, targets = batch()
    longer = tuple(np.concatenate([array, ids(9, 3, B, seed=7)]) for array in inputs)
    results = []
    for pair, y in ((inputs, targets), (longer, np.concatenate([targets, targets[:3]]))):
        model.zero_grad()
        logits, backward = model.forward(pair, lengths)
        backward(cross_entropy(logits, y, lengths=lengths[1])[1]())
        results.append((logits[:U][np.arange(U)[:, None] < TARGET_LENGTHS], model.flat_grads.copy()))
    for one, other in zip(*results, strict=True):
        assert_close(one, other, count_terms(model, T + U))


def test_an_empty_source_and_no_sequences():
    model = make()
    logits, backward = model.forward((ids(9, 3, 2), ids(9, 4, 2)), ([0, 3], [4, 4]))
    backward(np.ones_like(logits))
    assert np.isfinite(logits).all() and np.isfinite(model.flat_grads).all()
    assert model((ids(9, 3, 0), ids(9, 4, 0))).shape == (4, 0, V_TARGET)
    assert beam_search(model, ids(9, 3, 0)) == greedy_search(model, ids(9, 3, 0)) == []
    assert len(greedy_search(model, ids(9, 0, 2))) == 2


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_16_bit_runs(dtype):
    model, exact = make(dtype=dtype, tied=True), make(tied=True)
    inputs, lengths, targets = batch()
    logits, backward = model.forward(inputs, lengths)
    backward(cross_entropy(logits, targets, lengths=lengths[1])[1]())
    assert logits.dtype == model.dtype and model.grads["output.bias"].dtype == np.float32
    expected = exact(inputs, lengths)
    eps = {"float16": 2.0**-10, "bfloat16": 2.0**-7}[dtype]
    assert np.abs(logits.astype("float64") - expected).max() < 20 * eps * np.abs(expected).max()


# ---- scheduled sampling


def test_the_probability_of_sampling():
    linear, sigmoid = (Sampling(0.5, 100, kind) for kind in ("linear", "sigmoid"))
    assert [linear.rate_at(n) for n in (0, 50, 100, 1000)] == [0, 0.25, 0.5, 0.5]
    k = sigmoid._k
    assert k * math.log(k) == pytest.approx(50, rel=1e-12)
    for call in (0, 10, 50, 100):  # Bengio et al. 2015, section 2.4
        assert sigmoid.rate_at(call) == pytest.approx(0.5 * (1 - k / (k + math.exp(call / k))), rel=1e-12)
    assert sigmoid.rate_at(50) == pytest.approx(0.25, rel=1e-12)
    assert sigmoid.rate_at(10**9) == pytest.approx(0.5)


def test_sampling_reads_the_models_own_words():
    """Against the two passes written out, at a call whose number says the rate and the draw."""
    model, plain = make(dropout=0.3), make(dropout=0.3)
    inputs, lengths, _ = batch()
    model.sampling = Sampling(0.6, 10)
    for call in range(12):
        for name, module in plain.modules():
            module.calls = dict(model.modules())[name].calls
        logits, _ = model.forward(inputs, lengths)
        first = plain(inputs, lengths)
        first[..., [PADDING, UNKNOWN, START, END]] = -np.inf
        rate = 0.6 * min(1, call / 10)
        true_words = model.ops.dropout_mask((U - 1, B), rate, model.seed, name_key(".sampling"), call)
        mixed = inputs[1].copy()
        mixed[1:] = np.where(true_words, inputs[1][1:], first[:-1].argmax(axis=2))
        for name, module in plain.modules():
            if call == 0 or name.startswith(("source", "encoder")):  # there is one pass, or they have run once
                module.calls = call
        np.testing.assert_array_equal(plain.forward((inputs[0], mixed), lengths)[0], logits)
        assert call == 0 or true_words.mean() < 1
    assert model.calls == 12
    model.eval()
    plain.eval()
    np.testing.assert_array_equal(model.forward(inputs, lengths)[0], plain(inputs, lengths))
    assert model.calls == 12


# ---- decoding


def all_sequences(model, source, length, longest, alpha):
    """Score of every sequence of at most ``longest`` words, by teacher forcing: {words: score}."""
    words = [w for w in range(V_TARGET) if w > END]
    scores = {}
    for n in range(longest + 1):
        found = list(itertools.product(words, repeat=n))
        target = np.array([[START, *s] for s in found]).T
        logits = model((np.repeat(source, len(found), axis=1), target), ([length] * len(found), [n + 1] * len(found)))
        logp = logits - np.log(np.exp(logits).sum(axis=2, keepdims=True))
        following = np.array([[*s, END] for s in found]).T
        total = np.take_along_axis(logp, following[..., None], axis=2)[..., 0].sum(axis=0)
        scores |= dict(zip(found, total / penalty(n + 1, alpha), strict=True))
    return scores


@pytest.mark.parametrize("alpha", [0.0, 0.6, 1.5])
def test_beam_search_finds_the_best_of_all_sequences(alpha):
    """With as many beams as sequences nothing is lost: the best of all, and every score that of teacher forcing."""
    model, longest = spread(make(cell="gru", score="additive")), 3
    source = ids(V_SOURCE, T, B)
    found = beam_search(
        model, source, SOURCE_LENGTHS, beam=(V_TARGET - END - 1) ** longest * 3, alpha=alpha, max_length=longest
    )
    for b, hypotheses in enumerate(found):
        every = all_sequences(model, source[:, b : b + 1], SOURCE_LENGTHS[b], longest, alpha)
        best = max(every, key=every.get)
        assert tuple(hypotheses[0].ids) == best
        for hypothesis in hypotheses:
            assert hypothesis.score == pytest.approx(every[tuple(hypothesis.ids)], rel=1e-10)
        assert [h.score for h in hypotheses] == sorted((h.score for h in hypotheses), reverse=True)


def test_a_beam_of_one_is_greedy_and_a_wider_one_no_worse():
    lengths, better = [6, 1, 3, 5] * 3, 0
    for seed in range(4):
        model = spread(make(seed))
        source = ids(V_SOURCE, T, 12, seed=seed)
        greedy = greedy_search(model, source, lengths)
        one = [h[0] for h in beam_search(model, source, lengths, beam=1, alpha=0)]
        eight = [h[0] for h in beam_search(model, source, lengths, beam=8, alpha=0)]
        for a, b in zip(greedy, one, strict=True):
            np.testing.assert_array_equal(a.ids, b.ids)
            assert a.score == pytest.approx(b.score, rel=1e-12)
            assert_close(a.weights, b.weights, count_terms(model, T))
        better += sum(w.score > g.score + 1e-9 for w, g in zip(eight, greedy, strict=True))
    assert better > 0
    assert len({len(h.ids) for h in greedy}) > 1


class Table:
    """A model whose probabilities stand in a table: for each step those of ``END`` and of the two words there are."""

    xp, ops = np, get_backend("cpu")

    def __init__(self, *rows):
        self.rows, self.asked = rows, 0

    def start(self, source, lengths, beams=1):
        return None, np.zeros((1, beams * source.shape[1], 1))

    def next(self, ids, memory, state):
        with np.errstate(divide="ignore"):
            row = np.log([0, 0, 0, *self.rows[min(self.asked, len(self.rows) - 1)]])
        self.asked += 1
        return np.broadcast_to(row, (*ids.shape, len(row))), state, np.zeros((*ids.shape, 1))


def test_a_search_ends_when_nothing_can_overtake():
    """A short end is likelier than the long one, whose score per length is better: only the penalty decides."""
    rows = (0.5, 0.4, 0.1), *[(0.0, 0.998, 0.002)] * 4, (0.998, 0.001, 0.001)
    source = np.zeros((1, 1), np.int64)
    for alpha, words, asked in ((1.0, 5, 6), (0.0, 0, 1)):
        model = Table(*rows)
        best = beam_search(model, source, beam=3, alpha=alpha, max_length=9)[0][0]
        long = math.log(0.4 * 0.998**5)
        assert best.ids.tolist() == [END + 1] * words
        assert best.score == pytest.approx(long / penalty(6, alpha) if words else math.log(0.5))
        assert asked <= model.asked <= 6
        assert alpha or model.asked == 1  # ln 0.4 is below ln 0.5 already, and only falls


def test_unlikely_ends_do_not_end_a_search():
    """A confident model: its early ends are among the best extensions, but far from the best."""
    rows = *[(0.02, 0.97, 0.01)] * 8, (0.98, 0.01, 0.01)
    found = beam_search(Table(*rows), np.zeros((1, 1), np.int64), beam=3, alpha=0.6, max_length=12)[0]
    assert [len(h.ids) for h in found][0] == 8 and len(found) == 3
    assert found[0].score == pytest.approx((8 * math.log(0.97) + math.log(0.98)) / penalty(9, 0.6))


@pytest.mark.parametrize("search", [greedy_search, lambda *a, **k: [h[0] for h in beam_search(*a, beam=3, **k)]])
def test_what_decoding_returns(search):
    model = spread(make())
    source = ids(V_SOURCE, T, B)
    model.children["output"].params["bias"][[PADDING, UNKNOWN, START]] = 1e3  # likeliest by far, and yet never written
    model.children["output"].params["bias"][END] = -1e3  # never ends by itself
    for hypothesis, length, limit in zip(
        search(model, source, SOURCE_LENGTHS, max_length=np.array([3, 0, 7, 1])),
        SOURCE_LENGTHS,
        [3, 0, 7, 1],
        strict=True,
    ):
        assert len(hypothesis.ids) == limit and (hypothesis.ids > END).all()
        assert hypothesis.weights.shape == (limit + 1, T)
        np.testing.assert_allclose(hypothesis.weights.sum(axis=1), 1)
        assert not hypothesis.weights[:, length:].any()
    assert [len(h.ids) for h in search(model, source, SOURCE_LENGTHS)] == [2 * n + 10 for n in SOURCE_LENGTHS]


def test_a_sentence_is_decoded_alike_in_any_company():
    model = spread(make())
    source = ids(V_SOURCE, T, B)
    together = beam_search(model, source, SOURCE_LENGTHS, beam=4)
    for b, length in enumerate(SOURCE_LENGTHS):
        alone = beam_search(model, source[:length, b : b + 1], [length], beam=4)[0]
        assert [h.ids.tolist() for h in alone] == [h.ids.tolist() for h in together[b]]


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda m: EncoderDecoder(9, 9, 5), ValueError, "hidden should be even"),
        (lambda m: EncoderDecoder(3, 9, 4), ValueError, "source_size should be at least 4"),
        (lambda m: EncoderDecoder(9, 9, 4, cell="tcn"), ValueError, "cell should be one of 'lstm', 'gru', 'rnn'"),
        (lambda m: m(ids(9, T, B)), ShapeError, r"inputs: expected a pair \(source, target\)"),
        (lambda m: m((ids(9, T, B), ids(9, U, B + 1))), ShapeError, r"target: expected shape \(U, B\), got \(5, 5\)"),
        (lambda m: m((ids(9, T), ids(9, U))), ShapeError, r"source: expected shape \(T, B\), got \(6,\)"),
        (lambda m: m((ids(9, T, B) + 0.5, ids(9, U, B))), DtypeError, "source: expected integers"),
        (lambda m: m((ids(9, T, B), ids(9, U, B)), [1, 2, 3]), ShapeError, "lengths: expected a pair"),
        (lambda m: m((ids(9, T, B), ids(9, U, B)), ([7] * B, None)), ShapeError, "lengths of the source"),
        (lambda m: m((ids(9, T, B) + 9, ids(9, U, B))), ValueError, "source: expected numbers from 0 to 8"),
        (lambda m: beam_search(m, ids(9, T, B), beam=0), ValueError, "beam should be at least 1"),
        (lambda m: beam_search(m, ids(9, T, B), alpha=-1), ValueError, "alpha should be"),
        (lambda m: greedy_search(m, ids(9, T, B), max_length=[1, 2]), ValueError, "max_length: expected"),
        (lambda m: Sampling(2, 10), ValueError, "rate should be"),
        (lambda m: Sampling(0.5, 10, "step"), ValueError, "kind should be one of"),
    ],
)
def test_wrong_arguments_are_refused(call, error, message):
    with pytest.raises(error, match=message):
        call(make())


@pytest.mark.emulated
def test_the_cuda_backend_does_the_same(monkeypatch):
    """Training with dropout and scheduled sampling, and both searches, on the emulated device."""
    ops = cuda_ops()
    plain = losses.common.array_ops
    monkeypatch.setattr(losses.common, "array_ops", lambda *a: ops if isinstance(a[0], ops.xp.ndarray) else plain(*a))
    (source, target), lengths, targets = batch()
    results = []
    for backend in (ops, "cpu"):
        model = make(backend=backend, score="additive", tied=True, dropout=0.2, layers=2)
        model.sampling, model.calls, asarray = Sampling(0.5, 1), 1, model.xp.asarray
        logits, backward = model.forward((asarray(source), asarray(target)), lengths)
        backward(cross_entropy(logits, asarray(targets), lengths=lengths[1], label_smoothing=0.1)[1]())
        numbers = [model.ops.to_numpy(array).copy() for array in (logits, model.flat_grads)]
        spread(model)
        found = [h for hypotheses in beam_search(model, asarray(source), lengths[0], beam=3) for h in hypotheses]
        results.append((numbers, [h.ids.tolist() for h in found + greedy_search(model, asarray(source), lengths[0])]))
    for one, other in zip(results[0][0], results[1][0], strict=True):
        assert_close(one, other, count_terms(model, T + U))
    assert results[0][1] == results[1][1]
