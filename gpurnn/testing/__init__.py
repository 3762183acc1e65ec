"""Checks for layers of your own, the ones that ``gpurnn check`` and this library's tests use.

``check_gradients`` compares gradients with finite differences, ``check_parity`` a backend or a dtype with float64 on
NumPy, ``check_repeat`` the bits of two runs, ``check_ragged`` a ragged batch with its sequences one by one. Each
raises AssertionError with the array, its error and what is allowed, and returns the largest error as a share of what
is allowed: 1 or less.

A layer is a ``Module``, or any function that works as ``forward`` does: it takes arrays, and returns its outputs and
a function ``backward``, which takes the gradient with respect to each output and returns the gradient with respect to
each input. Inputs and outputs may be nested in tuples, as the state of an LSTM is. Inputs that are ``None`` or hold no
floating-point numbers (ids, lengths) have no gradient.

What is allowed follows from the size of one rounding, ``EPSILON`` of the dtype, from the number of terms in a sum, and
from the size of the numbers. Nothing is a tolerance that happened to be large enough.
"""

# The four checks are public. The rest is for `gpurnn check` and for this library's own tests.
from .allowed import allowed_rounding, count_terms, equal_bits, nan_is_worst, worst_error
from .call import results
from .checks import check_gradient, check_gradients, check_parity, check_ragged, check_repeat
from .differences import gradient_error
from .nested import draw_like, leaves, map_leaves, named_leaves
from .ragged import ragged_error

__all__ = ["check_gradient", "check_gradients", "check_parity", "check_ragged", "check_repeat"]
