"""Bad files of Keras: a clear error that names the file, nothing executed, no memory beyond the limit."""

import io
import json
import random
import tracemalloc
import zipfile

import numpy as np
import pytest
from hostile import mutated
from optional import needs, optional

import gpurnn
from gpurnn import files
from gpurnn.errors import FileError
from gpurnn.interop.keras import export_keras, import_keras, load_keras_weights
from gpurnn.interop.keras.files import place_names

h5py = optional("h5py")
pytestmark = needs("h5py")
KW = {"backend": "numpy", "seed": 1}
MUTATED = 100  # files of each kind; 2,000 were tried by hand
CELL = "layers/gru/cell/vars"


@pytest.fixture
def small():
    """A limit of 16 MB."""
    files.set_max_memory("16M")
    yield
    files.set_max_memory(None)


def small_model():
    layers = gpurnn.GRU(3, 4, **KW), gpurnn.LayerNorm(4, backend="numpy"), gpurnn.Linear(4, 2, **KW)
    return gpurnn.Sequential(*layers)


@pytest.fixture
def good(tmp_path):
    """(the bytes of a .keras, those of a .weights.h5)"""
    for name in ("good.keras", "good.weights.h5"):
        export_keras(small_model(), tmp_path / name)
    return (tmp_path / "good.keras").read_bytes(), (tmp_path / "good.weights.h5").read_bytes()


def refused(path, words, model=None):
    with pytest.raises(FileError, match=words) as error:
        load_keras_weights(model, path) if model else import_keras(path, backend="numpy")
    assert str(error.value).startswith(str(path)), error.value


