"""Optimizers on a model's flat buffers, gradient clipping, learning-rate schedules.

An update is one compiled pass, or in array code a handful of in-place operations, over ``model.flat_params`` and
``model.flat_grads``, however many layers the model has. Updates, names and defaults are ``torch.optim``'s.

>>> model = gpurnn.Linear(2, 1)
>>> optimizer = gpurnn.Adam(model, lr=1e-3)
>>> schedule = gpurnn.WarmupSchedule(optimizer, 5, after=gpurnn.CosineSchedule(optimizer, total=100))
>>> for epoch in range(105):
...     for x in [np.ones((4, 2), "float32")]:      # an epoch of one batch
...         model.zero_grad()
...         output, backward = model.forward(x)
...         _ = backward(output)
...         norm = gpurnn.clip_grad_norm(model, 1.0)
...         optimizer.step()
...     schedule.step()
>>> optimizer.lr
0.0
"""

from .base import Optimizer
from .clip import clip_grad_norm, clip_grad_value
from .lr_schedules import (
    ConstantSchedule,
    CosineSchedule,
    PlateauSchedule,
    Schedule,
    StepSchedule,
    WarmupSchedule,
)
from .optimizers import SGD, Adam, AdamW, RMSprop
from .state import is_square

__all__ = [
    # the base class, and the optimizers
    "Optimizer", "SGD", "RMSprop", "Adam", "AdamW",
    # gradient clipping
    "clip_grad_norm", "clip_grad_value",
    # learning-rate schedules
    "Schedule", "ConstantSchedule", "StepSchedule", "CosineSchedule", "PlateauSchedule", "WarmupSchedule",
    # for checkpoints
    "is_square",
]  # fmt: skip
