"""Connectionist temporal classification: a loss for labels whose place in time is not known, and its decoders.

>>> logits, targets = np.zeros((5, 2, 4)), [[1, 2], [3]]                         # (T, B, V), B label sequences
>>> logits[np.arange(5), :, [1, 0, 2, 2, 3]] = 1                                # the likeliest class of each step
>>> loss, backward = ctc_loss(logits, targets, lengths=[5, 3])
>>> ctc_greedy(logits, lengths=[5, 3])                                          # B lists of labels
[[1, 2, 3], [1, 2]]

Graves, Fernandez, Gomez, Schmidhuber, "Connectionist temporal classification: labelling unsegmented sequence data with
recurrent neural networks", ICML 2006. At every timestep the model names one of V classes, one of which is the blank. A
path is one class for each timestep. It stands for the labels that remain when repeats are merged and the blanks are
then removed: ``a a - a b b`` stands for ``a a b``. The probability of a label sequence is the sum over all paths that
stand for it. It is computed in the log domain, and in float64 whatever the logits' dtype: the log-probability of a path
is hundreds of nats, which leaves float32 four digits after the decimal point.
"""

from __future__ import annotations

import functools

import numpy as np

from ._typing import Array, Backward, Lengths
from .arrays import host_array
from .errors import DtypeError, ShapeError, check_choice, check_flag, check_shape, check_size
from .losses import REDUCTIONS, floats, loss_ops, quiet, upstream
from .masks import check_lengths, refuse_no_distribution, valid_steps


def ctc_loss(
    logits: Array,
    targets: Array,
    *,
    lengths: Lengths = None,
    target_lengths: Lengths = None,
    blank: int = 0,
    reduction: str = "mean",
    zero_infinity: bool = False,
    batch_first: bool = False,
) -> tuple[Array, Backward]:
    """Negative log-probability in nats of the target labels, summed over all their alignments.

    Equal to ``torch.nn.functional.ctc_loss`` of the log-softmax. A target that does not fit into its timesteps has the
    loss inf and a zero gradient (PyTorch: nan): each label takes one step, and one more between two equal ones.

    Parameters
    ----------
    logits : Array
        (T, B, V), or (B, T, V) with ``batch_first``. The log-softmax is part of the loss.
    targets : Array
        Classes other than ``blank``: a list of B sequences of integers; or integers (B, S), padded with anything; or
        integers (N,), the labels of all sequences one after another.
    lengths : Lengths
        (B,) integers: the valid timesteps of each sequence.
    target_lengths : Lengths
        (B,) integers, for the last two forms of targets; (B, S) without it has S labels everywhere.
    reduction : str
        "none": one loss for each sequence, (B,). "sum". "mean" as in PyTorch: each loss is divided by the number of its
        labels (at least 1), and these are averaged over the batch.
    zero_infinity : bool
        Whether a target that does not fit has the loss 0 instead of inf.

    Returns
    -------
    loss, backward
        As ``gpurnn.losses`` says. ``backward`` also holds a float64 array (T, B, 2 S + 1).

    Raises
    ------
    ShapeError, DtypeError, ValueError
        An argument does not fit, or a label is no class or the blank.

    Examples
    --------
    >>> loss, backward = ctc_loss(np.zeros((2, 1, 3)), [[1]])                   # 3 of 9 paths: 1 1, 1 -, - 1
    >>> float(loss)                                                             # log 3
    1.0986122886681098
    """
    check_choice("reduction", reduction, REDUCTIONS)
    check_flag("zero_infinity", zero_infinity)
    ops, given, logits, lengths, blank = _check_logits(logits, lengths, blank, batch_first)
    padded, counts = _pad_targets(targets, target_lengths, *logits.shape[1:], blank)
    paths = _Paths(ops.xp, logits, lengths, padded, counts, blank)
    return _path_loss(ops, paths, counts, reduction, zero_infinity, given, batch_first)


def _path_loss(ops, paths, counts, reduction, zero_infinity, given, batch_first):
    """``ctc_loss`` of all paths of the targets; given, batch_first: dtype and order of the caller's logits."""
    xp, B = ops.xp, len(counts)
    losses = xp.where(paths.possible, 0.0 - paths.likelihood, 0.0 if zero_infinity else np.inf)
    weights = xp.asarray(1 / (np.maximum(counts, 1) * max(B, 1)) if reduction == "mean" else np.ones(B))
    loss = (losses if reduction == "none" else (losses * weights).sum()).astype(paths.logits.dtype)

    def backward(dloss=1.0):
        dlosses = upstream(dloss, loss.shape, (B,), 1, np.float64, ops) * weights
        return _time_major(paths.gradient(dlosses).astype(given, copy=False), batch_first)

    return loss, backward


