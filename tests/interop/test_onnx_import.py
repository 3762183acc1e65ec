"""``import_onnx``: every recurrent node with all its attributes, and the nodes around them."""

import importlib

import numpy as np
import onnx_nodes as nodes
import pytest
from helpers import assert_close
from optional import needs, optional

from gpurnn.dtypes import check_dtype
from gpurnn.errors import DtypeError, FileError, ShapeError
from gpurnn.interop.onnx import import_onnx

onnx = optional("onnx")
RECURRENT = ("RNN", "GRU", "LSTM")
UNARY = """Relu Tanh Sigmoid Exp Sqrt Neg Abs Reciprocal Softplus Softsign Floor Ceil Sign Elu ThresholdedRelu Identity
Dropout Shape Size Flatten Transpose"""
BINARY = "Add Sub Mul Div PRelu Equal Less Greater LessOrEqual GreaterOrEqual Max Min Sum"


# ---- recurrent nodes


@pytest.mark.long
def test_all_recurrent_nodes_of_the_backend_suite():
    """18 cases in onnx 1.23."""
    for name in ("rnn", "gru", "lstm"):
        importlib.import_module(f"onnx.backend.test.case.node.{name}")
    suite = importlib.import_module("onnx.backend.test.case.node")._NodeTestCases
    cases = [case for case in suite if case.model.graph.node[0].op_type in RECURRENT]
    assert len(cases) >= 12, "fewer than the oldest onnx has"
    for case in cases:
        twin = import_onnx(case.model, backend="numpy")
        for inputs, outputs in case.data_sets:
            found = twin.run(dict(zip(twin.inputs, inputs, strict=True)))
            for name, expected in zip(twin.outputs, outputs, strict=True):
                np.testing.assert_allclose(
                    found[name], expected, rtol=1e-3, atol=1e-7, err_msg=case.name
                )  # the suite's


def terms(inputs, given):
    """Roundings of a node, one after another: the products of each timestep, and its pointwise part."""
    return inputs["X"].shape[given.get("layout", 0)] * (inputs["X"].shape[2] + 2 * given["hidden_size"] + 8)


def check_node(rng, kind):
    model, inputs, given = nodes.random_node(rng, kind, "float64")
    found = import_onnx(model, backend="numpy").run(nodes.fed(inputs))
    for got, expected in zip(found.values(), nodes.specified(kind, given, inputs), strict=True):
        assert_close(got, expected, terms(inputs, given), f"{given} {list(inputs)}", each=True)


@pytest.mark.parametrize("kind", RECURRENT)
def test_random_nodes_give_what_the_specification_says(kind):
    rng = np.random.default_rng(7)
    for _ in range(12):
        check_node(rng, kind)


@pytest.mark.long
@pytest.mark.parametrize("kind", RECURRENT)
def test_a_hundred_random_nodes_of_each_kind(kind):
    rng = np.random.default_rng(8)
    for _ in range(100):
        check_node(rng, kind)


@pytest.mark.slow
@needs("onnx")
def test_three_hundred_random_nodes_against_onnx_runtime():
    """It has no layout 1. Where no numbers are given, its Affine, ThresholdedRelu and ScaledTanh have others."""
    runtime = pytest.importorskip("onnxruntime")
    runtime.set_default_logger_severity(4)
    options = runtime.SessionOptions()
    options.intra_op_num_threads = 1
    rng, compared = np.random.default_rng(9), 0
    while compared < 300:
        kind = RECURRENT[compared % 3]
        model, inputs, given = nodes.random_node(rng, kind)
        if given.get("layout"):
            continue
        session = runtime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        expected = session.run(None, nodes.fed(inputs))
        if not all(np.isfinite(array).all() for array in expected):  # its Softplus of a large number
            continue
        exact = nodes.specified(kind, given, inputs)
        found = import_onnx(model, backend="numpy").run(nodes.fed(inputs))
        for got, theirs, true in zip(found.values(), expected, exact, strict=True):
            size = np.maximum(1, np.abs(true))
            allowed = 2 * (np.abs(theirs - true) / size).max() + terms(inputs, given) * 2.0**-23
            assert (np.abs(got - true) / size).max() <= allowed, f"{given} {list(inputs)}"
        compared += 1


