"""Recurrent networks on NumPy and on CUDA kernels of their own.

A model, and how it learns; arrays are (timesteps, sequences, features):

>>> import numpy as np
>>> import gpurnn
>>> x = np.random.default_rng(0).standard_normal((20, 64, 2)).astype("float32")
>>> y = np.cumsum(x.sum(2, keepdims=True), axis=0) * 0.1                    # a target for every timestep
>>> model = gpurnn.Sequential(gpurnn.LSTM(2, 32), gpurnn.Linear(32, 1))     # backend="cuda" for each: on a GPU
>>> history = gpurnn.fit(model, gpurnn.mse, [(x, y)], optimizer="adam", lr=0.01, epochs=5, progress=False)
>>> output, state = model(x)
>>> output.shape
(20, 64, 1)

The same by hand: forward returns a backward function, and so does a loss.

>>> adam = gpurnn.Adam(model, lr=0.01)
>>> model.zero_grad()
>>> output, state, backward = model.forward(x)
>>> loss, dloss = gpurnn.mse(output, y)
>>> dx, dstate = backward(dloss())
>>> adam.step()

``help(gpurnn.LSTM)`` explains a layer, ``help(gpurnn.fit)`` training. ``gpurnn --help`` on the shell trains on files.
"""

from difflib import get_close_matches
from typing import TYPE_CHECKING

from . import _interrupt, pruning, quantization, testing
from .attention import Attention
from .backends import backends, empty_cache, get_backend, use_backend
from .cells import cell
from .checkpoint import CheckpointError, load_checkpoint, save_checkpoint
from .ctc import ctc_beam_search, ctc_greedy, ctc_loss
from .data import Batch, SequenceBatches, TextBatches
from .errors import BackendError, DtypeError, ShapeError
from .gradients import GradientFlow, record_gradient_flow
from .layers import BatchNorm, Dropout, Embedding, LayerNorm, Linear, Pooling, Sequential, TiedLinear
from .loss_scale import LossScaler
from .losses import (
    binary_cross_entropy_with_logits,
    cross_entropy,
    huber,
    kl_div,
    mae,
    mse,
    nll_loss,
    quantile_loss,
    smooth_l1,
)
from .metrics import accuracy, bits_per_character, edit_distance, error_rate, perplexity
from .model_file import load, save
from .module import Module
from .optim import (
    SGD,
    Adam,
    AdamW,
    ConstantSchedule,
    CosineSchedule,
    PlateauSchedule,
    RMSprop,
    StepSchedule,
    WarmupSchedule,
    clip_grad_norm,
    clip_grad_value,
)
from .per_sample import PerSampleGradients, per_sample_gradients
from .recurrent import GRU, LSTM, RNN, GRUCell, LSTMCell, Recurrent, RNNCell
from .seq2seq import EncoderDecoder, beam_search, greedy_search
from .tangents import hvp, jvp
from .train import History, TrainingError, evaluate, fit, load_weights, save_weights

_HINTS = {  # what other libraries have -> what to do here
    "Bidirectional": "give the layer bidirectional=True", "Dense": "use gpurnn.Linear(in_features, out_features)",
    "functional": "losses and layers are in gpurnn itself", "manual_seed": "give seed= to each layer",
    "Model": "use gpurnn.Module", "no_grad": "calling a model saves nothing for a backward pass; only forward does",
    "pack_padded_sequence": "nothing is packed: give lengths= to the layer and to the loss",
    "TimeDistributed": "a layer acts on every timestep as it is",
    "ModuleList": "set a list of layers as an attribute of a gpurnn.Module", "nn": "the layers are in gpurnn itself",
    "tensor": "give arrays of NumPy or CuPy", "Tensor": "give arrays of NumPy or CuPy",
}  # fmt: skip


if not TYPE_CHECKING:  # which would take any name for an attribute

    def __getattr__(name):
        near = get_close_matches(name.casefold(), known := {one.casefold(): one for one in __all__}, 1)
        hint = _HINTS.get(name) or (f"did you mean {known[near[0]]}?" if near else "")
        if name.endswith("Loss"):
            hint = "losses are functions, such as gpurnn.cross_entropy(logits, targets) and gpurnn.mse(output, target)"
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}{hint and f'; {hint}'}")


__version__ = "0.1.0"

__all__ = [
    # recurrent layers, and single steps of them
    "LSTM", "GRU", "RNN", "LSTMCell", "GRUCell", "RNNCell",
    # a cell of one's own, and the layer of any cell
    "cell", "Recurrent",
    # other layers, and the base of all
    "Module", "Sequential", "Linear", "Embedding", "TiedLinear", "Dropout", "LayerNorm", "BatchNorm", "Pooling",
    # encoder-decoder
    "Attention", "EncoderDecoder", "greedy_search", "beam_search",
    # losses
    "cross_entropy", "nll_loss", "binary_cross_entropy_with_logits", "kl_div",
    "mse", "mae", "huber", "smooth_l1", "quantile_loss",
    # CTC: labels without a place in time
    "ctc_loss", "ctc_greedy", "ctc_beam_search",
    # metrics
    "accuracy", "perplexity", "bits_per_character", "edit_distance", "error_rate",
    # optimizers, gradient clipping, loss scaling
    "SGD", "RMSprop", "Adam", "AdamW", "clip_grad_norm", "clip_grad_value", "LossScaler",
    # learning-rate schedules
    "ConstantSchedule", "StepSchedule", "CosineSchedule", "PlateauSchedule", "WarmupSchedule",
    # training and validation
    "fit", "evaluate", "History", "TrainingError",
    # batches
    "Batch", "TextBatches", "SequenceBatches",
    # the gradient at every timestep
    "record_gradient_flow", "GradientFlow",
    # the gradients of each sequence
    "per_sample_gradients", "PerSampleGradients",
    # Hessian-vector products, derivatives along a direction
    "hvp", "jvp",
    # files of models, of weights, and checkpoints
    "save", "load", "save_weights", "load_weights", "save_checkpoint", "load_checkpoint", "CheckpointError",
    # the backend switch
    "use_backend", "get_backend", "backends", "empty_cache",
    # errors
    "ShapeError", "DtypeError", "BackendError",
]  # fmt: skip
