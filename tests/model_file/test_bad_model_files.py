"""Bad model files: a clear error that names the file, nothing executed, no memory beyond what the file itself has."""

import io
import json
import pickle
import random
import tracemalloc
import zipfile

import numpy as np
import pytest
from helpers import all_equal
from hostile import mutated, sparse
from safetensors.numpy import save

import gpurnn
from gpurnn import files
from gpurnn.checkpoint import CheckpointError

KW = {"backend": "numpy", "seed": 1}
MUTATED = 60  # files; 1,000 were tried by hand


@gpurnn.cell("f n")
def own(ax, ah, s):
    f = gpurnn.cells.sigmoid(ax.f + ah.f)
    return s.h + f * (gpurnn.cells.tanh(ax.n + ah.n(f * s.h)) - s.h)


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """The bytes of a file."""
    path = tmp_path_factory.mktemp("good") / "good.safetensors"
    table = gpurnn.Embedding(5, 3, **KW)
    layers = table, gpurnn.LSTM(3, 4, 2, layer_norm=True, dropout=0.1, **KW), gpurnn.Recurrent(own, 4, 3, **KW)
    model = gpurnn.Sequential(*layers, gpurnn.BatchNorm(3, **KW), gpurnn.TiedLinear(table))
    gpurnn.save(model.freeze("0.weight"), path)
    return path.read_bytes()


def parts(data):
    """(header, the bytes of the arrays) of a file."""
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def joined(header, arrays):
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + arrays


def without_digest(data, change):
    """A file whose document is changed by a function, which nothing but the document itself can show."""
    header, arrays = parts(data)
    document = json.loads(header["__metadata__"]["gpurnn"])
    change(document)
    header["__metadata__"] = {"gpurnn": json.dumps(document)}
    return joined(header, arrays)


def refused(path, words):
    with pytest.raises(CheckpointError, match=words) as error:
        gpurnn.load(path, "numpy")
    assert str(error.value).startswith(f"{path}: "), error.value
    return str(error.value)


def outcome(path):
    """What ``load`` does with a file: it is refused with its name, or a model."""
    try:
        model = gpurnn.load(path, "numpy")
    except CheckpointError as error:
        assert str(error).startswith(f"{path}: "), error
        return "refused"
    assert isinstance(model, gpurnn.Module)
    return "a model"


def test_mutated_files(good, tmp_path):
    """What is changed is seen, wherever it is."""
    path, ends = tmp_path / "bad.safetensors", {}
    path.write_bytes(good)
    expected = gpurnn.load(path, "numpy")
    for number in range(MUTATED):
        path.write_bytes(mutated(good, "good.safetensors", random.Random(number)))
        end = outcome(path)
        if end == "a model":  # nothing was changed but the name of the digest, or its absence
            found = gpurnn.load(path, "numpy")
            assert repr(found) == repr(expected) and found.frozen == expected.frozen, number
            all_equal(found.state_dict(), expected.state_dict(), number)
        ends[end] = ends.get(end, 0) + 1
    assert ends["refused"] > 0.9 * MUTATED, ends


def test_mutated_documents(good, tmp_path):
    """Files that are whole, of documents that are not: each is refused, or is a model, which answers a call or says
    what is wrong with it."""
    path, ends = tmp_path / "bad.safetensors", {}
    header, arrays = parts(good)
    text, ids = header["__metadata__"]["gpurnn"].encode(), np.arange(6).reshape(3, 2) % 5
    for number in range(MUTATED):
        changed = mutated(text, "model.json", random.Random(number))
        header["__metadata__"] = {"gpurnn": changed.decode("utf-8", "replace")}
        path.write_bytes(joined(header, arrays))
        end = outcome(path)
        if end == "a model":
            try:
                gpurnn.load(path, "numpy").train()(ids)
            except (ValueError, TypeError):
                end = "fails"
        ends[end] = ends.get(end, 0) + 1
    assert ends["refused"] > 0.5 * MUTATED and ends.get("a model", 0) > 1, ends


