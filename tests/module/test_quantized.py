"""``Module.quantize``: what is stored, what a quantized model does and refuses, files of it."""

import copy
import json
import pickle
import re

import numpy as np
import pytest
from helpers import cuda_ops, host
from optional import needs

import gpurnn
from gpurnn import CheckpointError
from gpurnn.cli.file_facts import rows_of
from gpurnn.errors import MissingError
from gpurnn.interop.c import export_c
from gpurnn.model_file.file import read_facts
from gpurnn.module import float_model
from gpurnn.quantization import quantize_rows

RNG = np.random.default_rng


def chain(**where):
    where = {"backend": "cpu"} | where
    return gpurnn.Sequential(
        gpurnn.LSTM(6, 10, 2, bidirectional=True, learn_state=True, seed=1, **where),
        gpurnn.LayerNorm(20, **where), gpurnn.GRU(20, 8, seed=2, heads=2, **where),
        gpurnn.Linear(8, 5, seed=3, **where),
    )  # fmt: skip


def text(**where):
    where = {"backend": "cpu"} | where
    table = gpurnn.Embedding(9, 6, seed=1, **where)
    return gpurnn.Sequential(table, gpurnn.LSTM(6, 6, dropout=0, seed=2, **where), gpurnn.TiedLinear(table))


def test_what_is_stored():
    model = chain()
    before, small = model.state_dict(), model.quantize("int8")
    stored = small.state_dict()
    quantized = {name for name in before if "weight_" in name or name == "3.weight"}
    assert stored.keys() == before.keys() | {f"{name}_scale" for name in quantized}
    for name, array in before.items():
        np.testing.assert_array_equal(model.state_dict()[name], array)
        if name not in quantized:
            np.testing.assert_array_equal(stored[name], array)
            continue
        values, scales = quantize_rows(array.reshape(-1, array.shape[-1]))
        assert stored[name].dtype == np.int8 and stored[name + "_scale"].dtype == np.float32
        np.testing.assert_array_equal(stored[name], values.reshape(array.shape))
        np.testing.assert_array_equal(stored[name + "_scale"], scales.reshape(array.shape[:-1]))
    assert model.training and not any(layer.training for _, layer in small.modules())
    assert not quantized & set(small.params) and small.quantized is None and small[0].quantized == "int8"
    assert "3: Linear(8, 5; 5 parameters, 40 weights in int8, cpu, float32)" in repr(small)


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16"])
@pytest.mark.parametrize("backend", ["numpy", "cpu"])
def test_array_code_reads_the_weights_as_floats(backend, dtype):
    """So does compiled code of another dtype than it multiplies whole numbers in; and where it does not exist."""
    model = chain(backend=backend, dtype=dtype)
    small, x = model.quantize(), RNG(0).standard_normal((7, 3, 6)).astype(dtype)
    (y, _), (plain, _) = (one(x, lengths=[7, 2, 0]) for one in (small, float_model(small)))
    if backend == "numpy" or dtype == "float16":
        np.testing.assert_array_equal(y, plain)
    else:
        assert 0 < np.abs(y - plain).max() < 1e-3
    assert float_model(model) is model
    if backend == "numpy" or dtype != "float16":  # array code rounds activations to 8 bits, but none of 16
        y, _ = model.quantize(activations="int8")(x, lengths=[7, 2, 0])
        assert (dtype == "float16") == np.array_equal(y, plain) and np.abs(y - plain).max() < 0.05


def test_numpy_rounds_as_compiled_code_does():
    layers = [gpurnn.Linear(70, 33, seed=1, backend=backend).quantize("int8", "int8") for backend in ("cpu", "numpy")]
    x = RNG(0).standard_normal((9, 70)).astype("float32")
    x[3], x[4], x[5] = 0, np.nan, [np.finfo("float32").max] + [0] * 69
    with np.errstate(invalid="ignore"):
        compiled, array_code = (layer(x) for layer in layers)
    np.testing.assert_allclose(array_code[5], compiled[5], rtol=1e-5)
    others = np.arange(9) != 5
    np.testing.assert_allclose(array_code[others], compiled[others], rtol=0, atol=1e-5)
    assert np.isnan(compiled[4]).all() and np.abs(compiled - float_model(layers[0])(x))[0].max() > 1e-3


