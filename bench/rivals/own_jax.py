"""An LSTM with peepholes as a cell of one's own: in JAX."""

import jax
import jax.numpy as jnp
from jax.nn import sigmoid


def make(input_size, hidden_size, key):
    I, H, uniform = input_size, hidden_size, jax.nn.initializers.uniform(2 * hidden_size**-0.5)
    shapes = {"W": (I, 4 * H), "U": (H, 4 * H), "b": (4 * H,)}
    params = {name: uniform(key, shape) - H**-0.5 for name, shape in shapes.items()}
    return params | {name: jnp.zeros(H) for name in ("p_i", "p_f", "p_o")}


def peephole(params, x):
    def step(state, ax):
        h, c = state
        i, f, g, o = jnp.split(ax + h @ params["U"], 4, axis=1)
        i = sigmoid(i + params["p_i"] * c)
        f = sigmoid(f + params["p_f"] * c)
        c = f * c + i * jnp.tanh(g)
        o = sigmoid(o + params["p_o"] * c)
        h = o * jnp.tanh(c)
        return (h, c), h

    zeros = jnp.zeros((x.shape[1], params["p_i"].size))
    state, output = jax.lax.scan(step, (zeros, zeros), x @ params["W"] + params["b"])
    return output, state
