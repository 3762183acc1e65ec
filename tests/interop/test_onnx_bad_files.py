"""Bad ONNX files: a clear error that names the file, nothing executed, no memory beyond the limit."""

import random

import numpy as np
import pytest
from hostile import mutated
from optional import needs, optional

import gpurnn
from gpurnn import files
from gpurnn.errors import FileError
from gpurnn.interop.onnx import export_onnx, import_onnx

onnx = optional("onnx")
pytestmark = needs("onnx")
KW = {"backend": "numpy", "seed": 1}


@pytest.fixture
def small():
    """A limit of 16 MB."""
    files.set_max_memory("16M")
    yield
    files.set_max_memory(None)


@pytest.fixture
def good(tmp_path):
    """The bytes of a file, and where to write others."""
    layers = gpurnn.Embedding(5, 3, **KW), gpurnn.LSTM(3, 4, **KW), gpurnn.GRU(4, 4, layer_norm=True, **KW)
    export_onnx(gpurnn.Sequential(*layers, gpurnn.Linear(4, 5, **KW)), tmp_path / "good.onnx")
    return (tmp_path / "good.onnx").read_bytes()


def tensor(name, dims, data=b"", data_type=1):
    return onnx.TensorProto(name=name, dims=dims, data_type=data_type, raw_data=data)


def model_of(nodes, initializers=(), opset=17):
    """x (T, B) -> y."""
    graph = onnx.helper.make_graph(
        nodes, "graph", [onnx.helper.make_tensor_value_info("x", 1, ["T", "B"])],
        [onnx.helper.make_tensor_value_info("y", 1, [None])], initializers,
    )  # fmt: skip
    return onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", opset)], ir_version=8)


def node(op, inputs, outputs, **attributes):
    return onnx.helper.make_node(op, inputs, outputs, **attributes)


def refused(path, words):
    with pytest.raises(FileError, match=words) as error:
        import_onnx(path, backend="numpy")
    assert str(error.value).startswith(str(path)), error.value


@pytest.mark.long
def test_a_thousand_mutated_files(good, small, tmp_path):
    """Each is refused, or is a model; a call of that gives a result or a clear error."""
    path, x, ends = tmp_path / "bad.onnx", np.array([[0, 1], [2, 3], [4, 0]]), {}
    for number in range(1000):
        path.write_bytes(mutated(good, "good.onnx", random.Random(number)))
        try:
            twin = import_onnx(path, backend="numpy")
        except ValueError as error:
            assert str(error).startswith(f"{path}: "), (number, error)
            end = "refused"
        else:
            end = "a model"
            try:
                twin(x, None, [3, 2])
            except (ValueError, TypeError):
                end = "fails"
        ends[end] = ends.get(end, 0) + 1
    assert ends["refused"] > 700 and ends["a model"] > 50, ends


