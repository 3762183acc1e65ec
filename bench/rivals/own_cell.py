"""One user's cell in four libraries (``own_gpurnn.py``, ``own_torch.py``, ...), each as its manual has it: a training
step, forward and backward to every gradient. For ``python -m bench.own_cell``; cases have the cell "peephole"."""

import os
from pathlib import Path

import numpy as np

from .gpurnn import layer_call as gpurnn_call
from .prepared import Prepared, prepare_jax, threads
from .torch import layer_call as torch_call

LIBRARIES = ("gpurnn", "torch", "jax", "keras")
PEEPHOLES = ("p_i", "p_f", "p_o")


def code_lines(library):
    """How many lines of code a library's file has, without blank ones and its first, which says what it is."""
    lines = Path(__file__).with_name(f"own_{library}.py").read_text(encoding="utf-8").splitlines()[1:]
    return sum(bool(line.strip()) for line in lines)


def own_gpurnn(case, weights, x, y):
    from .own_gpurnn import make

    layer = make(case.I, case.H)
    layer.load_state_dict(weights)
    run = gpurnn_call(case, layer, x, y)

    def results():
        names = "weight_hh_l0", "bias_hh_l0", *(f"{p}_l0" for p in PEEPHOLES)
        return _float64(run() | {name: layer.grads[name] for name in names})

    return Prepared(run, results)


def own_torch(mode="eager"):
    """mode: "eager", or "compile" for ``torch.compile``."""

    def prepare(case, weights, x, y):
        import torch

        from .own_torch import make

        torch.set_num_threads(threads())
        module = make(case.I, case.H)
        pairs = [(part, kind) for part in ("weight", "bias") for kind in ("ih", "hh")]
        names = {f"{kind}.{part}": f"{part}_{kind}_l0" for part, kind in pairs} | {p: f"{p}_l0" for p in PEEPHOLES}
        module.load_state_dict({own: torch.from_numpy(weights[name]) for own, name in names.items()})
        call = torch.compile(module) if mode == "compile" else module
        run = torch_call(case, module, call, torch.from_numpy(x), torch.from_numpy(y), same_memory=False)

        def results():
            found = run() | {names[own]: parameter.grad for own, parameter in module.named_parameters()}
            return _float64({name: value.detach().numpy() for name, value in found.items()})

        return Prepared(run, results)

    return prepare


def own_jax(case, weights, x, y):
    prepare_jax()
    import jax

    from .own_jax import make, peephole

    params = make(case.I, case.H, jax.random.key(0)) | _transposed(weights)

    def loss(params, x):
        output, _ = peephole(params, x)
        return (output * y).sum(), output

    return _jax_prepared(loss, params, x)


def own_keras(case, weights, x, y):
    """On its JAX backend, under ``jit``."""
    prepare_jax()
    os.environ["KERAS_BACKEND"] = "jax"
    from .own_keras import make

    layer, own = make(case.I, case.H), _transposed(weights)
    names = [variable.name for variable in layer.trainable_variables]
    y = y.swapaxes(0, 1)

    def loss(params, x):
        (output, *_), _ = layer.stateless_call([params[name] for name in names], layer.non_trainable_variables, x)
        return (output * y).sum(), output

    prepared = _jax_prepared(loss, own, x.swapaxes(0, 1))  # batch-major, as Keras has it

    def results():
        found = prepared.results()
        return found | {name: found[name].swapaxes(0, 1) for name in ("output", "dx")}

    return Prepared(prepared.run, results)


def _jax_prepared(loss, own, x):
    import jax

    own, x = jax.tree.map(jax.numpy.asarray, (own, x))
    train = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))

    def run():
        return jax.block_until_ready(train(own, x))

    def results():
        (_, output), (grads, dx) = run()
        found = {"output": output, "dx": dx, "weight_hh_l0": grads["U"].T, "bias_hh_l0": grads["b"]}
        return _float64(found | {f"{p}_l0": grads[p] for p in PEEPHOLES})

    return Prepared(run, results)


def _transposed(weights):
    """The weights as JAX and Keras have them, with one bias."""
    own = {"W": weights["weight_ih_l0"].T, "U": weights["weight_hh_l0"].T}
    own["b"] = weights["bias_ih_l0"] + weights["bias_hh_l0"]
    return own | {p: weights[f"{p}_l0"] for p in PEEPHOLES}


def _float64(found):
    return {name: np.array(value, np.float64) for name, value in found.items()}
