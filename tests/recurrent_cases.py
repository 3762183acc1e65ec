"""Recurrent layers of every kind, and helpers for their states: what the tests of the recurrent layers share."""

import gpurnn

KINDS = {
    "rnn-tanh": (gpurnn.RNN, {}),
    "rnn-relu": (gpurnn.RNN, {"nonlinearity": "relu"}),
    "lstm": (gpurnn.LSTM, {}),
    "lstm-projected": (gpurnn.LSTM, {"proj_size": 3}),
    "gru": (gpurnn.GRU, {}),
    "gru-original": (gpurnn.GRU, {"reset_after": False}),
}
BATCHES = (1, 3, 8, 11)  # below and above the batch size at which NumPy changes the memory order


def build(kind, inside=4, hidden=5, dtype="float64", seed=3, backend="cpu", **options):
    layer_class, own = KINDS[kind]
    return layer_class(inside, hidden, backend=backend, dtype=dtype, seed=seed, **own, **options)


def parts(state):
    """The arrays of a state, flat, however it is packed."""
    if state is None:
        return []
    if isinstance(state, tuple):
        return [array for part in state for array in parts(part)]
    return [state]


def like(state, rng):
    if isinstance(state, tuple):
        return tuple(like(part, rng) for part in state)
    return rng.standard_normal(state.shape)
