"""Packing: where sequences go, and that a packed batch is what its sequences are one by one."""

import numpy as np
import pytest
from helpers import assert_close, backend_of
from optional import given, needs, optional

import gpurnn
from gpurnn import GRU, LSTM, RNN, DtypeError, Pooling, Sequential, ShapeError
from gpurnn.data import pack, unpack
from gpurnn.testing import count_terms

st = optional("hypothesis.strategies")


def sequences_of(lengths, *shape, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.standard_normal((n, *shape)) for n in lengths]


# ---- where they go


@pytest.mark.parametrize(
    "lengths, T, rows, firsts",
    [
        ([3, 2, 5, 1, 4], 6, [2, 1, 0, 0, 1], [0, 4, 0, 5, 0]),
        ([3, 2, 5, 1, 4], None, [2, 2, 0, 1, 1], [0, 3, 0, 4, 0]),
        ([4, 4, 4], 4, [0, 1, 2], [0, 0, 0]),
        ([2, 2, 2], 7, [0, 0, 0], [0, 2, 4]),
        ([1], None, [0], [0]),
    ],
)
def test_first_fit_decreasing(lengths, T, rows, firsts):
    packed, reset, mask, where = pack(sequences_of(lengths, 2), T)
    assert where.rows.tolist() == rows and where.firsts.tolist() == firsts and where.lengths.tolist() == lengths
    B, T = max(rows) + 1, T or max(lengths)
    assert packed.shape == (T, B, 2) and reset.shape == mask.shape == (T, B) and where.shape == (T, B)
    assert where.filled == sum(lengths) / (T * B) == mask.mean()
    begins = np.zeros((T, B), bool)
    begins[firsts, rows] = True
    np.testing.assert_array_equal(reset, begins)


def first_fit(lengths, T):
    """By the definition, in O(N^2)."""
    room, rows, firsts = [], {}, {}
    for n in sorted(range(len(lengths)), key=lambda n: -lengths[n]):
        row = next((b for b, free in enumerate(room) if free >= lengths[n]), len(room))
        room += [T] * (row == len(room))
        rows[n], firsts[n] = row, T - room[row]
        room[row] -= lengths[n]
    return [rows[n] for n in range(len(lengths))], [firsts[n] for n in range(len(lengths))]


@pytest.mark.long
@needs("hypothesis")
@given(
    lambda: st.lists(st.integers(1, 9), min_size=1, max_size=40),
    lambda: st.integers(0, 6),
    lambda: st.booleans(),
    max_examples=300,
)
def test_every_pattern_is_packed_and_unpacked(lengths, more, batch_first):
    T = max(lengths) + more
    tokens = [np.arange(n, dtype=np.int32) + 100 * k + 1 for k, n in enumerate(lengths)]
    packed, reset, mask, where = pack(tokens, T, batch_first=batch_first)
    rows, firsts = first_fit(lengths, T)
    assert where.rows.tolist() == rows and where.firsts.tolist() == firsts
    assert packed.dtype == np.int32 and packed.flags.c_contiguous and mask.flags.c_contiguous
    for part, begins, one in zip(unpack(packed, where), unpack(reset, where), tokens, strict=True):
        np.testing.assert_array_equal(part, one)
        assert begins[0] and not begins[1:].any()
    assert (packed != 0).sum() == mask.sum() == sum(lengths) and ((packed != 0) == mask).all()
    assert reset.sum() == len(lengths)
    row_first = (packed if batch_first else packed.T)[mask if batch_first else mask.T]  # row by row, in time
    np.testing.assert_array_equal(np.concatenate([tokens[n] for n in where.order]), row_first)


@pytest.mark.parametrize("dtype", ["float32", "float16", "int64", "uint8"])
def test_rows_have_the_dtype_of_the_sequences(dtype):
    shape = (2, 3) if dtype == "float32" else ()
    assert pack([np.ones((n, *shape), dtype) for n in (2, 4)])[0].dtype == dtype


def test_lists_are_taken():
    assert pack([[1, 2], [3]], 3)[0].tolist() == [[1], [2], [3]]


@pytest.mark.parametrize(
    "make, error, message",
    [
        (lambda: pack([]), ValueError, "^sequences: expected at least one sequence"),
        (
            lambda: pack(sequences_of([2, 7, 3], 2), 5),
            ShapeError,
            r"^sequences\[1\]: expected at most T = 5.*got 7. Cut",
        ),
        (lambda: pack(sequences_of([6, 7, 3], 2), 5), ShapeError, r"^sequences\[1\]: .*got 7, and 1 more are longer"),
        (
            lambda: pack(sequences_of([2, 0], 2)),
            ShapeError,
            r"^sequences\[1\]: expected at least one timestep, got none",
        ),
        (lambda: pack([np.ones(3), np.ones((3, 1))]), ShapeError, r"^sequences\[1\]: expected shape \('T_n',\), as"),
        (
            lambda: pack([np.ones(3), np.ones(3, int)]),
            DtypeError,
            r"^sequences\[1\]: expected float64, as sequences\[0\]",
        ),
        (lambda: pack([1.0, 2.0]), ShapeError, r"^sequences\[0\]: expected an array"),
        (lambda: pack([[1]], 0), ValueError, "^T "),
        (lambda: pack([[1]], batch_first=1), TypeError, "batch_first"),
        (lambda: unpack(np.ones((3, 2)), pack([[1, 2]]).where), ShapeError, r"^output: expected .T, B, ...*\(2, 1\)"),
    ],
)
def test_what_cannot_be_packed(make, error, message):
    with pytest.raises(error, match=message):
        make()


