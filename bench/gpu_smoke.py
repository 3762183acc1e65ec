"""Is a kernel right? One layer on the GPU, forward and backward, against gpurnn's NumPy code in float64, which its own
tests have compared with torch in float64."""

from dataclasses import replace

import numpy as np

import gpurnn
from gpurnn.backends.cuda import schedules
from gpurnn.backends.cuda.launch import kernels_of
from gpurnn.backends.cuda.ops import CudaOps
from gpurnn.backends.cuda.schedules import tuning
from gpurnn.dtypes import EPSILON
from gpurnn.testing import leaves

from .gpu_cases import Smoke

CALLS = 4  # of a layer whose loop is to be recorded: the second call records, the others replay


class OnlyKernel:
    """In place of a table of measured times: as if of all candidates only those of one kernel had been measured."""

    def __init__(self, kernel):
        self.kernel = kernel

    def known(self, problem, device):
        found, _ = schedules.candidates(problem, device)
        return {
            candidate.key: (candidate.seconds, candidate.before)
            for candidate in found
            if getattr(candidate, "kernel", "") == self.kernel
        }


def make_ops(device, kernel):
    """``CudaOps`` that takes this one of ``gpu_cases.KERNELS`` where the layer asks for its schedule."""
    if kernel.startswith("step"):
        return CudaOps(device, graphs=16 if kernel == "step recorded" else 0)
    return CudaOps(device, measured=OnlyKernel(kernel))


def problems(case):
    """The ``schedules.Problem`` of every layer and direction of time of a ``Smoke`` or ``Case``."""
    D, tf32 = 2 if case.bidirectional else 1, case.precision == "tf32"
    found = []
    for layer in range(getattr(case, "L", 1)):
        inputs = D * case.H if layer else case.I
        both = tuning.problems([case.cell], [case.H], [case.B], [case.dtype], D, tf32)
        found += [replace(problem, T=case.T, B=case.B, I=inputs) for problem in both]
    return list(dict.fromkeys(found))


def kernels(case, ops):
    """(file, name expression, struct) of what the schedules of a case launch; of ``step`` its names for this dtype."""
    from gpurnn.backends.cuda.launch import kernel_names

    ops = ops.with_precision(case.precision)
    wanted = getattr(case, "schedule", "auto")
    found = [name for problem in problems(case) for name in kernels_of(problem, ops.candidate(problem, wanted))]
    cells = {problem.cell for problem in problems(case)}
    return found + kernel_names((case.dtype,), tuple(cells))


def chosen(case, ops):
    """The candidates that a case takes, forward and backward, by name. Raises ValueError where its kernel has none."""
    ops, found = ops.with_precision(case.precision), []
    for problem in problems(case):
        candidate = ops.choose(problem, getattr(case, "schedule", "auto"))[0]
        if isinstance(case, Smoke) and getattr(candidate, "kernel", "step") != case.kernel.partition(" ")[0]:
            raise ValueError(f"{case.kernel} has no tile for this size")
        found.append(f"{'backward' if problem.backward else 'forward'}: {candidate.key}")
    return found


# ---- the layer and its results


def build(case, backend, dtype, precision="float32", schedule="auto"):
    kind, options = {"lstm": gpurnn.LSTM, "gru": gpurnn.GRU}[case.cell], {"backend": backend, "dtype": dtype, "seed": 5}
    more = {"bidirectional": case.bidirectional, "precision": precision, "schedule": schedule}
    layer = kind(case.I, case.H, **more, **options)
    norm = {"norm": gpurnn.LayerNorm(case.I, **options)} if case.norm else {}
    return gpurnn.Sequential(norm | {"rnn": layer})