@pytest.mark.parametrize("backend", ["numpy", "cpu"])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_random_nodes_of_other_dtypes(dtype, backend):
    rng, array_dtype = np.random.default_rng(11), check_dtype(dtype)
    for kind in RECURRENT * 8:
        model, inputs, given = nodes.random_node(rng, kind, array_dtype)
        if "activations" in given:  # some jump
            continue
        if backend == "cpu" and ("clip" in given or "P" in inputs or "input_forget" in given):
            continue  # each would be a cell to compile
        found = import_onnx(model, backend=backend).run(nodes.fed(inputs))
        for got, expected in zip(found.values(), nodes.specified(kind, given, inputs), strict=True):
            assert got.dtype == array_dtype
            assert_close(got.astype("float64"), expected, terms(inputs, given), str(given), dtype, each=True)


def test_numbers_of_activations_are_taken_in_turn():
    """Only by those that have them: Softsign takes none."""
    rng = np.random.default_rng(0)
    given = {"hidden_size": 2, "direction": "bidirectional", "linear_before_reset": 1, "activation_beta": [0.5]}
    given |= {"activations": ["Softsign", "LeakyRelu", "Sigmoid", "scaledtanh"], "activation_alpha": [0.25, 0.75]}
    inputs = {"X": rng.normal(size=(3, 2, 2)), "W": rng.normal(size=(2, 6, 2)), "R": rng.normal(size=(2, 6, 2))}
    found = import_onnx(nodes.node_model("GRU", given, inputs, ["X", "W", "R"]), backend="numpy").run(nodes.fed(inputs))
    given["activations"][3] = "ScaledTanh"
    for got, expected in zip(found.values(), nodes.specified("GRU", given, inputs), strict=True):
        assert_close(got, expected, 60, each=True)


@pytest.mark.parametrize("backend", ["numpy", "cpu"])
def test_a_call_knows_states_and_lengths(backend):
    rng = np.random.default_rng(1)
    shapes = {"X": (4, 3, 2), "W": (1, 12, 2), "R": (1, 12, 3), "initial_h": (1, 3, 3), "initial_c": (1, 3, 3)}
    inputs = {name: rng.normal(size=shape).astype("float32") for name, shape in shapes.items()}
    inputs["sequence_lens"] = np.array([4, 1, 2], np.int32)
    names = ["X", "W", "R", "B", "sequence_lens", "initial_h", "initial_c"]
    model = nodes.node_model("LSTM", {"hidden_size": 3}, inputs, names)
    twin = import_onnx(model, backend=backend)
    state = inputs["initial_h"], inputs["initial_c"]
    y, (h, c) = twin(inputs["X"], state, [4, 1, 2])
    expected = nodes.specified("LSTM", {"direction": "forward"}, inputs)
    for got, exact in zip((y, h, c), expected, strict=True):
        assert_close(got, exact, 4 * 14, dtype="float32")
    first, state = twin(inputs["X"])
    zeros = {"initial_h": 0 * inputs["initial_h"], "initial_c": 0 * inputs["initial_c"]}
    expected = nodes.specified("LSTM", {"direction": "forward"}, inputs | zeros | {"sequence_lens": np.full(3, 4)})
    assert_close(first, expected[0], 4 * 14, dtype="float32")
    assert repr(twin) == "Twin(the model: X, sequence_lens, initial_h, initial_c -> Y, Y_h, Y_c)"


@pytest.mark.parametrize("fed", ["W", "R", "B", "P"])
def test_weights_may_be_inputs(fed):
    """What one call made of them is nothing to the next."""
    rng = np.random.default_rng(6)
    shapes = {"X": (3, 2, 2), "W": (1, 12, 2), "R": (1, 12, 3), "B": (1, 24), "P": (1, 9)}
    inputs = {name: rng.normal(size=shape) for name, shape in shapes.items()}
    names = ["X", "W", "R", "B", "sequence_lens", "initial_h", "initial_c", "P"]
    model, given = nodes.node_model("LSTM", {"hidden_size": 3}, inputs, names), {"direction": "forward"}
    weights = [one for one in model.graph.initializer if one.name != fed]
    del model.graph.initializer[:]
    model.graph.initializer.extend(weights)
    model.graph.input.append(onnx.helper.make_tensor_value_info(fed, 11, inputs[fed].shape))
    twin = import_onnx(model, backend="numpy")
    for _ in range(2):
        inputs[fed] = rng.normal(size=shapes[fed])
        found = twin.run({"X": inputs["X"], fed: inputs[fed]})
        for got, expected in zip(found.values(), nodes.specified("LSTM", given, inputs), strict=True):
            assert_close(got, expected, 3 * 16, fed)


