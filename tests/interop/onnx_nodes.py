"""Random RNN, GRU and LSTM nodes, and what ONNX's specification says that they give, in float64 and step by step."""

import numpy as np
from optional import optional

onnx = optional("onnx")

GATES = {"RNN": 1, "GRU": 3, "LSTM": 4}
_ACTIVATIONS = ("Tanh", "Sigmoid", "Relu", "Affine", "LeakyRelu", "ThresholdedRelu", "ScaledTanh", "HardSigmoid", "Elu",
                "Softsign", "Softplus")  # fmt: skip
_USUAL = {"RNN": ("Tanh",), "GRU": ("Sigmoid", "Tanh"), "LSTM": ("Sigmoid", "Tanh", "Tanh")}
_NUMBERS = {  # name -> its alpha and beta by default
    "Affine": (1.0, 0.0), "LeakyRelu": (0.01, None), "ThresholdedRelu": (1.0, None), "ScaledTanh": (1.0, 1.0),
    "HardSigmoid": (0.2, 0.5), "Elu": (1.0, None),
}  # fmt: skip
_OTHER_DEFAULTS = {
    "Affine",
    "ThresholdedRelu",
    "ScaledTanh",
}  # in ONNX Runtime their numbers are 0 where none are given


def random_node(rng, kind, dtype="float32"):
    """(model, inputs by name, attributes) of one node with everything drawn."""
    T, B, I, H = (int(rng.integers(1, high)) for high in (6, 5, 5, 6))
    direction = rng.choice(["forward", "reverse", "bidirectional"])
    D, G = (2 if direction == "bidirectional" else 1), GATES[kind]
    given = {"hidden_size": H, "direction": str(direction)}
    if rng.random() < 0.6:
        given |= _drawn_activations(rng, kind, D)
    if rng.random() < 0.4:
        given["clip"] = _drawn(rng, 0.2, 1.5)
    if rng.random() < 0.3:
        given["layout"] = 1
    if kind == "GRU" and rng.random() < 0.5:
        given["linear_before_reset"] = 1
    if kind == "LSTM" and rng.random() < 0.3:
        given["input_forget"] = 1
    batch_first = given.get("layout", 0)
    state = (B, D, H) if batch_first else (D, B, H)
    shapes = {"X": (B, T, I) if batch_first else (T, B, I), "W": (D, G * H, I), "R": (D, G * H, H)}
    rest = {"B": (D, 2 * G * H), "sequence_lens": (B,), "initial_h": state}
    if kind == "LSTM":
        rest |= {"initial_c": state, "P": (D, 3 * H)}
    shapes |= {name: shape for name, shape in rest.items() if rng.random() < 0.6}
    inputs = {name: rng.normal(0, 0.7, shape).astype(dtype) for name, shape in shapes.items()}
    if "sequence_lens" in inputs:
        inputs["sequence_lens"] = rng.integers(1, T + 1, B).astype(np.int32)
    return node_model(kind, given, inputs, [*["X", "W", "R"], *rest]), inputs, given


def _drawn(rng, low, high):
    """A number that an attribute can hold: they are float32."""
    return float(np.float32(rng.uniform(low, high)))


def _drawn_activations(rng, kind, D):
    names = [str(name) for name in rng.choice(_ACTIVATIONS, D * len(_USUAL[kind]))]
    alphas = [_drawn(rng, 0.1, 1) for name in names if name in _NUMBERS]
    betas = [_drawn(rng, 0.1, 1) for name in names if _NUMBERS.get(name, (0, None))[1] is not None]
    given = {"activations": names}
    if rng.random() < 0.7 or set(names) & _OTHER_DEFAULTS:
        given |= {name: v for name, v in (("activation_alpha", alphas), ("activation_beta", betas)) if v}
    return given


def node_model(kind, attributes, inputs, names):
    """A model of one node whose weights are initializers. names: all inputs that the operator has, in their order."""
    outputs = ["Y", "Y_h", "Y_c"][: 3 if kind == "LSTM" else 2]
    used = [name if name in inputs else "" for name in names]
    node = onnx.helper.make_node(kind, used, outputs, **attributes)
    weights = [onnx.numpy_helper.from_array(inputs[name], name) for name in ("W", "R", "B", "P") if name in inputs]
    fed = [name for name in names if name in inputs and name not in ("W", "R", "B", "P")]
    elem = {name: onnx.helper.np_dtype_to_tensor_dtype(inputs[name].dtype) for name in fed}
    graph = onnx.helper.make_graph(
        [node], "node", [onnx.helper.make_tensor_value_info(name, elem[name], inputs[name].shape) for name in fed],
        [onnx.helper.make_tensor_value_info(name, elem["X"], [None] * (4 if name == "Y" else 3)) for name in outputs],
        weights,
    )  # fmt: skip
    return onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=8)


