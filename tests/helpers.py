"""What several test files use: closeness up to rounding, backends, the emulated GPU, layers and optimizers by name."""

import os
from pathlib import Path

import numpy as np
import pytest
from cuda_on_cpu import gate, nvrtc
from cuda_on_cpu.device import EmulatedDevice
from cuda_on_cpu.emulator import Emulator
from cuda_on_cpu.gate import parse_log

from gpurnn import (
    GRU,
    LSTM,
    RNN,
    Attention,
    BatchNorm,
    Embedding,
    EncoderDecoder,
    GRUCell,
    LayerNorm,
    Linear,
    LSTMCell,
    Pooling,
    RNNCell,
    Sequential,
    check,
    optim,
    testing,
)  # fmt: skip
from gpurnn.backends.cpu.native import load_native
from gpurnn.backends.cuda import schedules
from gpurnn.backends.cuda.launch import kernel_of
from gpurnn.backends.cuda.ops import CudaOps
from gpurnn.backends.sources import kernel_source
from gpurnn.dtypes import EPSILON

needs_nvrtc = pytest.mark.skipif(nvrtc.missing() is not None, reason=str(nvrtc.missing()))

# ---- closeness


def assert_close(got, expected, terms, name="", dtype="float64", each=False):
    """Equal up to ``terms`` roundings of a dtype, one after another: a share of the largest absolute value, or of 1.

    terms: the additions that one number goes through, as ``testing.count_terms`` counts them for a layer. each: numbers
    that do not depend on one another; each may be off by a share of its own absolute value, or of 1.
    """
    got, expected = host(got), host(expected)
    assert got.shape == expected.shape, f"{name}: expected shape {expected.shape}, got {got.shape}"
    if each:
        size = np.where(np.isfinite(expected), np.maximum(np.abs(expected), 1), 1)
        np.testing.assert_allclose(got / size, expected / size, rtol=0, atol=terms * EPSILON[dtype], err_msg=str(name))
        return
    allowed = testing.allowed_rounding(expected[np.isfinite(expected)], dtype, terms)
    np.testing.assert_allclose(got, expected, rtol=0, atol=allowed, err_msg=str(name))


# ---- backends


ROOT = Path(__file__).resolve().parents[1]
DATA = Path(os.environ.get("GPURNN_DATA", ROOT.parent / "shared" / "data"))  # real data, beside some checkouts
BACKENDS = ["numpy", "cpu", pytest.param("cuda", marks=pytest.mark.emulated)]

# Orders in which an emulated GPU runs its threads.
THREAD_ORDERS = {
    "ascending": {},
    "random": {"policy": "random", "seed": 1},
    "interrupted": {"policy": "random", "seed": 2, "preemption": 0.01},
}


def cuda_ops(*, graphs=16, edits=(), **how):
    """``CudaOps`` over an emulated GPU: ``arch``, ``policy``, ``seed``, ... are the emulator's."""
    return CudaOps(EmulatedDevice(Emulator(**how), edits), graphs)


def backend_of(name):
    """What a layer takes as ``backend``: for "cuda" the emulated GPU."""
    return cuda_ops() if name == "cuda" else name


def cpu_levels():
    """Every kind of vector that this machine can run: 0 of 128 bits, 1 AVX2, 2 AVX-512."""
    found = load_native()
    return range(found[1] + 1) if found else ()


def results(layer, x, doutput, lengths=None):
    """Every array of one training call."""
    layer.zero_grad()
    output, state, backward = layer.forward(x, lengths=lengths)
    dx, dstate = backward(doutput)
    states = [part if isinstance(part, tuple) else (part,) for part in (state, dstate)]
    return [output, *states[0], dx, *states[1], layer.flat_grads.copy()]


def host(array):
    return array.get() if hasattr(array, "get") else np.asarray(array)


_draw = np.random.default_rng(5)


def values(shape):
    """Standard normal float32 numbers, others in each call."""
    return _draw.normal(size=shape).astype("float32")


def compare(*args, **options):
    """``check.compare``, which must find nothing wrong."""
    worst, detail = check.compare(*args, **options)
    assert worst <= 1, f"{args}, {options}: {detail}"


def all_equal(first, second, name=""):
    """Equal arrays under equal names."""
    assert first.keys() == second.keys()
    for key, value in first.items():
        np.testing.assert_array_equal(second[key], value, err_msg=f"{key} {name}")


# ---- compiled kernels


def spilling(file, expressions, arch, struct=None):
    """Those of some kernels that keep registers in memory."""
    program = nvrtc.compile(kernel_source(file, struct), file=file, arch=arch, expressions=tuple(sorted(expressions)))
    report = parse_log(program.log)
    figures = {expression: report[program.lowered[expression]] for expression in expressions}
    return [name for name, r in figures.items() if r.spill_stores or r.spill_loads or r.stack]


def precision(dtype):
    """The dtype of a layer, and how it multiplies."""
    return ("float32", {"precision": "tf32"}) if dtype == "tf32" else (dtype, {})


