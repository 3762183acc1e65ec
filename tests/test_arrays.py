"""How arrays from outside come in: what is converted, what is copied, what is refused, on every backend."""

import numpy as np
import pytest
from helpers import BACKENDS, assert_close, backend_of, host, values

import gpurnn
from gpurnn.testing import count_terms

rng = np.random.default_rng(5)


def swapped(array):
    """The same numbers with the other byte order."""
    return array.astype(array.dtype.newbyteorder())


def in_a_record(array):
    """The same numbers as a field of packed records: strides are no multiple of the number's size."""
    records = np.zeros(array.shape, np.dtype([("flag", "u1"), ("value", array.dtype)]))
    records["value"] = array
    return records["value"]


def every_other(array):
    """The same numbers with a gap after each of them."""
    spaced = np.full((*array.shape[:-1], 2 * array.shape[-1]), 99, array.dtype)
    spaced[..., ::2] = array
    return spaced[..., ::2]


def misplaced(array):
    """The same numbers at addresses that are no multiple of their size, C-contiguous."""
    memory = np.zeros(array.nbytes + 1, np.uint8)
    memory[1:] = np.frombuffer(array.tobytes(), np.uint8)
    return memory[1:].view(array.dtype).reshape(array.shape)


def backwards(array):
    """The same numbers, stored in reverse order."""
    return np.ascontiguousarray(array[..., ::-1])[..., ::-1]


ODD = [swapped, in_a_record, every_other, misplaced, backwards, np.asfortranarray]


def linear(ops):
    return gpurnn.Linear(6, 5, backend=ops, seed=1)


LAYERS = {
    "Linear": linear,
    "LSTM": lambda ops: gpurnn.LSTM(6, 5, backend=ops, seed=1),
    "GRU": lambda ops: gpurnn.GRU(6, 5, backend=ops, seed=1, reset_after=False),
    "LayerNorm": lambda ops: gpurnn.LayerNorm(6, backend=ops, seed=1),
    "BatchNorm": lambda ops: gpurnn.BatchNorm(6, backend=ops, seed=1),
    "Dropout": lambda ops: gpurnn.Dropout(0.5, backend=ops, seed=1),
    "Pooling": lambda ops: gpurnn.Pooling(6, "attention", backend=ops, seed=1),
}


@pytest.mark.parametrize("odd", ODD)
@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_layers_read_the_numbers_whatever_their_place(backend, kind, odd):
    if backend == "cuda" and odd not in (swapped, in_a_record):
        pytest.skip("the copy to the device makes all of these alike")
    ops = backend_of(backend)
    x, results = values((40, 8, 6) if backend != "cuda" else (5, 8, 6)), []
    dy = None
    for change in (lambda array: array, odd):
        layer = LAYERS[kind](ops)
        y, *_, backward = layer.forward(change(x))
        dy = values(y.shape) if dy is None else dy
        dx = backward(change(dy))
        dx = dx[0] if isinstance(dx, tuple) else dx
        results.append([host(a) for a in (y, dx, layer.flat_grads)])
    for got, expected in zip(results[1], results[0], strict=True):  # two orders of each sum
        assert_close(got, expected, 2 * count_terms(layer, len(x)), dtype="float32")


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.emulated
def test_layers_read_device_arrays_of_any_strides(kind):
    ops = backend_of("cuda")
    x, results = values((6, 8, 6)), []
    for plain in (True, False):
        layer = LAYERS[kind](ops)
        given = ops.xp.asarray(x)
        if not plain:
            whole = ops.xp.zeros((6, 8, 12), "float32")
            whole[..., ::2] = given
            given = whole[..., ::2]
            assert given.strides[2] == 8
        y, *_, backward = layer.forward(given)
        dy = ops.xp.zeros((*y.shape[:-1], 2 * y.shape[-1]), "float32")
        dy[..., ::2] = y
        dx = backward(y if plain else dy[..., ::2])
        dx = dx[0] if isinstance(dx, tuple) else dx
        results.append([host(a) for a in (y, dx, layer.flat_grads)])
    for got, expected in zip(results[1], results[0], strict=True):  # two orders of each sum
        assert_close(got, expected, 2 * count_terms(layer, len(x)), dtype="float32")


