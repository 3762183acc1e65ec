"""Connectionist temporal classification: a loss for labels whose place in time is not known, and its decoders.

>>> logits, targets = np.zeros((5, 2, 4)), [[1, 2], [3]]                         # (T, B, V), B label sequences
>>> logits[np.arange(5), :, [1, 0, 2, 2, 3]] = 1                                # the likeliest class of each step
>>> loss, backward = ctc_loss(logits, targets, lengths=[5, 3])
>>> ctc_greedy(logits, lengths=[5, 3])                                          # B lists of labels
[[1, 2, 3], [1, 2]]

Graves, Fernandez, Gomez, Schmidhuber, "Connectionist temporal classification: labelling unsegmented sequence data with
recurrent neural networks", ICML 2006. At every timestep the model names one of V classes, one of which is the blank. A
path, one class for each timestep, stands for the labels that are left when repeats are merged and the blanks are then
taken out: ``a a - a b b`` stands for ``a a b``. The probability of a label sequence is the sum over all paths that
stand for it. It is computed in the log domain, and in float64 whatever the logits' dtype: the log-probability of a path
is hundreds of nats, of which float32 keeps four digits behind the point.
"""

import functools

import numpy as np

from .arrays import host_array
from .backends import array_ops
from .errors import DtypeError, ShapeError, check_choice, check_flag, check_shape, check_size
from .losses import REDUCTIONS, floats, quiet, upstream
from .masks import check_lengths, refuse_no_distribution, valid_steps


def ctc_loss(
    logits,
    targets,
    *,
    lengths=None,
    target_lengths=None,
    blank=0,
    reduction="mean",
    zero_infinity=False,
    batch_first=False,
):
    """Negative log-probability in nats of the target labels, summed over all their alignments.

    logits: (T, B, V), or (B, T, V) with ``batch_first``; the log-softmax is inside. lengths: (B,), valid timesteps.
    targets: a list of B sequences of integers; or integers (B, S), padded with anything; or integers (N,), all targets
    one behind the other. target_lengths: (B,), for the last two; (B, S) without it has S labels everywhere. Labels are
    classes other than ``blank``.
    reduction: ``"none"``: one loss for each sequence, (B,); ``"sum"``; ``"mean"`` as in PyTorch: each loss is divided
    by the number of its labels (at least 1), and these are averaged over the batch.

    A target that does not fit into its timesteps (each label takes one, and one more between two equal ones) has the
    loss inf, or 0 with ``zero_infinity``. Its gradient is zero in both cases (PyTorch: nan in the first).

    Returns ``(loss, backward)`` and raises as losses.py says; ``backward`` also keeps a float64 (T, B, 2 S + 1).
    Equal to ``torch.nn.functional.ctc_loss`` of the log-softmax.

    >>> loss, backward = ctc_loss(np.zeros((2, 1, 3)), [[1]])                   # 3 of 9 paths: 1 1, 1 -, - 1
    >>> float(loss)                                                             # log 3
    1.0986122886681098
    """
    check_choice("reduction", reduction, REDUCTIONS)
    check_flag("zero_infinity", zero_infinity)
    ops, given, logits, lengths, blank = _check_logits(logits, lengths, blank, batch_first)
    xp, dtype = ops.xp, logits.dtype
    T, B, V = logits.shape
    padded, counts = _pad_targets(targets, target_lengths, B, V, blank)

    # the states that a path goes through from left to right: blank, label, blank, ..., label, blank
    states = np.full((B, 2 * padded.shape[1] + 1), blank)
    states[:, 1::2] = padded
    skips = np.full(states.shape, -np.inf)  # 0 where a path may come from two states to the left:
    skips[:, 3::2] = np.where(padded[:, 1:] != padded[:, :-1], 0.0, -np.inf)  # from one label to a different one
    start, end = np.full((2, *states.shape), -np.inf)
    start[:, 0] = end[np.arange(B), 2 * counts] = 0  # from both a path gets to a blank or to the label beside it
    states, skips, start, end = (xp.asarray(array) for array in (states, skips, start, end))
    valid = valid_steps(lengths, T, B, xp)

    with quiet():
        highest = xp.where(valid, logits.max(axis=2), 0)[:, :, None]
        total = xp.exp(xp.where(valid[:, :, None], logits - highest, 0)).sum(axis=2, keepdims=True, dtype=np.float64)
        logs = xp.take_along_axis(logits, xp.broadcast_to(states, (T, *states.shape)), axis=2)
        logs = logs - highest - xp.log(total)  # log-probability of each state's class, float64 (T, B, 2 S + 1)
        before, last = _log_sums(xp, logs, skips, start, valid)
        rows, n = xp.arange(B), xp.asarray(2 * counts)
        likelihood = _log_sum(xp, last[rows, n], xp.where(n > 0, last[rows, n - 1], -np.inf))
    possible = likelihood != -np.inf
    losses = xp.where(possible, 0.0 - likelihood, 0.0 if zero_infinity else np.inf)
    weights = xp.asarray(1 / (np.maximum(counts, 1) * max(B, 1)) if reduction == "mean" else np.ones(B))
    loss = (losses if reduction == "none" else (losses * weights).sum()).astype(dtype)

    def backward(dloss=1.0):
        dlosses = upstream(dloss, loss.shape, (B,), 1, np.float64, ops) * weights
        counted = valid & possible
        mirrored = xp.zeros(skips.shape) - np.inf
        mirrored[:, 2:] = skips[:, :1:-1]
        with quiet():
            after, _ = _log_sums(xp, logs[::-1, :, ::-1], mirrored, end[:, ::-1], valid[::-1])
            after = after[::-1, :, ::-1]
            # how probable it is that a path of the target is in this state at this step (Graves 2006, equation 14)
            share = xp.exp(before + logs + after - xp.where(possible, likelihood, 0)[:, None])
            dlogits = xp.exp(logits - highest - xp.log(total).astype(dtype))
            _subtract_shares(xp, dlogits, share, states, blank)
            dlogits *= dlosses.astype(dtype)[:, None]
            return _time_major(xp.where(counted[:, :, None], dlogits, 0).astype(given, copy=False), batch_first)

    return loss, backward


