"""Arrays in nested tuples, such as the state of an LSTM."""

import numpy as np


def leaves(nested):
    """The arrays of a state, an input or an output, however it is nested; None holds none."""
    if isinstance(nested, (tuple, list)):
        return [leaf for part in nested for leaf in leaves(part)]
    return [] if nested is None else [nested]


def map_leaves(function, nested, *others):
    """``nested`` with ``function`` of each array, and of the arrays in the same places of ``others``."""
    if isinstance(nested, tuple):
        return tuple(map_leaves(function, *parts) for parts in zip(nested, *others, strict=True))
    return None if nested is None else function(nested, *others)


def draw_like(nested, rng):
    """Standard normal float64 numbers in the structure and the shapes of ``nested``."""
    return map_leaves(lambda array: rng.standard_normal(np.shape(array)), nested)


def named_leaves(name, nested):
    """Name -> array. One array gets the name alone, the arrays of a tuple get the name and a number: "state 0"."""
    if isinstance(nested, tuple):
        return {f"{name} {k}": leaf for k, leaf in enumerate(leaves(nested))}
    return {} if nested is None else {name: nested}


def is_floating(array):
    # ml_dtypes' bfloat16 has kind V
    return hasattr(array, "dtype") and (array.dtype.kind == "f" or array.dtype.name == "bfloat16")
