"""The two parts of ``bench on-gpu`` as lists of items: what each asks of which process, and how long it may take."""

import importlib.util
import os
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from . import gpu_cases
from .gpu_cases import HEADLINE, KERNELS, PROBES, REHEARSED, SMOKE, TUNED, Smoke, from_dict, small, variants
from .gpu_orders import once, sources, tool
from .gpu_workers import Trouble
from .judge import allowed, furthest

# group -> the share of a part's time after which none of it begins, so that it leaves time for the next groups
GROUPS = {
    "A": {"versions": 0.2, "warm-up": 0.3, "smoke": 0.45, "probe": 0.65, "torch": 1.0, "headline": 1.0},
    "B right": {"ablation": 0.1, "profile": 0.3, "tune": 0.55, "tests": 0.9, "headline": 1.0},
    "B wrong": {"sanitizer": 0.4, "variants": 0.75, "headline": 1.0},
}
ROUNDS = 3
TURN = 0.03  # seconds of a rival's turn


@dataclass(frozen=True)
class Item:
    """One thing to do. run(pool, seconds) gives its record: status "right" by default. seconds: its time limit.
    needs: seconds without which it is not begun."""

    group: str
    name: str
    run: Callable
    seconds: float
    needs: float = 2.0
    parameters: dict = field(default_factory=dict)


def _asked(kind, order):
    return lambda pool, seconds: pool.ask(kind, dict(order), seconds)


def part_a(rehearsal):
    """(items, the share of the time by which each group ends, what was decided)."""
    shrink = small if rehearsal else lambda case: case
    items = [
        Item("versions", "versions", _versions, 30),
        Item("versions", "nvidia-smi", _command("nvidia-smi", "-q", judged=False), 15),
        Item("warm-up", "kernels", _warm_up([shrink(case) for case in (*SMOKE, *HEADLINE)]), 90, 5),
        *(smoke_item("smoke", shrink(case), rehearsal) for case in SMOKE),
    ]
    for name in PROBES:
        run = _probe(name) if name in REHEARSED or not rehearsal else _left_out("the emulator has nothing like it")
        items.append(Item("probe", name, run, 20, 3))
    items.append(Item("torch", "torch", _torch, 30))
    items += [headline_item(case, rehearsal) for case in dict.fromkeys(map(shrink, HEADLINE))]
    return items, GROUPS["A"], "part A"


def part_b(rehearsal, records):
    """The same for part B, chosen by the records of part A."""
    judged = [row for row in records if row["group"] in ("smoke", "headline")]
    wrong = [row for row in judged if row["status"] in ("wrong", "failed", "timed out")]
    timed = {row["name"] for row in judged if row["group"] == "headline" and row["status"] in ("right", "done")}
    cases = dict.fromkeys(map(small, HEADLINE) if rehearsal else HEADLINE)
    rest = [headline_item(case, rehearsal) for case in cases if case.name not in timed]
    if wrong:
        names = ", ".join(row["name"] for row in wrong[:5])
        return _suspects(wrong, rehearsal) + rest, GROUPS["B wrong"], f"{len(wrong)} not right in part A ({names})"
    decided = "everything was right in part A" if judged else "THERE IS NO PART A in this folder: taken as all right"
    items = [Item("ablation", "ablation", _left_out("the kernels have no switches that leave a stage out"), 1)]
    items += [_profile(case) for case in gpu_cases.PROFILED]
    items += [_tune(*size, rehearsal) for size in (TUNED[:2] if rehearsal else TUNED)]
    items.append(Item("tests", "test_gpu.py, test_cuda_gpu.py", _tests(rehearsal), 110, 20))
    return items + rest, GROUPS["B right"], decided


# ---- versions, warm-up


def _versions(pool, seconds):
    digest, count = sources()
    found = {"status": "done", "sources": digest, "source_files": count}
    return found | pool.ask("gpurnn", {"do": "versions"}, seconds)


def _torch(pool, seconds):
    """Late, because nothing has to wait for it before: it takes longest to start."""
    return {"status": "done"} | pool.ask("torch", {"do": "torch_versions"}, seconds)


