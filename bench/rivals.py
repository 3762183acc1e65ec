"""Against whom: each rival turns a case into something to run. What it needs is imported by its own process only.

A rival's ``prepare(case, weights, x, y)`` gets NumPy arrays in float32 or float64: weights by torch's names, x and
doutput; for a whole training step ("step") words and targets instead. It returns ``Prepared``. All do the same work:
the input GEMM, the walk, in training every gradient (dx included), in a step everything up to the changed weights.
"""

import importlib.util
import os

from .rival import RATE, Prepared, threads
from .rivals_torch import flashrnn_rival, torch_rival

# ---- gpurnn


def build(case, backend, dtype, schedule="auto", wavefront=0):
    """The gpurnn layer of a case, or for "step" the model: parts "embedding", "rnn", "linear"."""
    import gpurnn

    kind = {"lstm": gpurnn.LSTM, "gru": gpurnn.GRU, "rnn": gpurnn.RNN}[case.cell]
    where = {"backend": backend, "dtype": dtype, "seed": 0}
    exact = {"precision": case.precision}
    more = {"bidirectional": case.bidirectional, "schedule": schedule, "wavefront": wavefront}
    layer = kind(case.I, case.H, case.L, **more, **where, **exact)
    if case.what != "step":
        return layer
    D = 2 if case.bidirectional else 1
    linear = gpurnn.Linear(D * case.H, case.V, **where, **exact)
    return gpurnn.Sequential({"embedding": gpurnn.Embedding(case.V, case.I, **where), "rnn": layer, "linear": linear})


def gpurnn_rival(backend, schedule="auto", wavefront=0):
    def prepare(case, weights, x, y):
        import numpy as np

        import gpurnn

        def fresh():
            """(one run, which returns name -> array; the model)."""
            model = build(case, backend, case.dtype, schedule, wavefront)
            model.load_state_dict(weights)
            if case.what == "step":
                adam = gpurnn.Adam(model, lr=RATE)
                words, targets = model.xp.asarray(x), model.xp.asarray(y)

                def step():
                    model.zero_grad()
                    logits, _, backward = model.forward(words)
                    loss, dloss = gpurnn.cross_entropy(logits, targets)
                    backward(dloss())
                    norm = gpurnn.clip_grad_norm(model, 1.0)
                    adam.step()
                    return {"loss": loss, "norm": norm}

                return step, model
            given, doutput = (model.xp.asarray(array.astype(model.dtype)) for array in (x, y))

            def layer():
                if case.what == "inference":
                    return {"output": model(given, lengths=case.lengths)[0]}
                output, _, backward = model.forward(given, lengths=case.lengths)
                if case.what == "forward":
                    return {"output": output}
                model.zero_grad()
                return {"output": output, "dx": backward(doutput)[0]}

            return layer, model

        run, model = fresh()

        def results():
            again, model = fresh()
            found = again()
            if case.what in ("train", "step"):
                found |= {name: grad.copy() for name, grad in model.grads.items() if "_hh" in name}
            if case.what == "step":  # the second loss shows whether the weights were changed rightly
                found["loss"] = [float(found["loss"]), float(again()["loss"])]
            return {
                name: np.asarray(model.ops.to_numpy(array) if hasattr(array, "shape") else array, np.float64)
                for name, array in found.items()
            }

        def events(count):
            cuda = model.xp.cuda
            start, stop = cuda.Event(), cuda.Event()
            start.record()
            for _ in range(count):
                run()
            stop.record()
            stop.synchronize()
            return cuda.get_elapsed_time(start, stop) / 1e3

        if not hasattr(model.xp, "get_default_memory_pool"):
            return Prepared(run, results)
        pool = model.xp.get_default_memory_pool()
        return Prepared(run, results, model.ops.synchronize, events, pool.total_bytes)

    return prepare


def _products(case, *_):
    """The matrix products alone, with NumPy's BLAS: what no NumPy code can be faster than."""
    import numpy as np

    G, D, dtype = {"rnn": 1, "gru": 3, "lstm": 4}[case.cell], 2 if case.bidirectional else 1, np.dtype(case.dtype)

    def ones(*shape):
        return np.full(shape, 0.01, dtype)

    walks, T, B, H = [], case.T, case.B, case.H
    for layer in range(case.L):
        inputs = case.I if layer == 0 else D * H
        read = ones(T * B, inputs), ones(T, B, H), ones(G * H, inputs), ones(G * H, H)
        written = ones(T, B, G * H), ones(B, G * H), ones(T, B, H), ones(T * B, inputs)
        walks += [(*read, *written)] * D
    linear = (ones(T * B, D * H), ones(case.V, D * H)) if case.what == "step" else None

    def run():
        for x, h, W_ih, W_hh, ax, ah, dh, dx in walks:
            np.matmul(x, W_ih.T, out=ax.reshape(T * B, -1))
            for t in range(T):
                np.matmul(h[t], W_hh.T, out=ah)
            if case.what in ("train", "step"):
                for t in range(T):
                    np.matmul(ax[t], W_hh, out=dh[t])
                dgates = ax.reshape(T * B, -1)
                np.matmul(dgates, W_ih, out=dx)
                _ = dgates.T @ x, dgates.T @ h.reshape(T * B, H)
        if linear:
            output, W = linear
            dlogits = output @ W.T
            _ = dlogits @ W, dlogits.T @ output

    return Prepared(run, None)


