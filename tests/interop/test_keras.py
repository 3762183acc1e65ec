"""Models of Keras as gpurnn's and back, against Keras itself: layers in memory, files, masks, what is refused."""

import json
import zipfile

import numpy as np
import pytest
from helpers import assert_close, cuda_ops
from keras_models import call, drawn, fill, keras, random_layer, random_mask
from optional import needs, optional

import gpurnn
from gpurnn.errors import FileError
from gpurnn.interop.keras import Merge, export_keras, import_keras, load_keras_weights, to_keras
from gpurnn.testing import count_terms

pytestmark = [needs("keras"), needs("h5py"), needs("torch")]
pytestmark += [pytest.mark.filterwarnings("ignore::UserWarning")]  # Keras, of masks and layers that are built by hand
torch = optional("torch")
KW = {"backend": "numpy", "seed": 1}
RANDOM = 16  # layers; 200 were tried by hand
LOOPS = ("SimpleRNN", "LSTM", "GRU", "RNN", "Bidirectional")


def output(model, x, mask=None):
    """That of a gpurnn model, without the state."""
    y = model(x, mask=mask)
    return y[0] if model.stateful else y


def close(model, got, expected, T=1):
    """Equal up to the roundings of a model's sums in float32: Keras's constants are float32 in other dtypes, too."""
    assert_close(got.astype(expected.dtype), expected, count_terms(model, T), dtype="float32")


def random_ids(rng, B=4, T=6, V=7):
    return rng.integers(0, V, (B, T))


# ---- in memory


@pytest.mark.parametrize("seed", range(RANDOM))
def test_random_layers(seed):
    """Both ways, with and without masks with holes."""
    rng = np.random.default_rng(seed)
    dtype, T = drawn(rng, ["float32", "float64"]), int(rng.integers(1, 8))
    layer = random_layer(rng, dtype)
    x = rng.standard_normal((3, T, 3)).astype(dtype)
    ours, kind = import_keras(layer, backend="numpy"), type(layer).__name__
    masks = [None, random_mask(rng, 3, T)] if kind in LOOPS else [None]
    for mask in masks:
        expected = call(layer, x, mask)
        close(ours, output(ours, x, mask), expected, T)
        assert not ours.training and ours.dtype == dtype
    if kind not in ("Activation", "Dropout", "SpatialDropout1D"):
        again = to_keras(ours)
        x = x[:, 0] if len(again.input_shape) == 2 else x
        for mask in masks:
            close(ours, call(again, x, mask), call(layer, x, mask), T)
        if kind in (*LOOPS, "Dense"):
            for first, second in zip(layer.get_weights(), again.get_weights(), strict=True):
                assert np.array_equal(first, second)


OURS = {
    "lstm": ("LSTM", {"num_layers": 2, "bidirectional": True, "dropout": 0.3}),
    "gru": ("GRU", {"num_layers": 2, "hidden_size": [4, 6]}),
    "gru, original": ("GRU", {"reset_after": False, "bidirectional": True}),
    "rnn": ("RNN", {"nonlinearity": "relu", "bias": False}),
    "activations": ("LSTM", {"activation": "softsign", "recurrent_activation": "hard_sigmoid"}),
    "dropout": ("GRU", {"recurrent_dropout": 0.2, "recurrent_dropout_each": "sequence", "masked_output": "repeat"}),
    "training alone": ("LSTM", {"recurrent_dropout": 0.2, "weight_dropout": 0.1, "gradient_clip": 1.0}),
    "heads": ("LSTM", {"heads": 3, "bidirectional": True}),
    "time-major": ("GRU", {"batch_first": False}),
    "float64": ("LSTM", {"dtype": "float64"}),
}