def entries_of(data):
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def zipped(path, entries, method=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, data in entries.items():
            archive.writestr(name, data)


def with_config(good, path, change):
    """The good .keras with another configuration."""
    entries = entries_of(good[0])
    config = json.loads(entries["config.json"])
    config = change(config) or config
    zipped(path, entries | {"config.json": json.dumps(config)})


def with_weights(good, path, change):
    """The good .keras with other arrays. change: of the open HDF5 file."""
    entries, file = entries_of(good[0]), io.BytesIO(good[1])
    with h5py.File(file, "r+") as arrays:
        change(arrays)
    zipped(path, entries | {"model.weights.h5": file.getvalue()})


# ---- mutations


@pytest.mark.long
@pytest.mark.parametrize("kind", ["keras", "config", "h5"])
def test_mutated_files(kind, good, small, tmp_path):
    """Each is refused, or is a model; a call of that gives a result or a clear error."""
    path = tmp_path / ("bad.weights.h5" if kind == "h5" else "bad.keras")
    entries, x, ends = entries_of(good[0]), np.ones((2, 3, 3), "float32"), {"refused": 0, "a model": 0}
    for number in range(MUTATED):
        draw = random.Random(number)
        if kind == "config":
            zipped(path, entries | {"config.json": mutated(entries["config.json"], "config.json", draw)})
        else:
            path.write_bytes(mutated(good[0] if kind == "keras" else good[1], path.name, draw))
        try:
            if kind == "h5":
                load_keras_weights(small_model(), path)
            else:
                import_keras(path, backend="numpy")(x)
        except ValueError as error:
            assert str(error).startswith(f"{path}: "), (number, error)
            ends["refused"] += 1
        else:
            ends["a model"] += 1
    assert min(ends.values()) > MUTATED // 50, ends


def test_truncated(good, tmp_path):
    path = tmp_path / "bad.keras"
    for size in (0, 1, 100, len(good[0]) // 2, len(good[0]) - 1):
        path.write_bytes(good[0][:size])
        refused(path, "is no .keras file, or is damaged")
    path = tmp_path / "bad.weights.h5"
    for size in (0, 1, 100, len(good[1]) // 2):
        path.write_bytes(good[1][:size])
        refused(path, "HDF5|damaged", small_model())
    path.write_bytes(b"a letter\n" * 20)
    refused(path, "is no HDF5 file", small_model())
    with pytest.raises(FileError, match="is not a regular file but a folder"):
        import_keras(tmp_path)


# ---- the archive


def test_archives_that_are_none(good, tmp_path):
    path, entries = tmp_path / "bad.keras", entries_of(good[0])
    for name in entries:
        zipped(path, {key: data for key, data in entries.items() if key != name})
        refused(path, f"is no .keras file: it has no {name}")
    zipped(path, {f"../{name}": data for name, data in entries.items()})
    refused(path, "is no .keras file: it has no metadata.json")
    zipped(path, entries, zipfile.ZIP_LZMA)
    refused(path, "metadata.json is encrypted or compressed in a way that Keras does not write")
    zipped(path, entries | {"config.json": b"\x80\x04cbuiltins\nexit\n."})
    refused(path, "bad.keras: config.json: is not JSON")
    zipped(path, entries | {"../../outside": b"x", "/etc/outside": b"x", "assets/model.py": b"raise SystemExit"})
    assert len(import_keras(path, backend="numpy")) == 3
    assert sorted(one.name for one in tmp_path.iterdir()) == ["bad.keras", "good.keras", "good.weights.h5"]


@pytest.mark.long
def test_bombs(good, small, tmp_path):
    """Sizes are looked at before anything is unpacked."""
    path, entries = tmp_path / "bad.keras", entries_of(good[0])
    tracemalloc.start()
    for name in ("config.json", "model.weights.h5"):
        zipped(path, entries | {name: bytes(20 << 20)}, zipfile.ZIP_DEFLATED)
        tracemalloc.reset_peak()
        refused(path, f"{name} would take .* of memory, the limit is 16")
        assert tracemalloc.get_traced_memory()[1] < 4 << 20
    tracemalloc.stop()
    with zipfile.ZipFile(path, "w") as archive:
        for number in range(12_000):
            archive.writestr(f"{number:060}", b"")
    refused(path, "its list of entries would take .* of memory, the limit is 16")


def test_an_archive_that_lies_about_a_size(good, tmp_path):
    data = bytearray(good[0])
    place = data.rfind(b"PK\1\2")  # the last entry of the list: the weights
    assert data[place + 46 : place + 62] == b"model.weights.h5"
    for size in (10, 1 << 30):
        data[place + 24 : place + 28] = size.to_bytes(4, "little")
        (tmp_path / "bad.keras").write_bytes(data)
        refused(tmp_path / "bad.keras", "damaged|the archive says|would take")


# ---- the arrays


def replaced(arrays, name="0", **options):
    del arrays[f"{CELL}/{name}"]
    return arrays.create_dataset(f"{CELL}/{name}", **options)


def chunked(arrays):
    replaced(arrays, data=np.zeros((3, 12), "f4"), chunks=(3, 12), compression="gzip")


def endless(arrays):
    replaced(arrays, shape=(1 << 40, 12), dtype="f4", chunks=(1, 12))


def never_written(arrays):
    replaced(arrays, shape=(1 << 20, 1 << 20), dtype="f4")


def external(arrays):
    replaced(arrays, shape=(3, 12), dtype="f4", external=[("/etc/passwd", 0, 144)])


def virtual(arrays):
    layout = h5py.VirtualLayout(shape=(3, 12), dtype="f4")
    layout[:] = h5py.VirtualSource("other.h5", "data", shape=(3, 12))
    del arrays[f"{CELL}/0"]
    arrays.create_virtual_dataset(f"{CELL}/0", layout)


def linked(kind, *arguments):
    def change(arrays):
        del arrays[f"{CELL}/0"]
        arrays[f"{CELL}/0"] = getattr(h5py, kind)(*arguments)

    return change


def linked_group(arrays):
    del arrays["layers"]
    arrays["layers"] = h5py.ExternalLink("other.h5", "/layers")


def looped(arrays):
    del arrays["layers/gru/cell"]
    arrays["layers/gru/cell"] = arrays["layers"]


def values(data):
    return lambda arrays: replaced(arrays, data=data)


ARRAYS = {
    "compressed": (chunked, "array 0 is compressed, in pieces or in another file"),
    "endless": (endless, "array 0 is compressed, in pieces or in another file"),
    "never written": (never_written, r"array 0 is said to have 4398046511104 bytes, its file has \d+"),
    "external": (external, "array 0 is compressed, in pieces or in another file"),
    "virtual": (virtual, "array 0 is compressed, in pieces or in another file"),
    "external link": (linked("ExternalLink", "good.weights.h5", f"/{CELL}/1"), f"{CELL}/0 is a link to elsewhere"),
    "soft link": (linked("SoftLink", f"/{CELL}/1"), f"{CELL}/0 is a link to elsewhere"),
    "linked group": (linked_group, "//layers is a link to elsewhere"),
    "looped": (looped, "expected 3 arrays, kernel, recurrent_kernel, bias, got 0"),
    "strings": (values(["a", "b"]), "array 0: expected floating-point numbers, got object"),
    "integers": (values(np.zeros((3, 12), "i4")), "array 0: expected floating-point numbers, got int32"),
    "long doubles": (values(np.zeros((3, 12), "g")), "array 0: expected floating-point numbers, got "),
    "nothing": (values(np.zeros((0, 12), "f4")), "kernel and recurrent_kernel: expected 2 axes"),
    "one number": (values(np.float32(1)), "kernel and recurrent_kernel: expected 2 axes"),
    "another shape": (values(np.zeros((3, 11), "f4")), r"kernel: expected shape \(3, 12\), got \(3, 11\)"),
    "NaN": (values(np.full((3, 12), np.nan, "f4")), "gru.weight_ih_l0"),
    "gap": (lambda arrays: arrays.move(f"{CELL}/1", f"{CELL}/5"), "array 1 is missing"),
    "group": (lambda arrays: (arrays.move(f"{CELL}/1", "x"), arrays.create_group(f"{CELL}/1")), "expected a dataset"),
    "fewer": (lambda arrays: arrays.pop(f"{CELL}/2"), r"layer 'gru' \(GRU\): expected 3 arrays"),
}  # fmt: skip


@pytest.mark.parametrize("name", ARRAYS)
def test_arrays(name, good, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # where a link would find another file
    change, words = ARRAYS[name]
    with_weights(good, tmp_path / "bad.keras", change)
    refused(tmp_path / "bad.keras", words)


def test_many_names_of_one_array(good, small, tmp_path):
    """Arrays count as often as they are read."""
    path, count = tmp_path / "bad.keras", 80

    def more(config):
        layers = config["config"]["layers"]
        last = json.dumps(layers[-1]).replace('"units": 2', '"units": 100')
        layers += [json.loads(last) for _ in range(count)]

    def alias(arrays):
        del arrays["layers/dense/vars/0"]
        arrays["layers/dense/vars/0"] = np.zeros((4, 2), "f4")
        big = arrays.create_dataset("big", data=np.zeros((100, 100), "f4"))
        arrays["bias"] = np.zeros(100, "f4")
        for name in place_names(["Dense"] * (count + 1))[1:]:
            group = arrays.create_group(f"layers/{name}/vars")
            group["0"], group["1"] = big, arrays["bias"]

    with_config(good, path, more)
    again = path.read_bytes(), good[1]
    with_weights(again, path, alias)
    refused(path, "its arrays would take .* of memory, the limit is 16")


# ---- the configuration


def layers_of(config):
    return config["config"]["layers"]


def settings_of(config, number=1):
    return layers_of(config)[number]["config"]


def changed(**more):
    return lambda config: settings_of(config).update(more)


def named(**more):
    return lambda config: layers_of(config)[1].update(more)


def deep(config):
    for _ in range(30):
        config = {**config, "config": {**config["config"], "layers": [config]}}
    return config


def functional(config):
    """The same layers as a functional model, which branches."""
    layers = layers_of(config)
    names = ["input_layer", "gru", "layer_normalization", "dense"]
    for layer, name, source in zip(layers, names, [None, "input_layer", "gru", "gru"], strict=True):
        tensor = {"class_name": "__keras_tensor__", "config": {"keras_history": [source, 0, 0]}}
        layer |= {"name": name, "inbound_nodes": [{"args": [tensor], "kwargs": {}}] if source else []}
    ends = {"input_layers": ["input_layer", 0, 0], "output_layers": ["dense", 0, 0]}
    return config | {"class_name": "Functional", "config": {"layers": layers} | ends}


def cyclic(config):
    config = functional(config)
    layers_of(config)[1]["inbound_nodes"][0]["args"][0]["config"]["keras_history"][0] = "dense"
    return config


def given(**arguments):
    def change(config):
        config = functional(config)
        layers_of(config)[3]["inbound_nodes"][0]["args"][0]["config"]["keras_history"][0] = "layer_normalization"
        layers_of(config)[1]["inbound_nodes"][0]["kwargs"] = arguments
        return config

    return change


def code(config):
    function = {"class_name": "__lambda__", "config": {"code": "4wEAAA=="}}
    layers_of(config)[2] |= {"class_name": "Lambda", "config": {"function": function}}


def renorm(config):
    layers_of(config)[2] |= {"class_name": "BatchNormalization", "config": {"renorm": True}}


CONFIGS = {
    "a number": (lambda config: 3, "expected a Sequential or a functional model, got None"),
    "another class": (lambda config: config | {"class_name": "Model"}, "functional model, got 'Model'"),
    "of another module": (lambda config: config | {"module": "os"}, "expected a Sequential or a functional model"),
    "no layers": (lambda config: config | {"config": {"layers": 7}}, "expected a list of at most 10,000 layers"),
    "many layers": (lambda config: layers_of(config).extend([{}] * 10_000), "at most 10,000 layers"),
    "no class": (lambda config: layers_of(config).append({}), "expected layers that have a class_name each"),
    "deep": (deep, "more than 20 models inside one another"),
    "code": (code, r"layer 'Lambda' \(Lambda\): it has no form in gpurnn"),
    "own class": (named(module="os", class_name="system"), r"'gru' \(system\): it is a class of its own"),
    "registered": (named(registered_name="Own>GRU"), r"layer 'gru' \(GRU\): it is a class of its own"),
    "huge": (changed(units=1 << 60), "units: its weights are of size 4, got 1152921504606846976"),
    "negative": (changed(units=-4), "units should be at least 1, got -4"),
    "no number": (changed(units=[4]), "units should be an int, got list"),
    "a rate": (changed(recurrent_dropout=7), r"recurrent_dropout should be a finite number in \[0, 1\], got 7"),
    "a flag": (changed(use_bias="yes"), "use_bias should be True or False, got 'yes'"),
    "no dtype": (changed(dtype={"class_name": "DTypePolicy", "config": 3}), "dtype: expected one of float32, "),
    "quantized": (changed(dtype={"class_name": "QuantizedDTypePolicy"}), "dtype: expected one of float32, "),
    "renorm": (renorm, "renorm: gpurnn has False alone, got True"),
    "unknown": (changed(gates="zrh"), r"layer 'gru' \(GRU\): gates: gpurnn does not know this setting, got 'zrh'"),
    "activation": (changed(activation={"class_name": "function", "config": "eval"}), "activation: expected one of"),
    "a long name": (changed(name="x" * 10_000, units=3), r"layer 'x{40,60}\W* \(GRU\): units"),
    "escapes": (changed(name="\x1b[2J", units=3), r"layer '\\x1b\[2J' \(GRU\): units"),
    "branches": (functional, "layers 'layer_normalization', 'dense' read one output"),
    "cyclic": (cyclic, "output_layers: expected the end of one chain that all layers are in"),
    "a state": (given(initial_state=[1, 2]), r"'gru' \(GRU\): initial_state: gpurnn's chains have no such argument"),
    "training": (given(training=True), "training: gpurnn's chains have no such argument, got True"),
    "a mask": (given(mask=[[True]]), r"layer 'gru' \(GRU\): expected one tensor of the model, got \[\[True\]\]"),
}  # fmt: skip


@pytest.mark.parametrize("name", CONFIGS)
def test_configurations(name, good, tmp_path):
    change, words = CONFIGS[name]
    with_config(good, tmp_path / "bad.keras", change)
    refused(tmp_path / "bad.keras", words)


def test_a_functional_model_without_branches(good, tmp_path):
    with_config(good, tmp_path / "good.keras", given(training=False, mask=None))
    model, x = import_keras(tmp_path / "good.keras", backend="numpy"), np.ones((2, 3, 3), "float32")
    y, _ = small_model()(x.swapaxes(0, 1))
    assert np.array_equal(model(x)[0], y.swapaxes(0, 1))


def test_files_beyond_the_limit(good, small, tmp_path):
    files.set_max_memory("20K")
    refused(tmp_path / "good.weights.h5", "its arrays would take .* of memory, the limit is 20", small_model())
    refused(tmp_path / "good.keras", "config.json would take .* of memory, the limit is 20")


@pytest.mark.long
@pytest.mark.parametrize("layer", ["LSTM", "Embedding", "stack"])
def test_what_a_model_takes(layer, tmp_path):
    """No more memory than is asked for before anything is made, and not half of it."""
    path = tmp_path / "good.keras"
    made = {
        "LSTM": lambda: gpurnn.LSTM(256, 256, **KW),
        "Embedding": lambda: gpurnn.Embedding(1024, 512, **KW),
        "stack": lambda: gpurnn.Sequential(*(gpurnn.GRU(128, 128, **KW) for _ in range(4))),
    }[layer]()
    export_keras(made, path)
    import_keras(path, backend="numpy")  # what is made once
    arrays = [array.size for array in made.state_dict().values()]
    asked = 24 * sum(arrays) + 44 * max(arrays)
    try:
        tracemalloc.start()
        files.set_max_memory(asked)
        import_keras(path, backend="numpy")
        assert asked / 2 < tracemalloc.get_traced_memory()[1] < asked
        files.set_max_memory(int(0.9 * asked))
        refused(path, "its arrays would take")
    finally:
        tracemalloc.stop()
        files.set_max_memory(None)