def _warm_up(cases):
    """Compile all kernels that cases need, in as many processes as there are processors, up to 16."""

    def run(pool, seconds):
        start = time.monotonic()
        kernels = pool.ask("gpurnn", {"do": "kernels", "cases": [case.as_dict() for case in cases]}, seconds)["kernels"]
        if pool.rehearsal:  # each takes seconds there, and is kept on disk
            kernels = kernels[:4]
        count = min(16, os.cpu_count() or 1, len(kernels))
        kinds = [f"compile {k}" for k in range(count)]
        orders = [(kind, {"do": "compile", "kernels": kernels[k::count]}) for k, kind in enumerate(kinds)]
        answers = pool.ask_all(orders, seconds - (time.monotonic() - start))
        pool.stop(*kinds)
        failed, late = {}, []
        for answer in answers:
            if isinstance(answer, Trouble):
                late.append(answer.reason)
            else:
                failed |= answer["failed_kernels"]
        found = {"status": "failed" if failed or late else "done", "kernels": len(kernels), "processes": count}
        if failed or late:
            first = [f"{name}: {reason}" for name, reason in failed.items()] + late
            found |= {"reason": f"{len(failed)} kernels do not compile; {first[0]}", "failed_kernels": failed}
        return found

    return run


# ---- the cases


def smoke_item(group, case, rehearsal):
    order = {"do": "smoke", "case": case.as_dict()}
    limit = 40 if rehearsal else 12  # the emulator compiles with g++
    return Item(group, case.name, _asked("gpurnn", order), limit, 2, case.as_dict())


def _probe(name):
    def run(pool, seconds):
        found = pool.ask("gpurnn", {"do": "probe", "name": name}, seconds)["probe"][name]
        parts = [found, *(value for value in found.values() if isinstance(value, dict))]
        failed = [part["failed"] for part in parts if "failed" in part]
        problem = {"status": "failed", "reason": failed[0]} if failed else {}
        return {"status": "right", "probe": found} | problem

    return run


def headline_item(case, rehearsal):
    def run(pool, seconds):
        if rehearsal and case.what == "step":
            return {"status": "left out", "reason": "the loss takes arrays of CuPy, which the emulator's are not"}
        return _headline(case, pool, seconds)

    return Item("headline", case.name, run, 25, 4, case.as_dict())


def _headline(case, pool, seconds):
    """Ours and torch's of one case, each in its warm process, in turns, after their results were compared."""
    end = time.monotonic() + seconds
    with tempfile.TemporaryDirectory() as folder:
        paths = {kind: str(Path(folder) / f"{kind}.npz") for kind in ("gpurnn", "torch")}
        orders = [(kind, {"do": "prepare", "case": case.as_dict(), "path": path}) for kind, path in paths.items()]
        ours, theirs = pool.ask_all(orders, seconds)
        if isinstance(ours, Trouble):
            raise ours
        rivals = {"gpurnn": ours}
        if isinstance(theirs, Trouble):
            found = {"status": "done", "reason": f"nothing to compare with, torch: {theirs.reason}"}
        else:
            rivals["torch"] = theirs
            found = compare(case, paths["gpurnn"], paths["torch"])
            if found["status"] == "wrong":
                return found | {"rivals": rivals}
    order = {"do": "time", "seconds": 0.001 if pool.rehearsal else TURN}
    for _ in range(ROUNDS):
        for kind in tuple(rivals):
            try:
                rivals[kind].setdefault("samples", []).append(pool.ask(kind, order, end - time.monotonic()))
            except Trouble as trouble:
                if kind == "gpurnn":
                    raise
                del rivals[kind]  # ours is timed all the same
                found["reason"] = f"torch: {trouble.reason}"
    return found | {"rivals": rivals}


def compare(case, ours, theirs):
    """Are two files of results the same within what the arithmetic of a case allows?"""
    with np.load(ours, allow_pickle=False) as file:
        got = dict(file)
    with np.load(theirs, allow_pickle=False) as file:
        expected = dict(file)
    worst, where = furthest(got, expected)
    limit = allowed(case)
    found = {"status": "right", "worst": worst, "where": where, "allowed": limit, "compared": sorted(expected)}
    if not worst <= limit:
        found |= {"status": "wrong", "reason": f"{where}: off by {worst:.3g} of torch's largest, allowed {limit:.2g}"}
    return found


# ---- when something is wrong