def _log_sums(xp, logs, skips, start, valid):
    """The forward variables: of all paths, the log-probability of what they emit before step t, and where that leads.

    logs: (T, B, N) log-probability of what each state emits; skips: (B, N), 0 or -inf; start: (B, N); valid: (T, B).
    Returns ``reached`` (T, B, N): of being led to a state at step t, before it emits; and (B, N): of being in a state
    after each sequence's last step. Walked from right to left, it gives the backward variables.
    """
    reached = xp.empty(logs.shape)
    padded = xp.zeros((start.shape[0], start.shape[1] + 2)) - np.inf  # with two states to the left that nobody is in
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


def _subtract_shares(xp, dlogits, share, states, blank):
    """``dlogits[t, b, states[b, n]] -= share[t, b, n]`` for every n, in a fixed order; many states have one class."""
    labels = states[:, 1::2]
    B, S = labels.shape
    if S:
        same = labels[:, :, None] == labels[:, None, :]
        shares = xp.matmul(share[:, :, 1::2].transpose(1, 0, 2), same.astype(share.dtype)).transpose(1, 0, 2)
        # equal labels are given the sum that stands at the first of them, so that they write the same bits
        shares = xp.take_along_axis(shares, xp.broadcast_to(same.argmax(axis=2), shares.shape), axis=2)
        dlogits[:, xp.arange(B)[:, None], labels] -= shares.astype(dlogits.dtype)
    dlogits[:, :, blank] -= share[:, :, 0::2].sum(axis=2).astype(dlogits.dtype)


# ---- decoding


def ctc_greedy(logits, *, lengths=None, blank=0, batch_first=False):
    """The labels that the likeliest path stands for: a list with one list of labels for each sequence.

    logits, or log-probabilities: (T, B, V), or (B, T, V) with ``batch_first``; lengths: (B,). Raises as ``ctc_loss``.
    """
    ops, _, logits, lengths, blank = _check_logits(logits, lengths, blank, batch_first)
    _refuse_no_path(ops, logits, lengths)
    path = ops.to_numpy(logits.argmax(axis=2))
    new = np.ones(path.shape, bool)
    new[1:] = path[1:] != path[:-1]
    is_label = new & (path != blank)
    return [path[:length, b][is_label[:length, b]].tolist() for b, length in enumerate(lengths)]


