"""Random layers and models of Keras, with random weights, and calls of them: an oracle that others have written."""

import numpy as np
from optional import optional

keras = optional("keras")

ACTIVATIONS = (
    "tanh",
    "tanh",
    "sigmoid",
    "hard_sigmoid",
    "relu",
    "softsign",
    "softplus",
    "elu",
    "silu",
    "swish",
    "linear",
)
MERGES = ("concat", "concat", "sum", "mul", "ave")


def drawn(rng, names):
    return str(rng.choice(names))


def flag(rng, share=0.5):
    return bool(rng.random() < share)


def random_recurrent(rng, dtype="float32"):
    """A recurrent layer of Keras with everything drawn that gpurnn serves."""
    L, kind = keras.layers, drawn(rng, ["SimpleRNN", "LSTM", "GRU", "cells"])
    directions, sequences = 1 + flag(rng, 0.4), flag(rng)
    loop = {"return_sequences": sequences, "dtype": dtype}
    if directions == 1:
        loop |= {"zero_output_for_mask": flag(rng)} if sequences else {"go_backwards": flag(rng)}
    if kind == "cells":
        count = 1 if directions == 2 else int(rng.integers(1, 4))
        cells = [_one(rng, drawn(rng, ["SimpleRNN", "LSTM", "GRU"]), "Cell", dtype) for _ in range(count)]
        layer = L.RNN(L.StackedRNNCells(cells, dtype=dtype) if count > 1 else cells[0], **loop)
    else:
        layer = _one(rng, kind, "", **loop)
    return layer if directions == 1 else L.Bidirectional(layer, merge_mode=drawn(rng, MERGES), dtype=dtype)


def _one(rng, kind, suffix, dtype, **loop):
    options = {"activation": drawn(rng, ACTIVATIONS), "use_bias": flag(rng, 0.8)}
    options |= {"dropout": 0.3 * flag(rng, 0.2), "recurrent_dropout": 0.2 * flag(rng, 0.2)}
    if kind != "SimpleRNN":
        options["recurrent_activation"] = drawn(rng, ("sigmoid", "sigmoid", "hard_sigmoid", "tanh"))
    if kind == "GRU":
        options["reset_after"] = flag(rng) or bool(options["recurrent_dropout"])
    return getattr(keras.layers, kind + suffix)(int(rng.integers(1, 6)), dtype=dtype, **options, **loop)


def random_plain(rng, dtype="float32"):
    """A layer without a time loop."""
    L = keras.layers
    kind = drawn(rng, ["Dense", "LayerNormalization", "BatchNormalization", "Activation", "Dropout"])
    if kind == "Dense":
        options = {"use_bias": flag(rng), "activation": drawn(rng, (*ACTIVATIONS, "softmax"))}
        return L.Dense(int(rng.integers(1, 6)), dtype=dtype, **options)
    if kind == "Activation":
        return L.Activation(drawn(rng, ("relu", "softmax", "tanh")), dtype=dtype)
    if kind == "Dropout":
        return (L.SpatialDropout1D if flag(rng) else L.Dropout)(0.4, dtype=dtype)
    scale = flag(rng, 0.7)
    return getattr(L, kind)(
        scale=scale, center=flag(rng, 0.7) or not scale, epsilon=float(rng.uniform(1e-4, 1e-1)), dtype=dtype
    )


def fill(layer, rng):
    """Random weights for a layer that is built: moderate, so that no activation runs away; variances are positive."""
    values = [0.5 * rng.standard_normal(array.shape) / max(1, array.ndim) for array in layer.get_weights()]
    for one, variable in zip(range(len(values)), layer.weights, strict=True):
        if variable.name == "moving_variance":
            values[one] = 0.3 + np.abs(values[one])
    layer.set_weights(values)


def random_layer(rng, dtype="float32", features=3):
    """A layer with weights, recurrent or not, for (B, T, features)."""
    layer = random_recurrent(rng, dtype) if flag(rng, 0.8) else random_plain(rng, dtype)
    layer.build((None, None, features))
    fill(layer, rng)
    return layer


def random_mask(rng, B, T):
    """Holes, padding on both sides, and one sequence without a timestep."""
    mask = rng.random((B, T)) < 0.6
    mask[0] = False
    return mask


def call(model, x, mask=None):
    """The output of a layer or model in inference, as a NumPy array."""
    given = {} if mask is None else {"mask": mask}
    x = keras.ops.convert_to_tensor(x, str(x.dtype))  # Keras itself would round float64 to float32
    return np.asarray(keras.ops.convert_to_numpy(model(x, training=False, **given)))
