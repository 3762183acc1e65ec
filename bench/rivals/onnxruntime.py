"""ONNX Runtime: the operators RNN, GRU (linear_before_reset, torch's form) and LSTM; inference in float32, and of the
LSTM with weights in int8 (``quantize_dynamic``), which makes no other of the three."""

import logging
import tempfile
from pathlib import Path

import numpy as np

from .prepared import Prepared, threads


def onnxruntime_rival(int8=False):
    """A whole sequence in a call."""

    def prepare(case, weights, x, doutput):
        session = _session(_model(case, weights, x.shape, doutput.shape), int8)

        def run():
            return session.run(None, {"x": x})

        return Prepared(run, lambda: {"output": run()[0].astype("float64")})

    return prepare


def onnxruntime_cell_rival(int8=False):
    """A case of one timestep. Every run goes on from the states before."""

    def prepare(case, weights, x, doutput):
        states = [f"state{k}" for k in range(len(case.record.states))]
        session = _session(_model(case, weights, x.shape, doutput.shape, states), int8)
        zeros = dict.fromkeys(states, np.zeros((1, case.B, case.H), np.float32))
        fed = {"x": x} | zeros

        def run():
            output, *after = session.run(None, fed)
            fed.update(zip(states, after, strict=True))
            return output  # (1, directions, B, H)

        def results():
            fed.update(zeros)
            return {"output": run()[:, 0].astype("float64")}

        return Prepared(run, results)

    return prepare


def _session(model, int8):
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads()
    model = _quantized(model) if int8 else model.SerializeToString()
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def _quantized(model):
    """The bytes of the model with its weights in int8, a scale for each row."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "int8.onnx"
        logging.disable(logging.WARNING)  # it warns that the graph was not simplified, which has one node
        try:
            quantize_dynamic(model, path, weight_type=QuantType.QInt8, per_channel=True)
        finally:
            logging.disable(logging.NOTSET)
        return path.read_bytes()


def _model(case, weights, x_shape, output_shape, states=()):
    """The layers of a case as an ONNX model.

    states: names, for one layer that takes its states and returns them; its output has an axis for directions.
    """
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    D = 2 if case.bidirectional else 1
    constants = {} if states else {"shape": np.array([case.T, case.B, D * case.H])}
    nodes, value, after = [], "x", [f"{state}_after" for state in states]
    for layer in range(case.L):
        constants |= {f"{name}{layer}": array for name, array in _parameters(case, weights, layer).items()}
        options = {"hidden_size": case.H, "direction": "bidirectional" if D == 2 else "forward"}
        if case.cell == "gru":
            options["linear_before_reset"] = 1
        inputs = [value, f"W{layer}", f"R{layer}", f"B{layer}", *([""] if states else []), *states]  # "": lengths
        nodes.append(helper.make_node(case.cell.upper(), inputs, [f"y{layer}", *after], **options))  # (T, D, B, H)
        value = f"y{layer}"
        if not states:
            nodes.append(helper.make_node("Transpose", [f"y{layer}"], [f"t{layer}"], perm=[0, 2, 1, 3]))
            nodes.append(helper.make_node("Reshape", [f"t{layer}", "shape"], [f"out{layer}"]))
            value = f"out{layer}"
    shapes_in = {"x": x_shape} | dict.fromkeys(states, (D, case.B, case.H))
    shapes_out = {value: (case.T, D, case.B, case.H) if states else output_shape}
    shapes_out |= dict.fromkeys(after, (D, case.B, case.H))
    graph = helper.make_graph(
        nodes,
        "rnn",
        *(
            [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in shapes.items()]
            for shapes in (shapes_in, shapes_out)
        ),
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