def fed(inputs):
    """The inputs that are no weights."""
    return {name: array for name, array in inputs.items() if name not in ("W", "R", "B", "P")}


# ---- the specification


def _function(name, alphas, betas):
    alpha, beta = _NUMBERS.get(name, (None, None))
    alpha = alphas.pop(0) if alpha is not None and alphas else alpha
    beta = betas.pop(0) if beta is not None and betas else beta
    return {
        "Tanh": np.tanh, "Sigmoid": lambda x: np.exp(-np.logaddexp(0, -x)), "Relu": lambda x: np.maximum(x, 0),
        "Affine": lambda x: alpha * x + beta, "LeakyRelu": lambda x: np.where(x >= 0, x, alpha * x),
        "ThresholdedRelu": lambda x: np.where(x > alpha, x, 0), "ScaledTanh": lambda x: alpha * np.tanh(beta * x),
        "HardSigmoid": lambda x: np.clip(alpha * x + beta, 0, 1),
        "Elu": lambda x: np.where(x >= 0, x, alpha * np.expm1(np.minimum(x, 0))),
        "Softsign": lambda x: x / (1 + np.abs(x)),
        "Softplus": lambda x: np.logaddexp(0, x),
    }[name]  # fmt: skip


def specified(kind, given, inputs):
    """Y, Y_h and, of an LSTM, Y_c in float64."""
    a = {name: array.astype(np.float64) for name, array in inputs.items() if name != "sequence_lens"}
    D, H = len(a["R"]), a["R"].shape[2]
    if given.get("layout"):
        a |= {name: a[name].swapaxes(0, 1) for name in ("X", "initial_h", "initial_c") if name in a}
    T, B, _ = a["X"].shape
    lengths = inputs.get("sequence_lens", np.full(B, T))
    names = given.get("activations", _USUAL[kind] * D)
    alphas, betas = list(given.get("activation_alpha", ())), list(given.get("activation_beta", ()))
    each, limit = len(_USUAL[kind]), given.get("clip", np.inf)
    y = np.zeros((T, D, B, H))
    last = [np.zeros((D, B, H)) for _ in range(2)]
    functions = [_function(name, alphas, betas) for name in names]
    for d in range(D):
        backwards = given["direction"] == "reverse" or d == 1
        step = {"RNN": _rnn, "GRU": _gru, "LSTM": _lstm}[kind]
        weights = {name: a[name][d] for name in ("W", "R", "B", "P") if name in a}
        acts = [lambda x, f=f: f(np.clip(x, -limit, limit)) for f in functions[d * each : (d + 1) * each]]
        acts[2:] = functions[d * each + 2 : (d + 1) * each]  # of c, which no clip limits
        for b in range(B):
            h, c = (a[name][d, b] if name in a else np.zeros(H) for name in ("initial_h", "initial_c"))
            order = range(lengths[b])
            for t in reversed(order) if backwards else order:
                h, c = step(a["X"][t, b], h, c, weights, acts, given)
                y[t, d, b] = h
            last[0][d, b], last[1][d, b] = h, c
    if given.get("layout"):
        y, last = y.transpose(2, 0, 1, 3), [part.swapaxes(0, 1) for part in last]
    return y, *last[: 2 if kind == "LSTM" else 1]


def _blocks(x, h, weights, count):
    """W x + b_W and R h + b_R of each gate, and the parts of b_R and R."""
    W, R = (np.split(weights[name], count) for name in ("W", "R"))
    zero = np.zeros(2 * len(weights["W"]))
    parts = np.split(weights.get("B", zero), 2 * count)
    ax = [w @ x + b for w, b in zip(W, parts[:count], strict=True)]
    return ax, [r @ h + b for r, b in zip(R, parts[count:], strict=True)], R, parts[count:]


def _rnn(x, h, c, weights, acts, given):
    (ax,), (ah,), *_ = _blocks(x, h, weights, 1)
    return acts[0](ax + ah), c


def _gru(x, h, c, weights, acts, given):
    ax, ah, R, bias = _blocks(x, h, weights, 3)
    z, r = acts[0](ax[0] + ah[0]), acts[0](ax[1] + ah[1])
    inner = r * ah[2] if given.get("linear_before_reset") else R[2] @ (r * h) + bias[2]
    return (1 - z) * acts[1](ax[2] + inner) + z * h, c


def _lstm(x, h, c, weights, acts, given):
    ax, ah, *_ = _blocks(x, h, weights, 4)
    p_i, p_o, p_f = np.split(weights.get("P", np.zeros(3 * len(h))), 3)
    i = acts[0](ax[0] + ah[0] + p_i * c)
    f = 1 - i if given.get("input_forget") else acts[0](ax[2] + ah[2] + p_f * c)
    new = f * c + i * acts[1](ax[3] + ah[3])
    return acts[0](ax[1] + ah[1] + p_o * new) * acts[2](new), new
