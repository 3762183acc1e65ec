"""What is not used may hold anything: NaN and infinity in it change nothing, as if zeros stood there."""

import numpy as np
import pytest
from helpers import BACKENDS, backend_of, host, values

import gpurnn
from gpurnn import check
from gpurnn.check import CELLS
from gpurnn.tasks.text import probabilities, sample
from gpurnn.testing import leaves

LENGTHS = np.array([3, 0, 5, 0])
DIRECTIONS = [{}, {"reverse": True}, {"bidirectional": True}, {"num_layers": 2, "wavefront": 2}, {"batch_first": True}]


def run(layer, x, state, lengths, doutput, dstate):
    inward = layer.xp.asarray

    def move(part):
        return tuple(map(move, part)) if isinstance(part, tuple) else inward(part.astype(layer.dtype))

    layer.zero_grad()
    output, final, backward = layer.forward(move(x), None if state is None else move(state), lengths)
    dx, dinitial = backward(move(doutput), move(dstate))
    return {"output": host(output), "dx": host(dx), "grads": host(layer.flat_grads)} | {
        f"{name} {k}": host(part)
        for name, given in (("state", final), ("dstate", dinitial))
        for k, part in enumerate(leaves(given if isinstance(given, tuple) else (given,)))
    }


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("kind", CELLS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_what_sequences_without_steps_bring(backend, kind, bad):
    """Their initial state is returned as their final one, and the gradient of the final one as that of the initial one;
    nothing else reads them."""
    ops = backend_of(backend)
    for options in DIRECTIONS if backend != "cuda" or bad is np.nan else DIRECTIONS[:1]:
        for schedule, dtype in (("auto", "float32"), ("step", "float32"), ("auto", "float64"), ("auto", "float16")):
            layer = check.build(kind, ops, dtype, schedule=schedule, **options)
            first = layer.batch_first
            x = values((4, 5, 4) if first else (5, 4, 4))
            past = np.arange(5)[:, None] >= LENGTHS
            past = past.T if first else past
            output, final = layer(layer.xp.asarray(x.astype(layer.dtype)))
            doutput = values(output.shape)
            draw = [values(part.shape) for part in leaves(final if isinstance(final, tuple) else (final,))]
            ddraw = [values(part.shape) for part in draw]
            results = []
            for fill in (0, bad):
                x[past], doutput[past] = fill, fill
                state, dstate = ([part.copy() for part in parts] for parts in (draw, ddraw))
                for part in (*state, *dstate):
                    part[:, LENGTHS == 0] = fill
                pack = tuple if len(state) == 2 else lambda parts: parts[0]
                results.append(run(layer, x, pack(state), LENGTHS, doutput, pack(dstate)))
            for name, expected in results[0].items():
                got = results[1][name]
                if "state" in name:
                    np.testing.assert_array_equal(got[:, LENGTHS == 0], np.full_like(got[:, LENGTHS == 0], bad))
                    got, expected = (a[:, LENGTHS > 0] for a in (got, expected))
                np.testing.assert_array_equal(got, expected, err_msg=f"{name} {options} {schedule} {dtype}")


@pytest.mark.parametrize("backend", BACKENDS)
def test_padding_in_front_of_layers_without_lengths(backend):
    """A model that is called with lengths reads nothing past them, whichever layer comes first."""
    options = {"backend": backend_of(backend), "seed": 3}
    past = np.arange(5)[:, None] >= LENGTHS
    for batch_first in (False, True):
        first = {"batch_first": batch_first} | options
        model = gpurnn.Sequential(
            gpurnn.Linear(6, 7, **options),
            gpurnn.LayerNorm(7, **options),
            gpurnn.Dropout(0.2, **options),
            gpurnn.GRU(7, 5, **first),
            gpurnn.Sequential(gpurnn.LayerNorm(5, **options), gpurnn.LSTM(5, 4, **first)),
            gpurnn.BatchNorm(4, **first),
            gpurnn.Pooling(4, "mean", **first),
        )  # fmt: skip
        x, results = values((5, 4, 6)), []
        for fill in (0, np.nan):
            x[past] = fill
            given = x.swapaxes(0, 1) if batch_first else x
            model.zero_grad()
            for _, module in model.modules():
                module.calls = 0
            y, _, backward = model.forward(model.xp.asarray(given), lengths=LENGTHS)
            dx, _ = backward(y)
            for _, module in model.modules():
                module.calls = 0
            results.append(
                [host(a) for a in (y, dx, model.flat_grads, model(model.xp.asarray(given), None, LENGTHS)[0])]
            )
            np.testing.assert_array_equal(given if not batch_first else given.swapaxes(0, 1), x)
        for got, expected in zip(results[1], results[0], strict=True):
            np.testing.assert_array_equal(got, expected)


def test_padding_of_a_single_sequence_in_front_of_layers_without_lengths():
    model = gpurnn.Sequential(gpurnn.Linear(3, 4, seed=1), gpurnn.RNN(4, 2, seed=1))
    x, results = values((5, 3)), []
    for fill in (0, np.nan):
        x[2:] = fill
        model.zero_grad()
        y, _, backward = model.forward(x, lengths=[2])
        results.append([y, backward(y)[0], model.flat_grads.copy()])
    for got, expected in zip(results[1], results[0], strict=True):
        np.testing.assert_array_equal(got, expected)


LAST = {  # the layers after a recurrent one of 4 features
    "linear": lambda o: [gpurnn.Linear(4, 3, **o)],
    "norm": lambda o: [gpurnn.LayerNorm(4, **o)],
    "several": lambda o: [gpurnn.LayerNorm(4, **o), gpurnn.Dropout(0.2, **o), gpurnn.Linear(4, 3, **o)],
    "nested": lambda o: [gpurnn.Sequential(gpurnn.Linear(4, 4, **o), gpurnn.Linear(4, 3, **o))],
}


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("dtype", ["float32", "float64", "float16"])
@pytest.mark.parametrize("last", LAST)
@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_past_the_end_after_layers_without_lengths(backend, last, dtype, bad):
    """As if zeros stood there, whichever layer comes last, of numbers and of words, of batches and of one sequence."""
    for first in ("floats", "words", "single", "batch first"):
        options = {"backend": backend_of(backend), "seed": 3, "dtype": dtype}
        rnn = gpurnn.LSTM(6, 4, batch_first=first == "batch first", **options)
        front = [gpurnn.Embedding(9, 6, **options)] if first == "words" else []
        model = gpurnn.Sequential(*front, rnn, *LAST[last](options))
        x = np.arange(20).reshape(5, 4) % 9 if first == "words" else values((5, 4, 6)).astype(dtype)
        x, lengths = (x[:, 0], 3) if first == "single" else (x, LENGTHS)
        x = x.swapaxes(0, 1) if first == "batch first" else x
        past, results = np.arange(5)[:, None] >= np.asarray(lengths), []
        past = past[:, 0] if first == "single" else past.T if first == "batch first" else past
        given = np.array(lengths)
        y, _, backward = model.forward(model.xp.asarray(x), lengths=given, retain=True)
        given[...] = 0  # which a backward does not see
        dy = values(y.shape).astype(dtype)
        for fill in (0, bad):
            dy[past] = fill
            before = dy.copy()
            model.zero_grad()
            dx, _ = backward(model.xp.asarray(dy))
            results.append([host(model.flat_grads), *([] if dx is None else [host(dx)])])
            np.testing.assert_array_equal(dy, before)
        assert results[0][0].any()
        for got, expected in zip(*results, strict=True):
            np.testing.assert_array_equal(got, expected)


def test_what_stands_for_no_step_is_read():
    """Behind Pooling there are no steps, and with as many sequences as steps it looks as if there were."""
    model = gpurnn.Sequential(
        gpurnn.Embedding(9, 6, seed=1), gpurnn.GRU(6, 4, seed=2), gpurnn.Pooling(4), gpurnn.Linear(4, 3, seed=3)
    )
    y, _, backward = model.forward(np.arange(16).reshape(4, 4) % 9, lengths=LENGTHS - 1 + (LENGTHS == 0))
    backward(np.ones_like(y))
    np.testing.assert_array_equal(model.grads["3.bias"], [4, 4, 4])


def test_a_part_without_lengths_after_pooling():
    o, x = {"backend": "cpu", "seed": 1}, values((5, 4, 6))
    front = [gpurnn.GRU(6, 4, batch_first=True, **o), gpurnn.Pooling(4, batch_first=True)]
    y, _ = gpurnn.Sequential(*front, gpurnn.Sequential(gpurnn.Linear(4, 4, **o), gpurnn.Linear(4, 3, **o)))(
        x, lengths=[4, 2, 0, 3, 1]
    )
    front = [gpurnn.GRU(6, 4, batch_first=True, **o), gpurnn.Pooling(4, batch_first=True)]
    alone, _ = gpurnn.Sequential(*front)(x, lengths=[4, 2, 0, 3, 1])
    rest = gpurnn.Sequential(gpurnn.Linear(4, 4, **o), gpurnn.Linear(4, 3, **o))
    np.testing.assert_array_equal(y, rest(alone))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_past_the_end_of_a_translation(backend, tied):
    options = {"tied": tied, "backend": backend_of(backend), "seed": 1, "dropout": 0.2}
    model, results = gpurnn.EncoderDecoder(9, 8, 4, **options), []
    source, target = (
        model.xp.asarray(np.arange(20).reshape(5, 4) % 9),
        model.xp.asarray(np.arange(24).reshape(6, 4) % 8),
    )
    lengths = (LENGTHS, np.array([6, 2, 0, 3]))
    logits, backward = model.forward((source, target), lengths, retain=True)
    dlogits = values(logits.shape)
    for fill in (0, np.nan, np.inf):
        dlogits[np.arange(6)[:, None] >= lengths[1]] = fill
        model.zero_grad()
        backward(model.xp.asarray(dlogits))
        results.append(host(model.flat_grads))
    for got in results[1:]:
        np.testing.assert_array_equal(got, results[0])


@pytest.mark.parametrize("score", ["dot", "general", "additive"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_of_what_attention_could_not_read(backend, score):
    layer = gpurnn.Attention(6, 6, score, backend=backend_of(backend), seed=1)
    queries, memory, results = values((3, 4, 6)), values((5, 4, 6)), []
    dcontext, dweights = values((3, 4, 6)), values((3, 4, 5))
    past = (np.arange(5)[:, None] >= LENGTHS).T
    for fill in (0, np.nan, np.inf):
        memory[past.T] = fill
        dcontext[:, LENGTHS == 0] = fill
        dweights[:, past] = fill
        layer.zero_grad()
        inward = layer.xp.asarray
        context, weights, backward = layer.forward(inward(queries), inward(memory), LENGTHS)
        back = backward(inward(dcontext), inward(dweights))
        results.append([host(a) for a in (context, weights, *back, layer.flat_grads)])
    for got in results[1:]:
        for mine, expected in zip(got, results[0], strict=True):
            np.testing.assert_array_equal(mine, expected)


@pytest.mark.parametrize("mode", ["last", "mean", "max", "attention"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_of_what_pooling_could_not_read(backend, mode):
    layer = gpurnn.Pooling(6, mode, 2 if mode == "last" else 1, backend=backend_of(backend), seed=1)
    x, dy, results = values((5, 4, 6)), values((4, 6)), []
    for fill in (0, np.nan, np.inf):
        x[np.arange(5)[:, None] >= LENGTHS] = fill
        dy[LENGTHS == 0] = fill
        layer.zero_grad()
        y, backward = layer.forward(layer.xp.asarray(x), LENGTHS)
        results.append([host(a) for a in (y, backward(layer.xp.asarray(dy)), layer.flat_grads)])
    for got in results[1:]:
        for mine, expected in zip(got, results[0], strict=True):
            np.testing.assert_array_equal(mine, expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_of_steps_that_batch_statistics_leave_out(backend):
    layer = gpurnn.BatchNorm(6, backend=backend_of(backend), seed=1)
    x, dy, results = values((5, 4, 6)), values((5, 4, 6)), []
    past = np.arange(5)[:, None] >= LENGTHS
    for fill in (0, np.nan):
        x[past], dy[past] = fill, fill
        layer.zero_grad()
        y, backward = layer.forward(layer.xp.asarray(x), LENGTHS)
        results.append([host(a) for a in (y, backward(layer.xp.asarray(dy)), layer.flat_grads)])
    for got, expected in zip(results[1], results[0], strict=True):
        np.testing.assert_array_equal(got, expected)


# ---- sampling


@pytest.mark.parametrize("logits", [[0.0, 1.0, np.nan], [0.0, np.inf, 1.0], [0.0, -np.inf, -np.inf]])
@pytest.mark.parametrize("temperature", [0, 0.8])
def test_nothing_is_drawn_from_what_is_no_distribution(logits, temperature):
    with pytest.raises(ValueError, match="^logits: .*(nan|inf).*diverged"):
        probabilities(np.array(logits), temperature)


def test_minus_infinity_is_a_logit_like_another():
    np.testing.assert_array_equal(probabilities(np.array([0.0, -np.inf, 1.0])), [0, 0, 1])


def test_a_model_of_nan_writes_nothing():
    from gpurnn.data.vocabulary import Vocabulary

    vocabulary = Vocabulary("abc")
    V = len(vocabulary)
    model = gpurnn.Sequential(gpurnn.Embedding(V, 3, seed=1), gpurnn.RNN(3, 4, seed=1), gpurnn.Linear(4, V, seed=1))
    model["2"].params["bias"][-1] = np.nan
    with pytest.raises(ValueError, match="^logits: "):
        next(iter(sample(model, vocabulary, "a", 3)))


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_searches_refuse_what_is_no_distribution(bad):
    model = gpurnn.EncoderDecoder(9, 9, 4, seed=1).eval()
    source = np.full((3, 2), 5)
    gpurnn.greedy_search(model, source), gpurnn.beam_search(model, source, beam=2)
    model.params["output.bias"][6] = bad
    for search in (gpurnn.greedy_search, gpurnn.beam_search):
        with pytest.raises(ValueError, match="^logits: .*diverged"):
            search(model, source)
    logits = values((5, 2, 4))
    logits[3, 1, 2] = bad
    for decode in (gpurnn.ctc_greedy, gpurnn.ctc_beam_search):
        decode(logits, lengths=[5, 3])
        with pytest.raises(ValueError, match="^logits: .*diverged"):
            decode(logits)


# ---- the check that people run on their machines


@pytest.mark.parametrize("backend", [name for name in BACKENDS if name != "numpy"])
def test_the_ragged_check_sees_a_state_that_reaches_the_weights(backend, monkeypatch):
    ops = gpurnn.get_backend(backend_of(backend))
    for module in (gpurnn.recurrent.forward, gpurnn.recurrent.backward):
        monkeypatch.setattr(module, "zero_unused", lambda layer, states, lengths: states)
    assert not check.check_ragged("lstm", ops, "float32")[0] <= 1


def test_the_other_checks_see_padding_that_reaches_the_weights(monkeypatch):
    monkeypatch.setattr(gpurnn.Sequential, "_without_absent", lambda self, x, given: x)
    worst, _ = check.check_other("padding in front", "cpu", "float32")[0]
    assert not worst <= 1