class Batch:
    """What goes in, float64 on the host, the same in every process."""

    def __init__(self, case):
        draw, D = np.random.default_rng(7), 2 if case.bidirectional else 1
        states = [draw.normal(size=(D, case.B, case.H)) for _ in range(4)]
        count = 2 if case.cell == "lstm" else 1
        self.x = draw.normal(size=(case.T, case.B, case.I))
        self.doutput = draw.normal(size=(case.T, case.B, D * case.H))
        self.state, self.dstate = states[:count], states[2 : 2 + count]
        self.lengths = None
        if case.ragged:
            self.lengths = draw.integers(0, case.T + 1, case.B)
            self.lengths[0] = case.T

    def run(self, model):
        """Name -> float64 array: output, final state, dx, dstate and ``d`` + name of every parameter."""
        xp = model.xp

        def inward(array):
            return xp.asarray(array.astype(model.dtype))

        def states(pair):
            return (tuple(map(inward, pair)) if len(pair) == 2 else inward(pair[0]),)

        model.zero_grad()
        output, state, backward = model.forward(inward(self.x), states(self.state), self.lengths)
        dx, dstate = backward(inward(self.doutput), states(self.dstate))
        found = {"output": output, "dx": dx} | {f"d {name}": grad for name, grad in model.grads.items()}
        for name, value in (("state", state), ("dstate", dstate)):
            found |= {f"{name} {k}": part for k, part in enumerate(leaves(value))}
        return {name: np.asarray(model.ops.to_numpy(value), np.float64) for name, value in found.items()}


def run(case, device, poison=lambda: None):
    """The record of one smoke case: status, the largest error as a share of what is allowed, where, how far off.

    poison(): fills free memory with NaN, so that what a kernel does not write is seen. device: fresh for each case, as
    one that has given up cooperative launches stays so.
    """
    ops = make_ops(device, case.kernel)
    try:
        found = {"chosen": chosen(case, ops)}
    except ValueError as error:
        return {"status": "left out", "reason": str(error)}
    model = build(case, ops, case.dtype, case.precision, case.schedule)
    like = "float16" if case.precision == "tf32" else case.dtype  # tf32 keeps as many bits of what it multiplies
    exact, plain = (build(case, "numpy", dtype) for dtype in ("float64", like))
    for other in (exact, plain):
        other.load_state_dict(model.state_dict())
    batch = Batch(case)
    expected, usual = batch.run(exact), batch.run(plain)
    poison()
    runs = [batch.run(model) for _ in range(CALLS if case.kernel == "step recorded" else 2)]
    found |= judge(runs[-1], usual, expected, like, terms=case.T * (case.B + 2 * case.H + 4))
    if found["status"] == "right":
        found |= _repeats(runs[-2], runs[-1])
    if case.kernel == "step recorded":
        tried = ops.recordings()
        failed = [row["reason"] for row in tried if not row["recorded"]]
        found["recordings"] = tried
        if found["status"] == "right" and (failed or not tried):
            found |= {"status": "failed", "reason": f"right, but not recorded: {(failed or ['nobody says why'])[0]}"}
    return found


def judge(got, usual, expected, dtype, terms):
    """status, and where the results are furthest from float64.

    Allowed is twice the largest error of NumPy in the same dtype plus two roundings, as in ``gpurnn check``; in
    float64, where that says nothing, a rounding for each of the ``terms`` of the sums. Errors count as a share of an
    array's largest value or of 1.
    """
    sizes = {name: np.abs(value).max(initial=1) for name, value in expected.items()}
    error = max(np.abs(usual[name] - value).max(initial=0) / sizes[name] for name, value in expected.items())
    share = terms * EPSILON[dtype] if dtype == "float64" else 2 * error + 2 * EPSILON[dtype]
    worst, where, wrong = 0.0, "", None
    for name, value in expected.items():
        off = np.abs(got[name] - value) / (share * sizes[name])
        off = np.where(np.isnan(off), np.inf, off)
        if off.max(initial=0) > worst:
            worst, where = float(off.max()), name
        if wrong is None and (off > 1).any():
            wrong = _first_wrong(name, off > 1, got[name], value)
    found = {"status": "right", "worst": worst, "where": where, "allowed": float(share)}
    return found if wrong is None else found | wrong


def _first_wrong(name, wrong, got, expected):
    first = np.unravel_index(int(np.argmax(wrong)), wrong.shape)
    index, count = [int(i) for i in first], int(wrong.sum())
    reason = f"{name}{index}: expected {expected[first]:.6g}, got {got[first]:.6g}; {count} of {wrong.size} wrong"
    numbers = {"index": index, "expected": float(expected[first]), "got": float(got[first]), "wrong": count}
    return {"status": "wrong", "reason": reason, "first_wrong": {"array": name, **numbers}}


def _repeats(first, second):
    different = [name for name, value in first.items() if not np.array_equal(value, second[name])]
    return {"status": "wrong", "reason": f"two calls differ in {', '.join(different)}"} if different else {}