# ---- others


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
    options.intra_op_num_threads = threads()
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])

    def run():
        return session.run(None, {"x": x})

    return Prepared(run, lambda: {"output": run()[0].astype("float64")})


def _jax(case, weights, x, doutput):
    """``lax.scan`` over the cell's equations under ``jit``, on the CPU."""
    os.environ["JAX_PLATFORMS"] = "cpu"
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


RIVALS = {  # name -> (prepare, device, what it is)
    "gpurnn-cpu": (gpurnn_rival("cpu"), "cpu", "gpurnn's compiled code on the CPU"),
    "gpurnn-numpy": (gpurnn_rival("numpy"), "cpu", "gpurnn's generic code on NumPy"),
    "gpurnn-cupy": (gpurnn_rival("cupy"), "gpu", "gpurnn's generic code on CuPy"),
    "gpurnn-cuda": (gpurnn_rival("cuda"), "gpu", "gpurnn's kernels"),
    "gpurnn-cuda-step": (gpurnn_rival("cuda", "step"), "gpu", "gpurnn's kernels, schedule step only"),
    "gpurnn-cuda-wavefront": (gpurnn_rival("cuda", wavefront=64), "gpu", "gpurnn's kernels, layers 64 steps apart"),
    "products": (_products, "cpu", "the matrix products alone on NumPy: a bound, not a rival"),
    "torch-cpu": (torch_rival("cpu"), "cpu", "torch.nn on the CPU"),
    "torch-cpu-compile": (torch_rival("cpu", "compile"), "cpu", "torch.nn on the CPU under torch.compile"),
    "torch-cuda": (torch_rival("cuda"), "gpu", "torch.nn on a GPU (cuDNN)"),
    "torch-cuda-graph": (torch_rival("cuda", "graph"), "gpu", "torch.nn on a GPU, recorded as a CUDA graph"),
    "torch-cuda-compile": (torch_rival("cuda", "compile"), "gpu", "torch.nn on a GPU under torch.compile"),
    "flashrnn-fused": (flashrnn_rival("cuda_fused"), "gpu", "FlashRNN, whole-sequence kernel"),
    "flashrnn": (flashrnn_rival("cuda"), "gpu", "FlashRNN, a product and a kernel each step"),
    "onnxruntime": (_onnxruntime, "cpu", "ONNX Runtime on the CPU, inference"),
    "jax": (_jax, "cpu", "JAX, lax.scan under jit"),
}
USUAL = (
    "gpurnn-cpu",
    "gpurnn-numpy",
    "gpurnn-cupy",
    "gpurnn-cuda",
    "torch-cpu",
    "torch-cuda",
    "onnxruntime",
    "jax",
)  # if none is named
HIDDEN = {
    "sleeper": (_sleeper, "cpu", ""),
    "liar": (_liar, "cpu", ""),
    "flashrnn-vanilla": (flashrnn_rival("vanilla", "cpu"), "cpu", ""),
}


def missing(name):
    """Why a rival cannot run here, or None. Imports nothing heavy."""
    from gpurnn import backends
    from gpurnn.cpu_ops import load_native

    if name == "gpurnn-cpu" and not load_native():
        return "was not built, or not for this processor"
    if name.startswith("gpurnn-"):
        return backends()[name.split("-")[1]]
    needed = {"onnxruntime": ("onnx", "onnxruntime"), "jax": ("jax",), "products": ()}.get(name, ("torch",))
    for module in needed + ("flashrnn",) * name.startswith("flashrnn"):
        if importlib.util.find_spec(module) is None:
            return f"{module} is not installed"
    device = (RIVALS | HIDDEN)[name][1]
    if device == "gpu" and backends()["cuda"] and "driver" in backends()["cuda"]:
        return "no NVIDIA driver was found"
    return None


def refuses(name, case):
    """Why a rival does not take a case, or None."""
    if case.precision == "tf32" and not name.startswith(("gpurnn-cuda", "torch-cuda", "flashrnn")):
        return "computes float32 in float32"
    if name in ("onnxruntime", "jax", "products") and case.dtype != "float32":
        return "only float32 here"
    if name == "onnxruntime" and case.what != "inference":
        return "only inference"
    if name == "jax" and case.what == "forward":
        return "keeps nothing for a later backward"
    if case.ragged and not name.startswith("gpurnn-") and name not in ("torch-cpu", "torch-cuda"):
        return "all sequences of one length"
    if name.startswith("flashrnn") and (case.L > 1 or case.bidirectional):
        return "one layer and one direction"
    if name == "gpurnn-cuda-wavefront" and (case.L == 1 or case.bidirectional):
        return "several layers and one direction"
    if case.what == "step" and name.startswith(("flashrnn", "jax")):
        return "only layers, no whole training step"
    return None