def stacked(kind, D):
    """A file as others write it: two layers, each with a part of one state, batch first; (model, weights by name)."""
    rng, H, G = np.random.default_rng(4), 3, nodes.GATES[kind]
    names = ("h", "c") if kind == "LSTM" else ("h",)
    direction, made, weights = ("bidirectional" if D == 2 else "forward"), [], {}
    make, below = onnx.helper.make_node, "x_t"
    made.append(make("Transpose", ["x"], ["x_t"], perm=[1, 0, 2]))
    made += [make("Split", [f"{name}0", "parts"], [f"{name}0_0", f"{name}0_1"], axis=0) for name in names]
    for k in (0, 1):
        size = 2 if not k else D * H
        shapes = {"W": (D, G * H, size), "R": (D, G * H, H), "B": (D, 2 * G * H)}
        weights |= {f"{name}{k}": rng.normal(size=shape).astype("float32") for name, shape in shapes.items()}
        inputs = [below, f"W{k}", f"R{k}", f"B{k}", "", *(f"{name}0_{k}" for name in names)]
        outputs = [f"y{k}", *(f"{name}n_{k}" for name in names)]
        made.append(make(kind, inputs, outputs, hidden_size=H, direction=direction))
        made.append(make("Transpose", [f"y{k}"], [f"t{k}"], perm=[0, 2, 1, 3]))
        below = f"above{k}"
        made.append(make("Reshape", [f"t{k}", "flat"], [below]))
    made.append(make("Transpose", [below], ["y"], perm=[1, 0, 2]))
    made += [make("Concat", [f"{name}n_0", f"{name}n_1"], [f"{name}n"], axis=0) for name in names]
    info = onnx.helper.make_tensor_value_info
    arrays = weights | {"parts": _i(D, D), "flat": _i(0, 0, D * H)}
    graph = onnx.helper.make_graph(
        made, "stack",
        [info("x", 1, ["batch", "time", 2]), *(info(f"{name}0", 1, [2 * D, "batch", H]) for name in names)],
        [info(name, 1, [None] * 3) for name in ("y", *(f"{name}n" for name in names))],
        [onnx.numpy_helper.from_array(array, name) for name, array in arrays.items()],
    )  # fmt: skip
    return onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=8), weights


@pytest.mark.parametrize("kind", ["LSTM", "GRU"])
@pytest.mark.parametrize("D", [1, 2])
def test_a_state_of_several_layers(kind, D):
    """A call finds the state, although nodes read and write parts of it; without one it is zero."""
    model, weights = stacked(kind, D)
    twin, rng = import_onnx(model, backend="numpy"), np.random.default_rng(5)
    x = rng.normal(size=(2, 5, 2)).astype("float32")
    count = 2 if kind == "LSTM" else 1
    for given in (0, 1):
        parts = tuple(given * rng.normal(size=(2 * D, 2, 3)).astype("float32") for _ in range(count))
        state = None if not given else parts if count == 2 else parts[0]
        y, final = twin(x, state)
        below, finals = x.swapaxes(0, 1), []
        for k in (0, 1):
            inputs = {name: weights[f"{name}{k}"] for name in "WRB"} | {"X": below}
            inputs |= {f"initial_{name}": part[k * D : (k + 1) * D] for name, part in zip("hc", parts, strict=False)}
            direction = {"direction": "bidirectional" if D == 2 else "forward"}
            above, *last = nodes.specified(kind, direction, inputs)
            below = above.transpose(0, 2, 1, 3).reshape(5, 2, D * 3).astype("float32")
            finals.append(last)
        allowed = 2 * 5 * 14  # roundings of two layers
        assert_close(y, below.swapaxes(0, 1), allowed, dtype="float32")
        final = final if count == 2 else (final,)
        for got, exact in zip(final, zip(*finals, strict=True), strict=True):
            assert_close(got, np.concatenate(exact), allowed, dtype="float32")


# ---- the nodes around them


