"""Losses over all timesteps at once, each returned with its own backward.

>>> logits, targets = np.zeros((3, 2, 4)), np.zeros((3, 2), int)               # (T, B, V), (T, B)
>>> loss, backward = cross_entropy(logits, targets, lengths=[3, 1])
>>> backward().shape                                                           # the gradient with respect to logits
(3, 2, 4)

What every loss here has in common:

- It returns ``(loss, backward)``. ``loss`` is a scalar of the first argument's dtype, or an array with
  ``reduction="none"``. ``backward(dloss=1.0)`` returns the gradient with respect to the first argument, a fresh array
  of its shape and dtype. ``dloss`` is a number, or with ``"none"`` a number or an array of the loss's shape.
  ``backward`` may be called again.
- ``backward`` recomputes results of the forward pass instead of saving them, so the gradient is the only large array
  that a loss ever makes (a saved softmax would be a second one). The arguments are saved by reference: do not change
  them in place before ``backward``.
- ``mask``: booleans, True where a place counts. Its shape is the leading axes of the array, usually (T, B).
  ``lengths``: integers (B,); step t of sequence b counts where t < lengths[b]. The array is then (T, B, ...), or
  (B, T, ...) with ``batch_first=True``. With both, a place counts where both say so.
- Places that do not count are left out of every sum. NaN, infinities and targets out of range there change nothing,
  and the gradient there is exactly zero.
- ``reduction``: ``"mean"`` over the elements that count, ``"sum"``, or ``"none"``: one loss for each element, zero
  where it does not count. Sums are accumulated in float64. If nothing counts, or the batch is empty, the mean is 0
  with zero gradients (PyTorch: nan).
- ``weight``, of losses whose targets are classes: a number for each class, at least 0, by which the losses of its
  targets are multiplied. The mean is then the sum divided by the weights of the targets that count, as in PyTorch; if
  these add up to 0, it is 0.
- dtypes are float32, float64, float16 and bfloat16. The 16-bit ones are computed in float32, and so is their loss.
  Arrays live where the first argument lives; others are copied to it from the host.
- Each raises ShapeError, DtypeError, BackendError or ValueError, naming the argument, before anything is computed. A
  loss that overflows is inf or nan, without a warning, as on a GPU.
"""

from .classes import cross_entropy, nll_loss
from .common import REDUCTIONS, class_rows, floats, loss_ops, quiet, upstream
from .divergence import kl_div
from .elementwise import binary_cross_entropy_with_logits, huber, mae, mse, smooth_l1
from .quantile import quantile_loss

__all__ = [
    # of targets that are classes
    "cross_entropy", "nll_loss",
    # of targets that are numbers
    "mse", "mae", "huber", "smooth_l1", "quantile_loss",
    # of targets that are probabilities
    "binary_cross_entropy_with_logits", "kl_div",
    # for other losses and metrics
    "REDUCTIONS", "class_rows", "floats", "loss_ops", "quiet", "upstream",
]  # fmt: skip
