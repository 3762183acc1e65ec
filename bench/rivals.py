"""Against whom: each rival turns a case into something to run. What it needs is imported by its own process only.

A rival's ``prepare(case, weights, x, doutput)`` gets NumPy arrays in float32 or float64 (weights by torch's names) and
returns ``Prepared``. All do the same work: the input GEMM, the walk, and in training every gradient, dx included.
"""

import importlib.util
import os
from collections.abc import Callable
from dataclasses import dataclass


@dataclass
class Prepared:
    """run(): the timed work. results(): name -> float64 NumPy array, after one run. wait(): until the device is done.
    events: None, or a function that runs ``run`` n times and returns the device's own seconds."""

    run: Callable
    results: Callable
    wait: Callable = lambda: None
    events: Callable | None = None


def _gpurnn(backend):
    def prepare(case, weights, x, doutput):
        import numpy as np

        import gpurnn

        kind = {"lstm": gpurnn.LSTM, "gru": gpurnn.GRU, "rnn": gpurnn.RNN}[case.cell]
        layer = kind(
            case.I, case.H, case.L, bidirectional=case.bidirectional, backend=backend, dtype=case.dtype, seed=0
        )
        layer.load_state_dict(weights)
        to_numpy = layer.ops.to_numpy
        x, doutput = (layer.xp.asarray(array.astype(layer.dtype)) for array in (x, doutput))
        last = {}

        def run():
            if case.what == "inference":
                last["output"] = layer(x)[0]
                return
            last["output"], _, backward = layer.forward(x)
            if case.what == "train":
                layer.zero_grad()
                last["dx"], _ = backward(doutput)

        def results():
            run()
            found = dict(last)
            if case.what == "train":
                found |= {name: grad for name, grad in layer.grads.items() if "_hh" in name}
            return {name: to_numpy(array).astype(np.float64) for name, array in found.items()}

        def events(count):
            cuda = layer.xp.cuda
            start, stop = cuda.Event(), cuda.Event()
            start.record()
            for _ in range(count):
                run()
            stop.record()
            stop.synchronize()
            return cuda.get_elapsed_time(start, stop) / 1e3

        return Prepared(run, results, layer.ops.synchronize, None if backend == "numpy" else events)

    return prepare


def _torch(device):
    def prepare(case, weights, x, doutput):
        import torch

        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
        if device == "cuda":
            allowed = case.precision == "tf32"  # torch's own default for RNNs is tf32
            torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = allowed
        dtype = getattr(torch, case.dtype)
        kind = getattr(torch.nn, case.cell.upper())
        layer = kind(case.I, case.H, case.L, bidirectional=case.bidirectional)
        layer.load_state_dict({name: torch.from_numpy(value) for name, value in weights.items()})
        layer = layer.to(device, dtype)
        x, doutput = (torch.from_numpy(array).to(device, dtype) for array in (x, doutput))
        x.requires_grad_(case.what == "train")
        layer.train(case.what != "inference")
        last = {}

        def run():
            if case.what == "inference":
                with torch.inference_mode():
                    last["output"] = layer(x)[0]
                return
            last["output"] = output = layer(x)[0]
            if case.what == "train":
                x.grad = None
                layer.zero_grad()
                output.backward(doutput)

        def results():
            run()
            found = dict(last)
            if case.what == "train":
                found |= {"dx": x.grad} | {name: p.grad for name, p in layer.named_parameters() if "_hh" in name}
            return {name: value.detach().cpu().double().numpy() for name, value in found.items()}

        def events(count):
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            for _ in range(count):
                run()
            stop.record()
            stop.synchronize()
            return start.elapsed_time(stop) / 1e3

        if device == "cpu":
            return Prepared(run, results)
        return Prepared(run, results, torch.cuda.synchronize, events)

    return prepare


def _onnxruntime(case, weights, x, doutput):
    """The ONNX operators RNN, GRU (linear_before_reset, torch's form) and LSTM; inference in float32 only."""
    import numpy as np
    import onnx
    import onnxruntime
    from onnx import TensorProto, helper, numpy_helper

    order = {"rnn": (0,), "gru": (1, 0, 2), "lstm": (0, 3, 1, 2)}[case.cell]  # ONNX has z r h and i o f c
    D = 2 if case.bidirectional else 1

    def gates(name, layer):
        parts = [weights[f"{name}_l{layer}{suffix}"] for suffix in ("", "_reverse")[:D]]
        return np.stack([np.concatenate([np.split(part, len(order))[k] for k in order]) for part in parts])

    nodes, constants, value = [], [], "x"
    for layer in range(case.L):
        biases = np.concatenate([gates("bias_ih", layer), gates("bias_hh", layer)], axis=1)
        for name, array in (("W", gates("weight_ih", layer)), ("R", gates("weight_hh", layer)), ("B", biases)):
            constants.append(numpy_helper.from_array(array, f"{name}{layer}"))
        options = {"hidden_size": case.H, "direction": "bidirectional" if D == 2 else "forward"}
        if case.cell == "gru":
            options["linear_before_reset"] = 1
        inputs = [value, f"W{layer}", f"R{layer}", f"B{layer}"]
        nodes.append(helper.make_node(case.cell.upper(), inputs, [f"y{layer}"], **options))  # (T, D, B, H)
        nodes.append(helper.make_node("Transpose", [f"y{layer}"], [f"t{layer}"], perm=[0, 2, 1, 3]))
        nodes.append(helper.make_node("Reshape", [f"t{layer}", "shape"], [f"out{layer}"]))
        value = f"out{layer}"
    constants.append(numpy_helper.from_array(np.array([case.T, case.B, D * case.H]), "shape"))
    graph = helper.make_graph(
        nodes,
        "rnn",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, x.shape)],
        [helper.make_tensor_value_info(value, TensorProto.FLOAT, doutput.shape)],
        constants,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 14)], ir_version=8)
    onnx.checker.check_model(model)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = int(os.environ.get("OMP_NUM_THREADS", "1"))
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])

    def run():
        return session.run(None, {"x": x})

    return Prepared(run, lambda: {"output": run()[0].astype("float64")})