@pytest.mark.parametrize("name", OURS)
def test_layers_of_ours(name):
    """With both biases drawn, which Keras adds up where it has one."""
    kind, given = OURS[name]
    rng = np.random.default_rng(3)
    layer = getattr(gpurnn, kind)(**{"input_size": 3, "hidden_size": 6, "batch_first": True, **given}, **KW).eval()
    x, mask = rng.standard_normal((4, 5, 3)).astype(layer.dtype), random_mask(rng, 4, 5)
    for given_mask in (None, mask):
        here = [one if layer.batch_first or one is None else one.swapaxes(0, 1) for one in (x, given_mask)]
        y = layer(here[0], mask=here[1])[0]
        close(layer, y if layer.batch_first else y.swapaxes(0, 1), call(to_keras(layer), x, given_mask), 5)


@pytest.mark.parametrize("layers", [1, 3])
def test_reversed_layers(layers):
    """One in reverse, and several, which are one time loop of several cells in Keras; the dropout of Keras is ours."""
    L, rng = keras.layers, np.random.default_rng(layers)
    cells = [L.LSTMCell(4, dropout=0.1), L.GRUCell(3, dropout=0.2), L.SimpleRNNCell(2)][:layers]
    loop = L.RNN(cells if layers > 1 else cells[0], go_backwards=True)
    loop.build((None, None, 3))
    fill(loop, rng)
    x, mask = rng.standard_normal((4, 6, 3)).astype("float32"), random_mask(rng, 4, 6)
    ours = import_keras(loop, backend="numpy")
    assert all(layer.reverse for layer in ours if layer.stateful) and sum(layer.stateful for layer in ours) == layers
    again = to_keras(ours)
    if layers > 1:
        assert [cell.dropout for cell in again.layers[1].cell.cells] == [0.0, 0.2, 0.0]
    for given in (None, mask):
        close(ours, output(ours, x, given), call(loop, x, given), 6)
        close(ours, call(again, x, given), call(loop, x, given), 6)


def test_rates_and_what_does_not_train():
    L, rng = keras.layers, np.random.default_rng(0)
    model = keras.Sequential([
        keras.Input((None, 3)),
        L.Bidirectional(L.GRU(4, dropout=0.1, recurrent_dropout=0.2, return_sequences=True)),
        L.SpatialDropout1D(0.3), L.Dropout(0.4), L.Dropout(0.5, noise_shape=(None, 1, None)),
        L.BatchNormalization(momentum=0.9, epsilon=0.01, scale=False), L.LayerNormalization(scale=False),
        L.Dense(2, trainable=False),
    ])  # fmt: skip
    fill(model, rng)
    ours = import_keras(model, backend="numpy")
    first, loop, spatial, plain, shaped, norm, layer_norm, _ = ours
    assert (loop.recurrent_dropout, loop.recurrent_dropout_each) == (0.2, "sequence")
    drops = [(one.rate, one.variational) for one in (first, spatial, plain, shaped)]
    assert drops == [(0.1, True), (0.3, True), (0.4, False), (0.5, True)]
    assert (norm.momentum, norm.eps, layer_norm.eps) == (0.1, 0.01, 1e-3)
    still = [(name.partition("_")[0][:5], name.partition(".")[2]) for name in ours.frozen]
    assert still == [("batch", "weight"), ("layer", "weight"), ("dense", "weight"), ("dense", "bias")]
    again = keras.saving.deserialize_keras_object(keras.saving.serialize_keras_object(to_keras(ours)))
    rates = [getattr(one, "rate", None) for one in again.layers]
    assert rates[:1] + rates[2:5] == [0.1, 0.3, 0.4, 0.5]
    assert again.layers[5].momentum == 0.9 and again.layers[1].forward_layer.recurrent_dropout == 0.2