def check_spills(file, chosen, arch, device):
    """chosen: name expression -> (problem, candidate). The accepted compiler spills nowhere; another nowhere any more
    once the tile holds less, as the library then makes it (CudaOps.way)."""
    for expression in spilling(file, chosen, arch):
        assert nvrtc.version() != gate.read_accepted()[0], expression
        asked, candidate = chosen[expression]
        while (name := kernel_of(asked, candidate)[1]) and spilling(file, [name], arch):
            candidate = schedules.hold_less(asked, candidate, device)
            assert candidate is not None, expression


# ---- every layer, by name

_numbers = np.random.default_rng(0)


def numbers(*shape):
    """Standard normal float64 numbers, others in each call."""
    return _numbers.standard_normal(shape)


IDS = np.array([[1, 2, 1], [0, 4, 2]])

# name -> (layer of options, inputs of its forward)
LAYERS = {
    "linear": (lambda o: Linear(3, 4, **o), [numbers(5, 2, 3)]),
    "linear without bias": (lambda o: Linear(3, 4, bias=False, **o), [numbers(2, 3)]),
    "embedding": (lambda o: Embedding(5, 3, padding_idx=0, **o), [IDS]),
    "layer norm": (lambda o: LayerNorm(3, **o), [numbers(5, 2, 3)]),
    "batch norm": (lambda o: BatchNorm(3, **o), [numbers(5, 2, 3)]),
    "batch norm, evaluation": (lambda o: BatchNorm(3, **o).eval(), [numbers(5, 2, 3)]),
    "pooling, attention": (lambda o: Pooling(3, "attention", **o), [numbers(5, 2, 3)]),
    "attention, general": (lambda o: Attention(3, 4, "general", **o), [numbers(2, 2, 3), numbers(5, 2, 4)]),
    "attention, additive": (lambda o: Attention(3, 4, "additive", **o), [numbers(2, 2, 3), numbers(5, 2, 4)]),
    "rnn": (lambda o: RNN(3, 4, **o), [numbers(5, 2, 3)]),
    "rnn, relu": (lambda o: RNN(3, 4, nonlinearity="relu", **o), [numbers(5, 2, 3)]),
    "lstm": (lambda o: LSTM(3, 4, 2, bidirectional=True, learn_state=True, **o), [numbers(5, 2, 3)]),
    "lstm, projected": (lambda o: LSTM(3, 4, proj_size=2, **o), [numbers(5, 2, 3)]),
    "lstm, wavefront": (lambda o: LSTM(3, 4, 2, wavefront=2, **o), [numbers(5, 2, 3)]),
    "gru": (lambda o: GRU(3, 4, **o), [numbers(5, 2, 3)]),
    "gru, original": (lambda o: GRU(3, 4, reset_after=False, reverse=True, **o), [numbers(5, 2, 3)]),
    "rnn cell": (lambda o: RNNCell(3, 4, **o), [numbers(2, 3)]),
    "lstm cell": (lambda o: LSTMCell(3, 4, **o), [numbers(2, 3)]),
    "gru cell": (lambda o: GRUCell(3, 4, **o), [numbers(2, 3)]),
    "sequential": (lambda o: Sequential(LSTM(3, 4, **o), LayerNorm(4, **o), Linear(4, 2, **o)), [numbers(5, 2, 3)]),
    "encoder-decoder": (lambda o: EncoderDecoder(6, 6, 4, tied=True, **o), [(IDS, IDS)]),
}


def build_layer(kind, backend="numpy", dtype="float64"):
    make, inputs = LAYERS[kind]
    layer = make({"backend": backend, "dtype": dtype, "seed": 1})
    layer.flat_grads[...] = 0
    return layer, [x if isinstance(x, tuple) or x.dtype.kind == "i" else x.astype(layer.dtype) for x in inputs]


def ones(outputs):
    return tuple(map(ones, outputs)) if isinstance(outputs, tuple) else np.full_like(outputs, 0.01)


# ---- every optimizer, by name

# All that an update branches on: what is compiled, for a CPU or a GPU, is compared with array code for each.
OPTIMIZERS = {
    "sgd": lambda m: optim.SGD(m, 0.1),
    "sgd, momentum": lambda m: optim.SGD(m, 0.1, momentum=0.9, dampening=0.3, weight_decay=0.01),
    "sgd, nesterov": lambda m: optim.SGD(m, 0.1, momentum=0.9, nesterov=True),
    "rmsprop": lambda m: optim.RMSprop(m, 0.01, weight_decay=0.01),
    "rmsprop, all": lambda m: optim.RMSprop(m, 0.01, centered=True, momentum=0.8),
    "adam": lambda m: optim.Adam(m, 0.01, weight_decay=0.02),
    "adam, amsgrad": lambda m: optim.Adam(m, 0.01, amsgrad=True),
    "adamw": lambda m: optim.AdamW(m, 0.01, weight_decay=0.1),
}


# ---- a text to learn

TEXT_IDS = ((np.arange(3000) * 7 + (np.arange(3000) // 13) ** 2) % 11).astype(np.uint8)