@pytest.mark.parametrize("odd", ODD)
@pytest.mark.parametrize("dtype", ["float32", "float64", "float16"])
def test_losses_read_the_numbers_whatever_their_place(dtype, odd):
    x, y = (values((7, 4, 9)).astype(dtype) for _ in range(2))
    targets = rng.integers(0, 9, (7, 4))

    def check(plain, other):
        (loss, backward), (odd_loss, odd_backward) = plain, other
        # two orders of the sum over 7 x 4 x 9 numbers; derivatives are each of a row of 9
        wide = gpurnn.dtypes.compute_dtype(np.dtype(dtype)).name
        assert_close(odd_loss, loss, 2 * 7 * 4 * 9, dtype=wide)
        assert_close(odd_backward(), backward(), 2 * 9, dtype=dtype)
        assert odd_backward().dtype.isnative

    for smoothing in (0.0, 0.1):
        plain = gpurnn.cross_entropy(x, targets, label_smoothing=smoothing)
        check(plain, gpurnn.cross_entropy(odd(x), odd(targets), label_smoothing=smoothing))
    check(gpurnn.mse(x, y), gpurnn.mse(odd(x), odd(y)))
    check(gpurnn.mae(x, y), gpurnn.mae(odd(x), odd(y)))
    sure = gpurnn.binary_cross_entropy_with_logits
    check(sure(x, y), sure(odd(x), odd(y)))
    labels = rng.integers(1, 9, (4, 2))
    check(gpurnn.ctc_loss(x, labels), gpurnn.ctc_loss(odd(x), odd(labels)))
    assert gpurnn.accuracy(x, targets) == gpurnn.accuracy(odd(x), odd(targets))


def test_masks_lengths_and_states_of_the_other_byte_order():
    layer = gpurnn.LSTM(3, 4, backend="cpu", seed=1)
    x, h, c = values((5, 2, 3)), values((1, 2, 4)), values((1, 2, 4))
    lengths = np.array([3, 5])
    expected = layer(x, (h, c), lengths)[0]
    np.testing.assert_array_equal(layer(x, (swapped(h), in_a_record(c)), swapped(lengths))[0], expected)
    ids = rng.integers(0, 9, (5, 2))
    table = gpurnn.Embedding(9, 3, backend="cpu", seed=1)
    np.testing.assert_array_equal(table(swapped(ids)), table(ids))


def masked(array):
    return np.ma.MaskedArray(array, np.zeros(array.shape, bool))