@pytest.mark.parametrize(
    "policy, dtype",
    [("float16", "float16"), ("mixed_float16", "float16"), ("bfloat16", "bfloat16"), ("mixed_bfloat16", "bfloat16")],
)
def test_16_bit_policies(policy, dtype, tmp_path):
    """In memory and in a file; the values of the weights stay what they are."""
    rng, options = np.random.default_rng(0), {"dtype": policy, "return_sequences": True, "name": "gru"}
    layer = keras.layers.GRU(4, recurrent_initializer="zeros", **options)  # torch has no orthogonal one in 16 bits
    model = keras.Sequential([keras.Input((None, 3)), layer])
    fill(model, rng)
    model.save(tmp_path / "model.keras")
    ours, read = (import_keras(one, backend="numpy") for one in (model, tmp_path / "model.keras"))
    assert str(ours.dtype) == dtype == str(read.dtype)
    kernel = np.asarray(model.get_weights()[0], np.float32)
    for one in (ours, read):
        assert np.array_equal(np.sort(one.params["gru.weight_ih_l0"].ravel()), np.sort(kernel.ravel()))
    assert to_keras(ours).layers[0].dtype_policy.name == f"mixed_{dtype}"


# ---- masks


def masked_model(kind, functional):
    """A model that makes its masks, with everything behind them. kind: "ids", or the value that Masking skips."""
    L = keras.layers
    layers = [
        L.Embedding(7, 4, mask_zero=True) if kind == "ids" else L.Masking(kind),
        L.SpatialDropout1D(0.2), L.LSTM(4, return_sequences=True), L.BatchNormalization(),
        L.Dense(5, activation="relu"), L.Bidirectional(L.GRU(3, return_sequences=True), merge_mode="ave"),
        L.LayerNormalization(), L.RNN(L.StackedRNNCells([L.GRUCell(3), L.LSTMCell(2)])), L.Dense(2),
    ]  # fmt: skip
    entry = keras.Input((None,), dtype="int32") if kind == "ids" else keras.Input((None, 3))
    if not functional:
        return keras.Sequential([entry, *layers])
    x = entry
    for layer in layers:
        x = layer(x)
    return keras.Model(entry, x)


@pytest.mark.long
@pytest.mark.parametrize("functional", [False, True])
@pytest.mark.parametrize("kind", ["ids", 0.5])
def test_masks_from_the_data(kind, functional, tmp_path):
    """Masking and mask_zero: in memory, in files, and back; with a mask given in addition; streaming."""
    model, rng = masked_model(kind, functional), np.random.default_rng(functional)
    fill(model, rng)
    x = random_ids(rng)
    if kind != "ids":
        x = np.where((x == 0)[..., None], np.float32(kind), rng.standard_normal((4, 6, 3)).astype("float32"))
        x[2] = kind
    model.save(tmp_path / "model.keras")
    live, read = import_keras(model, backend="numpy"), import_keras(tmp_path / "model.keras", backend="numpy")
    expected = call(model, x)
    for ours in (live, read):
        close(ours, output(ours, x), expected, 6)
        assert all(np.array_equal(array, live.params[name]) for name, array in ours.params.items())
    close(live, call(to_keras(live), x), expected, 6)
    export_keras(live, tmp_path / "again.keras")
    close(live, call(keras.saving.load_model(tmp_path / "again.keras"), x), expected, 6)
    cut = np.ones((4, 6), bool)
    cut[:, 4:] = False
    close(live, output(live, x, cut), call(model, x[:, :4]), 6)


def test_streaming_with_masks():
    L, rng = keras.layers, np.random.default_rng(0)
    model = keras.Sequential([keras.Input((None,)), L.Embedding(4, 3, mask_zero=True), L.GRU(5, return_sequences=True)])
    fill(model, rng)
    ours, ids, state = import_keras(model, backend="numpy"), random_ids(rng, V=4), None
    whole, steps = output(ours, ids), []
    for t in range(ids.shape[1]):
        y, state = ours.step(ids[:, t], state)
        steps.append(y)
    close(ours, np.stack(steps, 1), whole, 6)


