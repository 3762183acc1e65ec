"""What the estimators take as X and y: checked, and made into one array for each sequence."""

from __future__ import annotations

from typing import Any

import numpy as np
from sklearn.utils.validation import check_array, validate_data

from ..._typing import Array
from ...arrays import refuse_masked
from ...errors import described


def read_sequences(estimator: Any, X: Any, *, reset: bool) -> list[Array]:
    """X as a list of float64 arrays (T_n, I).

    X is a table (N, T), one number for each timestep; or sequences: an array (N, T, I), or a list of arrays (T_n, I) or
    (T_n,), or of lists of numbers that are not all as long. reset: whether this is the X of ``fit``, which sets
    ``n_features_in_`` and, for a table with named columns, ``feature_names_in_``; otherwise X has to be as that was.
    Raises ValueError or TypeError.
    """
    if isinstance(X, (list, tuple)) and not len(X):
        raise ValueError("X: expected at least one sequence, got an empty list: 0 sample(s)")
    if not is_sequences(X):
        same = reset or estimator._is_table
        table = validate_data(estimator, X, reset=reset, dtype=np.float64) if same else check_array(X, dtype=np.float64)
        found = list(table[:, :, None])
    else:
        found = _checked(X)
    if reset:
        estimator._is_table = not is_sequences(X)
        estimator._input_size = found[0].shape[1]
        if not estimator._is_table:
            estimator.n_features_in_ = estimator._input_size
            if hasattr(estimator, "feature_names_in_"):
                del estimator.feature_names_in_
    elif found[0].shape[1] != estimator._input_size:
        raise ValueError(
            f"X has {found[0].shape[1]} features at each timestep, but {type(estimator).__name__} is expecting "
            f"{estimator._input_size}, as the X of fit had"
        )
    return found


def is_sequences(X: Any) -> bool:
    """Whether X, or y, is a list of arrays, a ragged list of lists, or an array of three axes; not (N,) or (N, T)."""
    if hasattr(X, "shape"):
        return len(X.shape) == 3 or (len(X.shape) == 1 and X.dtype == object and _holds_arrays(X))
    return isinstance(X, (list, tuple)) and _holds_arrays(X)


def _holds_arrays(X):
    if not len(X):
        return False
    first = X[0]
    if isinstance(first, (list, tuple)):  # a row of a table, or timesteps
        if any(_length(x) != len(first) for x in X):
            return True
        return bool(first) and isinstance(first[0], (list, tuple, np.ndarray))
    return getattr(first, "ndim", 0) in (1, 2)


def _length(x):
    return len(x) if isinstance(x, (list, tuple)) or getattr(x, "ndim", 0) else None


def _checked(X):
    if not len(X):
        raise ValueError("X: found array with 0 sample(s) while a minimum of 1 is required")
    found = []
    for n, x in enumerate(X):
        name = f"X[{n}]"
        refuse_masked(name, x)
        try:
            x = np.asarray(x)
        except ValueError as error:
            raise ValueError(f"{name}: expected an array (T, I) or (T,), got {described(x)}") from error
        if x.dtype == object or x.dtype.kind not in "iufb":
            raise TypeError(f"{name}: expected numbers, got {x.dtype}")
        x = x.astype(np.float64)
        x = x[:, None] if x.ndim == 1 else x
        if x.ndim != 2 or not x.shape[1]:
            raise ValueError(f"{name}: expected an array (T, I) or (T,), got shape {x.shape}")
        if not len(x):
            raise ValueError(f"{name}: expected at least one timestep, got none")
        if found and x.shape[1] != found[0].shape[1]:
            raise ValueError(f"{name}: expected {found[0].shape[1]} features, as X[0] has, got {x.shape[1]}")
        if not np.isfinite(x).all():
            t, k = np.argwhere(~np.isfinite(x))[0]
            kind = "NaN" if np.isnan(x[t, k]) else "infinity"
            raise ValueError(f"{name}: feature {k} of timestep {t} is {kind}: fill it, or leave the sequence out")
        found.append(x)
    return found


def read_steps(y: Any, sequences: list[Array]) -> list[Array]:
    """y as an array for each sequence, one entry for each of its timesteps. Raises ValueError where they do not fit."""
    check_count(y, sequences)
    found = []
    for n, (steps, x) in enumerate(zip(y, sequences, strict=True)):
        steps = np.asarray(steps)
        if not steps.ndim or len(steps) != len(x):
            got = f"{len(steps)}" if steps.ndim else "one value"
            raise ValueError(f"y[{n}]: expected a value for each of the {len(x)} timesteps of X[{n}], got {got}")
        found.append(steps)
    return found


def check_count(y: Any, sequences: list[Array]) -> None:
    """Raise ValueError unless y has as many entries as there are sequences."""
    if len(y) != len(sequences):
        raise ValueError(
            f"Found input variables with inconsistent numbers of samples: X has {len(sequences)}, y has {len(y)}"
        )


def mean_and_scale(numbers: Array) -> tuple[Array, Array]:
    """The mean and the deviation of each column of (N, K) numbers; the deviation is 1 for a column of equal numbers."""
    power = np.frexp(np.abs(numbers).max(axis=0))[1]
    small = np.ldexp(numbers, -power)  # at most 1, so that no square overflows; a power of two rounds nothing
    mean, deviation = small.mean(axis=0), small.std(axis=0)
    scale = np.maximum(np.ldexp(deviation, power), np.finfo(np.float64).smallest_subnormal)
    scale = np.where(deviation > 1e-12 * np.abs(mean), scale, 1.0)
    return np.ldexp(np.clip(mean, small.min(axis=0), small.max(axis=0)), power), scale


def standardized(name: str, numbers: Array, mean: Array, scale: Array, dtype: np.dtype) -> Array:
    """(numbers - mean) / scale. Raises ValueError where that is too large for the dtype."""
    share, power = np.frexp(scale)
    with np.errstate(over="ignore", invalid="ignore"):
        found = ((np.ldexp(numbers, -power) - np.ldexp(mean, -power)) / share).astype(dtype)
    finite = np.isfinite(found.astype(np.float64))
    if not finite.all():
        row, column = np.argwhere(~finite)[0]
        raise ValueError(
            f"{name}: {numbers[row, column]:g} (row {row}, column {column}) is too far from the data of fit, whose "
            f"mean is {mean[column]:g} and deviation {scale[column]:g}, for {np.dtype(dtype).name}: leave it out"
        )
    return found


def restored(numbers: Array, mean: Array, scale: Array) -> Array:
    """numbers * scale + mean, where ``standardized`` began."""
    share, power = np.frexp(scale)
    return np.ldexp(numbers * share + np.ldexp(mean, -power), power)