# ---- a packed batch is its sequences one by one

LENGTHS = [5, 1, 3, 9, 2, 2, 4, 1, 6]
LAYERS = {
    "lstm": lambda **o: LSTM(3, 4, **o),
    "lstm, two layers, two directions": lambda **o: LSTM(3, 4, num_layers=2, bidirectional=True, learn_state=True, **o),
    "gru, two directions": lambda **o: GRU(3, 5, bidirectional=True, **o),
    "rnn, reverse": lambda **o: RNN(3, 4, reverse=True, learn_state=True, **o),
    "stack": lambda **o: Sequential(
        gpurnn.Linear(3, 4, **o), GRU(4, 3, **o), gpurnn.LayerNorm(3, **o), LSTM(3, 2, proj_size=1, **o)
    ),
}


def one_by_one(layer, sequences, doutputs):
    """Outputs, final states and dx of each sequence alone, and the sum of the gradients."""
    layer.zero_grad()
    found = []
    for x, dy in zip(sequences, doutputs, strict=True):
        y, state, backward = layer.forward(x[:, None])
        found.append((y[:, 0], state, backward(dy[:, None])[0][:, 0]))
    return *zip(*found, strict=True), {name: gradient.copy() for name, gradient in layer.grads.items()}


def check_packed(layer, lengths, T, seed=0):
    """Compare one packed call with calls one by one; NaN stands where nothing does."""
    sequences = sequences_of(lengths, 3, seed=seed)
    rows, reset, mask, where = pack(sequences, T)
    doutput = np.random.default_rng(seed + 1).standard_normal(layer(rows)[0].shape)
    outputs, _, dxs, gradients = one_by_one(layer, sequences, unpack(doutput, where))
    rows[~mask], doutput[~mask] = np.nan, np.nan
    layer.zero_grad()
    y, state, backward = layer.forward(rows, reset=reset, mask=mask)
    dx, _ = backward(doutput)
    terms = count_terms(layer, sum(lengths))
    for got, wanted in ((y, outputs), (dx, dxs)):
        for n, part in enumerate(unpack(got, where)):
            assert_close(part, wanted[n], terms, f"sequence {n}")
    for name, gradient in gradients.items():
        assert_close(layer.grads[name], gradient, terms, name)
    return where, state


@pytest.mark.parametrize("backend", ["numpy", "cpu"])
@pytest.mark.parametrize("T", [None, 12, 40])
@pytest.mark.parametrize("name", LAYERS)
def test_a_packed_batch_is_its_sequences_one_by_one(name, T, backend):
    layer = LAYERS[name](backend=backend_of(backend), dtype="float64", seed=1)
    layer.flat_params += 0.3 * np.random.default_rng(9).standard_normal(layer.flat_params.shape)
    check_packed(layer, LENGTHS, T)


@pytest.mark.parametrize("backend", ["numpy", "cpu"])
def test_the_state_is_that_of_the_last_sequence_of_a_row(backend):
    """Of the first one in the reverse direction."""
    gru = GRU(3, 4, bidirectional=True, backend=backend_of(backend), dtype="float64", seed=1)
    where, state = check_packed(gru, LENGTHS, 12)
    for b in range(where.shape[1]):
        row = np.flatnonzero(where.rows == b)
        for d, n in enumerate((row[where.firsts[row].argmax()], row[where.firsts[row].argmin()])):
            alone = gru(sequences_of(LENGTHS, 3)[n][:, None])[1]
            assert_close(state[d, b], alone[d, 0], count_terms(gru, 12))


@pytest.mark.long
@needs("hypothesis")
@given(
    lambda: st.lists(st.integers(1, 5), min_size=1, max_size=6),
    lambda: st.integers(0, 4),
    lambda: st.sampled_from([LSTM, GRU, RNN]),
    lambda: st.booleans(),
    lambda: st.sampled_from(["numpy", "cpu"]),
    max_examples=200,
)
def test_every_pattern_is_its_sequences_one_by_one(lengths, more, cell, bidirectional, backend):
    layer = cell(3, 2, bidirectional=bidirectional, backend=backend_of(backend), dtype="float64", seed=len(lengths))
    check_packed(layer, lengths, max(lengths) + more, seed=more)


@pytest.mark.parametrize("mode, directions", [("last", 2), ("mean", 1), ("max", 1), ("attention", 1)])
def test_pooled_vectors_have_the_order_of_packing(mode, directions):
    o = {"backend": "cpu", "dtype": "float64", "seed": 1}
    model = Sequential(LSTM(3, 2, bidirectional=True, **o), Pooling(4, mode, directions, **o))
    sequences = sequences_of(LENGTHS, 3)
    rows, reset, mask, where = pack(sequences, 12)
    y, _ = model(rows, reset=reset, mask=mask)
    alone = np.concatenate([model(one[:, None])[0] for one in sequences])
    assert_close(y, alone[where.order], count_terms(model, 12))
