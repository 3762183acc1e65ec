"""JAX: ``lax.scan`` over the cell's equations under ``jit``, on the CPU."""

import os

import numpy as np

from .prepared import Prepared


def jax_rival(case, weights, x, doutput):
    os.environ["JAX_PLATFORMS"] = "cpu"
    import jax
    import jax.numpy as jnp

    def forward(params, x):
        return _forward(case, params, x)

    def loss(params, x):
        output = forward(params, x)
        return jnp.sum(output * doutput), output

    params = {name: jnp.asarray(value) for name, value in weights.items()}
    x, doutput = jnp.asarray(x), jnp.asarray(doutput)
    train = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))
    infer, last = jax.jit(forward), {}

    def wait():
        if last:
            jax.block_until_ready(last["found"])

    def run():
        last["found"] = train(params, x) if case.what == "train" else infer(params, x)
        wait()  # else the runs pile up

    def results():
        run()
        if case.what != "train":
            return {"output": np.asarray(last["found"], np.float64)}
        (_, output), (grads, dx) = last["found"]
        found = {"output": output, "dx": dx} | {name: grad for name, grad in grads.items() if "_hh" in name}
        return {name: np.asarray(value, np.float64) for name, value in found.items()}

    return Prepared(run, results, wait)


def _forward(case, params, x):
    """All layers, both directions of each; params by torch's names."""
    import jax.numpy as jnp
    from jax import lax

    for layer in range(case.L):
        outputs = []
        for d, suffix in enumerate(("", "_reverse")[: 2 if case.bidirectional else 1]):
            W_ih, W_hh, b_ih, b_hh = (
                params[f"{name}_l{layer}{suffix}"] for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
            )

            def step(carry, ax, W_hh=W_hh, b_hh=b_hh):
                return _cell(case.cell, carry, ax, carry[0] @ W_hh.T + b_hh)

            start = (jnp.zeros((case.B, case.H), x.dtype),) * 2
            outputs.append(lax.scan(step, start, x @ W_ih.T + b_ih, reverse=d == 1)[1])
        x = jnp.concatenate(outputs, -1)
    return x


def _cell(cell, carry, ax, ah):
    """((h, c), h) of one timestep, from the products of x and of h."""
    import jax.numpy as jnp
    from jax.nn import sigmoid

    h, c = carry
    if cell == "rnn":
        h = jnp.tanh(ax + ah)
    elif cell == "gru":
        (xr, xz, xn), (hr, hz, hn) = jnp.split(ax, 3, -1), jnp.split(ah, 3, -1)
        z = sigmoid(xz + hz)
        h = (1 - z) * jnp.tanh(xn + sigmoid(xr + hr) * hn) + z * h
    else:
        i, f, g, o = jnp.split(ax + ah, 4, -1)
        c = sigmoid(f) * c + sigmoid(i) * jnp.tanh(g)
        h = sigmoid(o) * jnp.tanh(c)
    return (h, c), h
