"""``gpurnn.save`` and ``gpurnn.load``: every layer, option, dtype and backend comes back to the bit."""

import copy
import json
import pickle

import numpy as np
import pytest
from helpers import BACKENDS, LAYERS, backend_of, build_layer, numbers, ones
from optional import optional
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

import gpurnn
from gpurnn import (
    GRU,
    LSTM,
    RNN,
    BatchNorm,
    Dropout,
    Embedding,
    LayerNorm,
    Linear,
    Pooling,
    Sequential,
    TiedLinear,
    cells,
)
from gpurnn.checkpoint import CheckpointError
from gpurnn.testing import leaves

ml_dtypes = optional("ml_dtypes")
KW = {"backend": "numpy", "seed": 1}


def through_file(model, tmp_path, **options):
    path = tmp_path / "model.safetensors"
    gpurnn.save(model, path)
    return gpurnn.load(path, **options)


def assert_same(model, other):
    """Equal layers, arguments, values, draws; the other is in evaluation mode, without gradients."""
    assert type(model) is type(other) and repr(model) == repr(other)
    one, two = model.state_dict(), other.state_dict()
    assert list(one) == list(two)
    for name, value in one.items():
        np.testing.assert_array_equal(two[name], value, err_msg=name)
        assert two[name].dtype == value.dtype
    assert model.random_state() == other.random_state() and model.frozen == other.frozen
    assert [name for name, _ in model.modules()] == [name for name, _ in other.modules()]
    for (_, mine), (_, theirs) in zip(model.modules(), other.modules(), strict=True):
        assert (mine.name, mine.dtype, mine.precision) == (theirs.name, theirs.dtype, theirs.precision)
    assert not any(module.training for _, module in other.modules())
    assert not other.ops.to_numpy(other.flat_grads).any()


def results(layer, inputs):
    """Everything that two training calls give, an update between them."""
    found = []
    for _ in range(2):
        layer.zero_grad()
        *outputs, backward = layer.forward(*inputs)
        found += leaves(outputs) + leaves(backward(ones(outputs[0]))) + [layer.flat_grads.copy()]
        if layer.parameter_count:
            gpurnn.SGD(layer, lr=0.1).step()
    return found + list(layer.state_dict().values())


def assert_equal_results(model, other, inputs):
    for mode in (False, True):
        mine, theirs = results(model.train(mode), inputs), results(other.train(mode), inputs)
        for one, two in zip(mine, theirs, strict=True):
            np.testing.assert_array_equal(one, two)


DTYPES = [("numpy", "float64"), ("cpu", "float32"), ("cpu", "float16"), ("cpu", "bfloat16")]


@pytest.mark.parametrize("backend, dtype", DTYPES)
@pytest.mark.parametrize("kind", LAYERS)
def test_every_layer_comes_back_to_the_bit(kind, backend, dtype, tmp_path):
    if dtype == "bfloat16":
        ml_dtypes.bfloat16  # noqa: B018 - skips where it is not here
    layer, inputs = build_layer(kind, backend, dtype)
    results(layer, inputs)  # running statistics and counters of draws
    other = through_file(layer, tmp_path, backend=backend)
    assert_same(layer, other)
    assert_equal_results(layer, other, inputs)


