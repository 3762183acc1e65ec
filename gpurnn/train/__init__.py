"""Training: ``fit``, ``find_lr``, ``measure`` and ``evaluate``, and files of weights."""

from .find_lr import LrCurve, find_lr
from .fit import fit
from .history import History, StopTraining, Terminated, TrainingError
from .measure import evaluate, measure
from .weights import load_weights, save_weights

__all__ = [
    # training, and its record
    "fit", "History", "TrainingError", "Terminated", "StopTraining",
    # the learning rate
    "find_lr", "LrCurve",
    # how good a model is
    "evaluate", "measure",
    # files of weights
    "save_weights", "load_weights",
]  # fmt: skip
