"""ONNX Runtime: the operators RNN, GRU (linear_before_reset, torch's form) and LSTM; inference in float32 only."""

import numpy as np

from .prepared import Prepared, threads


def onnxruntime_rival(case, weights, x, doutput):
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads()
    model = _model(case, weights, x.shape, doutput.shape).SerializeToString()
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])

    def run():
        return session.run(None, {"x": x})

    return Prepared(run, lambda: {"output": run()[0].astype("float64")})


def _model(case, weights, x_shape, output_shape):
    """The layers of a case as an ONNX model."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    D = 2 if case.bidirectional else 1
    constants = {"shape": np.array([case.T, case.B, D * case.H])}
    nodes, value = [], "x"
    for layer in range(case.L):
        constants |= {f"{name}{layer}": array for name, array in _parameters(case, weights, layer).items()}
        options = {"hidden_size": case.H, "direction": "bidirectional" if D == 2 else "forward"}
        if case.cell == "gru":
            options["linear_before_reset"] = 1
        inputs = [value, f"W{layer}", f"R{layer}", f"B{layer}"]
        nodes.append(helper.make_node(case.cell.upper(), inputs, [f"y{layer}"], **options))  # (T, D, B, H)
        nodes.append(helper.make_node("Transpose", [f"y{layer}"], [f"t{layer}"], perm=[0, 2, 1, 3]))
        nodes.append(helper.make_node("Reshape", [f"t{layer}", "shape"], [f"out{layer}"]))
        value = f"out{layer}"
    graph = helper.make_graph(
        nodes,
        "rnn",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, x_shape)],
        [helper.make_tensor_value_info(value, TensorProto.FLOAT, output_shape)],
        [numpy_helper.from_array(array, name) for name, array in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 14)], ir_version=8)
    onnx.checker.check_model(model)
    return model


def _parameters(case, weights, layer):
    """A layer's weights W, R and biases B: a row for each direction, gates in ONNX's order."""
    order = {"rnn": (0,), "gru": (1, 0, 2), "lstm": (0, 3, 1, 2)}[case.cell]  # ONNX has z r h and i o f c

    def gates(name):
        suffixes = ("", "_reverse")[: 2 if case.bidirectional else 1]
        parts = [weights[f"{name}_l{layer}{suffix}"] for suffix in suffixes]
        return np.stack([np.concatenate([np.split(part, len(order))[k] for k in order]) for part in parts])

    biases = np.concatenate([gates("bias_ih"), gates("bias_hh")], axis=1)
    return {"W": gates("weight_ih"), "R": gates("weight_hh"), "B": biases}