X = [numbers(6, 3, 4)]
OPTIONS = {
    "everything": lambda: LSTM(
        4, (6, 4), 2, dropout=0.3, learn_state=True, weight_dropout=0.2, layer_norm=True, zoneout=(0.1, 0.2),
        peephole=True, recurrent_dropout=0.1, cell_clip=2.0, gradient_clip=1.0, bidirectional=True, **KW,
    ),
    "heads": lambda: GRU(4, 6, 2, heads=2, mix_heads=False, residual=True, wavefront=2, **KW),
    "with_heads": lambda: gpurnn.recurrent.with_heads(GRU(4, 6, **KW), 3),
    "memory": lambda: LSTM(4, 6, memory="1MiB", masked_output="repeat", reset_to="initial", schedule="step", **KW),
    "states": lambda: GRU(4, 6, save="states", reset_after=False, bias=False, **KW),
    "batch norm": lambda: LSTM(4, 6, batch_norm=3, **KW),
    "batch norm of 100": lambda: RNN(4, 6, nonlinearity="relu", batch_norm=True, reverse=True, **KW),
    "one mask": lambda: GRU(4, 6, recurrent_dropout=0.5, recurrent_dropout_each="sequence", **KW),
    "initial values": lambda: LSTM(4, 6, init="orthogonal", forget_bias=1.0, **KW),
    "activations": lambda: LSTM(4, 6, coupled=True, activation="silu", recurrent_activation="hard_sigmoid", **KW),
    "own activation": lambda: LSTM(4, 6, activation=lambda x: x * cells.sigmoid(x - 1), **KW),
    "own nonlinearity": lambda: RNN(4, 6, nonlinearity=cells.softsign, **KW),
    "tf32": lambda: LSTM(4, 6, proj_size=2, precision="tf32", **KW),
    "NumPy's numbers": lambda: LSTM(np.int64(4), np.int32(6), memory=np.int64(10**6), **KW),
    "own cell": lambda: gpurnn.Recurrent(leaky, 4, 6, 2, bidirectional=True, learn_state=True, **KW),
    "cell of the library": lambda: gpurnn.Recurrent(cells.slstm, 4, 6, heads=2, forget_bias=1.0, **KW),
    "second product": lambda: gpurnn.Recurrent(cells.mgu, 4, 6, **KW),
    "built-in cell": lambda: gpurnn.Recurrent(cells.CELLS["gru"], 4, 6, **KW),
    "built-in cell with a projection": lambda: gpurnn.Recurrent(cells.LSTMStep(True), 4, 6, proj_size=3, **KW),
    "linear": lambda: Linear(4, 3, bias=False, precision="tf32", **KW),
    "layer norm": lambda: LayerNorm(4, eps=0.1, bias=False, **KW),
    "batch norm layer": lambda: BatchNorm(4, momentum=None, affine=False, batch_first=True, **KW),
    "dropout": lambda: Dropout(0.4, True, batch_first=True, **KW),
    "pooling": lambda: Pooling(4, "mean", directions=2, batch_first=True, **KW),
    "attention pooling": lambda: Pooling(4, "attention", attention_size=3, **KW),
}  # fmt: skip


@gpurnn.cell(gates="z", parameters={"leak": 0.5, "gain": "ones"})
def leaky(ax, ah, s, p):
    new = cells.zoneout(cells.tanh(p.gain * ax.z + ah.z), s.h, 0.2)
    return s.h + p.leak * (cells.dropout(new, 0.1) - s.h)


@pytest.mark.parametrize("name", OPTIONS)
def test_every_option_comes_back_to_the_bit(name, tmp_path):
    layer = OPTIONS[name]()
    inputs = [x.astype("float32") for x in X]
    results(layer, inputs)
    other = through_file(layer, tmp_path, backend="numpy")
    assert_same(layer, other)
    for attribute in ("memory", "wavefront", "schedule", "init", "hidden_sizes", "reset_to", "masked_output"):
        assert getattr(other, attribute, None) == getattr(layer, attribute, None)
    if hasattr(layer, "_cell"):
        assert other._cell == layer._cell
    assert_equal_results(layer, other, inputs)


def deep_model(**options):
    table = Embedding(7, 6, **options)
    norm = LayerNorm(6, **options)
    inner = Sequential({"drop": Dropout(0.5, **options), "batch": BatchNorm(6, **options)})
    return Sequential(
        {
            "head first": TiedLinear(table, bias=False), "table": table, "norm": norm,
            "rnn": LSTM(6, 6, 2, dropout=0.3, **options), "inner": inner, "again": norm, "head": TiedLinear(table),
        }
    )  # fmt: skip


def test_shared_layers_tied_tables_and_nested_chains(tmp_path):
    model = deep_model(dtype="float64", **KW)
    model.freeze("norm.*", "rnn.weight_hh_l0")
    other = through_file(model, tmp_path, backend="numpy")
    assert_same(model, other)
    assert other["again"] is other["norm"] and other.parameter_count == model.parameter_count
    assert other["head"].embedding is other["table"] and other["head first"].embedding is other["table"]