@pytest.mark.emulated
def test_on_an_emulated_gpu():
    ops = cuda_ops()
    small = gpurnn.Sequential(gpurnn.GRU(6, 10, seed=1, backend=ops), gpurnn.Linear(10, 3, backend=ops)).quantize()
    x = RNG(0).standard_normal((4, 3, 6)).astype("float32")
    y, plain = small(small.xp.asarray(x))[0], float_model(small)(small.xp.asarray(x))[0]
    np.testing.assert_array_equal(host(y), host(plain))


@pytest.mark.parametrize("make, activations", [(chain, "int16"), (chain, "int8"), (text, "int8")])
def test_copies_and_files(make, activations, tmp_path):
    small = make().quantize(activations=activations)
    x = RNG(0).standard_normal((4, 3, 6)).astype("float32") if make is chain else RNG(0).integers(0, 9, (4, 3))
    y, _ = small(x)
    path = tmp_path / "small.safetensors"
    gpurnn.save(small, path)
    fresh = make().quantize(activations=activations)
    for twin in (copy.deepcopy(small), pickle.loads(pickle.dumps(small)), gpurnn.load(path, "cpu"), fresh):
        twin.load_state_dict(small.state_dict())
        np.testing.assert_array_equal(twin(x)[0], y)
        pairs = zip(twin._saved_arrays().values(), small._saved_arrays().values(), strict=True)
        assert not any(np.shares_memory(*pair) for pair in pairs)
    gpurnn.save_weights(small, tmp_path / "small.json")
    twin = make().quantize(activations=activations)
    gpurnn.load_weights(twin, tmp_path / "small.json")
    np.testing.assert_array_equal(twin(x)[0], y)
    facts = read_facts(path)
    assert facts["quantized"] == sum(array.size for array in small.state_dict().values() if array.dtype == np.int8)
    assert sum(layer["quantized"] for layer in facts["layers"][1:]) == facts["quantized"]
    rows = rows_of(facts)
    rest = ", and what they multiply" if activations == "int8" else ""
    assert rows["In 8 bits"] == f"{facts['quantized']:,} weights more{rest}"
    assert (" weights and activations in int8" in repr(small)) == (activations == "int8")
    assert any(" parameters, " in text and text.endswith(" weights in 8 bits") for text in rows.values())


def test_a_file_has_a_quarter_of_the_bytes(tmp_path):
    model = gpurnn.LSTM(256, 256)
    for name, one in (("whole", model), ("small", model.quantize())):
        gpurnn.save(one, tmp_path / f"{name}.safetensors")
    whole, small = ((tmp_path / f"{name}.safetensors").stat().st_size for name in ("whole", "small"))
    assert small < 0.27 * whole


def test_files_say_their_version(tmp_path):
    """So that an older gpurnn says what is wrong; other files stay as they were."""
    for model, version in ((chain(), 1), (chain().quantize(), 2), (chain().quantize("int8", "int8"), 3)):
        gpurnn.save(model, tmp_path / "model.safetensors")
        data = (tmp_path / "model.safetensors").read_bytes()
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        assert json.loads(header["__metadata__"]["gpurnn"])["version"] == version


def test_damaged_files(tmp_path):
    path = tmp_path / "model.safetensors"
    gpurnn.save(gpurnn.Linear(300, 2).quantize(activations="int8"), path)
    data = path.read_bytes()
    for old, new, words in (
        (b'"quantized\\": \\"int8', b'"quantized\\": \\"int4', "quantized should be one of 'int8', got 'int4'"),
        (b'"activations\\": \\"int8', b'"activations\\": \\"int4', "activations should be one of 'int16', 'int8', got"),
        (b'"I8"', b'"U8"', "is damaged|sha256|SHA-256"),
    ):
        assert old in data
        path.write_bytes(data.replace(old, new))
        with pytest.raises(CheckpointError, match=words):
            gpurnn.load(path)


def test_loading_reaches_what_was_made_of_the_weights():
    """The floats of array code, the addresses of compiled code, and a stepper's program."""
    for backend in ("numpy", "cpu"):
        small, other = (gpurnn.Sequential(gpurnn.GRU(6, 10, seed=n, backend=backend)).quantize() for n in (1, 2))
        x, stepper = RNG(0).standard_normal((4, 3, 6)).astype("float32"), small.stepper(3)
        before = small(x)[0]
        small.load_state_dict(other.state_dict())
        np.testing.assert_array_equal(small(x)[0], other(x)[0])
        np.testing.assert_array_equal(stepper.step(x[0]), other(x)[0][0])
        assert not np.array_equal(before, small(x)[0])


