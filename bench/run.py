"""Timing: a process for each rival, in turns. Every sample is saved, and the results are written after each case.

Processes, because the thread pools of two BLAS libraries in one process hold the cores against each other; turns
(A B A B), so that drift of the machine meets all. Before a rival is timed its results are compared with float64; one
that is wrong is reported as wrong and not timed.
"""

import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from gpurnn.files import is_stream

from . import rivals as _rivals
from .cases import Case
from .ceilings import ceilings, floor_seconds
from .doubles import DOUBLES
from .judge import allowed, furthest, inputs, reference
from .machine import clocks, environment
from .results_file import FORMAT, times, write

# ---- a rival's process


def work(name):
    """Reads orders from standard input, a JSON object a line, and answers each with a line of JSON.

    The process "reference" writes what is right into a file, once for all rivals; the others compare with that file.
    """
    prepare = _prepare(name) if name != "reference" else None
    prepared = key = None
    for line in sys.stdin:
        order = json.loads(line)
        case = Case(**order["case"])
        try:
            if order["do"] == "reference":
                np.savez(order["path"], **reference(case, *inputs(case)))
                answer = {}
            else:
                if order["case"] != key:
                    prepared, key = None, order["case"]
                    start = time.perf_counter()
                    prepared = prepare(case, *inputs(case))
                    prepared.run()
                    prepared.wait()
                    setup = time.perf_counter() - start
                if order["do"] == "check":
                    answer = {"setup_s": setup, "peak_host_bytes": _peak_bytes()}
                    answer |= {"device_bytes": prepared.device_bytes()} | _errors(prepared, order["path"])
                else:
                    answer = time_runs(prepared, order["seconds"])
        except Exception as error:  # a rival's failure is a line of the report, not the end of the run
            key, answer = None, {"failed": f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]}
        print(json.dumps(answer), flush=True)


def _prepare(name):
    """How a rival, or one of the doubles in its place, is prepared."""
    return DOUBLES.get(name) or (_rivals.RIVALS | _rivals.HIDDEN)[name][0]


def _peak_bytes():
    """Most memory this process has held so far, its libraries included; None where the system does not say."""
    try:
        import resource
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _errors(prepared, path):
    if prepared.results is None:
        return {"bound": True}
    with np.load(path, allow_pickle=False) as file:
        expected = dict(file)
    got = prepared.results()
    missing = [name for name in expected if name not in got]
    if missing:
        return {"error": None, "where": f"{missing[0]} is missing"}
    worst, where = furthest(got, expected)
    return {"error": worst, "where": where}


def time_runs(prepared, seconds):
    """One sample: seconds of one run, over as many runs as fill the given time; on a GPU the device's own time too, and
    the processor time of all threads, which other processes do not add to.

    A third of that time goes before, not measured: the threads of a process that waited for its turn must wake up.
    """
    warm, start = 0, time.perf_counter()
    while warm < 1 or time.perf_counter() - start < seconds / 3:
        prepared.run()
        warm += 1
    speed = clocks() if prepared.events else {}  # while the device works
    prepared.wait()
    warm_s = time.perf_counter() - start
    count, start, processor = 0, time.perf_counter(), time.process_time()
    while True:
        prepared.run()
        count += 1
        if count >= 2 and time.perf_counter() - start >= seconds:
            break
    launched = time.perf_counter() - start
    prepared.wait()
    answer = {
        "host_s": (time.perf_counter() - start) / count,
        "cpu_s": (time.process_time() - processor) / count,
        "launch_s": launched / count,
        "runs": count,
        "warm": warm,
        "warm_s": warm_s,
    } | speed
    if prepared.events:
        answer["device_s"] = prepared.events(count) / count
    return answer


def command_of(*arguments):
    """A command of this benchmark, for a process of its own."""
    return [sys.executable, "-m", __package__, *arguments]


def environment_of(threads):
    """The environment of such a process: this many threads for BLAS and torch."""
    names = "OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"
    found = os.environ | dict.fromkeys(names, str(threads))
    if __package__ == "bench":  # a checkout: wherever it is run from
        root = str(Path(__file__).resolve().parent.parent)
        found["PYTHONPATH"] = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
    return found


