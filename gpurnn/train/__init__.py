"""Training: ``fit``, ``measure`` and ``evaluate``, and files of weights."""

from .fit import fit
from .history import History, StopTraining, Terminated, TrainingError
from .measure import evaluate, measure
from .weights import load_weights, save_weights

__all__ = [
    # training, and its record
    "fit", "History", "TrainingError", "Terminated", "StopTraining",
    # how good a model is
    "evaluate", "measure",
    # files of weights
    "save_weights", "load_weights",
]  # fmt: skip
