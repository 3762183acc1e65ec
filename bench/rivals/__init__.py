"""Against whom: each rival turns a case into something to run. What it needs is imported by its own process only.

A rival's ``prepare(case, weights, x, y)`` gets NumPy arrays in float32 or float64: weights by torch's names, x and
doutput; for a whole training step ("step") words and targets instead. It returns ``Prepared``. All do the same work:
the input GEMM, the time loop, in training every gradient (dx included), in a step everything up to the changed weights.
"""

import importlib.util

from ..cells import CELLS, PLAIN
from .flashrnn import flashrnn_rival
from .gpurnn import gpurnn_rival, stepper_rival, unavailable
from .jax import jax_rival
from .onnxruntime import onnxruntime_cell_rival, onnxruntime_rival
from .own_cell import own_gpurnn, own_jax, own_keras, own_torch
from .plain import plain_rival
from .products import products_rival
from .torch import torch_cell_rival, torch_rival
from .torch_loop import torch_loop_rival

RIVALS = {  # name -> (prepare, device, what it is)
    "gpurnn-cpu": (gpurnn_rival("cpu"), "cpu", "gpurnn's compiled code on the CPU"),
    "gpurnn-cpu-int8": (gpurnn_rival("cpu", weights_in="int8"), "cpu", "gpurnn's compiled code, weights in int8"),
    "gpurnn-cpu-int8x8": (
        gpurnn_rival("cpu", weights_in="int8", activations="int8"),
        "cpu",
        "the same, activations too",
    ),
    "gpurnn-numpy": (gpurnn_rival("numpy"), "cpu", "gpurnn's generic code on NumPy"),
    "gpurnn-cupy": (gpurnn_rival("cupy"), "gpu", "gpurnn's generic code on CuPy"),
    "gpurnn-cuda": (gpurnn_rival("cuda"), "gpu", "gpurnn's kernels"),
    "gpurnn-cuda-step": (gpurnn_rival("cuda", "step"), "gpu", "gpurnn's kernels, schedule step only"),
    "gpurnn-cuda-wavefront": (gpurnn_rival("cuda", wavefront=64), "gpu", "gpurnn's kernels, layers 64 steps apart"),
    "products": (products_rival, "cpu", "the matrix products alone on NumPy: a bound, not a rival"),
    "torch-cpu": (torch_rival("cpu"), "cpu", "torch.nn on the CPU"),
    "torch-cpu-compile": (torch_rival("cpu", "compile"), "cpu", "torch.nn on the CPU under torch.compile"),
    "gpurnn-cpu-plain": (plain_rival(gpurnn_rival("cpu")), "cpu", "gpurnn-cpu's cell without the option: a bound"),
    "torch-cpu-plain": (plain_rival(torch_rival("cpu")), "cpu", "torch.nn's cell without the option: a bound"),
    "gpurnn-cpu-stepper": (stepper_rival("cpu"), "cpu", "gpurnn's compiled code one timestep at a time"),
    "gpurnn-cpu-int8-stepper": (stepper_rival("cpu", "int8"), "cpu", "the same, weights in int8"),
    "gpurnn-cpu-int8x8-stepper": (stepper_rival("cpu", "int8", "int8"), "cpu", "the same, activations too"),
    "torch-cell": (torch_cell_rival, "cpu", "torch.nn.LSTMCell and its kin, one timestep at a time"),
    "torch-loop": (torch_loop_rival(), "cpu", "any cell as a loop over timesteps in torch"),
    "torch-loop-compile": (torch_loop_rival("compile"), "cpu", "that loop under torch.compile"),
    "haste-torch": (torch_loop_rival("script"), "cpu", "Haste's equations of layer norm, under torch.jit"),
    "torch-cuda": (torch_rival("cuda"), "gpu", "torch.nn on a GPU (cuDNN)"),
    "torch-cuda-graph": (torch_rival("cuda", "graph"), "gpu", "torch.nn on a GPU, recorded as a CUDA graph"),
    "torch-cuda-compile": (torch_rival("cuda", "compile"), "gpu", "torch.nn on a GPU under torch.compile"),
    "flashrnn-fused": (flashrnn_rival("cuda_fused"), "gpu", "FlashRNN, whole-sequence kernel"),
    "flashrnn": (flashrnn_rival("cuda"), "gpu", "FlashRNN, a product and a kernel each step"),
    "onnxruntime": (onnxruntime_rival(), "cpu", "ONNX Runtime on the CPU, inference"),
    "onnxruntime-int8": (onnxruntime_rival(int8=True), "cpu", "ONNX Runtime, weights in int8 (quantize_dynamic)"),
    "onnxruntime-cell": (onnxruntime_cell_rival(), "cpu", "ONNX Runtime one timestep at a time"),
    "onnxruntime-cell-int8": (onnxruntime_cell_rival(int8=True), "cpu", "the same, weights in int8"),
    "jax": (jax_rival, "cpu", "JAX, lax.scan under jit"),
}
USUAL = (
    "gpurnn-cpu",
    "gpurnn-numpy",
    "gpurnn-cupy",
    "gpurnn-cuda",
    "torch-cpu",
    "torch-cuda",
    "onnxruntime",
    "jax",
)  # if none is named
USUAL_OF_OPTIONS = ("gpurnn-cpu-plain", "torch-cpu-plain", "torch-loop")  # these, too, where a cell has options
_STEPS = (
    "gpurnn-cpu-stepper", "gpurnn-cpu-int8-stepper", "gpurnn-cpu-int8x8-stepper", "torch-cell", "onnxruntime-cell",
    "onnxruntime-cell-int8",
)  # fmt: skip
_FLOAT32 = ("jax", "products", "torch-loop", "haste-torch")
_LOOPS = ("torch-loop", "torch-loop-compile", "haste-torch")  # float32, layers alone
HIDDEN = {
    "flashrnn-vanilla": (flashrnn_rival("vanilla", "cpu"), "cpu", ""),  # for a test of "flashrnn" without a GPU
    "own-gpurnn": (own_gpurnn, "cpu", ""),  # these for ``python -m bench.own_cell``
    "own-torch": (own_torch(), "cpu", ""),
    "own-torch-compile": (own_torch("compile"), "cpu", ""),
    "own-jax": (own_jax, "cpu", ""),
    "own-keras": (own_keras, "cpu", ""),
}


