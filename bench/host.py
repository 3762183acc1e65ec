"""``python -m bench host``: how much Python a call on the ``cuda`` backend takes before a GPU is asked for anything.

A device that launches nothing stands for the GPU, and NumPy for CuPy's arrays, whose own cost is left out. Sizes are
tiny, so that what NumPy does for a copy costs no time either. Needs no GPU; figures are of this machine's processor.
"""

import time
import types

import numpy as np

CASES = {  # name -> (layer's class, options of the layer)
    "lstm block": ("LSTM", {"schedule": "block"}),
    "lstm block bfloat16": ("LSTM", {"schedule": "block", "dtype": "bfloat16"}),
    "lstm grid": ("LSTM", {"schedule": "grid", "hidden_size": 40}),
    "lstm step, recorded": ("LSTM", {"schedule": "step"}),
    "lstm both directions": ("LSTM", {"schedule": "block", "bidirectional": True}),
    "gru of two layers": ("GRU", {"schedule": "block", "num_layers": 2}),
}
T, B, I, H = 50, 2, 64, 8


class Array(np.ndarray):
    """An array that says where it lies, as CuPy's do."""

    data = types.SimpleNamespace(ptr=0)


def _made_by(function):
    return lambda *given, **options: function(*given, **options).view(Array)


# NumPy under CuPy's version; memory that no kernel fills is zero, as other numbers may be slow ones
ARRAYS = types.SimpleNamespace(
    **(vars(np) | {name: _made_by(getattr(np, name)) for name in ("zeros", "asarray", "ascontiguousarray")})
)
ARRAYS.empty, ARRAYS.ndarray, ARRAYS.__version__ = ARRAYS.zeros, Array, "14.0.0"


class Device:
    """What ``CudaOps`` asks of a GPU, done in no time."""

    xp, stream, queue, recording = ARRAYS, 0, 0, None
    address = staticmethod(lambda array: 0)

    def __init__(self):
        from gpurnn.backends.cuda.schedules import Device as Limits

        self.limits = Limits(90, 132, 227 * 1024)

    def load(self, file, expression, struct=None):
        return lambda grid, block, args, shared_mem=0, cooperative=False: None

    def spills(self, file, expression, struct=None):
        return 0

    def product(self, a, b, out, accumulate=False, tf32=False):
        return lambda: None

    def is_capturing(self):
        return False

    def gemm(self, a, b, out, accumulate=False, tf32=False):
        """Nothing: the binding's own cost is not counted."""

    def mirror(self, array):
        return np.zeros(array.size, array.dtype), lambda: None

    def record(self, function):
        return self

    def launch(self):
        """A recorded loop."""


def measure(rounds=7, calls=60):
    """Name -> {"inference": seconds of a call, "train": of forward and backward}: the best of ``rounds``, as other
    work on the machine only adds to it."""
    import gpurnn
    from gpurnn.backends.cuda.ops import CudaOps

    ops, found = CudaOps(Device()), {}
    for name, (kind, options) in CASES.items():
        options = {"hidden_size": H} | options
        layer = getattr(gpurnn, kind)(I, options.pop("hidden_size"), backend=ops, seed=0, **options)
        x = ARRAYS.zeros((T, B, I), layer.dtype)
        doutput = ARRAYS.zeros(layer(x)[0].shape, layer.dtype)

        def train(layer=layer, x=x, doutput=doutput):
            layer.forward(x)[2](doutput)

        found[name] = {
            "inference": _seconds(lambda layer=layer, x=x: layer(x), rounds, calls),
            "train": _seconds(train, rounds, calls),
        }
    return found


def _seconds(call, rounds, calls):
    samples = []
    for _ in range(rounds + 1):  # the first finds and remembers what sizes decide
        start = time.perf_counter()
        for _ in range(calls):
            call()
        samples.append((time.perf_counter() - start) / calls)
    return min(samples[1:])


def lines(found):
    """The table for a terminal, in microseconds."""
    yield f"{'':24}{'inference':>12}{'train':>12}"
    for name, seconds in found.items():
        yield f"{name:24}{seconds['inference'] * 1e6:9.1f} us{seconds['train'] * 1e6:9.1f} us"
