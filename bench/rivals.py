"""Against whom: each rival turns a case into something to run. What it needs is imported by its own process only.

A rival's ``prepare(case, weights, x, doutput)`` gets NumPy arrays in float32 or float64 (weights by torch's names) and
returns ``Prepared``. All do the same work: the input GEMM, the walk, and in training every gradient, dx included.
"""

import importlib.util
import os
from collections.abc import Callable
from dataclasses import dataclass


@dataclass
class Prepared:
    """run(): the timed work. results(): name -> float64 NumPy array, after one run. wait(): until the device is done.
    events: None, or a function that runs ``run`` n times and returns the device's own seconds."""

    run: Callable
    results: Callable
    wait: Callable = lambda: None
    events: Callable | None = None


def _gpurnn(backend):
    def prepare(case, weights, x, doutput):
        import numpy as np

        import gpurnn

        kind = {"lstm": gpurnn.LSTM, "gru": gpurnn.GRU, "rnn": gpurnn.RNN}[case.cell]
        layer = kind(
            case.I, case.H, case.L, bidirectional=case.bidirectional, backend=backend, dtype=case.dtype, seed=0
        )
        layer.load_state_dict(weights)
        to_numpy = layer.ops.to_numpy
        x, doutput = (layer.xp.asarray(array.astype(layer.dtype)) for array in (x, doutput))
        last = {}

        def run():
            if case.what == "inference":
                last["output"] = layer(x)[0]
                return
            last["output"], _, backward = layer.forward(x)
            if case.what == "train":
                layer.zero_grad()
                last["dx"], _ = backward(doutput)

        def results():
            run()
            found = dict(last)
            if case.what == "train":
                found |= {name: grad for name, grad in layer.grads.items() if "_hh" in name}
            return {name: to_numpy(array).astype(np.float64) for name, array in found.items()}

        def events(count):
            cuda = layer.xp.cuda
            start, stop = cuda.Event(), cuda.Event()
            start.record()
            for _ in range(count):
                run()
            stop.record()
            stop.synchronize()
            return cuda.get_elapsed_time(start, stop) / 1e3

        return Prepared(run, results, layer.ops.synchronize, None if backend == "numpy" else events)

    return prepare


def _torch(device):
    def prepare(case, weights, x, doutput):
        import torch

        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
        if device == "cuda":
            allowed = case.precision == "tf32"  # torch's own default for RNNs is tf32
            torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = allowed
        dtype = getattr(torch, case.dtype)
        kind = getattr(torch.nn, case.cell.upper())
        layer = kind(case.I, case.H, case.L, bidirectional=case.bidirectional)
        layer.load_state_dict({name: torch.from_numpy(value) for name, value in weights.items()})
        layer = layer.to(device, dtype)
        x, doutput = (torch.from_numpy(array).to(device, dtype) for array in (x, doutput))
        x.requires_grad_(case.what == "train")
        layer.train(case.what != "inference")
        last = {}

        def run():
            if case.what == "inference":
                with torch.inference_mode():
                    last["output"] = layer(x)[0]
                return
            last["output"] = output = layer(x)[0]
            if case.what == "train":
                x.grad = None
                layer.zero_grad()
                output.backward(doutput)

        def results():
            run()
            found = dict(last)
            if case.what == "train":
                found |= {"dx": x.grad} | {name: p.grad for name, p in layer.named_parameters() if "_hh" in name}
            return {name: value.detach().cpu().double().numpy() for name, value in found.items()}

        def events(count):
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            for _ in range(count):
                run()
            stop.record()
            stop.synchronize()
            return start.elapsed_time(stop) / 1e3

        if device == "cpu":
            return Prepared(run, results)
        return Prepared(run, results, torch.cuda.synchronize, events)

    return prepare


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


RIVALS = {  # name -> (prepare, what it is)
    "gpurnn-numpy": (_gpurnn("numpy"), "gpurnn on NumPy"),
    "gpurnn-cupy": (_gpurnn("cupy"), "gpurnn's generic code on CuPy"),
    "gpurnn-cuda": (_gpurnn("cuda"), "gpurnn's kernels"),
    "torch-cpu": (_torch("cpu"), "torch.nn on the CPU"),
    "torch-cuda": (_torch("cuda"), "torch.nn on a GPU (cuDNN)"),
}
HIDDEN = {"sleeper": (_sleeper, ""), "liar": (_liar, "")}


def missing(name):
    """Why a rival cannot run here, or None. Imports nothing heavy."""
    from gpurnn import backends

    if name.startswith("gpurnn-"):
        return backends()[name.removeprefix("gpurnn-")]
    if name.startswith("torch") and importlib.util.find_spec("torch") is None:
        return "torch is not installed"
    if name == "torch-cuda" and backends()["cuda"] and "driver" in backends()["cuda"]:
        return "no NVIDIA driver was found"
    return None


def refuses(name, case):
    """Why a rival does not take a case, or None."""
    if case.precision == "tf32" and not name.startswith("torch-cuda"):
        return "computes float32 in float32"
    return None