def test_gradients_through_masks():
    """Those of all weights, against Keras on torch."""
    L, rng = keras.layers, np.random.default_rng(0)
    model = keras.Sequential([
        keras.Input((None,)), L.Embedding(7, 4, mask_zero=True, name="table"),
        L.LSTM(4, return_sequences=True, zero_output_for_mask=True, name="low"),
        L.Bidirectional(L.GRU(3), name="both"), L.Dense(2, activation="silu", name="head"),
    ])  # fmt: skip
    fill(model, rng)
    ids, weight = random_ids(rng), rng.standard_normal((4, 2)).astype("float32")
    (model(ids, training=False) * torch.from_numpy(weight)).sum().backward()
    ours = import_keras(model, backend="numpy")
    _, _, backward = ours.forward(ids)
    backward(weight)
    theirs = [variable.value.grad for variable in model.weights]
    names = {"table.weight": 0, "low.weight_ih_l0": 1, "low.weight_hh_l0": 2, "low.bias_ih_l0": 3, "head.weight": 10}
    for name, number in names.items():
        expected = theirs[number].numpy() if number == 0 else theirs[number].numpy().T
        assert_close(ours.grads[name], expected, count_terms(ours, 6), name, dtype="float32")
    bias = ours.grads["both.bias_hh_l0_reverse"].reshape(3, 3)[[1, 0, 2]].ravel()
    assert_close(bias, theirs[9][1].numpy(), count_terms(ours, 6), dtype="float32")


# ---- files


def everything(rng):
    """A model of all kinds of layers, with weights."""
    L = keras.layers
    inner = keras.Sequential(
        [keras.Input((None, 8)), L.GRU(4, return_sequences=True, reset_after=False), L.GRU(3, return_sequences=True)]
    )
    model = keras.Sequential([
        keras.Input((None,)), L.Embedding(7, 4), L.Dropout(0.1), L.Bidirectional(L.LSTM(4, return_sequences=True)),
        inner, L.LayerNormalization(), L.SimpleRNN(4, return_sequences=True), L.BatchNormalization(center=False),
        L.LSTM(3, return_sequences=True, use_bias=False), L.ReLU(), L.Activation("silu"), L.GlobalAveragePooling1D(),
        L.Dense(3, activation="softmax"), L.Dense(2, use_bias=False), L.Softmax(),
    ])  # fmt: skip
    fill(model, rng)
    return model


def test_files_both_ways(tmp_path):
    rng = np.random.default_rng(0)
    model, ids = everything(rng), random_ids(rng)
    model.save(tmp_path / "model.keras")
    model.save_weights(tmp_path / "model.weights.h5")
    expected, ours = call(model, ids), import_keras(str(tmp_path / "model.keras"), backend="numpy")
    close(ours, output(ours, ids), expected, 6)
    assert [name.partition("_")[0] for name in ours.children][:4] == ["embedding", "dropout", "bidirectional", "gru"]

    export_keras(ours, tmp_path / "again.keras")
    again = keras.saving.load_model(tmp_path / "again.keras")
    close(ours, call(again, ids), expected, 6)
    export_keras(ours, tmp_path / "again.weights.h5")
    again.set_weights([np.zeros_like(array) for array in again.get_weights()])
    again.load_weights(tmp_path / "again.weights.h5")
    close(ours, call(again, ids), expected, 6)

    flat = import_keras(tmp_path / "again.keras", backend="numpy", batch_first=False)
    close(ours, output(flat, ids.T), expected, 6)
    for name in ("again.weights.h5", "again.keras"):
        fresh = import_keras(tmp_path / "again.keras", backend="numpy")
        fresh.flat_params[...] = 0
        load_keras_weights(fresh, tmp_path / name)
        assert all(
            np.array_equal(array, ours.params[key])
            for key, array in zip(fresh.params, fresh.params.values(), strict=True)
            if key in ours.params
        )
        close(ours, output(fresh, ids), expected, 6)


def test_weights_of_another_file(tmp_path):
    """The layers from one place, the arrays from another; models inside models included."""
    first, rng = everything(np.random.default_rng(0)), np.random.default_rng(1)
    first.save(tmp_path / "model.keras")
    fill(first, rng)
    first.save_weights(tmp_path / "later.weights.h5")
    ids = random_ids(rng)
    for source in (tmp_path / "model.keras", first):
        ours = import_keras(source, weights=tmp_path / "later.weights.h5", backend="numpy")
        close(ours, output(ours, ids), call(first, ids), 6)
    with pytest.raises(FileError, match="later.weights.h5: layer '.*' .GRU.: expected 3 arrays, .*, got 0"):
        import_keras(keras.layers.GRU(3), weights=tmp_path / "later.weights.h5")