class _Paths:
    """The paths of each target through its states, from left to right: blank, label, blank, ..., label, blank.

    logits: (T, B, V). valid: (T, B), the steps that count. states: (B, 2 S + 1), the class of each.
    skips, end: (B, 2 S + 1), 0 where a path may come from two states to the left, and where it may end; else -inf.
    logs, before: float64 (T, B, 2 S + 1), the log-probability of each state's class, and the forward variables.
    likelihood: (B,), the log-probability of each target. possible: (B,), whether it fits into its timesteps.
    """

    def __init__(self, xp, logits, lengths, padded, counts, blank):
        T, B, _ = logits.shape
        self.xp, self.logits, self.blank = xp, logits, blank
        self.valid = valid = valid_steps(lengths, T, B, xp)
        states = np.full((B, 2 * padded.shape[1] + 1), blank)
        states[:, 1::2] = padded
        skips = np.full(states.shape, -np.inf)
        skips[:, 3::2] = np.where(padded[:, 1:] != padded[:, :-1], 0.0, -np.inf)  # from one label to a different one
        start, end = np.full((2, *states.shape), -np.inf)
        start[:, 0] = end[np.arange(B), 2 * counts] = (
            0  # a path moves on from there to a blank or to the label beside it
        )
        self.states, self.skips, start, self.end = (xp.asarray(array) for array in (states, skips, start, end))
        with quiet():
            self.highest = xp.where(valid, logits.max(axis=2), 0)[:, :, None]
            shifted = xp.where(valid[:, :, None], logits - self.highest, 0)
            self.total = xp.exp(shifted).sum(axis=2, keepdims=True, dtype=np.float64)
            logs = xp.take_along_axis(logits, xp.broadcast_to(self.states, (T, *states.shape)), axis=2)
            self.logs = logs - self.highest - xp.log(self.total)
            self.before, last = _log_sums(xp, self.logs, self.skips, start, valid)
            rows, n = xp.arange(B), xp.asarray(2 * counts)
            self.likelihood = _log_sum(xp, last[rows, n], xp.where(n > 0, last[rows, n - 1], -np.inf))
        self.possible = self.likelihood != -np.inf

    def gradient(self, dlosses):
        """The gradient with respect to logits, (T, B, V), from that with respect to each sequence's loss, (B,)."""
        xp, dtype = self.xp, self.logits.dtype
        counted = self.valid & self.possible
        mirrored = xp.zeros(self.skips.shape) - np.inf
        mirrored[:, 2:] = self.skips[:, :1:-1]
        with quiet():
            after, _ = _log_sums(xp, self.logs[::-1, :, ::-1], mirrored, self.end[:, ::-1], self.valid[::-1])
            after = after[::-1, :, ::-1]
            # the probability that a path of the target is in this state at this step (Graves 2006, equation 14)
            likelihood = xp.where(self.possible, self.likelihood, 0)[:, None]
            occupancy = xp.exp(self.before + self.logs + after - likelihood)
            dlogits = xp.exp(self.logits - self.highest - xp.log(self.total).astype(dtype))
            _subtract_occupancy(xp, dlogits, occupancy, self.states, self.blank)
            dlogits *= dlosses.astype(dtype)[:, None]
            return xp.where(counted[:, :, None], dlogits, 0)


def _log_sums(xp, logs, skips, start, valid):
    """The forward variables; with time and states in reverse, the backward variables.

    logs: (T, B, N), the log-probability of what each state emits. skips: (B, N), 0 or -inf. start: (B, N), where paths
    may start. valid: (T, B).
    Returns (T, B, N): over all paths that reach a state at step t, the log-probability of what they emitted before t;
    and (B, N): of all paths that are in a state after the sequence's last step.
    """
    reached = xp.empty(logs.shape)
    padded = xp.zeros((start.shape[0], start.shape[1] + 2)) - np.inf  # with two states on the left that no path is in
    now = padded[:, 2:]
    now[...] = start
    for t in range(len(logs)):
        reached[t] = _log_sum(xp, now, padded[:, 1:-1], padded[:, :-2] + skips)
        now[...] = xp.where(valid[t][:, None], reached[t] + logs[t], now)
    return reached, now


def _log_sum(xp, *terms):
    """log(sum(exp(terms))); -inf where all of them are, without inf - inf."""
    highest = functools.reduce(xp.maximum, terms)
    highest = xp.where(highest == -np.inf, 0, highest)
    return highest + xp.log(sum(xp.exp(term - highest) for term in terms))