X, IDS = values((5, 2, 6)), np.ones((5, 2), int)
MASKED = {
    "x": [lambda layer=make: layer("cpu")(masked(X)) for make in LAYERS.values()]
    + [lambda: gpurnn.LSTM(6, 5, backend="numpy").step(masked(X[0]))]
    + [lambda: gpurnn.LSTMCell(6, 5, backend="numpy")(masked(X[0]))]
    + [lambda: linear("cpu")([masked(X[0]), masked(X[1])])],
    "ids": [lambda: gpurnn.Embedding(9, 3)(masked(IDS))],
    "state": [lambda: gpurnn.GRU(6, 5)(X, masked(values((1, 2, 5))))],
    "doutput": [lambda: linear("cpu").forward(X)[1](masked(values((5, 2, 5))))],
    "lengths": [
        lambda: gpurnn.GRU(6, 5)(X, lengths=masked(np.array([1, 2]))),
        lambda: gpurnn.mse(X, X, lengths=masked(np.array([1, 2]))),
    ],
    "logits": [
        lambda: gpurnn.cross_entropy(masked(X), IDS),
        lambda: gpurnn.ctc_loss(masked(X), [[1], [1]]),
        lambda: gpurnn.binary_cross_entropy_with_logits(masked(X), X),
        lambda: gpurnn.accuracy(masked(X), IDS),
    ],
    "targets": [
        lambda: gpurnn.cross_entropy(X, masked(IDS)),
        lambda: gpurnn.ctc_loss(X, masked(np.ones((2, 2), int))),
        lambda: gpurnn.ctc_loss(X, [masked(np.ones(2, int)), np.ones(1, int)]),
        lambda: gpurnn.SequenceBatches([X], [masked(X)], 2),
    ],
    "target": [lambda: gpurnn.mse(X, masked(X))],
    "mask": [lambda: gpurnn.mse(X, X, mask=masked(np.ones((5, 2), bool)))],
    "dloss": [lambda: gpurnn.mse(X, X, reduction="none")[1](masked(X))],
    "inputs": [lambda: gpurnn.SequenceBatches([masked(X)], [X], 2)],
    "ids:": [lambda: gpurnn.TextBatches(masked(np.arange(9)), 2, 2)],
    "bias": [
        lambda: linear("cpu").params.__setitem__("bias", masked(values(5))),
        lambda: linear("cpu").grads.__setitem__("bias", masked(values(5))),
        lambda: linear("cpu").load_state_dict({"bias": masked(values(5))}, strict=False),
        lambda: gpurnn.save_checkpoint("nowhere/at_all.json", {"bias": masked(values(5))}, {}),
    ],
    "sequences": [lambda: gpurnn.data.pad([X, masked(X)]), lambda: gpurnn.data.pad(masked(X))],
    "source": [lambda: gpurnn.EncoderDecoder(9, 9, 4)((masked(IDS), IDS))],
    "queries": [lambda: gpurnn.Attention(6, 6)(masked(X), X)],
    "memory": [lambda: gpurnn.Attention(6, 6)(X, masked(X))],
}


@pytest.mark.parametrize("name", MASKED)
def test_masked_arrays_are_refused_with_what_to_do(name):
    for call in MASKED[name]:
        with pytest.raises(gpurnn.DtypeError, match=f"^{name}.*masked array.*filled.*lengths=") as caught:
            call()
        assert "mask" in str(caught.value)


def test_matrices_count_as_plain_arrays():
    x = values((4, 6))
    with pytest.warns(PendingDeprecationWarning):
        matrix = np.matrix(x)
    for layer in (linear("numpy"), gpurnn.LayerNorm(6), gpurnn.Dropout(0.5, seed=1)):
        np.testing.assert_array_equal(layer.eval()(matrix), layer(x))
        assert type(layer(matrix)) is np.ndarray


def test_a_training_run_takes_any_byte_order_and_no_masked_arrays():
    class Source:
        def __init__(self, inputs, targets):
            self.changes = inputs, targets

        def __len__(self):
            return 1

        def batch(self, epoch, index):
            return gpurnn.Batch(*(change(array) for change, array in zip(self.changes, (X, X[..., :5]), strict=True)))

    model = linear("cpu")

    def run(*changes):
        data, optimizer = Source(*changes), gpurnn.SGD(model, 0.0)
        return gpurnn.fit(model, gpurnn.mse, data, optimizer=optimizer, epochs=1, progress=False)

    assert run(swapped, swapped)[-1]["train_loss"] == run(np.array, np.array)[-1]["train_loss"]
    with pytest.raises(gpurnn.DtypeError, match="inputs.*masked array"):
        run(masked, np.array)
    with pytest.raises(gpurnn.DtypeError, match="targets.*masked array"):
        run(np.array, masked)


