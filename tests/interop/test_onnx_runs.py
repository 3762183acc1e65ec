"""``gpurnn export RUN model.onnx`` and ``gpurnn import model.onnx RUN``: a model of every task, there and back."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from hostile import good_files
from optional import needs, optional

from gpurnn.cli import main
from gpurnn.interop.onnx import import_onnx
from gpurnn.tasks.run import prepare
from gpurnn.tasks.trained import load

onnx = optional("onnx")
pytestmark = [needs("onnx"), pytest.mark.long]
SHARED = {"hidden": 6, "epochs": 1, "seed": 1, "backend": "numpy", "batch": 4}
RUNS = {  # name -> task, files, settings
    "text": ("text", ["book.txt"], {"steps": 8, "tied": True}),
    "text in 16 bits": ("text", ["book.txt"], {"steps": 8, "dtype": "float16", "cell": "gru"}),
    "classify": ("classify", ["labelled.tsv"], {"bidirectional": True, "pooling": "attention", "valid": 0.2}),
    "translate": ("translate", ["pairs.tsv"], {"layers": 2}),
    "speech": ("speech", ["sounds.tsv"], {"valid": 0.25, "stack": 1, "layers": 2, "bidirectional": True}),
    "music": ("music", ["tunes.json"], {}),
    "series": ("series", ["series.csv"], {"window": 6, "horizon": 2}),
    "series, recursive": ("series", ["series.csv"], {"window": 6, "horizon": 2, "mode": "recursive", "interval": "80"}),
    "longrange": ("longrange", [], {"steps": 5, "sequences": 40, "learn_state": True, "cell": "rnn"}),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny run of each, and its .onnx."""
    folder = tmp_path_factory.mktemp("runs")
    good_files(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("gpurnn.train.run_files.RunFiles.draw", lambda files: None)
        for name, (task, files, settings) in RUNS.items():
            with prepare(task, [folder / file for file in files], folder / name, **SHARED | settings) as run:
                run.train(progress=False)
            call("export", folder / name, folder / f"{name}.onnx")
    return folder


def call(*arguments, code=0):
    done = CliRunner().invoke(main, list(map(str, arguments)), prog_name="gpurnn")
    if done.exception and not isinstance(done.exception, SystemExit):
        raise done.exception
    assert done.exit_code == code, done.output
    return done


def inputs_of(model, twin, T, B):
    """What a model takes, and the lengths that the twin takes besides."""
    rng, given = np.random.default_rng(T), []
    lengths = rng.integers(1, T + 1, B) if twin._roles.lengths else None
    for name in twin._roles.x:
        dtype, shape = twin.inputs[name]
        sizes = [{"T": T, "B": B, "U": 3, "horizon": 2}.get(size, size) for size in shape]
        given.append(rng.integers(4, 6, sizes) if dtype == "int64" else rng.normal(size=sizes).astype(dtype))
    return (given[0] if len(given) == 1 else tuple(given)), lengths


def output_of(model, x, lengths):
    """The output of a model of any task."""
    floats = isinstance(x, np.ndarray) and x.dtype.kind == "f"
    x = x.astype(model.dtype) if floats else x
    pair = type(model).__name__ == "EncoderDecoder"
    given = () if lengths is None else ((lengths, None),) if pair else (lengths,)
    if model.stateful:
        return model(x, None, *given)[0]
    return model(x, *given)


@pytest.mark.parametrize("name", RUNS)
def test_the_file_gives_what_the_run_gives(name, folder):
    model, path = load(folder / name, "numpy").model, folder / f"{name}.onnx"
    proto = onnx.load(str(path))
    onnx.checker.check_model(proto, full_check=True)
    twin = import_onnx(path, backend="numpy")
    most = 2.0**-8 if model.dtype == "float16" else 1e-5  # the model rounds its states to 16 bits, the file does not
    for T, B in ((1, 1), (4, 3), (7, 2)):
        x, lengths = inputs_of(model, twin, T, B)
        expected = output_of(model, x, lengths)
        np.testing.assert_allclose(twin(x, None, lengths)[0], expected, rtol=0, atol=most)


@pytest.mark.parametrize("name", RUNS)
def test_onnx_runtime_gives_the_same(name, folder):
    runtime = pytest.importorskip("onnxruntime")
    options = runtime.SessionOptions()
    options.intra_op_num_threads = 1
    session = runtime.InferenceSession(str(folder / f"{name}.onnx"), options, providers=["CPUExecutionProvider"])
    twin = import_onnx(folder / f"{name}.onnx", backend="numpy")
    for T, B in ((1, 1), (4, 3)):
        x, lengths = inputs_of(None, twin, T, B)
        roles, sizes = twin._roles, {"T": T, "B": B}
        feeds = dict(zip(roles.x, x if isinstance(x, tuple) else (x,), strict=True))
        feeds |= roles.lengths_given(None if lengths is None else lengths.astype(np.int32), sizes)
        states = roles.states_given(None, sizes, twin.inputs, twin._program.initial)
        feeds |= {state: np.ascontiguousarray(array) for state, array in states.items()}
        for got, exact in zip(twin.run(feeds).values(), session.run(None, feeds), strict=True):
            np.testing.assert_allclose(got, exact, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", RUNS)
def test_there_and_back(name, folder, tmp_path):
    """The same settings, facts and weights, to the bit; of a 16-bit run the weights that it computes with."""
    printed = call("import", folder / f"{name}.onnx", tmp_path / "again").output
    assert printed.splitlines()[0].startswith(f"Wrote {tmp_path / 'again'}")
    one, other = load(folder / name, "numpy"), load(tmp_path / "again", "numpy")
    assert (one.settings, one.facts) == (other.settings, other.facts)
    before, after = one.model.state_dict(), other.model.state_dict()
    assert list(before) == list(after)
    for key, array in before.items():
        if key.endswith("num_batches_tracked"):
            continue
        rounded = array.astype(one.model.dtype).astype(array.dtype)
        np.testing.assert_array_equal(after[key], rounded, err_msg=key)
    facts = [json.loads(call("info", run, "--json").output) for run in (folder / name, tmp_path / "again")]
    for key in ("task", "data", "settings", "parameters"):
        assert facts[0][key] == facts[1][key]
    trained = [{key: fact["trained"][key] for key in ("epochs", "updates", "best")} for fact in facts]
    assert trained[0] == trained[1]


def test_an_imported_run_is_used_like_another(folder, tmp_path):
    call("import", folder / "text.onnx", tmp_path / "again")
    written = [call("sample", run, "--length", 40, "--seed", 3).output for run in (folder / "text", tmp_path / "again")]
    assert written[0] == written[1]
    call("train", "text", folder / "book.txt", "--from", tmp_path / "again", "--out", tmp_path / "further",
         "--epochs", 1, "--no-progress")  # fmt: skip
    error = call("train", "text", folder / "book.txt", "--resume", "--out", tmp_path / "again", code=1).stderr
    assert "does not fit this run" in error


def test_what_the_file_says_of_the_run(folder):
    metadata = import_onnx(folder / "text.onnx").metadata
    vocabulary = load(folder / "text").facts["vocabulary"]
    assert (metadata["task"], json.loads(metadata["vocabulary"])) == ("text", vocabulary)
    assert str(folder) not in (folder / "text.onnx").read_bytes().decode("latin-1"), "where its files were"


# ---- the options, and what is refused


def test_options_of_export(folder, tmp_path):
    plain, small = folder / "text.onnx", tmp_path / "small.onnx"
    call("export", folder / "text", small, "--weights", "float16", "--no-states")
    assert list(import_onnx(small).inputs) == ["x", "lengths"]
    weights = [sum(len(one.raw_data) for one in onnx.load(str(path)).graph.initializer) for path in (plain, small)]
    assert weights[1] < 0.55 * weights[0]
    call("import", small, tmp_path / "again")
    call("export", folder / "translate", tmp_path / "encoder.onnx", "--part", "encoder")
    assert list(import_onnx(tmp_path / "encoder.onnx").outputs) == ["memory", "h_0", "c_0"]
    error = call("import", tmp_path / "encoder.onnx", tmp_path / "none", code=2).stderr
    assert "holds the encoder alone: a run needs the whole model" in error
    assert "there already" in call("export", folder / "text", small, code=2).stderr
    call("export", folder / "text", small, "--overwrite")
    error = call("export", folder / "text", tmp_path / "model.txt", code=2).stderr
    assert "FILE: expected a name that ends with .onnx, .safetensors or .h, got model.txt" in error
    assert "already holds a run" in call("import", small, folder / "text", code=2).stderr


def changed(model, change):
    """A copy of a model's bytes in which ``change`` has altered what the file says of its run."""
    copy = type(model)()
    copy.CopyFrom(model)
    entry = next(one for one in copy.metadata_props if one.key == "gpurnn")
    document = json.loads(entry.value)
    change(document, copy)
    entry.value = json.dumps(document)
    return copy.SerializeToString()


def _set(where, name, value):
    def change(document, model):
        target = document
        for part in where.split():
            target = target[part]
        target[name] = value

    return change


def _weights(document, model):
    model.graph.initializer[0].dims[:] = [1, 1]
    model.graph.initializer[0].raw_data = b"1234"


def _not_finite(document, model):
    name = next(one for one in model.graph.initializer if one.name.endswith("linear.bias"))
    name.raw_data = np.full(name.dims[0], np.nan, np.float32).tobytes()


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda document, model: document.pop("run"), "says nothing of a run"),
        (_set("run", "task", "other"), "what it says of its run is damaged: task should be one of"),
        (_set("run settings", "hidden", 10**9), "hidden of its settings is not what its weights have"),
        (_set("run settings", "layers", 10**9), "layers of its settings is not what its weights have"),
        (_set("run settings", "hidden", 5), "its graph is not that of its settings"),
        (_set("run settings", "cell", "gru"), "its graph is not that of its settings"),
        (_set("run settings", "nothing", 5), "what it says of its run is damaged"),
        (_set("run facts", "vocabulary", 3), "what it says of its run is damaged"),
        (_set("run progress", "epoch", "x"), "what it says of its run is damaged: epoch should be a number"),
        (_set("run", "files", [3]), "what it says of its run is damaged"),
        (_set("options", "weights", "float64"), "its settings make no model: weights: expected"),
        (lambda document, model: model.graph.node.add(op_type="Relu", input=["x"], output=["z"]), "its graph is not"),
        (_weights, "its weights .* are missing, or of another shape"),
        (_not_finite, "its weights 'linear.bias' are not finite"),
    ],
)
def test_a_file_that_makes_no_run(change, words, folder, tmp_path):
    path = tmp_path / "bad.onnx"
    path.write_bytes(changed(onnx.load(str(folder / "text.onnx")), change))
    error = call("import", path, tmp_path / "run", code=2).stderr
    assert error.startswith(f"Error: {path}: ") and re.search(words, error), error
    assert not Path(tmp_path / "run").exists()