def _suspects(wrong, rehearsal):
    """A checker of memory and races on the first cases that were not right, and what they differ by."""
    cases = [from_dict(row["parameters"]) for row in wrong]
    smoke = [case for case in cases if isinstance(case, Smoke)]
    if not smoke:  # only a large one: the same layer short, by every kernel
        smoke = [
            Smoke(case.cell, kernel, case.dtype, case.precision, B=case.B, I=case.I, H=case.H, ragged=case.ragged)
            for case in cases[:2]
            for kernel in KERNELS
        ]
        found = [smoke_item("variants", case, rehearsal) for case in smoke]
    else:
        found = [smoke_item("variants", other, rehearsal) for case in smoke[:3] for other in variants(case)]
    checks = []
    for case in smoke[:2]:
        short = replace(case, T=min(case.T, 5))
        for check in ("memcheck", "racecheck"):
            command = "compute-sanitizer", "--tool", check, "--error-exitcode", "9", "--print-limit", "20"
            watched = once("gpurnn", {"do": "smoke", "case": short.as_dict()})
            checks.append(Item("sanitizer", f"{check}: {short.name}", _command(*command, *watched), 60, 20))
    return checks + list({item.name: item for item in found}.values())


# ---- commands


def _left_out(reason):
    return lambda pool, seconds: {"status": "left out", "reason": reason}


def _command(name, *arguments, judged=True):
    """A tool of CUDA's, where it is installed. judged: whether another exit code than 0 means something is wrong."""

    def run(pool, seconds):
        path = tool(name)
        if path is None:
            return {"status": "left out", "reason": f"{name} is not installed"}
        answer = pool.ask("tools", {"do": "command", "command": [path, *arguments], "seconds": seconds - 2}, seconds)
        return _command_record(answer, "wrong" if judged else "failed", "right" if judged else "done")

    return run


def _command_record(answer, bad, good):
    recorded = {"exit": answer["exit"], "last": answer["last"]}
    if answer["exit"] is None:
        return {"status": "timed out", "reason": "stopped at its time limit"} | recorded
    if answer["exit"]:
        return {"status": bad, "reason": f"exit code {answer['exit']}: {' | '.join(answer['last'][-2:])}"} | recorded
    return {"status": good} | recorded


def _profile(case):
    """Nsight Compute on the kernels of the time loop, which run longest. The clocks are left as they are."""
    sections = "SpeedOfLight", "WarpStateStats", "SchedulerStats", "LaunchStats", "Occupancy", "MemoryWorkloadAnalysis"
    command = ["--clock-control", "none", "--launch-count", "2", "--kernel-name", "regex:grid|block"]
    command += [part for section in sections for part in ("--section", section)]
    command += once("gpurnn", {"do": "once", "case": replace(case, T=min(case.T, 128)).as_dict()})
    return Item("profile", f"ncu: {case.name}", _command("ncu", *command, judged=False), 40, 20, case.as_dict())


def _tune(cell, H, B, dtype, tf32, rehearsal):
    if rehearsal:
        H, B = 24, 2
    sizes = {"cell": cell, "H": H, "B": B, "dtype": dtype, "tf32": tf32}

    def run(pool, seconds):
        path = str(pool.folder / ("rehearsal-tuned.json" if rehearsal else "tuned.json"))
        return {"status": "done"} | pool.ask("gpurnn", {"do": "tune", "path": path, **sizes}, seconds)

    return Item("tune", f"{cell} H{H} B{B} {'tf32' if tf32 else dtype}", run, 25, 4, sizes)


def _tests(rehearsal):
    """The tests that need a GPU, by name; not the one that repeats all of ``gpurnn check``, which takes minutes."""

    def run(pool, seconds):
        files = "tests/backends/cuda/test_gpu.py", "tests/backends/cuda/test_cuda_gpu.py"
        if not (Path(__file__).resolve().parent.parent / files[0]).is_file():
            return {"status": "left out", "reason": "the tests are in the source checkout only"}
        if importlib.util.find_spec("pytest") is None:
            return {"status": "left out", "reason": "pytest is not installed"}
        command = [sys.executable, "-m", "pytest", *files, "-q", "-m", "gpu", "-k", "not everything_is_right"]
        command += ["-p", "no:cacheprovider", "--tb", "short"]
        if importlib.util.find_spec("hypothesis") is None:  # which tests/conftest.py imports for other tests
            command.append("--noconftest")
        answer = pool.ask("tools", {"do": "command", "command": command, "seconds": seconds - 2}, seconds)
        return _command_record(answer, "wrong", "done" if rehearsal else "right")

    return run