def op(name, count, attributes=None, opset=17, **inputs):
    """(name, model of one node, inputs)."""
    attributes, outputs = attributes or {}, [f"y{k}" for k in range(count)]
    dtype = onnx.helper.np_dtype_to_tensor_dtype
    node = onnx.helper.make_node(name, list(inputs), outputs, **attributes)
    graph = onnx.helper.make_graph(
        [node], name,
        [onnx.helper.make_tensor_value_info(n, dtype(a.dtype), a.shape) for n, a in inputs.items()],
        [onnx.helper.make_empty_tensor_value_info(n) for n in outputs],
    )  # fmt: skip
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", opset)], ir_version=8)
    model = onnx.shape_inference.infer_shapes(model)
    for one in model.graph.output:  # of those that it cannot infer
        one.type.tensor_type.shape.SetInParent()
    return model, inputs


def _i(*values):
    return np.array(values, np.int64)


def single_nodes():
    """A node of each operator, by what is special about it."""
    rng = np.random.default_rng(3)
    x, y, wide = (rng.normal(size=shape) for shape in ((2, 3, 4), (3, 1), (4, 5)))
    flags = rng.random((2, 3, 4)) > 0.5
    for name in UNARY.split():
        yield name, op(name, 1, x=np.abs(x) if name in ("Sqrt", "Reciprocal") else x)
    single = x.astype("float32")  # for those with numbers that are float32 in the reference
    for name in ("LeakyRelu", "HardSigmoid", "HardSwish"):
        yield name, op(name, 1, x=single)
    yield "Log", op("Log", 1, x=np.abs(x))
    for name in BINARY.split():
        yield name, op(name, 1, x=x, y=y)
    yield "Div of integers", op("Div", 1, x=_i(-7, 7, -6, 5), y=_i(2, -2, 3, 7))
    yield "Pow", op("Pow", 1, x=np.abs(x), y=y)
    for name in ("And", "Or", "Xor"):
        yield name, op(name, 1, x=flags, y=flags[:, ::-1].copy())
    yield "Not", op("Not", 1, x=flags)
    yield "Where", op("Where", 1, c=flags, x=x, y=y)
    yield "Clip", op("Clip", 1, x=x, low=np.array(-0.5), high=np.array(0.25))
    yield "Cast", op("Cast", 1, {"to": 1}, x=x)
    yield "MatMul", op("MatMul", 1, x=x, y=wide)
    some = {"alpha": 0.5, "beta": 2.0, "transA": 1}
    yield "Gemm", op("Gemm", 1, some, a=x[0], b=x[1], c=rng.normal(size=4))
    yield "Gemm, b", op("Gemm", 1, {"transB": 1}, a=x[0], b=x[1])
    for name in ("Mean", "Max", "Min", "Prod", "L1", "L2", "SumSquare"):
        yield f"Reduce{name}", op(f"Reduce{name}", 1, {"axes": [0, -1], "keepdims": 0}, x=x)
    yield "ReduceSum", op("ReduceSum", 1, x=x, axes=_i(1))
    yield "ReduceMean 18", op("ReduceMean", 1, opset=18, x=x, axes=_i(-1))
    yield "ReduceSum of none", op("ReduceSum", 1, {"noop_with_empty_axes": 1}, x=x)
    yield "ReduceMax of all", op("ReduceMax", 1, {"keepdims": 0}, x=x)
    for name in ("Softmax", "LogSoftmax"):
        yield name, op(name, 1, {"axis": 1}, x=x)
    yield "ArgMax", op("ArgMax", 1, {"axis": 2, "keepdims": 0}, x=x)
    yield "ArgMin, last", op("ArgMin", 1, {"select_last_index": 1}, x=np.round(x))
    yield "LayerNormalization", op("LayerNormalization", 1, {"epsilon": 2.0**-10}, x=x, s=x[0, 0], b=x[1, 0])
    moments = {"m": x[1, :, 0], "v": np.abs(y[:, 0])}
    some = {"epsilon": 2.0**-10}
    yield "BatchNormalization", op("BatchNormalization", 1, some, x=x, s=y[:, 0], b=x[0, :, 0], **moments)
    yield "Reshape", op("Reshape", 1, x=x, s=_i(0, -1, 2))
    yield "Squeeze", op("Squeeze", 1, x=x[:1], a=_i(0))
    yield "Squeeze 11", op("Squeeze", 1, {"axes": [-3]}, opset=11, x=x[:1])
    yield "Unsqueeze", op("Unsqueeze", 1, x=x, a=_i(0, -1))
    yield "Concat", op("Concat", 1, {"axis": -1}, x=x, y=x[..., :1])
    yield "Split", op("Split", 2, {"axis": 2}, x=x, s=_i(1, 3))
    yield "Split, equal", op("Split", 3, {"axis": 1}, x=x)
    yield "Slice", op("Slice", 1, x=x, s=_i(-1, 1), e=_i(-9223372036854775808, 100), a=_i(2, 1), t=_i(-2, 1))
    yield "Slice, backwards to 1", op("Slice", 1, x=x, s=_i(3), e=_i(0), a=_i(2), t=_i(-1))
    yield "Gather", op("Gather", 1, {"axis": 1}, x=x, i=_i(2, -1, 0).reshape(3, 1))
    yield "GatherElements", op("GatherElements", 1, {"axis": 2}, x=x, i=np.full((2, 3, 1), -2))
    yield "Expand", op("Expand", 1, x=y, s=_i(2, 1, 4))
    yield "Tile", op("Tile", 1, x=y, s=_i(2, 3))
    yield "ConstantOfShape", op("ConstantOfShape", 1, x=_i(2, 3))
    yield "Range", op("Range", 1, a=np.array(7), b=np.array(-2), c=np.array(-3))
    yield "Pad", op("Pad", 1, x=y, p=_i(1, 0, 0, 2), v=np.array(9.0))
    yield "ReverseSequence", op("ReverseSequence", 1, {"time_axis": 1, "batch_axis": 0}, x=x, n=_i(3, 2))
    yield "CastLike", op("CastLike", 1, x=x, y=np.zeros(1, np.float32))
    for name, value in {"value_float": 0.5, "value_floats": [0.5, 2.0], "value_int": 3, "value_ints": [3, 4]}.items():
        yield f"Constant, {name}", op("Constant", 1, {name: value})
    yield "Constant", op("Constant", 1, {"value": onnx.numpy_helper.from_array(wide)})
    yield "Shape of some", op("Shape", 1, {"start": 1}, x=x)