@pytest.mark.parametrize("head_first", [False, True])
def test_a_tied_table_in_an_inner_chain(head_first, tmp_path):
    table = Embedding(6, 6, **KW)
    parts = {"inner": Sequential({"table": table, "norm": LayerNorm(6, **KW)}), "head": Sequential(TiedLinear(table))}
    model = Sequential({name: parts[name] for name in (reversed(parts) if head_first else parts)})
    other = through_file(model, tmp_path, backend="numpy")
    assert_same(model, other)
    assert other["head"][0].embedding is other["inner"]["table"]


def test_a_model_that_was_loaded_can_be_trained_saved_and_copied(tmp_path):
    model = Sequential(Embedding(5, 4, **KW), gpurnn.Recurrent(leaky, 4, 6, **KW), Linear(6, 5, **KW))
    other = through_file(through_file(model, tmp_path, backend="numpy"), tmp_path, backend="numpy")
    assert_same(model, other)
    ids = np.arange(12).reshape(4, 3) % 5
    for one in (model, other):
        gpurnn.fit(one, gpurnn.cross_entropy, [(ids, ids)], epochs=2, optimizer="sgd", lr=0.1, progress=False)
    np.testing.assert_array_equal(model.flat_params, other.flat_params)
    for copied in (copy.deepcopy(other), pickle.loads(pickle.dumps(other))):
        np.testing.assert_array_equal(copied.flat_params, model.flat_params)


@pytest.mark.parametrize("name", BACKENDS)
def test_every_backend_loads_what_another_saved(name, tmp_path):
    model = Sequential(LSTM(3, 4, layer_norm=False, **KW), Linear(4, 2, **KW))
    x, backend = numbers(5, 2, 3).astype("float32"), backend_of(name)
    other = through_file(model, tmp_path, backend=backend)
    assert other.ops.name == name and other[0].ops.xp is other[1].ops.xp
    again = through_file(other, tmp_path, backend="numpy")
    assert_same(model.eval(), again)
    direct = Sequential(LSTM(3, 4, backend=backend, seed=1), Linear(4, 2, backend=backend, seed=1)).eval()
    x = direct.xp.asarray(x)
    for one, two in zip(leaves(direct(x)), leaves(other(x)), strict=True):
        np.testing.assert_array_equal(direct.ops.to_numpy(one), direct.ops.to_numpy(two))


def test_backend_and_dtype_are_the_callers(tmp_path):
    model = Sequential(GRU(3, 4, **KW), Linear(4, 2, precision="tf32", **KW))
    x = numbers(5, 2, 3)
    ml_dtypes.bfloat16  # noqa: B018 - skips where it is not here
    with gpurnn.use_backend("numpy"):
        assert through_file(model, tmp_path).ops.name == "numpy"
    for dtype in ("float64", "float32", "float16", "bfloat16"):
        other = through_file(model, tmp_path, backend="cpu", dtype=dtype)
        assert {module.dtype.name for _, module in other.modules()} == {dtype}
        np.testing.assert_array_equal(other.flat_params.astype("float32"), model.flat_params)
        assert other(x.astype(other.dtype))[0].dtype == other.dtype
    assert through_file(model, tmp_path, backend="cpu")[1].precision == "tf32"
    half = Linear(2, 2, dtype="float64", **KW)
    half.params["weight"] = 1e300
    with pytest.raises(CheckpointError, match=r"weight: holds values that are not finite in float32"):
        through_file(half, tmp_path, dtype="float32")


def test_nothing_is_drawn_for_a_file(tmp_path, monkeypatch):
    model = Sequential(LSTM(3, 4, init="orthogonal", **KW), Linear(4, 2, **KW))
    gpurnn.save(model, tmp_path / "m.safetensors")
    for name in ("uniform", "normal"):
        monkeypatch.setattr(f"gpurnn.rng.{name}", None)
    assert_same(model, gpurnn.load(tmp_path / "m.safetensors", backend="numpy"))