def _subtract_occupancy(xp, dlogits, occupancy, states, blank):
    """``dlogits[t, b, states[b, n]] -= occupancy[t, b, n]`` for every n, in a fixed order.

    Several states may have the same class.
    """
    labels = states[:, 1::2]
    B, S = labels.shape
    if S:
        same = labels[:, :, None] == labels[:, None, :]
        sums = xp.matmul(occupancy[:, :, 1::2].transpose(1, 0, 2), same.astype(occupancy.dtype)).transpose(1, 0, 2)
        # all equal labels take the sum computed for the first of them, so that they write the same bits
        sums = xp.take_along_axis(sums, xp.broadcast_to(same.argmax(axis=2), sums.shape), axis=2)
        dlogits[:, xp.arange(B)[:, None], labels] -= sums.astype(dlogits.dtype)
    dlogits[:, :, blank] -= occupancy[:, :, 0::2].sum(axis=2).astype(dlogits.dtype)


# ---- decoding


def ctc_greedy(logits: Array, *, lengths: Lengths = None, blank: int = 0, batch_first: bool = False) -> list[list[int]]:
    """The labels of the likeliest path of each sequence.

    Parameters
    ----------
    logits : Array
        Logits or log-probabilities, (T, B, V), or (B, T, V) with ``batch_first``.
    lengths : Lengths
        (B,) integers: the valid timesteps of each sequence.
    blank : int
        The class of the blank.

    Returns
    -------
    list of list of int
        The labels of each of the B sequences.

    Raises
    ------
    ShapeError, DtypeError, ValueError
        An argument does not fit; as DivergedError, if logits of a valid timestep are NaN or infinite.

    Examples
    --------
    >>> logits = np.eye(3)[[1, 1, 0, 1, 2]][:, None]       # the likeliest classes are 1 1 - 1 2
    >>> ctc_greedy(logits)
    [[1, 1, 2]]
    """
    ops, _, logits, lengths, blank = _check_logits(logits, lengths, blank, batch_first)
    _refuse_no_path(ops, logits, lengths)
    path = ops.to_numpy(logits.argmax(axis=2))
    new = np.ones(path.shape, bool)
    new[1:] = path[1:] != path[:-1]
    is_label = new & (path != blank)
    return [path[:length, b][is_label[:length, b]].tolist() for b, length in enumerate(lengths)]


def ctc_beam_search(
    logits: Array, beam: int = 16, *, lengths: Lengths = None, blank: int = 0, batch_first: bool = False
) -> list[list[tuple[list[int], float]]]:
    """The likeliest label sequences, each with its log-probability summed over the paths that were followed.

    This is prefix beam search without a language model: Hannun, Maas, Jurafsky, Ng, "First-pass large vocabulary
    continuous speech recognition using bi-directional recurrent DNNs", 2014, algorithm 1. It is exact if there are at
    least as many beams as label sequences.

    Parameters
    ----------
    logits, lengths, blank, batch_first
        As in ``ctc_greedy``.
    beam : int
        How many label sequences are followed at a time.

    Returns
    -------
    list of list of (labels, log-probability)
        For each of the B sequences up to ``beam`` pairs, the likeliest first.

    Raises
    ------
    ShapeError, DtypeError, ValueError
        As in ``ctc_greedy``.

    Examples
    --------
    >>> [[(labels, score), *others]] = ctc_beam_search(np.zeros((2, 1, 3)))
    >>> labels, round(score, 4)                             # log(3 / 9): the paths 1 1, 1 - and - 1
    ([1], -1.0986)
    """
    beam = check_size("beam", beam)
    ops, _, logits, lengths, blank = _check_logits(logits, lengths, blank, batch_first)
    _refuse_no_path(ops, logits, lengths)
    logits = ops.to_numpy(logits).astype(np.float64)
    with quiet():
        logits -= logits.max(axis=2, keepdims=True)
        logits -= np.log(np.exp(logits).sum(axis=2, keepdims=True))
        return [_beam_search(logits[:length, b], beam, blank) for b, length in enumerate(lengths)]


def _refuse_no_path(ops, logits, lengths):
    """Raise DivergedError where logits (T, B, V) of a valid timestep are NaN or infinite."""
    highest = ops.to_numpy(logits.max(axis=2))
    refuse_no_distribution(highest[valid_steps(lengths, *highest.shape)])