def nodes_without_attributes():
    """What holds where an attribute is left out, or an axis is counted from the end."""
    rng = np.random.default_rng(8)
    x, y, square = (rng.normal(size=shape) for shape in ((2, 3, 4), (3, 1), (3, 3)))
    for name in ("ArgMax", "ArgMin", "Softmax", "LogSoftmax", "ReduceMean", "ReduceMin"):
        yield name, op(name, 1, x=x)
    for name in ("ArgMax", "ReduceProd"):
        yield f"{name}, from the end", op(name, 1, {"axis": -1} if name == "ArgMax" else {"axes": [-2]}, x=x)
    yield "ReverseSequence", op("ReverseSequence", 1, x=square, n=_i(3, 1, 2))
    yield "Split", op("Split", 2, x=x)
    yield "Split 11", op("Split", 2, {"split": [1, 3], "axis": -1}, 11, x=x)
    yield "Gather", op("Gather", 1, x=x, i=_i(1, -2))
    yield "Gather, from the end", op("Gather", 1, {"axis": -1}, x=x, i=_i(3, 0).reshape(1, 2))
    yield "GatherElements", op("GatherElements", 1, x=square, i=np.array([[0, -1, 1]]))
    yield "Flatten, from the end", op("Flatten", 1, {"axis": -1}, x=x)
    yield "Transpose", op("Transpose", 1, {"perm": [2, 0, 1]}, x=x)
    yield "Gemm", op("Gemm", 1, a=square, b=square, c=y)
    yield "Slice", op("Slice", 1, x=x, s=_i(1, 0), e=_i(2, -1))
    yield "Slice 9", op("Slice", 1, {"starts": [0, 1], "ends": [2, 9], "axes": [-1, 1]}, 9, x=x)
    yield "Pad 18, axes", op("Pad", 1, None, 18, x=x, p=_i(1, 0, 0, 2), v=np.array(7.0), a=_i(-1, 0))
    yield "Pad 10", op("Pad", 1, {"pads": [0, 1, 2, 0], "value": 0.5}, 10, x=y.astype("float32"))
    yield "Clip, low", op("Clip", 1, x=x, low=np.array(0.25))
    yield "Clip 6", op("Clip", 1, {"min": -0.5, "max": 0.25}, 6 + 1, x=x.astype("float32"))
    yield "Unsqueeze 11", op("Unsqueeze", 1, {"axes": [1]}, 11, x=x)
    yield "Squeeze of all", op("Squeeze", 1, x=x[:1, :, :1])
    yield "LayerNormalization", op("LayerNormalization", 1, {"epsilon": 2.0**-10, "axis": 1}, x=x, s=x[0])
    yield "Reshape, allowzero", op("Reshape", 1, {"allowzero": 1}, x=x[:0], s=_i(3, 0))
    yield "MatMul of vectors", op("MatMul", 1, x=x, y=x[0, 0])
    yield "Dropout 7", op("Dropout", 1, {"ratio": 0.5}, 7, x=x)
    yield "Constant of a shape", op("ConstantOfShape", 1, {"value": onnx.numpy_helper.from_array(_i(5))}, x=_i(2))