def test_truncated(good, tmp_path):
    path = tmp_path / "bad.safetensors"
    for length in (0, 1, 7, 8, 9, 100, len(good) // 2, len(good) - 1):
        path.write_bytes(good[:length])
        refused(path, "is not a safetensors file, or is cut off|is not JSON|is damaged: ")


@pytest.mark.parametrize(
    "length, words",
    [(1 << 60, "or is cut off"), (40 << 30, "its header would take .* of memory, the limit is"), (0, "JSON")],
)
def test_a_file_of_50_gigabytes(length, words, tmp_path):
    path = tmp_path / "bad.safetensors"
    sparse(path, length.to_bytes(8, "little"))
    with pytest.raises(files.FileError, match=words) as error:
        gpurnn.load(path, "numpy")
    assert str(error.value).startswith(f"{path}: ")


def test_pickles_are_not_loaded(tmp_path):
    class Loud:
        def __reduce__(self):
            return (print, ("executed",))

    path, archive = tmp_path / "bad.safetensors", io.BytesIO()
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("archive/data.pkl", pickle.dumps(Loud()))
    for data in (pickle.dumps([Loud()] * 9), archive.getvalue()):
        path.write_bytes(data)
        refused(path, "no safetensors file, but a pickle or an archive: a pickle can run any code")


def test_other_safetensors_files(good, tmp_path):
    path = tmp_path / "bad.safetensors"
    path.write_bytes(save({"weight": np.ones((2, 2))}))
    refused(path, "holds arrays, but not which model they are of: build that, then model.load_state_dict")
    gpurnn.save_weights(gpurnn.Linear(2, 2, **KW), tmp_path / "w.json")
    refused(next(tmp_path.glob("w-*.safetensors")), "holds arrays, but not which model")


def set_layer(place, name, value):
    """A change of one argument of a layer."""

    def change(document):
        document["model"]["layers"][place]["arguments"][name] = value

    return change


def set_entry(*path):
    *place, key, value = path

    def change(document):
        for one in place:
            document = document[one]
        document[key] = value

    return change


LAYER = ("model", "layers")
WRONG = {
    "newer": (set_entry("version", 4), "has format version 4, this gpurnn reads version 3: install a newer gpurnn"),
    "no version": (set_entry("version", "1"), "version should be an int"),
    "dtype": (set_entry("dtype", "int8"), "dtype should be one of float32, float64, float16, bfloat16, got 'int8'"),
    "layer": (set_entry(*LAYER, "1", "layer", "os.system"), "1: unknown layer 'os.system'"),
    "kind of a layer": (set_entry(*LAYER, "1", "layer", ["LSTM"]), "1: unknown layer"),
    "series alone": (set_entry(*LAYER, "1", "layer", "Direct"), "'layers' is missing"),
    "argument": (set_layer("1", "backend", "cuda"), "1: LSTM has no argument 'backend'"),
    "unknown argument": (set_layer("1", "speed", 3), "1: LSTM has no argument 'speed'"),
    "no arguments": (set_entry(*LAYER, "1", "arguments", [1]), "1: arguments should be values by name"),
    "value": (set_layer("1", "dropout", 7), "dropout should be a finite number in"),
    "type": (set_layer("1", "hidden_size", "4"), "hidden_size should be an int"),
    "hidden": (set_layer("1", "hidden_size", 10**9), "its layers have more parameters than its arrays have numbers"),
    "input": (set_layer("1", "input_size", 10**15), "its layers have more parameters than its arrays have numbers"),
    "features": (set_layer("3", "features", 10**12), "its layers have more parameters than its arrays have numbers"),
    "batch norm": (
        lambda d: d["model"]["layers"]["1"]["arguments"].update(layer_norm=False, batch_norm=10**12),
        "its layers have more parameters",
    ),
    "layers": (set_layer("1", "num_layers", 10**9), "num_layers is 1000000000, more than its arrays allow"),
    "heads": (
        lambda d: d["model"]["layers"]["1"]["arguments"].update(hidden_size=10**9, heads=10**9),
        "heads is 1000000000, more than its arrays allow",
    ),
    "fewer": (set_layer("1", "num_layers", 1), "dropout acts between|is unknown"),
    "another layer": (set_layer("1", "bidirectional", True), "more parameters than|is missing"),
    "shape": (set_entry(*LAYER, "2", "layer", "LSTM"), "LSTM has no argument 'cell'"),
    "sizes": (
        lambda d: d["model"]["layers"]["0"]["arguments"].update(num_embeddings=3, embedding_dim=5),
        "reads 3 features, but 0: Embedding before it gives 5",
    ),
    "table": (set_layer("4", "embedding", "1"), "embedding: expected an Embedding, got LSTM"),
    "no table": (set_layer("4", "embedding", "9"), "'9' is missing"),
    "a part of itself": (set_layer("4", "embedding", "4"), "4: it is a part of itself"),
    "the model as a table": (set_layer("4", "embedding", ""), "it is a part of itself"),
    "same": (set_entry(*LAYER, "1", {"same": "7"}), "'7' is missing"),
    "built-in cell": (set_layer("2", "cell", {"built_in": "print"}), "cell should be one of"),
    "cell": (set_layer("2", "cell", {}), "'cell' is missing"),
    "function": (set_layer("1", "activation", {"function": "print"}), "is damaged, or no model file"),
    "random": (set_entry("random", {}), "random state is of another model"),
    "counters": (set_entry("random", "1", ["seed", 0, 0]), "seed should be"),
    "frozen": (set_entry("frozen", ["7.weight"]), "freeze: no parameter or layer is called"),
    "arguments of a chain": (set_entry("model", "arguments", {"once": 1}), "Sequential: expected the arguments none"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_wrong_documents(name, good, tmp_path):
    change, words = WRONG[name]
    path = tmp_path / "bad.safetensors"
    path.write_bytes(without_digest(good, change))
    tracemalloc.start()
    refused(path, words)
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert most < 20 << 20, f"{most:,} bytes"


def test_the_document_of_these_tests_is_good_otherwise(good, tmp_path):
    path = tmp_path / "good.safetensors"
    path.write_bytes(without_digest(good, lambda document: None))
    assert outcome(path) == "a model"


def test_damage_that_only_the_digest_shows(good, tmp_path):
    path, header = tmp_path / "bad.safetensors", parts(good)[0]
    path.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    refused(path, "is damaged: its SHA-256 is not the one")
    text = header["__metadata__"]["gpurnn"]
    header["__metadata__"]["gpurnn"] = text.replace('"dropout": 0.1', '"dropout": 0.9')
    assert header["__metadata__"]["gpurnn"] != text
    path.write_bytes(joined(header, parts(good)[1]))
    refused(path, "is damaged: its SHA-256 is not the one")


@pytest.mark.parametrize(
    "change, words",
    [
        ({"dtype": "I32"}, "0.weight: expected numbers as float32, got int32"),
        ({"dtype": "F8"}, "the dtype 'F8' should be one of"),
        ({"shape": [3, 5]}, r"0.weight: expected shape \(5, 3\), got \(3, 5\)"),
        ({"shape": [10**12, 15]}, "should not have 60 bytes"),
        ({"shape": [-5, -3]}, "sizes should be whole numbers"),
        ({"shape": [True, 15]}, "sizes should be whole numbers"),
        ({"shape": 15}, "is not a safetensors file"),
        ({"data_offsets": [4, 64]}, "does not begin where the one before it ends"),
        ({"data_offsets": [10**18, 10**18 + 60]}, "does not begin where the one before it ends"),
        ({"data_offsets": [0]}, "is not a safetensors file"),
    ],
)
def test_wrong_headers(change, words, good, tmp_path):
    path = tmp_path / "bad.safetensors"
    header, arrays = parts(good)
    header["0.weight"] |= change
    path.write_bytes(joined(header, arrays))
    refused(path, words)


def test_arrays_of_other_names(good, tmp_path):
    path = tmp_path / "bad.safetensors"
    header, arrays = parts(good)
    header["x"] = header.pop("0.weight")
    path.write_bytes(joined(header, arrays))
    refused(path, "the array '0.weight' is missing")
    header["0.weight"], end = header["x"], len(arrays)
    header["x"] = {"dtype": "F32", "shape": [1], "data_offsets": [end, end + 4]}
    path.write_bytes(joined(header, arrays + bytes(4)))
    refused(path, "the array 'x' is unknown")


def test_too_many_layers_and_too_deep(good, tmp_path):
    path = tmp_path / "bad.safetensors"
    many = {str(n): {"layer": "Dropout", "arguments": {"rate": 0}} for n in range(10_001)}
    path.write_bytes(without_digest(good, set_entry("model", "layers", many)))
    refused(path, "it has 10,002 layers, 1 deep: a file holds at most 10,000")
    deep = {"layer": "Dropout", "arguments": {"rate": 0}}
    for _ in range(300):
        deep = {"layer": "Sequential", "arguments": {}, "layers": {"0": deep}}
    path.write_bytes(without_digest(good, set_entry("model", deep)))
    refused(path, "it has 301 layers, 300 deep: a file holds at most 10,000, and 50 deep")


def test_a_description_that_is_too_large_for_the_limit(good, tmp_path):
    path = tmp_path / "bad.safetensors"
    path.write_bytes(good)
    files.set_max_memory("200K")
    try:
        with pytest.raises(files.FileError, match="its model would take .* of memory, the limit is"):
            gpurnn.load(path, "numpy")
    finally:
        files.set_max_memory(None)


def test_parts_of_composites(tmp_path):
    path = tmp_path / "bad.safetensors"
    gpurnn.save(gpurnn.EncoderDecoder(6, 7, 4, backend="numpy", seed=1), path)
    data, dropout = path.read_bytes(), {"layer": "Dropout", "arguments": {"rate": 0.5}}
    for change, words in (
        (set_entry(*LAYER, "encoder", dropout), "its part 'encoder' should be a layer of the kind Recurrent"),
        (lambda d: d["model"]["layers"].pop("output_dropout"), "its part 'output_dropout' should be a layer"),
        (lambda d: d["model"]["layers"].pop("bridge_c"), "it needs a bridge for each state of its decoder"),
        (set_entry(*LAYER, "more", dropout), "EncoderDecoder: it has no part 'more'"),
    ):
        path.write_bytes(without_digest(data, change))
        refused(path, words)