def test_layers_for_each_timestep():
    L, rng = keras.layers, np.random.default_rng(0)
    wrapped = [L.Dense(4, activation="relu"), L.LayerNormalization(), L.Dropout(0.1), L.Activation("softmax")]
    model = keras.Sequential([keras.Input((5, 3)), L.GRU(3, return_sequences=True), *map(L.TimeDistributed, wrapped)])
    fill(model, rng)
    ours, x = import_keras(model, backend="numpy"), rng.standard_normal((2, 5, 3)).astype("float32")
    close(ours, output(ours, x), call(model, x), 5)
    close(ours, call(to_keras(ours), x), call(model, x), 5)


def test_equal_models_make_equal_files(tmp_path):
    model = gpurnn.Sequential(gpurnn.GRU(3, 4, **KW), gpurnn.Linear(4, 2, **KW))
    for name in ("a.keras", "b.keras"):
        export_keras(model, tmp_path / name)
    assert (tmp_path / "a.keras").read_bytes() == (tmp_path / "b.keras").read_bytes()


def test_every_place_has_its_group(tmp_path):
    """The first versions of Keras 3 look for it, in layers without arrays, too."""
    h5py = pytest.importorskip("h5py")
    layers = gpurnn.GRU(3, 4, bidirectional=True, **KW), gpurnn.Dropout(0.1, **KW), gpurnn.Linear(8, 2, **KW)
    export_keras(gpurnn.Sequential(*layers), tmp_path / "model.weights.h5")
    with h5py.File(tmp_path / "model.weights.h5") as file:
        places = [
            "bidirectional",
            "bidirectional/forward_layer",
            "bidirectional/backward_layer/cell",
            "dropout",
            "dense",
        ]
        assert "vars" in file and all(f"layers/{place}/vars" in file for place in places)


def test_weights_of_another_model(tmp_path):
    """Nothing changes, and the message names the file and the place in it."""
    export_keras(gpurnn.Sequential(gpurnn.LSTM(3, 4, **KW), gpurnn.Linear(4, 2, **KW)), tmp_path / "model.weights.h5")
    for recurrent, head, words in [
        (gpurnn.LSTM(3, 5, **KW), (5, 2), r"layers/lstm/cell: .*expected shape \(20, 3\)"),
        (gpurnn.LSTM(3, 4, **KW), (4, 3), r"layers/dense: 1.weight: expected shape \(3, 4\)"),
        (gpurnn.LSTM(3, 4, bias=False, **KW), (4, 2), "layers/lstm/cell: expected 2 arrays"),
        (gpurnn.GRU(3, 4, **KW), (4, 2), "layers/gru/cell: expected 3 arrays, .*got 0"),
        (gpurnn.LSTM(3, 4, heads=2, **KW), (4, 2), "layers/lstm/cell: heads: "),
    ]:
        other = gpurnn.Sequential(recurrent, gpurnn.Linear(*head, **KW))
        before = other.state_dict()
        with pytest.raises(FileError, match=words) as error:
            load_keras_weights(other, tmp_path / "model.weights.h5")
        assert str(error.value).startswith(str(tmp_path / "model.weights.h5"))
        assert all(np.array_equal(array, before[name]) for name, array in other.state_dict().items())


def test_a_table_with_two_uses(tmp_path):
    """A Dense of Keras has a copy; weights do not come back into two uses of one table."""
    table = gpurnn.Embedding(5, 3, **KW)
    tied = gpurnn.Sequential(table, gpurnn.GRU(3, 3, batch_first=True, **KW), gpurnn.TiedLinear(table))
    ids = random_ids(np.random.default_rng(0), V=5)
    close(tied, tied(ids)[0], call(to_keras(tied), ids), 6)
    export_keras(tied, tmp_path / "tied.weights.h5")
    with pytest.raises(FileError, match="layers/dense: a Dense has weights of its own"):
        load_keras_weights(tied, tmp_path / "tied.weights.h5")