def ctc_beam_search(logits, beam=16, *, lengths=None, blank=0, batch_first=False):
    """The likeliest label sequences, each with its log-probability summed over the paths that were followed.

    logits, or log-probabilities: (T, B, V), or (B, T, V) with ``batch_first``; lengths: (B,). beam: label sequences
    followed at a time. Returns for each of the B sequences a list of up to ``beam`` pairs (labels, log-probability),
    the likeliest first. Raises as ``ctc_loss``.

    Prefix beam search without a language model: Hannun, Maas, Jurafsky, Ng, "First-pass large vocabulary continuous
    speech recognition using bi-directional recurrent DNNs", 2014, algorithm 1. With as many beams as there are label
    sequences it is exact.
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
    """Raise ValueError where logits (T, B, V) of a valid timestep are NaN or infinite."""
    highest = ops.to_numpy(logits.max(axis=2))
    refuse_no_distribution(highest[valid_steps(lengths, *highest.shape)])


def _beam_search(logs, beam, blank):
    """Log-probabilities (T, V) -> up to ``beam`` pairs (labels, log-probability)."""
    V = logs.shape[1]
    prefixes, ended, open_ = [()], np.zeros(1), np.full(1, -np.inf)  # log-probability with a blank behind, and without
    for step in logs:
        last = np.array([prefix[-1] if prefix else blank for prefix in prefixes])
        whole = np.logaddexp(ended, open_)
        longer = whole[:, None] + step  # (prefixes, V): one more label
        rows = np.arange(len(prefixes))
        longer[rows, last] = ended + step[last]  # the same label again needs a blank between
        longer[:, blank] = -np.inf
        ended, open_ = whole + step[blank], open_ + step[last]  # open_ of the empty prefix is -inf and stays so
        place = {prefix: row for row, prefix in enumerate(prefixes)}
        for row, prefix in enumerate(prefixes):  # a prefix grown to one that is followed already
            if prefix and (parent := place.get(prefix[:-1])) is not None:
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
    """(ops, the logits' own dtype, time-major logits in what they are computed in, lengths on the host, blank)."""
    check_flag("batch_first", batch_first)
    ops = array_ops(logits)
    given = ops.asarray(logits, "logits").dtype
    logits = floats(logits, "logits", ops)
    check_shape("logits", logits, ("B", "T", "V") if batch_first else ("T", "B", "V"))
    logits = _time_major(logits, batch_first)
    T, B, V = logits.shape
    if check_size("blank", blank, 0) >= V:
        raise ValueError(f"blank: expected a class from 0 to {V - 1} (logits have V = {V}), got {blank}")
    return ops, given, logits, np.full(B, T) if lengths is None else check_lengths(lengths, T, B), int(blank)


def _pad_targets(targets, target_lengths, B, V, blank):
    """Targets in any of their three forms as (int64 (B, S), with ``blank`` behind the labels; int64 (B,) label counts).

    Raises ShapeError, DtypeError, and ValueError for labels that are no class or the blank.
    """
    if isinstance(targets, (list, tuple)) and target_lengths is None:
        rows = [host_array(row, "targets") for row in targets]
    else:
        array = host_array(targets, "targets")
        if array.ndim == 2:
            counts = np.full(len(array), array.shape[1]) if target_lengths is None else target_lengths
            counts = check_lengths(counts, array.shape[1], len(array), "target_lengths")
            rows = [row[:count] for row, count in zip(array, counts, strict=True)]
        elif array.ndim == 1 and target_lengths is not None:
            counts = check_lengths(target_lengths, len(array), B, "target_lengths")
            if counts.sum() != len(array):
                raise ShapeError(f"target_lengths: expected a sum of {len(array)}, the labels, got {counts.sum()}")
            rows = np.split(array, np.cumsum(counts)[:-1]) if B else []
        else:
            raise ShapeError(
                "targets: expected a list of B sequences, (B, S), or (N,) with target_lengths, got shape "
                f"{array.shape}{'' if target_lengths is None else ' with target_lengths'}"
            )
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
