"""gpurnn itself, on each of its backends."""

import numpy as np

import gpurnn
from gpurnn.recurrent import dropout

from ..cells import CELLS, PLAIN
from .prepared import RATE, Prepared, is_judged


def unavailable(backend):
    """Why a backend cannot run here, or None."""
    from gpurnn.backends.cpu.native import load_native

    if backend == "cpu" and not load_native():
        return "was not built, or not for this processor"
    return gpurnn.backends()[backend]


def build(case, backend, dtype, schedule="auto", wavefront=0):
    """The gpurnn layer of a case, or for "step" the model: parts "embedding", "rnn", "linear"."""
    where = {"backend": backend, "dtype": dtype, "seed": 0}
    exact = {"precision": case.precision}
    more = {"bidirectional": case.bidirectional, "schedule": schedule, "wavefront": wavefront, "heads": case.heads}
    layer = CELLS[case.cell].layer(case.I, case.H, case.L, **more, **where, **exact)
    layer.train(case.what != "inference")
    if case.what != "step":
        return layer
    D = 2 if case.bidirectional else 1
    linear = gpurnn.Linear(D * case.H, case.V, **where, **exact)
    return gpurnn.Sequential({"embedding": gpurnn.Embedding(case.V, case.I, **where), "rnn": layer, "linear": linear})


def first_draws(case):
    """What the first call of a case draws: for each layer, for each direction ([the masks of the cell's draws, each
    (steps, B, H)], the mask of W_hh or None)."""
    layer = build(case, "numpy", "float32")
    cells, weights = dropout.cell_masks(layer, case.T, case.B), dropout.weight_masks(layer)
    count = len(layer.cell.draws)
    return [
        [
            (np.split(cells[k][d], count, -1) if count else [], weights[k][d] if weights[k] else None)
            for d in range(2 if case.bidirectional else 1)
        ]
        for k in range(case.L)
    ]


def gpurnn_rival(backend, schedule="auto", wavefront=0, weights_in=None, activations="int16"):
    """weights_in: None, or the format that the weights are quantized to, for inference, with these activations."""

    def prepare(case, weights, x, y):
        def fresh():
            """(one run, which returns name -> array; the model)."""
            model = build(case, backend, case.dtype, schedule, wavefront)
            model.load_state_dict(weights)
            model = model.quantize(weights_in, activations) if weights_in else model
            return (_step if case.what == "step" else layer_call)(case, model, x, y), model

        run, model = fresh()

        def results():
            """Of a fresh model where a run changes it: its weights, or which masks it draws next."""
            changes = case.what == "step" or case.cell not in PLAIN
            return _results(case, *(fresh() if changes else (run, model)))

        if not hasattr(model.xp, "get_default_memory_pool"):
            return Prepared(run, results)
        pool = model.xp.get_default_memory_pool()
        return Prepared(run, results, model.ops.synchronize, _events(run, model.xp.cuda), pool.total_bytes)

    return prepare


def stepper_rival(backend, weights_in=None, activations="int16"):
    """A stepper in a case of one timestep in inference. The model's state is its initial one in every run."""

    def prepare(case, weights, x, y):
        model = build(case, backend, case.dtype)
        model.load_state_dict(weights)
        model = model.quantize(weights_in, activations) if weights_in else model
        stepper, x = model.stepper(case.B), x[0].astype(model.dtype)

        def results():
            stepper.reset()
            return {"output": np.asarray(stepper.step(x), np.float64)[None]}

        return Prepared(lambda: stepper.step(x), results)

    return prepare


def _step(case, model, words, targets):
    """A whole training step, forward to Adam."""
    adam = gpurnn.Adam(model, lr=RATE)
    words, targets = model.xp.asarray(words), model.xp.asarray(targets)

    def run():
        model.zero_grad()
        logits, _, backward = model.forward(words)
        loss, dloss = gpurnn.cross_entropy(logits, targets)
        backward(dloss())
        norm = gpurnn.clip_grad_norm(model, 1.0)
        adam.step()
        return {"loss": loss, "norm": norm}

    return run


def layer_call(case, layer, x, doutput):
    """A layer's call, forward alone, or forward and backward."""
    x, doutput = (layer.xp.asarray(array.astype(layer.dtype)) for array in (x, doutput))
    lengths, reset = case.lengths, case.reset
    reset = None if reset is None else layer.xp.asarray(np.array(reset))

    def run():
        if case.what == "inference":
            return {"output": layer(x, lengths=lengths, reset=reset)[0]}
        output, _, backward = layer.forward(x, lengths=lengths, reset=reset)
        if case.what == "forward":
            return {"output": output}
        layer.zero_grad()
        return {"output": output, "dx": backward(doutput)[0]}

    return run


def _results(case, run, model):
    """Name -> float64 array, of the next run."""
    found = run()
    if case.what in ("train", "step"):
        found |= {name: grad.copy() for name, grad in model.grads.items() if is_judged(name)}
    if case.what == "step":  # the second loss shows whether the weights were changed rightly
        found["loss"] = [float(found["loss"]), float(run()["loss"])]
    return {
        name: np.asarray(model.ops.to_numpy(array) if hasattr(array, "shape") else array, np.float64)
        for name, array in found.items()
    }


def _events(run, cuda):
    def events(count):
        start, stop = cuda.Event(), cuda.Event()
        start.record()
        for _ in range(count):
            run()
        stop.record()
        stop.synchronize()
        return cuda.get_elapsed_time(start, stop) / 1e3

    return events