@pytest.mark.parametrize("backend", ["cpu", pytest.param("cuda", marks=pytest.mark.emulated)])
def test_backends(backend, tmp_path):
    L, rng = keras.layers, np.random.default_rng(2)
    model = keras.Sequential([
        keras.Input((None, 3)), L.Masking(), L.Bidirectional(L.LSTM(4, return_sequences=True), merge_mode="mul"),
        L.GRU(4, go_backwards=True), L.Dense(2, activation="softmax"),
    ])  # fmt: skip
    fill(model, rng)
    model.save(tmp_path / "model.keras")
    x = rng.standard_normal((2, 4, 3)).astype("float32")
    x[0, 3] = x[1, 0] = x[1, 2] = 0
    ours = import_keras(tmp_path / "model.keras", backend=cuda_ops() if backend == "cuda" else backend)
    y, _ = ours(ours.xp.asarray(x))
    assert ours.ops.name == backend
    close(ours, ours.ops.to_numpy(y), call(model, x), 4)
    export_keras(ours, tmp_path / "again.keras")
    again = import_keras(tmp_path / "again.keras", backend="numpy")
    close(again, output(again, x), call(model, x), 4)


# ---- what is refused


def branches():
    entry = keras.Input((None, 3))
    low = keras.layers.GRU(3, return_sequences=True, name="low")(entry)
    left, right = keras.layers.Dense(3, name="left")(low), keras.layers.Dense(3, name="right")(low)
    return keras.Model(entry, keras.layers.Add()([left, right]))


def two_outputs():
    entry = keras.Input((None, 3))
    low = keras.layers.Dense(3)(entry)
    return keras.Model(entry, [low, keras.layers.Dense(3)(low)])


def state_as_input():
    entry = keras.Input((None, 3))
    _, h = keras.layers.GRU(3, return_state=True, name="low")(entry)
    return keras.Model(entry, keras.layers.Dense(3, name="head")(h))


def own_layer():
    class LSTM(keras.layers.LSTM):
        pass

    return LSTM(3)


def stack(*layers):
    return keras.Sequential([keras.Input((None, 3)), *layers])


def own_mask():
    entry = keras.Input((None, 3))
    mask = keras.ops.any(keras.ops.not_equal(entry, 2.0), axis=-1)
    return keras.Model(entry, keras.layers.GRU(3)(entry, mask=mask))


