"""What a machine reaches at best, measured, and the floor that this sets under the time of a case."""

import time

import numpy as np

import gpurnn

from .probe import probe
from .probe_device import Gpu
from .rates import rates, read_rate


def ceilings(threads, isa=None):
    """What this machine reaches at best, measured: {"cpu": ..., "gpu": ... or None}.

    threads, isa: of the CPU, as ``rates`` takes them. flops: by arithmetic ("float32", "tf32", ...), on a CPU of
    multiply-adds in registers, else, and where there is no C compiler, of a large product. bytes: of a copy, read and
    written, a second. reads: [bytes, bytes a second] of blocks that are read again and again, each thread's of that
    size; only on a CPU with a C compiler. step: seconds from one timestep to the next that depends on it, at least: on
    a CPU nothing, on a GPU by "block" (all weights on one multiprocessor: its barrier) or "grid" (one exchange between
    multiprocessors).
    """
    found = {"cpu": _cpu_ceilings(threads, isa), "gpu": None}
    if gpurnn.backends()["cuda"] is None:
        found["gpu"] = ceilings_of(probe(Gpu(), ("copy", "gemm", "block_barrier", "hop_all")))
    return found


def _cpu_ceilings(threads, isa):
    block = np.ones(1 << 23, np.float32)
    copy = np.empty_like(block)
    found = {"bytes": 2 * block.nbytes / _best(lambda: np.copyto(copy, block)), "step": {}}
    measured = rates(threads, isa)
    if measured:
        return found | {"flops": {"float32": measured["flops"]}, "reads": measured["reads"], "threads": threads}
    a = np.ones((1024, 1024), np.float32)
    out = np.empty_like(a)
    return found | {"flops": {"float32": 2 * 1024**3 / _best(lambda: np.matmul(a, a, out=out))}}


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

    The largest of the products at the best rate of a large one; the bytes at a copy's rate, or, where the rates of
    reading were measured, the weights of each timestep at the rate of the cache that holds them; the dependent steps.
    """
    arithmetic = "tf32" if case.precision == "tf32" else case.dtype
    rate = ceilings["flops"].get(arithmetic)
    if rate is None:
        return None
    parts = {"products": case.flops / rate}
    if "reads" in ceilings:
        weights, read = case.weights_read
        parts["weights"] = read / read_rate(ceilings["reads"], weights / ceilings["threads"])
    else:
        parts["bytes"] = case.bytes / ceilings["bytes"]
    if ceilings["step"]:
        fits = case.recurrent_bytes <= 330e3  # what one multiprocessor's registers and memory hold
        kind = "block" if fits else "grid"
        parts["steps"] = case.steps * ceilings["step"][kind]
    reason = max(parts, key=parts.get)
    return parts[reason], reason