def test_other_libraries_read_the_weights(tmp_path):
    model = Sequential({"rnn": LSTM(3, 4, **KW)})
    gpurnn.save(model, tmp_path / "m.safetensors")
    arrays = load_file(tmp_path / "m.safetensors")
    assert sorted(arrays) == sorted(model.state_dict())
    with safe_open(tmp_path / "m.safetensors", "numpy") as file:
        document = json.loads(file.metadata()["gpurnn"])
    assert document["model"]["layers"]["rnn"]["layer"] == "LSTM" and document["version"] == 1


def test_a_model_has_one_file(tmp_path):
    """The same bytes each time, also of the model that was loaded."""
    model = deep_model(dtype="float64", **KW)
    gpurnn.save(model, tmp_path / "a.safetensors")
    gpurnn.save(gpurnn.load(tmp_path / "a.safetensors", "numpy"), tmp_path / "b.safetensors")
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()


def test_a_file_without_a_digest_may_have_other_weights(tmp_path):
    layer, path = Linear(2, 2, **KW), tmp_path / "m.safetensors"
    gpurnn.save(layer, path)
    with safe_open(path, "numpy") as file:
        metadata = file.metadata()
    arrays = load_file(path) | {"bias": np.full(2, 7, "float16")}
    save_file(arrays, path, metadata)
    with pytest.raises(CheckpointError, match="SHA-256 is not the one.*leaves the metadata 'sha256' out"):
        gpurnn.load(path)
    del metadata["sha256"]
    save_file(arrays, path, metadata)
    assert gpurnn.load(path, "numpy").params["bias"].tolist() == [7, 7]