@pytest.mark.parametrize("made", [single_nodes, nodes_without_attributes])
def test_each_operator_gives_what_the_reference_gives(made):
    reference = importlib.import_module("onnx.reference")
    for name, (model, inputs) in made():
        expected = reference.ReferenceEvaluator(model).run(None, inputs)
        found = import_onnx(model, backend="numpy").run(inputs)
        for got, exact in zip(found.values(), expected, strict=True):
            exact = np.asarray(exact)
            assert got.dtype == exact.dtype and got.shape == exact.shape, (name, got.dtype, exact.dtype, got.shape)
            if exact.dtype.kind == "f":
                assert_close(got, exact, 40, name, exact.dtype.name, each=True)
            else:
                np.testing.assert_array_equal(got, exact, err_msg=name)


@pytest.mark.parametrize("given", [{"axis": 1}, {}, {"axis": -2}])
def test_softmax_before_version_13_has_one_axis_of_the_rest(given):
    x = np.random.default_rng(2).normal(size=(2, 3, 4))
    model, inputs = op("Softmax", 1, given, opset=11, x=x)
    exps = np.exp(x.reshape(2, 12))
    expected = (exps / exps.sum(axis=1, keepdims=True)).reshape(x.shape)
    assert_close(import_onnx(model, backend="numpy").run(inputs)["y0"], expected, 40)


def test_a_division_by_zero_is_no_warning():
    model, inputs = op("Div", 1, x=np.array([1.0, -1.0, 0.0]), y=np.zeros(1))
    found = import_onnx(model, backend="numpy").run(inputs)["y0"]
    np.testing.assert_array_equal(found, [np.inf, -np.inf, np.nan])


def test_what_a_call_returns_may_be_written_to():
    values = onnx.numpy_helper.from_array(np.ones(2, np.float32), "w")
    made = [onnx.helper.make_node("Relu", ["x"], ["z"]), onnx.helper.make_node("Neg", ["w"], ["y"])]
    twin = import_onnx(chain(*made, initial=[values]), backend="numpy")
    for _ in range(2):
        y, _ = twin(np.ones((1, 1, 2), "float32"))
        assert y.tolist() == [-1, -1]
        y[:] = 5


# ---- what does not fit


def chain(*proto_nodes, initial=(), shape=("T", "B", 2), metadata=None):
    """A model of nodes from x to y."""
    graph = onnx.helper.make_graph(
        list(proto_nodes), "chain", [onnx.helper.make_tensor_value_info("x", 1, shape)],
        [onnx.helper.make_tensor_value_info("y", 1, None)], list(initial),
    )  # fmt: skip
    graph.output[0].type.tensor_type.shape.SetInParent()
    return onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=8)


def test_unknown_operators_are_named():
    nodes_ = [onnx.helper.make_node("Einsum", ["x"], ["z"], equation="ab->ba")]
    nodes_ += [onnx.helper.make_node("Gelu", ["z"], ["y"], domain="com.microsoft")]
    model = chain(*nodes_, shape=("T", 2))
    model.opset_import.append(onnx.helper.make_opsetid("com.microsoft", 1))
    with pytest.raises(FileError, match="operators that gpurnn does not know: Einsum, com.microsoft.Gelu"):
        import_onnx(model)


