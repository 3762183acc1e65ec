"""What a machine reaches at best, measured, and the floor that this sets under the time of a case."""

import time

import numpy as np

import gpurnn

from .probe import probe
from .probe_device import Gpu


def ceilings():
    """What this machine reaches at best, measured: {"cpu": ..., "gpu": ... or None}.

    flops: by arithmetic ("float32", "tf32", ...), of a large product. bytes: of a copy, read and written, a second.
    step: seconds from one timestep to the next that depends on it, at least: on a CPU nothing, on a GPU by "block" (all
    weights on one multiprocessor: its barrier) or "grid" (one exchange between multiprocessors).
    """
    found = {"cpu": _cpu_ceilings(), "gpu": None}
    if gpurnn.backends()["cuda"] is None:
        found["gpu"] = ceilings_of(probe(Gpu(), ("copy", "gemm", "block_barrier", "hop_all")))
    return found


def _cpu_ceilings():
    a = np.ones((1024, 1024), np.float32)
    out = np.empty_like(a)
    block = np.ones(1 << 23, np.float32)
    copy = np.empty_like(block)
    gemm = _best(lambda: np.matmul(a, a, out=out))
    moved = _best(lambda: np.copyto(copy, block))
    return {"flops": {"float32": 2 * 1024**3 / gemm}, "bytes": 2 * block.nbytes / moved, "step": {}}


def _best(action, least=0.5):
    """Seconds of the fastest run within ``least`` seconds and five runs."""
    best, end, count = float("inf"), time.perf_counter() + least, 0
    while count < 5 or time.perf_counter() < end:
        start = time.perf_counter()
        action()
        best, count = min(best, time.perf_counter() - start), count + 1
    return best


def ceilings_of(found):
    """The ceilings that measurements show; None where those of products and copies are not among them."""
    if "bytes_per_second" not in found.get("copy", {}):
        return None
    gemm, hops = ({key: row for key, row in found.get(name, {}).items() if isinstance(row, dict)}
                  for name in ("gemm", "hop_all"))  # fmt: skip
    rates = {name: row["flops_per_second"] for name, row in gemm.items() if "flops_per_second" in row}
    step = {}
    if "seconds" in found.get("block_barrier", {}):
        step["block"] = found["block_barrier"]["seconds"]
    exchanges = [row["seconds"] for row in hops.values() if "seconds" in row]
    if exchanges:
        step["grid"] = min(exchanges)
    return {"flops": rates, "bytes": found["copy"]["bytes_per_second"], "step": step, "measured": found}


def floor_seconds(case, ceilings):
    """The least time of a case on a device with these ceilings, and what sets it: (seconds, reason), or None where its
    arithmetic was not measured.

    The largest of the products at the best rate of a large one, the bytes at a copy's rate, and the dependent steps.
    """
    arithmetic = "tf32" if case.precision == "tf32" else case.dtype
    rate = ceilings["flops"].get(arithmetic)
    if rate is None:
        return None
    parts = {"products": case.flops / rate, "bytes": case.bytes / ceilings["bytes"]}
    if ceilings["step"]:
        fits = case.recurrent_bytes <= 330e3  # what one multiprocessor's registers and memory hold
        kind = "block" if fits else "grid"
        parts["steps"] = case.steps * ceilings["step"][kind]
    reason = max(parts, key=parts.get)
    return parts[reason], reason