def _beam_search(logs, beam, blank):
    """Log-probabilities (T, V) -> up to ``beam`` pairs (labels, log-probability)."""
    V = logs.shape[1]
    prefixes, ended, open_ = (
        [()],
        np.zeros(1),
        np.full(1, -np.inf),
    )  # log-probabilities: the path ends with a blank, or not
    for step in logs:
        last = np.array([prefix[-1] if prefix else blank for prefix in prefixes])
        whole = np.logaddexp(ended, open_)
        longer = whole[:, None] + step  # (prefixes, V): one more label
        rows = np.arange(len(prefixes))
        longer[rows, last] = ended + step[last]  # the same label again needs a blank in between
        longer[:, blank] = -np.inf
        ended, open_ = whole + step[blank], open_ + step[last]  # open_ of the empty prefix is -inf and stays so
        row_of = {prefix: row for row, prefix in enumerate(prefixes)}
        for row, prefix in enumerate(prefixes):  # where a prefix grows into one that is already followed
            if prefix and (parent := row_of.get(prefix[:-1])) is not None:
                open_[row] = np.logaddexp(open_[row], longer[parent, prefix[-1]])
                longer[parent, prefix[-1]] = -np.inf
        scores = np.concatenate([np.logaddexp(ended, open_), longer.reshape(-1)])
        best = np.argsort(-scores, kind="stable")[:beam]
        best = best[~np.isneginf(scores[best])]
        stay, grow = best[best < len(rows)], best[best >= len(rows)] - len(rows)
        grown = [(*prefixes[n // V], int(n % V)) for n in grow]
        prefixes = [prefixes[n] for n in stay] + grown
        ended = np.concatenate([ended[stay], np.full(len(grow), -np.inf)])
        open_ = np.concatenate([open_[stay], longer.reshape(-1)[grow]])
    scores = np.logaddexp(ended, open_)
    return [(list(prefixes[n]), float(scores[n])) for n in np.argsort(-scores, kind="stable")]


# ---- arguments


def _time_major(array, batch_first):
    return array.swapaxes(0, 1) if batch_first else array


def _check_logits(logits, lengths, blank, batch_first):
    """(ops, the caller's dtype, time-major logits in the compute dtype, lengths on the host, blank)."""
    check_flag("batch_first", batch_first)
    ops = loss_ops("logits", logits)
    given = ops.asarray(logits, "logits").dtype
    logits = floats(logits, "logits", ops)
    check_shape("logits", logits, ("B", "T", "V") if batch_first else ("T", "B", "V"))
    logits = _time_major(logits, batch_first)
    T, B, V = logits.shape
    if check_size("blank", blank, 0) >= V:
        raise ValueError(f"blank: expected a class from 0 to {V - 1} (logits have V = {V}), got {blank}")
    return (
        ops,
        given,
        logits,
        np.full(B, T) if lengths is None else check_lengths(lengths, T, B, batch_first=batch_first),
        int(blank),
    )


def _pad_targets(targets, target_lengths, B, V, blank):
    """Targets in any of their three forms as int64 (B, S), with ``blank`` after the labels, and label counts (B,).

    Raises ShapeError, DtypeError, and ValueError for labels that are no class or the blank.
    """
    if isinstance(targets, (list, tuple)) and target_lengths is None:
        rows = [host_array(row, "targets") for row in targets]
    else:
        rows = _target_rows(host_array(targets, "targets"), target_lengths, B)
    if len(rows) != B:
        raise ShapeError(f"targets: expected {B} sequences, as logits have, got {len(rows)}")
    counts = np.array([row.size for row in rows], np.int64)
    padded = np.full((B, counts.max(initial=0)), blank)
    for b, row in enumerate(rows):
        if row.ndim != 1:
            raise ShapeError(f"targets[{b}]: expected shape (S,), got {row.shape}")
        if row.size and row.dtype.kind not in "iu":
            raise DtypeError(f"targets: expected integers (class numbers), got {row.dtype}")
        wrong = row[(row < 0) | (row >= V) | (row == blank)]
        if wrong.size:
            raise ValueError(
                f"targets[{b}]: expected classes from 0 to {V - 1} (logits have V = {V}) other than the blank {blank}, "
                f"got {wrong[0]}"
            )
        padded[b, : row.size] = row
    return padded, counts


def _target_rows(array, target_lengths, B):
    """The labels of each sequence, from an array (B, S) or (N,) of all labels."""
    if array.ndim == 2:
        counts = np.full(len(array), array.shape[1]) if target_lengths is None else target_lengths
        counts = check_lengths(counts, array.shape[1], len(array), "target_lengths")
        return [row[:count] for row, count in zip(array, counts, strict=True)]
    if array.ndim == 1 and target_lengths is not None:
        counts = check_lengths(target_lengths, len(array), B, "target_lengths")
        if counts.sum() != len(array):
            raise ShapeError(
                f"target_lengths: expected a sum of {len(array)}, the number of labels, got {counts.sum()}"
            )
        return np.split(array, np.cumsum(counts)[:-1]) if B else []
    raise ShapeError(
        "targets: expected a list of B sequences, (B, S), or (N,) with target_lengths, got shape "
        f"{array.shape}{'' if target_lengths is None else ' with target_lengths'}"
    )