def test_what_older_versions_mean_otherwise_is_refused():
    model = chain(onnx.helper.make_node("Relu", ["x"], ["y"]))
    scan = onnx.helper.make_node("Scan", ["x"], ["y"], body=model.graph, num_scan_inputs=1)
    old = chain(scan)
    old.opset_import[0].version = 8
    with pytest.raises(FileError, match=r"\(Scan\): expected a Scan of opset 9 or later, got one of 8|is no valid"):
        import_onnx(old)
    x = np.ones((2, 3), np.float32)
    made, inputs = op("BatchNormalization", 1, {"spatial": 0}, 7, x=x, s=x[0], b=x[0], m=x[0], v=x[0])
    with pytest.raises(ValueError, match="spatial: expected 1"):
        import_onnx(made, backend="numpy").run(inputs)
    made, inputs = op("BatchNormalization", 3, {"training_mode": 1}, 17, x=x, s=x[0], b=x[0], m=x[0], v=x[0])
    with pytest.raises(ValueError, match="statistics of the batch, as in training, are not computed here"):
        import_onnx(made, backend="numpy").run(inputs)


def test_wrong_inputs_are_named():
    twin = import_onnx(chain(onnx.helper.make_node("Relu", ["x"], ["y"])), backend="numpy")
    assert twin.inputs == {"x": ("float32", ("T", "B", 2))}
    x = np.ones((3, 1, 2), "float32")
    with pytest.raises(ShapeError, match=r"x: expected shape \(3, 1, 2\), got \(3, 1, 5\)"):
        twin(np.ones((3, 1, 5), "float32"))
    with pytest.raises(ShapeError, match=r"x: expected shape \(.*2\), got \(3, 1\)"):
        twin(x[..., 0])
    with pytest.raises(DtypeError, match="x: expected float32, got int64"):
        twin(x.astype(int))
    with pytest.raises(ValueError, match="lengths: this graph takes none"):
        twin(x, lengths=[1])
    with pytest.raises(ValueError, match="state: this graph takes none"):
        twin(x, x)
    with pytest.raises(ValueError, match="inputs: expected x; 'z' is none of them"):
        twin.run({"x": x, "z": x})
    with pytest.raises(ValueError, match="inputs: expected x; 'x' is missing"):
        twin.run({})
    with pytest.raises(ValueError, match="outputs: expected some of y, got 'z'"):
        twin.run({"x": x}, ["z"])
    assert twin.run({"x": -x}, ["y"])["y"].tolist() == np.zeros((3, 1, 2)).tolist()
    with pytest.raises(TypeError, match="path: expected the name of a file or an onnx.ModelProto, got int"):
        import_onnx(3)


@pytest.mark.parametrize(
    "given, message",
    [
        ({"activations": ["Tanh", "Nothing"]}, "activations: expected some of ONNX's.*'Nothing'"),
        ({"activations": ["Tanh"]}, "activations: expected 2 for each of 1 directions, got 1"),
        ({"direction": "sideways"}, "direction: expected one of forward, reverse, bidirectional, got 'sideways'"),
        ({"clip": -1.0}, "clip: expected a number of at least 0"),
        ({"layout": 2}, "layout: expected 0 or 1, got 2"),
    ],
)
def test_wrong_attributes_are_named(given, message):
    inputs = {"X": np.zeros((2, 1, 2)), "W": np.zeros((1, 6, 2)), "R": np.zeros((1, 6, 2))}
    with pytest.raises(FileError, match=r"node '' \(GRU\): " + message):
        import_onnx(nodes.node_model("GRU", given, inputs, ["X", "W", "R"]))


def test_weights_that_do_not_fit_are_named():
    inputs = {"X": np.zeros((2, 1, 2)), "W": np.zeros((1, 5, 2)), "R": np.zeros((1, 6, 2))}
    twin = import_onnx(nodes.node_model("GRU", {"hidden_size": 2}, inputs, ["X", "W", "R"]), backend="numpy")
    with pytest.raises(ShapeError, match=r"W: expected shape \(1, 6, 2\), got \(1, 5, 2\)"):
        twin(inputs["X"])
    inputs["W"] = np.zeros((1, 6, 2))
    twin = import_onnx(nodes.node_model("GRU", {"hidden_size": 3}, inputs, ["X", "W", "R"]), backend="numpy")
    with pytest.raises(ShapeError, match="hidden_size: expected 2, as R has it, got 3"):
        twin(inputs["X"])
