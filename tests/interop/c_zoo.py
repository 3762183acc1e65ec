"""The models that the tests of ``gpurnn.interop.c`` export."""

import functools

import numpy as np

import gpurnn
from gpurnn import cells
from gpurnn.cells import exp, expm1, log, log1p, maximum, mean, minimum, normalized, sigmoid, softplus, tanh, where

FORMS = {
    "": {},
    "_int8": {"weights": "int8"},
    "_int16": {"weights": "int8", "activations": "int16"},
}  # how weights are stored


@gpurnn.cell(gates="z", parameters="leak")
def leaky(ax, ah, s, p):
    return s.h + p.leak * (tanh(ax.z + ah.z) - s.h)


@gpurnn.cell(gates="f n", states="h c", parameters="w")
def gated(ax, ah, s, p):
    """Something of everything: a second product, states, a mean, a comparison, logarithms, names of C."""
    unix = sigmoid(ax.f + ah.f) * 0.9
    state = tanh(ax.n + ah.n(unix * s.h))
    k = unix * s.c + log1p(abs(state)) / (1 + exp(-p.w)) - 0.1 * mean(state)
    return where(k > 0.2, minimum(softplus(k), 0.7), maximum(expm1(k), -0.5)), k


@gpurnn.cell(gates="a b", states="h c")
def averages(ax, ah, s):
    """A mean of means, one before the second product, and states that swap."""
    a = normalized(ax.a + ah.a)
    b = normalized(ah.b(a + s.c) + ax.b) * log(1.5 + mean(a * s.c) ** 2)
    return 0.5 * s.c + 0.1 * b, tanh(s.h - a)


@gpurnn.cell(gates="a b", biases=False)
def no_product(ax, ah, s):
    return 0.5 * s.h + sigmoid(ax.a) * tanh(ax.b)


def layer(kind, *sizes, **options):
    """A function of (dtype, seed) that makes a layer."""
    return functools.partial(_made, kind, sizes, options)


def _made(kind, sizes, options, dtype):
    return getattr(gpurnn, kind)(*sizes, backend="numpy", seed=1, dtype=dtype, **options)


def chain(*makers):
    return lambda dtype: gpurnn.Sequential(*(make(dtype) for make in makers))


def tied(dtype):
    embedding = _made("Embedding", (41, 7), {}, dtype)
    return gpurnn.Sequential(embedding, _made("LSTM", (7, 7), {}, dtype), gpurnn.TiedLinear(embedding))


def nested(dtype):
    inner = gpurnn.Sequential({"rnn/*": _made("RNN", (3, 5), {"nonlinearity": "relu"}, dtype)})
    return gpurnn.Sequential({"größe \\": inner, "int": _made("Linear", (5, 2), {}, dtype)})


RECURRENT = {
    "rnn": ("RNN", {}),
    "rnn_relu": ("RNN", {"nonlinearity": "relu", "bias": False, "num_layers": 2}),
    "lstm": ("LSTM", {"num_layers": 2}),
    "gru": ("GRU", {"num_layers": 2}),
    "gru_original": ("GRU", {"reset_after": False, "num_layers": 2}),
    "without_bias": ("LSTM", {"bias": False}),
    "projection": ("LSTM", {"proj_size": 5, "num_layers": 2}),
    "peephole": ("LSTM", {"peephole": True}),
    "coupled": ("LSTM", {"coupled": True, "peephole": True, "recurrent_activation": "hard_sigmoid"}),
    "clip": ("LSTM", {"cell_clip": 0.1, "gradient_clip": 1.0}),
    "zoneout": ("GRU", {"zoneout": 0.2, "reset_after": False}),
    "dropout": ("LSTM", {"num_layers": 2, "dropout": 0.5, "recurrent_dropout": 0.3, "weight_dropout": 0.2}),
    "layer_norm": ("LSTM", {"layer_norm": True, "num_layers": 2}),
    "layer_norm_gru": ("GRU", {"layer_norm": True, "bias": False}),
    "layer_norm_rnn": ("RNN", {"layer_norm": True, "nonlinearity": "softsign"}),
    "batch_norm": ("LSTM", {"batch_norm": 4}),
    "batch_norm_once": ("RNN", {"batch_norm": 1}),
    "heads": ("LSTM", {"heads": 3, "num_layers": 2, "peephole": True}),
    "heads_apart": ("GRU", {"heads": 3, "mix_heads": False, "layer_norm": True}),
    "heads_normed": ("GRU", {"heads": 2, "batch_norm": 3}),
    "learned_state": ("LSTM", {"learn_state": True, "num_layers": 2, "residual": True}),
    "residual": ("GRU", {"residual": True, "num_layers": 4}),
    "unequal": ("GRU", {"hidden_size": [12, 7, 12], "num_layers": 3, "residual": True}),
    "batch_first": ("GRU", {"batch_first": True}),
    "tall": ("LSTM", {"hidden_size": 19}),
    "single": ("LSTM", {"hidden_size": 1}),
    "own": ("Recurrent", {"cell": leaky, "num_layers": 2, "heads": 2}),
    "own_everything": ("Recurrent", {"cell": gated, "heads": 2}),
    "own_means": ("Recurrent", {"cell": averages, "num_layers": 2, "bias": False}),
    "own_no_product": ("Recurrent", {"cell": no_product}),
    "lstm_float64": ("LSTM", {"dtype": "float64"}),
}
OWN = [name for name, one in vars(cells).items() if isinstance(one, cells.TracedCell)]
RECURRENT |= {f"cell_{name}": ("Recurrent", {"cell": getattr(cells, name)}) for name in OWN}
RECURRENT |= {"cell_cornn": ("Recurrent", {"cell": cells.cornn(0.1)})}
RECURRENT |= {f"elman_{name}": ("Recurrent", {"cell": cells.elman(name)}) for name in cells.ACTIVATIONS}
MODELS = {
    "words": chain(
        layer("Embedding", 41, 6), layer("LSTM", 6, 12, num_layers=2), layer("LayerNorm", 12, eps=1e-3),
        layer("Dropout", 0.5), layer("Linear", 12, 41),
    ),
    "tied": tied,
    "nested": nested,
    "normed": chain(
        layer("BatchNorm", 4), layer("GRU", 4, 10, num_layers=3, residual=True), layer("BatchNorm", 10, affine=False),
        layer("Linear", 10, 33, bias=False), layer("LayerNorm", 33, bias=False), layer("RNN", 33, 3),
    ),
    "mean": chain(layer("GRU", 3, 8), layer("Pooling", 8, "mean"), layer("Linear", 8, 2)),
    "largest": chain(layer("GRU", 3, 8), layer("Pooling", 8, "max")),
    "last": chain(layer("GRU", 3, 8), layer("Pooling", 8, "last"), layer("Linear", 8, 2), layer("Linear", 2, 9)),
    "linear": layer("Linear", 5, 3),
    "nothing_to_do": layer("Pooling", 4, "last"),
    "only_embedding": layer("Embedding", 50, 3),
    "dropout_first": chain(layer("Dropout", 0.1), layer("GRU", 3, 4)),
}  # fmt: skip


