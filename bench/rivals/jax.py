"""JAX: ``lax.scan`` over the cell's equations under ``jit``, on the CPU."""

from types import SimpleNamespace

import numpy as np

from .equations import Equations
from .gpurnn import first_draws
from .prepared import Prepared, is_judged, prepare_jax


def jax_rival(case, weights, x, doutput):
    prepare_jax()
    import jax
    import jax.numpy as jnp

    equations = Equations(_functions(), case)

    def loss(params, x, draws):
        output = _forward(case, equations, params, x, draws)
        return jnp.sum(output * doutput), output

    def drawn(key):
        return _draw(case, equations, params, key) if equations.training else _no_draws(case)

    def train(params, x, key):
        return jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(params, x, drawn(key))

    params = {name: jnp.asarray(value) for name, value in weights.items() if not name.startswith("running_")}
    x, doutput, key = jnp.asarray(x), jnp.asarray(doutput), jax.random.key(0)
    drawing = equations.training and (case.record.draws or equations.options.weight_dropout)
    if case.what == "train":
        timed, given = jax.jit(train), jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))
    else:
        timed = jax.jit(lambda params, x, key: _forward(case, equations, params, x, drawn(key)))
        given = jax.jit(lambda params, x, draws: _forward(case, equations, params, x, draws))
    last = {}

    def wait():
        if last:
            jax.block_until_ready(last["found"])

    def run():
        last["found"] = timed(params, x, key)
        wait()  # else the runs pile up

    def results():
        """With gpurnn's masks, as no other draws have the same numbers; compiled anew only where there are any."""
        found = given(params, x, first_draws(case)) if drawing else timed(params, x, key)
        if case.what != "train":
            return {"output": np.asarray(found, np.float64)}
        (_, output), (grads, dx) = found
        found = {"output": output, "dx": dx} | {name: grad for name, grad in grads.items() if is_judged(name)}
        return {name: np.asarray(value, np.float64) for name, value in found.items()}

    run()  # compiles
    return Prepared(run, results, wait)


def _no_draws(case):
    return [[([], None)] * (2 if case.bidirectional else 1)] * case.L


def _draw(case, equations, params, key):
    """The masks of a call, as ``first_draws`` has them."""
    import jax

    rate, found = equations.options.weight_dropout, []
    for layer, directions in enumerate(_no_draws(case)):
        found.append([])
        for d in range(len(directions)):
            masks, weight = [], None
            for draw in case.record.draws:
                key, mine = jax.random.split(key)
                shape = case.T if draw.each == "timestep" else 1, case.B, case.H
                masks.append(jax.random.bernoulli(mine, 1 - draw.rate, shape))
            if rate:
                key, mine = jax.random.split(key)
                name = f"weight_hh_l{layer}" + "_reverse" * d
                weight = jax.random.bernoulli(mine, 1 - rate, params[name].shape)
            found[-1].append((masks, weight))
    return found


def _forward(case, equations, params, x, draws):
    """All layers, both directions of each; params by gpurnn's names."""
    import jax.numpy as jnp
    from jax import lax

    for layer in range(case.L):
        outputs = []
        for d, suffix in enumerate((f"_l{layer}", f"_l{layer}_reverse")[: 2 if case.bidirectional else 1]):
            masks, weight_mask = draws[layer][d]
            named = {name.removesuffix(suffix): p for name, p in params.items() if name.endswith(suffix)}
            p = equations.dropped_weights(SimpleNamespace(**named), weight_mask)
            masks = equations.scaled(masks)
            each = [mask if len(mask) == case.T else None for mask in masks]  # those of all timesteps are no input

            def step(state, now, p=p, masks=masks):
                ax, each = now
                here = [mask[0] if mine is None else mine for mask, mine in zip(masks, each, strict=True)]
                state = equations.step(p, ax, state, here)
                return state, state[0]

            start = (jnp.zeros((case.B, case.H), x.dtype),) * equations.states
            outputs.append(lax.scan(step, start, (equations.inputs(p, x), each), reverse=d == 1)[1])
        x = jnp.concatenate(outputs, -1)
    return x


def _functions():
    """What ``Equations`` asks for, in JAX."""
    import jax
    import jax.numpy as jnp

    def linear(x, W, b=None):
        return x @ W.T if b is None else x @ W.T + b

    def layer_norm(x, gain, bias, epsilon):
        mean, variance = jnp.mean(x, -1, keepdims=True), jnp.var(x, -1, keepdims=True)
        return (x - mean) * jax.lax.rsqrt(variance + epsilon) * gain + bias

    def batch_norm(x, epsilon, training):
        """In evaluation by the running statistics of a layer that has seen nothing."""
        if not training:
            return x * (1 + epsilon) ** -0.5
        return (x - jnp.mean(x, -2, keepdims=True)) * jax.lax.rsqrt(jnp.var(x, -2, keepdims=True) + epsilon)

    @jax.custom_vjp
    def clip_gradient(x, limit):
        return x

    clip_gradient.defvjp(lambda x, limit: (x, limit), lambda limit, d: (jnp.clip(d, -limit, limit), None))
    return SimpleNamespace(
        sigmoid=jax.nn.sigmoid, hard_sigmoid=jax.nn.hard_sigmoid, log_sigmoid=jax.nn.log_sigmoid,
        identity=lambda x: x, tanh=jnp.tanh, relu=jax.nn.relu, exp=jnp.exp, clip=jnp.clip, maximum=jnp.maximum,
        where=jnp.where, linear=linear, split=lambda x, n: jnp.split(x, n, -1),
        split_rows=lambda x, n: jnp.split(x, n, 0), layer_norm=layer_norm, batch_norm=batch_norm,
        clip_gradient=clip_gradient,
    )  # fmt: skip