def test_truncated(good, tmp_path):
    path = tmp_path / "bad.onnx"
    for size in (0, 1, 100, len(good) // 2, len(good) - 1):
        path.write_bytes(good[:size])
        refused(path, "ONNX")
    path.write_bytes(b"a letter\n" * 20)
    refused(path, "is no ONNX file")


@pytest.mark.parametrize(
    "dims, data, words",
    [
        ([1 << 40], b"", "would take"),
        ([1 << 20, 1 << 20], b"", "would take"),
        ([1 << 62, 4], b"", "would take"),
        ([-1], b"", "negative size"),
        ([3], b"12345678", "is damaged|is no valid"),
        ([2], b"1" * 40, "is damaged|is no valid"),
    ],
)
def test_sizes_of_weights(dims, data, words, tmp_path):
    onnx.save(model_of([node("Add", ["x", "w"], ["y"])], [tensor("w", dims, data)]), tmp_path / "bad.onnx")
    refused(tmp_path / "bad.onnx", words)


def int64s(name, *values):
    return onnx.numpy_helper.from_array(np.array(values, np.int64), name)


@pytest.mark.parametrize(
    "nodes",
    [
        lambda: [node("ConstantOfShape", ["s"], ["z"]), node("ReduceSum", ["z"], ["y"])],
        lambda: [node("Expand", ["x", "s"], ["y"])],
        lambda: [node("Unsqueeze", ["x", "a"], ["z"]), node("Tile", ["z", "r"], ["y"])],
        lambda: [node("Pad", ["x", "p"], ["y"])],
        lambda: [node("Range", ["zero", "many", "one"], ["z"]), node("Cast", ["z"], ["y"], to=1)],
        lambda: [node("ConstantOfShape", ["few"], ["z"]), node("Unsqueeze", ["z", "a"], ["u"]),
                 node("Unsqueeze", ["z", "one_axis"], ["v"]), node("Mul", ["u", "v"], ["y"])],
        lambda: [node("ConstantOfShape", ["few"], ["z"]), node("Unsqueeze", ["z", "a"], ["u"]),
                 node("Unsqueeze", ["z", "one_axis"], ["v"]), node("MatMul", ["v", "u"], ["y"])],
        lambda: [node("ConstantOfShape", ["few"], ["z"]), node("Unsqueeze", ["z", "a"], ["u"]),
                 node("Unsqueeze", ["z", "one_axis"], ["v"]), node("Cast", ["x"], ["b"], to=9),
                 node("Where", ["b", "u", "v"], ["y"])],
        lambda: [*(node("ConstantOfShape", ["some"], [f"z{k}"]) for k in range(9)),
                 node("Sum", ["x", *(f"z{k}" for k in range(9))], ["y"])],
    ],
)  # fmt: skip
def test_what_nodes_make_is_limited(nodes, small, tmp_path):
    """Nothing of it is executed on import; the call refuses it."""
    numbers = [int64s("s", 1 << 20, 1 << 20), int64s("a", 0), int64s("one_axis", 1), int64s("r", 1 << 40, 1, 1)]
    numbers += [int64s("p", 0, 0, 1 << 40, 0), int64s("few", 100_000), int64s("some", 1, 1, 600_000)]
    numbers += [onnx.numpy_helper.from_array(np.array(v), n) for n, v in (("zero", 0), ("many", 1 << 40), ("one", 1))]
    nodes = nodes()
    read = {name for one in nodes for name in one.input}
    onnx.save(model_of(nodes, [one for one in numbers if one.name in read]), tmp_path / "bad.onnx")
    twin = import_onnx(tmp_path / "bad.onnx", backend="numpy")
    with pytest.raises(FileError, match=r"bad.onnx: .*would take .* of memory, the limit is 16"):
        twin(np.ones((1, 1), "float32"))


def external(location, **more):
    one = tensor("w", [2])
    one.ClearField("raw_data")
    one.data_location = onnx.TensorProto.EXTERNAL
    for key, value in {"location": location, **more}.items():
        one.external_data.add(key=key, value=str(value))
    return model_of([node("Add", ["x", "w"], ["y"])], [one])


def test_external_data(tmp_path):
    """Read from the folder of the model alone."""
    folder, path = tmp_path / "folder", tmp_path / "folder" / "model.onnx"
    (folder / "inner").mkdir(parents=True)
    numbers = np.array([1, 2, 3, 4], "<f4").tobytes()
    for place in (folder / "data", folder / "inner" / "data", tmp_path / "secret"):
        place.write_bytes(numbers)
    (folder / "link").symlink_to(tmp_path / "secret")
    for location in ("data", "inner/data", "./data"):
        onnx.save_model(external(location, offset=4, length=8), path)
        assert import_onnx(path, backend="numpy")(np.zeros((1, 2), "float32"))[0].tolist() == [[2, 3]]
    outside = ("../secret", str(tmp_path / "secret"), "inner/../../secret", "", "C:secret", "..\\secret")
    for location in outside:
        path.write_bytes(external(location).SerializeToString())
        refused(path, "its external data should be in a file in the folder of the model")
    for location, more, words in [
        ("link", {}, "is outside the folder of the model"),
        ("absent", {}, "its external data"),
        ("inner", {}, "not a regular file"),
        ("data", {"offset": 12}, "ends after 4 of 8 bytes"),
        ("data", {"offset": -1}, "expected 8 bytes from an offset of at least 0"),
        ("data", {"length": 1 << 50}, "expected 8 bytes"),
        ("data", {"offset": "x"}, "should be numbers"),
    ]:
        path.write_bytes(external(location, **more).SerializeToString())
        refused(path, words)
    with pytest.raises(FileError, match="the model: tensor 'w': its external data should be in a file in the folder"):
        import_onnx(external("data"))


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda: model_of([node("Add", ["x", "z"], ["y"]), node("Relu", ["y"], ["z"])]), "is no valid ONNX model"),
        (lambda: model_of([node("Relu", ["y"], ["y"])]), "is no valid ONNX model"),
        (lambda: model_of([node("Relu", ["x"], ["y"]), node("Relu", ["x"], ["y"])]), "is no valid ONNX model"),
        (lambda: model_of([node("Relu", ["x"], ["z"])]), "is no valid ONNX model"),
        (lambda: model_of([node("Relu", ["x"], ["y"])], opset=6), "one opset of ONNX from 7 to .*, got 6"),
        (lambda: model_of([node("Relu", ["x"], ["y"])], opset=999), "one opset of ONNX from 7 to .*, got 999"),
        (lambda: model_of([node("Add", ["x", "w"], ["y"])], [tensor("w", [1], b"1", 99)]), "of an unknown type"),
    ],
)
def test_graphs_that_are_none(make, words, tmp_path):
    (tmp_path / "bad.onnx").write_bytes(make().SerializeToString())
    refused(tmp_path / "bad.onnx", words)


def test_what_is_not_read_is_named(tmp_path):
    path, model = tmp_path / "bad.onnx", model_of([node("Relu", ["x"], ["y"])])
    model.functions.add(name="own", domain="mine")
    path.write_bytes(model.SerializeToString())
    refused(path, "it has functions of its own, which gpurnn does not read")
    model = model_of([node("Add", ["x", "w"], ["y"])])
    model.graph.sparse_initializer.add().values.CopyFrom(tensor("w", [1], b"1234"))
    path.write_bytes(model.SerializeToString())
    refused(path, "it has sparse weights, which gpurnn does not read")


def test_a_file_beyond_the_limit(good, small, tmp_path):
    files.set_max_memory("20K")
    with pytest.raises(FileError, match="good.onnx: its graph would take .* of memory, the limit is 20"):
        import_onnx(tmp_path / "good.onnx")


def test_what_a_file_says_of_itself_is_checked(good, tmp_path):
    """Roles that name what is not there are none; without them the twin still runs by names."""
    model = onnx.load_from_string(good)
    for value in ("{}", "[" * 10_000, '{"roles": {"state": ["nothing"], "final": null, "lengths": null, "time": 0}}'):
        next(one for one in model.metadata_props if one.key == "gpurnn").value = value
        twin = import_onnx(model, backend="numpy")
        given = {name: np.zeros([3 if size == "T" else 2 if size == "B" else size for size in shape], dtype)
                 for name, (dtype, shape) in twin.inputs.items()}  # fmt: skip
        assert twin.run(given | {"lengths": np.array([3, 3], np.int32)})["output"].shape == (3, 2, 5)