def build(name, dtype="float32"):
    """A model in evaluation, with numbers in what begins as zeros and ones."""
    if name in MODELS:
        model = MODELS[name](dtype)
    else:
        kind, options = RECURRENT[name]
        options = {"hidden_size": 12, "input_size": 6, "dtype": dtype} | options
        model = getattr(gpurnn, kind)(backend="numpy", seed=1, **options)
    rng = np.random.default_rng(3)
    for key, array in [
        *model.params.items(),
        *((name, one) for _, m in model.modules() for name, one in m.buffers.items()),
    ]:
        if array.ndim == 1 or key.startswith("running"):
            array[...] = rng.uniform(0.1, 0.9, array.shape).astype(np.float32)
    return model.eval()


def random_model(seed, dtype):
    """A layer, and perhaps others around it, of any sizes and options."""
    rng = np.random.default_rng(seed)
    sizes = rng.integers(1, 40, 3).tolist()
    kind, heads = rng.choice(["RNN", "LSTM", "GRU", "Recurrent"]), int(rng.choice([1, 1, 1, 2, 3]))
    sizes[1] *= heads
    options = {"num_layers": int(rng.integers(1, 4)), "bias": bool(rng.random() < 0.8), "heads": heads}
    options |= {"learn_state": bool(rng.random() < 0.3), "dtype": dtype, "backend": "numpy", "seed": seed}
    options |= {"residual": bool(options["num_layers"] > 1 and rng.random() < 0.3)}
    if kind == "Recurrent":
        names = rng.choice([*OWN, "gated", "averages", "leaky"], 1)
        options["cell"] = getattr(cells, names[0], None) or globals()[names[0]]
    elif rng.random() < 0.5:
        options["layer_norm"] = bool(rng.random() < 0.5)
        options["zoneout"] = float(rng.choice([0, 0.1]))
        options["nonlinearity" if kind == "RNN" else "activation"] = str(rng.choice(list(cells.ACTIVATIONS)))
        if kind == "LSTM":
            options |= {"peephole": bool(rng.random() < 0.5), "coupled": bool(rng.random() < 0.5), "cell_clip": 0.7}
    elif kind == "LSTM" and heads == 1 and sizes[1] > 1:
        options["proj_size"] = int(rng.integers(1, sizes[1]))
    elif kind == "GRU":
        options["reset_after"] = False
    given = {"dtype": dtype, "backend": "numpy", "seed": seed}
    rnn = getattr(gpurnn, kind)(input_size=sizes[0], hidden_size=sizes[1], **options)
    F = options.get("proj_size") or sizes[1]
    head = [gpurnn.LayerNorm(F, **given)] if rng.random() < 0.3 else []
    head += [gpurnn.Linear(F, sizes[2], **given)] if rng.random() < 0.5 else []
    below = [gpurnn.Embedding(9, sizes[0], **given)] if rng.random() < 0.3 else []
    model = gpurnn.Sequential(*below, rnn, *head)
    for array in model.params.values():
        if array.ndim == 1:
            array[...] = rng.uniform(-0.5, 0.5, array.shape).astype(np.float32)
    return model.eval()