def test_the_old_file_stays_until_the_new_one_is_complete(tmp_path, monkeypatch):
    path = tmp_path / "m.safetensors"
    gpurnn.save(Linear(2, 2, **KW), path)
    before = path.read_bytes()
    monkeypatch.setattr("os.fsync", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(CheckpointError, match="m.safetensors: could not be saved: .*No space left"):
        gpurnn.save(GRU(3, 4, **KW), path)
    assert path.read_bytes() == before and [file.name for file in tmp_path.iterdir()] == ["m.safetensors"]


# ---- what is refused


class Own(gpurnn.Module):
    def __init__(self):
        super().__init__()
        self.first = Linear(2, 2, **KW)


class MyLSTM(LSTM):
    pass


class MyStep(cells.RNNStep):
    """As RNN's cell by all that it declares, but for its equations."""


class MyTraced(cells.TracedCell):
    pass


def translation_with(**parts):
    model = gpurnn.EncoderDecoder(6, 7, 4, **KW)
    model.add_layers(parts)
    return model


def with_parameter(layer):
    layer.parameter("gain", np.ones(2))
    return layer


def with_value(layer, value):
    layer.params["bias"] = value
    return layer


REFUSED = {
    "own class": (Own, TypeError, "model: Own is a class of your own, whose code no file holds. Save its weights by"),
    "own layer inside": (lambda: Sequential(Sequential(MyLSTM(2, 3, **KW))), TypeError, "0.0: MyLSTM is a class"),
    "module": (gpurnn.Module, TypeError, "model: Module is a class"),
    "own parameter": (lambda: with_parameter(GRU(2, 3, **KW)), ValueError, "model: GRU was given parameters or layers"),
    "parameter of a chain": (
        lambda: with_parameter(Sequential(GRU(2, 3, **KW))), ValueError, "has a parameter of its own, 'gain'",
    ),
    "own step": (lambda: gpurnn.Recurrent(MyStep("tanh"), 2, 3, **KW), TypeError, "cell: MyStep is code in Python"),
    "own kind of traced cell": (
        lambda: gpurnn.Recurrent(MyTraced(lambda ax, ah, s: ax.z + ah.z, "z", "h", name="one"), 2, 3, **KW), TypeError,
        "cell: MyTraced is code in Python, which no file holds: make it with gpurnn.cell",
    ),
    "another encoder": (
        lambda: translation_with(encoder=Dropout(0.5, **KW)), ValueError, "its part 'encoder' should be a layer of the",
    ),
    "more parts": (lambda: translation_with(more=Dropout(0.5, **KW)), ValueError, "it has no part .more."),
    "table elsewhere": (lambda: TiedLinear(Embedding(3, 2, **KW)), ValueError, "TiedLinear: its embedding is no part"),
    "not finite": (lambda: with_value(Linear(2, 2, **KW), np.inf), CheckpointError, "'bias' holds values that are not"),
    "array": (lambda: np.ones(3), TypeError, "model: expected a gpurnn layer or model, got ndarray"),
    "batch norm in an activation": (
        lambda: LSTM(2, 3, activation=lambda x: cells.batch_normalized(x), **KW), ValueError, "no activation that",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_no_file_can_hold_is_refused(name, tmp_path):
    make, error, words = REFUSED[name]
    with pytest.raises(error, match=words):
        gpurnn.save(make(), tmp_path / "m.safetensors")
    assert not list(tmp_path.iterdir())


def test_wrong_arguments(tmp_path):
    layer = Linear(2, 2, **KW)
    with pytest.raises(TypeError, match=r"save: expected the model first and then the path"):
        gpurnn.save("m.safetensors", layer)
    with pytest.raises(ValueError, match=r"path should end in .safetensors, got 'm.json'"):
        gpurnn.save(layer, "m.json")
    with pytest.raises(TypeError, match=r"path: expected the name of a .safetensors file, got int"):
        gpurnn.save(layer, 3)
    with pytest.raises(CheckpointError, match="nowhere.*could not be saved"):
        gpurnn.save(layer, tmp_path / "nowhere" / "m.safetensors")
    for path, words in (
        (tmp_path, "gpurnn.tasks.run.load.folder. reads a run"),
        ("model.json", "gpurnn.load_weights.model, path. reads a checkpoint"),
        ("model.pt", "a pickle can run any code when it is loaded, so gpurnn loads none"),
        ("model.pkl", "a pickle can run any code"),
        ("model.onnx", "import_onnx.path. reads it"),
        ("model", "path should name a .safetensors file, got 'model'$"),
    ):
        with pytest.raises(ValueError, match=words):
            gpurnn.load(path)
    with pytest.raises(CheckpointError, match="m.safetensors: cannot be read: .*No such file"):
        gpurnn.load(tmp_path / "m.safetensors")
    gpurnn.save(layer, tmp_path / "m.safetensors")
    with pytest.raises(ValueError, match="is no checkpoint of gpurnn: .*; gpurnn.load.path. makes the model of one"):
        gpurnn.load_weights(layer, tmp_path / "m.safetensors")
    with pytest.raises(gpurnn.DtypeError, match="dtype should be one of"):
        gpurnn.load(tmp_path / "m.safetensors", dtype="int8")
    with pytest.raises(ValueError, match="nothing"):
        gpurnn.load(tmp_path / "m.safetensors", "nothing")


def test_layers_that_keras_alone_has(tmp_path):
    from gpurnn.interop.keras import Activation, First, Masked, Merge

    inner = {
        "embedding": gpurnn.Embedding(9, 4, **KW), "both": LSTM(4, 6, bidirectional=True, **KW),
        "merge": Merge(12, "ave", backend="numpy"), "gru": GRU(6, 5, reverse=True, **KW),
        "first": First(5, backend="numpy"),
    }  # fmt: skip
    model = Sequential({"masked": Masked(inner), "activation": Activation("softmax", backend="numpy")}).eval()
    floats = Sequential(Masked({"rnn": GRU(2, 3, **KW)}, mask_value=-1.5)).eval()
    x = np.array([[1, 2], [0, 3], [4, 0]])
    for one, given in ((model, x), (floats, np.where(x[..., None] == 0, -1.5, x[..., None]).repeat(2, 2))):
        given = given if one is model else given.astype("float32")
        gpurnn.save(one, tmp_path / "model.safetensors")
        loaded = gpurnn.load(tmp_path / "model.safetensors", backend="numpy")
        np.testing.assert_array_equal(loaded(given)[0], one(given)[0])