class Worker:
    """A rival's process, which answers one order at a time."""

    def __init__(self, name, threads):
        self.process = subprocess.Popen(
            command_of("worker", name), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env=environment_of(threads),
        )  # fmt: skip

    def ask(self, case, do, **order):
        """The answer, or ``{"failed": why}``."""
        try:
            self.process.stdin.write(json.dumps({"case": case.as_dict(), "do": do, **order}) + "\n")
            self.process.stdin.flush()
            answer = self.process.stdout.readline()
        except BrokenPipeError:
            answer = ""
        return json.loads(answer) if answer else {"failed": f"the process ended with {self.process.wait()}"}

    def close(self):
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()


# ---- a run


def run(cases, names, *, threads, rounds=5, seconds=0.1, out=None, command="", progress=None):
    """Time every case for every rival; returns the document, which is also written to ``out`` after each case.

    progress: wraps the list of cases, as ``tqdm`` does.
    """
    document = {
        "format": FORMAT, "command": command, "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "threads": threads, "rounds": rounds, "l2": "hot: nothing is flushed between runs",
        "environment": environment(_rivals.packages()), "ceilings": ceilings(), "cases": [],
    }  # fmt: skip
    unable = {name: _rivals.missing(name) if name in _rivals.RIVALS else None for name in names}
    workers = {name: Worker(name, threads) for name in names if unable[name] is None}
    judge = Worker("reference", os.cpu_count())
    folder = tempfile.TemporaryDirectory()
    right = str(Path(folder.name) / "right.npz")
    try:
        for case in progress(cases) if progress else cases:
            results = {name: {"status": "not here", "reason": reason} for name, reason in unable.items() if reason}
            able = {}
            for name, worker in workers.items():
                reason = _rivals.refuses(name, case)
                if reason:
                    results[name] = {"status": "not taken", "reason": reason}
                else:
                    able[name] = worker
            if able:
                answer = judge.ask(case, "reference", path=right)
                if "failed" in answer:
                    failed = {"status": "failed", "reason": f"no reference to compare with: {answer['failed']}"}
                    results |= dict.fromkeys(able, failed)
                else:
                    results |= _run_case(case, able, right, rounds, seconds)
            floors = {
                device: floor_seconds(case, measured) for device, measured in document["ceilings"].items() if measured
            }
            row = {"name": case.name, "case": case.as_dict(), "flops": case.flops, "bytes": case.bytes}
            document["cases"].append(row | {"steps": case.steps, "floors": floors, "results": results})
            if out and not is_stream(out):
                write(out, document)
        if out and is_stream(out):  # which holds one document, not one for each case
            write(out, document)
    finally:
        for worker in (judge, *workers.values()):
            worker.close()
        folder.cleanup()
    return document


def _run_case(case, workers, path, rounds, seconds):
    """Name -> result of each worker's rival; path: the file of what is right."""
    results, right = {}, []
    for name, worker in workers.items():
        answer = worker.ask(case, "check", path=path)
        limit = allowed(case)
        if "failed" in answer:
            results[name] = {"status": "failed", "reason": answer["failed"]}
        elif "bound" in answer:
            results[name] = {"status": "timed", **answer, "samples": []}
            right.append(name)
        elif answer["error"] is None or not answer["error"] <= limit:
            reason = f"{answer['where']}: off by {answer['error']} of the largest value, allowed {limit:.2g}"
            results[name] = {"status": "wrong", "reason": reason}
        else:
            results[name] = {"status": "timed", "allowed": limit, **answer, "samples": []}
            right.append(name)
    for _ in range(rounds):
        for name in right:
            results[name]["samples"].append(workers[name].ask(case, "time", seconds=seconds))
            time.sleep(0.05)  # the other's idle threads stop spinning; those of OpenBLAS do after 2^26 clocks
    for name in right:
        samples = results[name]["samples"]
        failed = [sample["failed"] for sample in samples if "failed" in sample]
        if failed:
            results[name] = {"status": "failed", "reason": failed[0]}
            continue
        results[name]["median_s"] = statistics.median(times(samples))
    return results