def test_what_cannot_be_loaded_changes_nothing():
    small = gpurnn.Linear(3, 2, seed=1).quantize()
    before = small.state_dict()
    for name, value, error, words in (
        ("weight", np.full((2, 3), 0.5), ValueError, "weight: expected whole numbers as int8 holds them"),
        ("weight", np.full((2, 3), 128), ValueError, "weight: expected whole numbers as int8 holds them"),
        ("weight_scale", np.array([1, np.nan]), ValueError, "weight_scale: holds values that are not finite"),
    ):
        with pytest.raises(error, match=words):
            small.load_state_dict(before | {name: value})
    with pytest.raises(MissingError, match="missing .'weight_scale'."):
        small.load_state_dict(gpurnn.Linear(3, 2).state_dict())
    for name, array in small.state_dict().items():
        np.testing.assert_array_equal(array, before[name])


def test_what_is_refused():
    small, x = chain().quantize(), np.ones((3, 2, 6), "float32")
    alone = "is quantized to int8, for inference alone"
    for call, error, words in (
        (lambda: small.train(), RuntimeError, f"train: 0: this LSTM {alone}"),
        (lambda: gpurnn.Sequential(small).train(), RuntimeError, f"train: 0.0: this LSTM {alone}"),
        (lambda: setattr(small[3], "training", True), RuntimeError, f"training: this Linear {alone}"),
        (lambda: small.forward(x), RuntimeError, f"forward: this LSTM {alone}"),
        (lambda: small[3].forward(np.ones((2, 8), "float32")), RuntimeError, f"forward: this Linear {alone}"),
        (lambda: gpurnn.Adam(small, lr=0.1), RuntimeError, f"an optimizer: 0: this LSTM {alone}"),
        (lambda: gpurnn.pruning.prune(small, 0.5), RuntimeError, f"prune: 0: this LSTM {alone}"),
        (lambda: gpurnn.recurrent.with_heads(small[2], 1), RuntimeError, f"with_heads: this GRU {alone}"),
        (lambda: small.quantize(), ValueError, "quantize: this Sequential is quantized already"),
        (lambda: chain().quantize("int4"), ValueError, "format should be one of 'int8', got 'int4'"),
        (lambda: chain().quantize("int8", "float32"), ValueError, "activations should be one of 'int16', 'int8', got"),
        (lambda: gpurnn.Embedding(3, 2).quantize(), ValueError, "quantize: this Embedding has no weights to quantize"),
    ):
        with pytest.raises(error, match=words):
            call()
        assert not any(layer.training for _, layer in small.modules())
    model = chain()
    model.params["2.weight_hh_l0"] = np.inf
    with pytest.raises(ValueError, match="quantize: 2.weight_hh_l0 holds numbers that are not finite in float32"):
        model.quantize()


def test_a_model_of_which_a_part_is_quantized():
    """The rest can be, too; a frozen weight is no parameter then."""
    small = gpurnn.GRU(3, 4, seed=1).quantize()
    model = gpurnn.Sequential(small, gpurnn.Linear(4, 2, seed=2).freeze("weight"))
    whole, x = model.quantize(), np.ones((3, 2, 3), "float32")
    assert model[1].quantized is None and whole[1].quantized == "int8" and whole.frozen == []
    np.testing.assert_array_equal(whole[0](x)[0], small(x)[0])


def test_a_single_step_and_a_layer_of_ones_own():
    class Own(gpurnn.Module):
        def __init__(self):
            super().__init__()
            self.cell = gpurnn.LSTMCell(3, 4, seed=1)
            self.parameter("gain", np.full(4, 2.0))

        def __call__(self, x):
            return self.cell(x)[0] * self.params["gain"]

    model, x = Own(), np.ones((2, 3), "float32")
    small = model.quantize()
    assert sorted(small.params) == ["cell.bias_hh", "cell.bias_ih", "gain"]
    np.testing.assert_allclose(small(x), model(x), atol=0.01)
    assert not np.array_equal(small(x), model(x))


def test_exported_c_has_its_whole_numbers(tmp_path):
    small = gpurnn.Sequential(gpurnn.GRU(6, 10, seed=1), gpurnn.Linear(10, 3, seed=2)).quantize()
    export_c(small, tmp_path / "small.h", weights="int8")
    found = re.findall(r"int8_t \w+\[\d+\] \w+ = {([^}]*)}", (tmp_path / "small.h").read_text())
    found = sorted(sorted(map(int, re.findall(r"-?\d+", numbers))) for numbers in found)
    stored = [array for array in small.state_dict().values() if array.dtype == np.int8]
    assert len(found) == 3 and found == sorted(sorted(array.ravel().tolist()) for array in stored)