@pytest.mark.emulated
@pytest.mark.parametrize("schedule", ["step", "auto"])
def test_more_sequences_than_a_launch_takes_are_refused_by_name(schedule):
    ops = backend_of("cuda")
    layer = gpurnn.LSTM(1, 300, num_layers=2, dropout=0.5, backend=ops, schedule=schedule, seed=1)
    x = np.broadcast_to(np.zeros((1, 1, 1), "float32"), (1, 262_141, 1))
    with pytest.raises(gpurnn.ShapeError, match=r"x: B = 262141 .*262140.*split the batch"):
        layer.forward(x)
    assert layer.calls == 0
    with pytest.raises(gpurnn.ShapeError, match=r"x: B = 262141 .*262140.*split the batch"):
        layer.plan(1, 262_141)


@pytest.mark.parametrize("backend", BACKENDS)
def test_sizes_that_kernels_cannot_count_are_refused_by_name(backend):
    ops = gpurnn.get_backend(backend_of(backend))
    for name, sizes in (("T", (1 << 31, 1)), ("B", (1, 1 << 31))):
        if ops.name == "numpy":  # array code counts as far as memory goes
            ops.refuse_sizes(*sizes, tuple)
            continue
        with pytest.raises(gpurnn.ShapeError, match=f"x: {name} = 2147483648 "):
            ops.refuse_sizes(*sizes, tuple)
        with pytest.raises(gpurnn.ShapeError, match=f"x: {name} = 2147483648 "):
            gpurnn.LSTM(1, 1, backend=ops, seed=1).plan(*sizes)
    if ops.name == "cpu":
        x = np.broadcast_to(np.zeros((1, 1, 1), "float32"), (1 << 31, 1, 1))
        with pytest.raises(gpurnn.ShapeError, match="x: T = 2147483648 "):
            gpurnn.RNN(1, 1, backend=ops, seed=1)(x)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_tensor_with_a_graph_is_refused_with_what_to_do(backend):
    torch = pytest.importorskip("torch")
    ops = backend_of(backend)
    layer, lstm = linear(ops), gpurnn.LSTM(6, 5, backend=ops)
    x = torch.tensor(X, requires_grad=True)
    for call, name in (
        (lambda: layer(x), "x"), (lambda: lstm.forward(x), "x"), (lambda: layer(x * 2), "x"),
        (lambda: gpurnn.mse(x, X), "prediction"), (lambda: gpurnn.cross_entropy(x, IDS), "logits"),
        (lambda: gpurnn.mse(X, x), "target"), (lambda: layer.forward(X)[1](x[..., :5]), "doutput"),
        (lambda: lstm(X, (x[:1, :, :5], x[:1, :, :5])), "state"),
        (lambda: layer.params.__setitem__("weight", torch.nn.Linear(6, 5).weight), "weight"),
        (lambda: layer.params.__setitem__("bias", x[0, 0, :5]), "bias"),
        (lambda: layer.grads.__setitem__("bias", x[0, 0, :5] * 2), "bias"),
        (lambda: gpurnn.save_checkpoint("nowhere/at_all.json", {"w": x}, {}), "w"),
    ):  # fmt: skip
        with pytest.raises(TypeError, match=rf"^{name}.*requires grad.*Give \w+.detach\(\)"):
            call()
    np.testing.assert_array_equal(host(layer(x.detach())), host(layer(X)))
    state = torch.nn.Linear(6, 5).state_dict(keep_vars=True)
    assert state["weight"].requires_grad
    layer.load_state_dict(state)


def test_a_gradient_is_written_only_where_it_may_be():
    logits, targets = values((5, 2, 9)), rng.integers(0, 9, (5, 2))
    _, backward = gpurnn.cross_entropy(logits, targets)
    expected = backward()
    for change in (misplaced, every_other):
        out = change(np.zeros_like(logits))
        np.testing.assert_array_equal(backward(out=out), expected)
    read_only = np.zeros_like(logits)
    read_only.flags.writeable = False
    with pytest.raises(ValueError, match="^out: expected an array that may be written to"):
        backward(out=read_only)
    assert not read_only.any()
    with pytest.raises(gpurnn.DtypeError, match="^out: expected an array of float32"):
        backward(out=swapped(logits))