REFUSED = {
    "branches": (lambda L: branches(), r"layer 'add.*' \(Add\): expected one tensor of the model, got \["),
    "outputs": (lambda L: two_outputs(), "output_layers: gpurnn has models with one input and one output"),
    "state": (lambda L: state_as_input(), "layer 'head' .Dense.: reads another output than the first one of 'low'"),
    "mask": (lambda L: own_mask(), "layer 'not_equal.*it is not the mask of a Masking or an Embedding"),
    "own class": (lambda L: own_layer(), r"\(LSTM\): it is a class of its own"),
    "lambda": (lambda L: stack(L.Lambda(lambda x: x)), r"\(Lambda\): it has no form in gpurnn"),
    "convolution": (lambda L: stack(L.Conv1D(3, 2)), r"\(Conv1D\): it has no form in gpurnn: expected one of"),
    "activation": (lambda L: L.LSTM(3, activation="gelu"), r"\(LSTM\): activation: expected one of .*, got 'gelu'"),
    "leaky relu": (lambda L: L.GRU(3, recurrent_activation="leaky_relu"), "recurrent_activation: expected one"),
    "function": (lambda L: L.Dense(3, activation=lambda x: x), "activation: expected one of"),
    "backwards": (
        lambda L: L.GRU(3, go_backwards=True, return_sequences=True), "go_backwards with return_sequences"),
    "zero": (lambda L: L.GRU(3, zero_output_for_mask=True), "zero_output_for_mask without return_sequences"),
    "original form": (
        lambda L: L.GRU(3, reset_after=False, recurrent_dropout=0.1), r"\(GRU\): recurrent_dropout .* reset_after"),
    "for each timestep": (lambda L: L.TimeDistributed(L.BatchNormalization()), "layer: expected one of Dense"),
    "merge": (lambda L: L.Bidirectional(L.GRU(3), merge_mode=None), "merge_mode: expected one of"),
    "directions": (
        lambda L: L.Bidirectional(
            L.GRU(3), backward_layer=L.GRU(3, go_backwards=True, activation="relu")),
        "backward_layer: expected the settings of the forward layer"),
    "backward first": (
        lambda L: L.Bidirectional(L.GRU(3, go_backwards=True), backward_layer=L.GRU(3)),
        "forward_layer: go_backwards: expected False, got True"),
    "stacked directions": (
        lambda L: L.Bidirectional(L.RNN([L.GRUCell(3), L.GRUCell(2)])),
        "layer: cells on top of each other"),
    "stacked backwards": (
        lambda L: L.Bidirectional(
            L.RNN(L.GRUCell(2)), backward_layer=L.RNN([L.GRUCell(2), L.GRUCell(2)], go_backwards=True)),
        "layer: cells on top of each other"),
    "own cell": (lambda L: L.RNN(own_cell()), "cell: expected one of SimpleRNNCell, LSTMCell, GRUCell"),
    "axis": (lambda L: L.BatchNormalization(axis=1), "axis: expected -1"),
    "rms": (lambda L: L.LayerNormalization(rms_scaling=True), "rms_scaling: gpurnn has False alone, got True"),
    "noise": (lambda L: stack(L.Dropout(0.1, noise_shape=(1, None, 3))), "noise_shape: expected None or"),
    "dtypes": (
        lambda L: stack(L.GRU(3), L.Dense(2, dtype="float64")), "dtype: expected float32, as the"),
    "dtypes inside": (
        lambda L: L.RNN(L.GRUCell(3, dtype="float64")), "dtype: expected float32, as the layer around"),
    "late masking": (lambda L: stack(L.Dense(3), L.Masking()), "it has to be the first layer"),
    "largest": (
        lambda L: stack(L.Masking(), L.GlobalMaxPooling1D()), "takes the largest of masked timesteps"),
    "pooling first": (lambda L: L.GlobalAveragePooling1D(), "its number of features is not known"),
    "relu": (lambda L: stack(L.ReLU(max_value=6)), "max_value: gpurnn has None alone, got 6"),
    "sparse": (lambda L: stack(L.GlobalMaxPooling1D(keepdims=True)), "keepdims: gpurnn has False alone"),
    "adapted": (lambda L: low_rank(), "lora_rank: gpurnn has None alone, got 2"),
    "nothing": (lambda L: stack(L.Activation("linear")), "source: it has no layers"),
}  # fmt: skip


def own_cell():
    class LSTMCell(keras.layers.LSTMCell):
        pass

    return LSTMCell(3)


def low_rank():
    layer = keras.layers.Dense(3)
    layer.build((None, None, 3))
    layer.enable_lora(2)
    return layer


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused_by_name(name):
    make, words = REFUSED[name]
    model = make(keras.layers)
    if not model.built:
        model.build((None, 4, 3))
    with pytest.raises(ValueError, match=words) as error:
        import_keras(model, backend="numpy")
    assert str(error.value).startswith("source: ")


def test_other_sources(tmp_path):
    with pytest.raises(TypeError, match="source: expected a path, or a layer or model of Keras, got ndarray"):
        import_keras(np.zeros(3))
    with pytest.raises(ValueError, match=r"layer 'gru.*' \(GRU\): it has no weights yet: call it once"):
        import_keras(keras.layers.GRU(3))
    with pytest.raises(ValueError, match="holds weights alone: gpurnn.interop.keras.load_keras_weights"):
        import_keras(tmp_path / "model.weights.h5")
    with pytest.raises(FileNotFoundError):
        import_keras(tmp_path / "absent.keras")
    with pytest.raises(TypeError, match="batch_first should be True or False"):
        import_keras(tmp_path / "absent.keras", batch_first=1)