@needs("onnx")
def test_onnx_has_its_weights_as_floats(tmp_path):
    from gpurnn.interop.onnx import export_onnx, import_onnx

    small = gpurnn.GRU(6, 10, seed=1, backend="numpy").quantize()
    export_onnx(small, tmp_path / "small.onnx")
    x = RNG(0).standard_normal((4, 3, 6)).astype("float32")
    twin = import_onnx(tmp_path / "small.onnx", backend="numpy")
    np.testing.assert_array_equal(twin(x)[0], small(x)[0])


def test_a_parameter_of_a_cell_that_is_called_like_weights_stays_a_vector():
    @gpurnn.cell(gates="z", parameters={"weight_hh_gain": "ones"})
    def own(ax, ah, s, p):
        return gpurnn.cells.tanh(p.weight_hh_gain * (ax.z + ah.z))

    for backend in ("cpu", "numpy"):
        model = gpurnn.Recurrent(own, 4, 3, seed=0, backend=backend).eval()
        small = model.quantize()
        assert small.params["weight_hh_gain_l0"].dtype == np.float32
        x = RNG(0).normal(size=(5, 2, 4)).astype("float32")
        np.testing.assert_array_less(np.abs(small(x)[0] - model(x)[0]), 0.02)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("backend, dtype", [("numpy", "float32"), ("cpu", "float32"), ("cpu", "float16")])
def test_numbers_that_are_written_into_its_arrays_count_after_changed(backend, dtype, bias):
    for make in (gpurnn.Linear, gpurnn.LSTM):
        small = make(3, 3, bias=bias, seed=0, backend=backend, dtype=dtype).quantize()
        chain = gpurnn.Sequential(small, gpurnn.RNN(3, 2, backend=backend, dtype=dtype)).eval()
        stepper, x = chain.stepper(2), np.ones((1, 2, 3), dtype)
        stepper.step(x[0])
        name = "weight" if make is gpurnn.Linear else "weight_ih_l0"
        small.buffers[name][...] = 0
        small.buffers[name + "_scale"] = small.buffers[name + "_scale"] * 2
        chain.changed()
        fresh = make(3, 3, bias=bias, seed=9, backend=backend, dtype=dtype).quantize()
        fresh.load_state_dict(small.state_dict())
        given, expected = small(x), fresh(x)
        if make is gpurnn.LSTM:
            given, expected = given[0], expected[0]
        np.testing.assert_array_equal(given, expected)
        stepper.reset()
        np.testing.assert_allclose(
            stepper.step(x[0]), chain(x)[0][0], rtol=0, atol=1e-3 if dtype == "float16" else 1e-6
        )


@pytest.mark.parametrize("strict", [True, False])
def test_states_of_floats_and_of_whole_numbers_do_not_mix(strict):
    model = gpurnn.Linear(2, 2, seed=0)
    model.params["weight"][...] = [[0, 1], [1, 0]]
    small = model.quantize()
    for into, given in ((model, small), (small, model)):
        before = into.state_dict()
        with pytest.raises(
            (MissingError, gpurnn.DtypeError, ValueError), match="only one of the|expected (floats|whole numbers)"
        ):
            into.load_state_dict(given.state_dict(), strict=strict)
        assert all((before[name] == array).all() for name, array in into.state_dict().items())


def test_buffers_of_ones_own_may_end_like_scales():
    class Own(gpurnn.Linear):
        pass

    model = Own(5, 3, seed=0, backend="cpu")
    model.buffers["gain"], model.buffers["gain_scale"] = np.ones(3, "float32"), np.ones(3, "float32")
    small = model.quantize()
    assert "15 weights in int8" in repr(small) and small._int8_count() == 15
    again = float_model(small)
    assert again.buffers.keys() == {"gain", "gain_scale"} and again.params.keys() == {"weight", "bias"}


def test_inputs_near_the_largest_number():
    small = gpurnn.Linear(2, 2, seed=0, backend="cpu").quantize()
    x = np.full((1, 2), 1e37, "float32")
    exact = float_model(small)(x)
    assert np.isfinite(exact).all()
    np.testing.assert_allclose(small(x), exact, rtol=1e-3)


def test_the_summary_counts_whole_numbers():
    assert gpurnn.Linear(5, 3).quantize().summary().splitlines()[-1].split()[-1] == "15"