def _jax(case, weights, x, doutput):
    """``lax.scan`` over the cell's equations under ``jit``, on JAX's default device."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    from jax import lax

    sigmoid, D = jax.nn.sigmoid, 2 if case.bidirectional else 1

    def step(params, carry, ax):
        h, c = carry
        ah = h @ params["hh"].T + params["bias_hh"]
        if case.cell == "rnn":
            h = jnp.tanh(ax + ah)
        elif case.cell == "gru":
            (xr, xz, xn), (hr, hz, hn) = jnp.split(ax, 3, -1), jnp.split(ah, 3, -1)
            z = sigmoid(xz + hz)
            h = (1 - z) * jnp.tanh(xn + sigmoid(xr + hr) * hn) + z * h
        else:
            i, f, g, o = jnp.split(ax + ah, 4, -1)
            c = sigmoid(f) * c + sigmoid(i) * jnp.tanh(g)
            h = sigmoid(o) * jnp.tanh(c)
        return (h, c), h

    def forward(params, x):
        for layer in range(case.L):
            outputs = []
            for d, suffix in enumerate(("", "_reverse")[:D]):
                mine = {
                    short: params[f"{name}_l{layer}{suffix}"]
                    for short, name in (
                        ("ih", "weight_ih"),
                        ("hh", "weight_hh"),
                        ("bias_ih", "bias_ih"),
                        ("bias_hh", "bias_hh"),
                    )
                }
                start = (jnp.zeros((case.B, case.H), x.dtype),) * 2
                ax = x @ mine["ih"].T + mine["bias_ih"]
                outputs.append(lax.scan(lambda carry, ax, p=mine: step(p, carry, ax), start, ax, reverse=d == 1)[1])
            x = jnp.concatenate(outputs, -1)
        return x

    def loss(params, x):
        output = forward(params, x)
        return jnp.sum(output * doutput), output

    params = {name: jnp.asarray(value) for name, value in weights.items()}
    x, doutput = jnp.asarray(x), jnp.asarray(doutput)
    train = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))
    infer, last = jax.jit(forward), {}

    def run():
        last["found"] = train(params, x) if case.what == "train" else infer(params, x)

    def wait():
        if last:
            jax.block_until_ready(last["found"])

    def timed():
        run()
        wait()  # else the runs pile up

    def results():
        timed()
        if case.what != "train":
            return {"output": np.asarray(last["found"], np.float64)}
        (_, output), (grads, dx) = last["found"]
        found = {"output": output, "dx": dx} | {name: grad for name, grad in grads.items() if "_hh" in name}
        return {name: np.asarray(value, np.float64) for name, value in found.items()}

    return Prepared(timed, results, wait)


def _sleeper(case, weights, x, doutput):
    """Sleeps 20 ms: for the tests of the clock."""
    import time

    from .run import reference

    return Prepared(lambda: time.sleep(0.02), lambda: reference(case, weights, x, doutput))


def _liar(case, weights, x, doutput):
    """Computes half of what it should: for the test that a wrong rival is not timed."""
    from .run import reference

    return Prepared(
        lambda: None, lambda: {name: value / 2 for name, value in reference(case, weights, x, doutput).items()}
    )


RIVALS = {  # name -> (prepare, what it is)
    "gpurnn-numpy": (_gpurnn("numpy"), "gpurnn on NumPy"),
    "gpurnn-cupy": (_gpurnn("cupy"), "gpurnn's generic code on CuPy"),
    "gpurnn-cuda": (_gpurnn("cuda"), "gpurnn's kernels"),
    "torch-cpu": (_torch("cpu"), "torch.nn on the CPU"),
    "torch-cuda": (_torch("cuda"), "torch.nn on a GPU (cuDNN)"),
    "onnxruntime": (_onnxruntime, "ONNX Runtime on the CPU, inference"),
    "jax": (_jax, "JAX, lax.scan under jit"),
}
HIDDEN = {"sleeper": (_sleeper, ""), "liar": (_liar, "")}


def missing(name):
    """Why a rival cannot run here, or None. Imports nothing heavy."""
    from gpurnn import backends

    if name.startswith("gpurnn-"):
        return backends()[name.removeprefix("gpurnn-")]
    if name.startswith("torch") and importlib.util.find_spec("torch") is None:
        return "torch is not installed"
    needed = {"onnxruntime": ("onnx", "onnxruntime"), "jax": ("jax",)}.get(name, ())
    for module in needed:
        if importlib.util.find_spec(module) is None:
            return f"{module} is not installed"
    if name == "torch-cuda" and backends()["cuda"] and "driver" in backends()["cuda"]:
        return "no NVIDIA driver was found"
    return None


def refuses(name, case):
    """Why a rival does not take a case, or None."""
    if case.precision == "tf32" and not name.startswith("torch-cuda"):
        return "computes float32 in float32"
    if name in ("onnxruntime", "jax") and case.dtype != "float32":
        return "only float32 here"
    if name == "onnxruntime" and case.what != "inference":
        return "only inference"
    if name == "jax" and case.what == "forward":
        return "keeps nothing for a later backward"
    return None