@gpurnn.cell(gates="z")
def own(ax, ah, s):
    return s.h + ax.z + ah.z


S = gpurnn.Sequential
GRU, LSTM, Linear, Pooling = gpurnn.GRU, gpurnn.LSTM, gpurnn.Linear, gpurnn.Pooling
NO_FORM = {
    "own cell": (lambda: gpurnn.Recurrent(own, 3, 4, **KW), "model: Recurrent has no form in Keras: expected one of"),
    "option": (lambda: LSTM(3, 4, peephole=True, **KW), "model: peephole: Keras has no such option, got True"),
    "norm": (lambda: S({"low": GRU(3, 4, layer_norm=True, **KW)}), "low: layer_norm: Keras has no such option"),
    "zoneout": (lambda: GRU(3, 4, zoneout=0.1, **KW), "model: zoneout: Keras has no such option, got 0.1"),
    "projection": (lambda: LSTM(3, 4, proj_size=2, **KW), "model: proj_size: Keras has no such option, got 2"),
    "activation": (lambda: GRU(3, 4, activation="hard_sigmoid_2", **KW), "activation: expected one that Keras has"),
    "reverse": (lambda: GRU(3, 4, reverse=True, **KW), "reverse: Keras gives these outputs in reverse order"),
    "repeat": (lambda: GRU(3, 4, bidirectional=True, masked_output="repeat", **KW), "masked_output: Keras gives"),
    "pooling": (lambda: S(GRU(3, 4, bidirectional=True, **KW), Pooling(8, **KW)), "1: Pooling has a form in Keras"),
    "far pooling": (lambda: S(Linear(3, 4, **KW), Pooling(4, **KW)), "1: Pooling has a form in Keras behind"),
    "attention": (lambda: S(GRU(3, 4, **KW), Pooling(4, "attention", **KW)), "1: mode: Keras has no pooling by"),
    "merge": (lambda: S(GRU(3, 4, **KW), Merge(4, "sum", backend="numpy")), "1: Merge has a form in Keras behind"),
    "momentum": (lambda: gpurnn.BatchNorm(3, momentum=None, **KW), "model: momentum: Keras has no averages"),
    "size": (lambda: S(gpurnn.Dropout(0.1, **KW)), "none of its layers says how many features it reads"),
    "module": (lambda: gpurnn.Attention(3, 3, **KW), "model: Attention has no form in Keras"),
}


@pytest.mark.parametrize("name", NO_FORM)
def test_what_has_no_form_in_keras(name, tmp_path):
    make, words = NO_FORM[name]
    with pytest.raises(ValueError, match=words):
        export_keras(make(), tmp_path / "model.keras")
    assert not list(tmp_path.iterdir())


def test_arguments_of_exports(tmp_path):
    layer = gpurnn.GRU(3, 4, **KW)
    with pytest.raises(ValueError, match="ends with .keras or .weights.h5, got model.h5"):
        export_keras(layer, tmp_path / "model.h5")
    with pytest.raises(TypeError, match="model: expected a gpurnn layer or model, got dict"):
        export_keras({}, tmp_path / "model.keras")
    shared = gpurnn.Linear(3, 3, **KW)
    with pytest.raises(ValueError, match="1: the layer is in two places"):
        export_keras(S(shared, shared), tmp_path / "model.keras")


def test_files_of_keras_2(tmp_path):
    export_keras(gpurnn.GRU(3, 4, **KW), tmp_path / "model.keras")
    with zipfile.ZipFile(tmp_path / "model.keras") as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    entries["metadata.json"] = json.dumps({"keras_version": "2.15.0"}).encode()
    with zipfile.ZipFile(tmp_path / "old.keras", "w") as archive:
        for name, data in entries.items():
            archive.writestr(name, data)
    with pytest.raises(FileError, match="old.keras: expected a file of Keras 3 or later, got one of '2.15.0'"):
        import_keras(tmp_path / "old.keras")