def missing(name):
    """Why a rival cannot run here, or None. Imports nothing heavy."""
    if name.startswith("gpurnn-"):
        return unavailable(name.split("-")[1])
    needed = {"onnxruntime": ("onnx", "onnxruntime"), "jax": ("jax",), "products": ()}
    needed = needed.get(name.partition("-")[0], ("torch",))
    for module in (*needed, "flashrnn") if name.startswith("flashrnn") else needed:
        if importlib.util.find_spec(module) is None:
            return f"{module} is not installed"
    device = (RIVALS | HIDDEN)[name][1]
    if device == "gpu" and "driver" in (unavailable("cuda") or ""):
        return "no NVIDIA driver was found"
    return None


def packages():
    """Names of the packages whose rivals can run here."""
    rivals = {"torch-cpu": "torch", "jax": "jax", "onnxruntime": "onnxruntime", "flashrnn": "flashrnn"}
    return [package for rival, package in rivals.items() if missing(rival) is None]


def refuses(name, case):
    """Why a rival does not take a case, or None."""
    if case.precision == "tf32" and not name.startswith(("gpurnn-cuda", "torch-cuda", "flashrnn")):
        return "computes float32 in float32"
    if name.startswith(("onnxruntime", *_FLOAT32)) and case.dtype != "float32":
        return "only float32 here"
    if name.startswith(("onnxruntime", "gpurnn-cpu-int8")) and case.what != "inference":
        return "only inference"
    if name.startswith("onnxruntime") and name.endswith("int8") and case.cell in ("gru", "rnn"):
        return "quantizes no cell but the LSTM"
    single = case.T == 1 and case.what == "inference" and not case.bidirectional and not case.resets
    if name in _STEPS and not (single and (case.L == 1 or name.startswith("gpurnn-"))):
        return "only one timestep of one direction in inference"
    option = case.cell not in PLAIN
    if name.endswith("-plain"):
        if not option or CELLS[case.cell].plain is None:
            return "only for a cell with an option"
    elif option and name.startswith(("torch-cpu", "torch-cuda", "torch-cell", "flashrnn", "onnxruntime")):
        return "has only the plain cells"
    if name == "haste-torch" and case.cell not in ("layer_norm_lstm", "layer_norm_gru"):
        return "only layer norm in LSTM and GRU"
    if name == "jax" and case.what == "forward":
        return "keeps nothing for a later backward"
    if case.ragged and not name.startswith("gpurnn-") and name not in ("torch-cpu", "torch-cpu-plain", "torch-cuda"):
        return "all sequences of one length"
    others = ("torch-cpu", "torch-cpu-compile", "torch-cuda")
    if case.resets and not name.startswith("gpurnn-") and name not in others:
        return "no resets"
    if case.heads > 1 and not name.startswith("gpurnn-") and (name not in others or case.L > 1 or case.bidirectional):
        return "no heads"
    if name.startswith("flashrnn") and (case.L > 1 or case.bidirectional):
        return "one layer and one direction"
    if name == "gpurnn-cuda-wavefront" and (case.L == 1 or case.bidirectional):
        return "several layers and one direction"
    if case.what == "step" and name.startswith(("flashrnn", "jax", *_LOOPS)):
        return "only layers, no whole training step"
    return None
