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
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from gpurnn.files import is_stream

from . import rivals as _rivals
from .cases import Case
from .ceilings import ceilings, floor_seconds
from .doubles import DOUBLES
from .judge import allowed, furthest, inputs, reference
from .latency import clock_runs, latency
from .machine import clocks, environment
from .results_file import FORMAT, in_int8, load, times, write

LONG = 0.1  # seconds of a run, beside which it takes no time for threads to wake up
_FEW = 3  # turns that a rival has at least, however long a run takes
_HOPELESS = 1.5  # times the fastest rival's time

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
                    setup, last = time.perf_counter() - start, 0.0
                if order["do"] == "check":
                    answer, last = _check(prepared, order["path"])
                    answer["setup_s"] = setup + last
                elif order["do"] == "clock":
                    answer = {"nanoseconds": clock_runs(prepared, order["count"])}
                else:
                    answer = time_runs(prepared, order["seconds"], last >= LONG)
                    last = answer["host_s"]
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


def _check(prepared, path):
    """(answer, seconds of a run). A run that is ``LONG`` is the one whose results are compared, and not repeated."""
    start = time.perf_counter()
    found = _errors(prepared, path)
    last = time.perf_counter() - start
    if last < LONG or "bound" in found:
        start = time.perf_counter()
        prepared.run()
        prepared.wait()
        last = time.perf_counter() - start
    return {"peak_host_bytes": _peak_bytes(), "device_bytes": prepared.device_bytes()} | found, last


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


def time_runs(prepared, seconds, long=False):
    """One sample: seconds of one run, over as many runs as fill the given time; on a GPU the device's own time too, and
    the processor time of all threads, which other processes do not add to.

    A third of that time goes before, not measured: the threads of a process that waited for its turn must wake up.
    long: whether a run takes so long that this hardly matters.
    """
    warm, start = 0, time.perf_counter()
    while not long and (warm < 1 or time.perf_counter() - start < seconds / 3):
        prepared.run()
        warm += 1
    speed = clocks() if prepared.events else {}  # while the device works
    prepared.wait()
    warm_s = time.perf_counter() - start
    count, start, processor = 0, time.perf_counter(), time.process_time()
    while True:
        prepared.run()
        count += 1
        if time.perf_counter() - start >= seconds:
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


def environment_of(threads, isa=None):
    """The environment of such a process: this many threads for everybody, and gpurnn on this instruction set.

    The others choose their own, but for AVX2: there those that can be bound to it are. ONNX Runtime cannot.
    """
    names = "OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "GPURNN_NUM_THREADS"
    found = os.environ | dict.fromkeys(names, str(threads))
    if isa:
        found["GPURNN_ISA"] = isa
    if isa == "avx2":
        found |= {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "OPENBLAS_CORETYPE": "Haswell"}
        found["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_cpu_max_isa=AVX2".strip()
    if __package__ == "bench":  # a checkout: wherever it is run from
        root = str(Path(__file__).resolve().parent.parent)
        found["PYTHONPATH"] = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
    return found


class Worker:
    """A rival's process, which answers one order at a time."""

    def __init__(self, name, threads, isa=None):
        self.process = subprocess.Popen(
            command_of("worker", name), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env=environment_of(threads, isa),
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


@dataclass(frozen=True)
class How:
    """How rivals are timed.

    threads: of each. isa: what ``GPURNN_ISA`` forces; None: nothing. rounds: turns of each rival. seconds: least
    duration of a turn. limit: None, or the most seconds that the turns of one rival should take in a case. Then a slow
    rival has fewer of them, three at least; but one where a run takes ``LONG`` and 1.5 times the fastest's with such
    weights, in int8 or not. steps: how many runs are clocked one by one after the turns.
    """

    threads: int
    isa: str | None = None
    rounds: int = 5
    seconds: float = 0.1
    limit: float | None = None
    steps: int = 0

    def turns(self, samples):
        """Name -> how many turns a rival has, by the first sample of each."""
        if self.limit is None:
            return dict.fromkeys(samples, self.rounds)
        seconds, found = {name: times([sample])[0] for name, sample in samples.items()}, {}
        for name, each in seconds.items():
            few = max(_FEW, int(self.limit / max(each, self.seconds * 4 / 3)))
            fastest = min(other for peer, other in seconds.items() if in_int8(peer) == in_int8(name))
            hopeless = each >= LONG and each > _HOPELESS * fastest
            found[name] = 1 if hopeless else min(self.rounds, few)
        return found


def run(cases, names, *, out=None, command="", progress=None, merge=None, **how):
    """Time every case for every rival; returns the document, which is also written to ``out`` after each case.

    progress: wraps the list of cases, as ``tqdm`` does. merge: "missing" or "all": begin with the cases that ``out``
    has, and time those that it lacks, or time all and replace those that it has. how: the fields of ``How``. Raises
    ValueError where ``out`` was timed in another way.
    """
    how = How(**how)
    document = {
        "format": FORMAT, "command": command, "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "threads": how.threads, "isa": how.isa, "rounds": how.rounds, "seconds": how.seconds, "limit": how.limit,
        "l2": "hot: nothing is flushed between runs", "environment": environment(_rivals.packages()), "cases": [],
    }  # fmt: skip
    if merge and out and Path(out).exists():
        document = merged(load(out), document)
        present = {row["name"] for row in document["cases"]}
        cases = [case for case in cases if merge == "all" or case.name not in present]
    else:
        document["ceilings"] = ceilings(how.threads, how.isa)
    unable = {name: _rivals.missing(name) if name in _rivals.RIVALS else None for name in names}
    workers = {name: Worker(name, how.threads, how.isa) for name in names if unable[name] is None}
    judge = Worker("reference", os.cpu_count())
    folder = tempfile.TemporaryDirectory()
    right = str(Path(folder.name) / "right.npz")
    try:
        for case in progress(cases) if progress else cases:
            results = {name: {"status": "not here", "reason": reason} for name, reason in unable.items() if reason}
            results |= _results(case, workers, judge, right, how)
            _put(document["cases"], _row(case, results, document["ceilings"]))
            if out and not is_stream(out):
                write(out, document)
        if out and is_stream(out):  # which holds one document, not one for each case
            write(out, document)
    finally:
        for worker in (judge, *workers.values()):
            worker.close()
        folder.cleanup()
    return document


def merged(old, new):
    """The document ``old``, to which cases are added as ``new``, without any, would time them. Raises ValueError where
    that is not how those of ``old`` were timed."""
    for key in ("threads", "isa", "rounds", "seconds", "limit"):
        if old.get(key) != new[key]:
            raise ValueError(f"--merge: the file has {key} {old.get(key)}, this run {new[key]}: give another --out")
    for key in ("cpu", "gpu"):
        if old["environment"][key] != new["environment"][key]:
            raise ValueError(f"--merge: the file is of {old['environment'][key]}: give another --out")
    more = {"command": new["command"], "started": new["started"], "environment": new["environment"]}
    return old | {"merged": [*old.get("merged", []), more]}


def _put(rows, row):
    """Add a row, or put it in the place of the one of its name."""
    names = [other["name"] for other in rows]
    place = names.index(row["name"]) if row["name"] in names else len(rows)
    rows[place : place + 1] = [row]


def _row(case, results, measured):
    """A case of a document. measured: the ceilings."""
    floors = {device: floor_seconds(case, found) for device, found in measured.items() if found}
    facts = {"flops": case.flops, "bytes": case.bytes, "steps": case.steps}
    return {"name": case.name, "case": case.as_dict()} | facts | {"floors": floors, "results": results}


def _results(case, workers, judge, path, how):
    """Name -> result of each worker's rival; path: where the judge's process writes what is right."""
    refused = {name: _rivals.refuses(name, case) for name in workers}
    results = {name: {"status": "not taken", "reason": reason} for name, reason in refused.items() if reason}
    able = {name: worker for name, worker in workers.items() if name not in results}
    answer = judge.ask(case, "reference", path=path) if able else {}
    if "failed" in answer:
        failed = {"status": "failed", "reason": f"no reference to compare with: {answer['failed']}"}
        return results | dict.fromkeys(able, failed)
    return results | _run_case(case, able, path, how)


def _run_case(case, workers, path, how):
    """Name -> result of rivals that take a case; path: the file of what is right."""
    results, right = {}, []
    for name, worker in workers.items():
        results[name] = _checked(worker.ask(case, "check", path=path), allowed(case, name))
        if results[name]["status"] == "timed":
            right.append(name)
    left = dict.fromkeys(right, 1)
    for turn in range(how.rounds):
        for name in [name for name in right if turn < left[name]]:
            results[name]["samples"].append(workers[name].ask(case, "time", seconds=how.seconds))
            # the other's idle threads stop spinning; those of OpenBLAS do after 2^26 clocks
            time.sleep(0.03 if how.threads > 1 else 0)
        if turn == 0:
            first = {name: results[name]["samples"][0] for name in right}
            left = how.turns({name: sample for name, sample in first.items() if "failed" not in sample})
            left = dict.fromkeys(right, 1) | left
    for name in right:
        samples = results[name]["samples"]
        failed = [sample["failed"] for sample in samples if "failed" in sample]
        if failed:
            results[name] = {"status": "failed", "reason": failed[0]}
            continue
        results[name]["median_s"] = statistics.median(times(samples))
    timed = [name for name in right if results[name]["status"] == "timed"]
    for name, found in latency(case, {name: workers[name] for name in timed}, results, how.steps).items():
        results[name]["latency"] = found
    return results


def _checked(answer, limit):
    """The result that begins with a worker's answer to "check"; limit: the error that is allowed."""
    if "failed" in answer:
        return {"status": "failed", "reason": answer["failed"]}
    if "bound" in answer:
        return {"status": "timed", **answer, "samples": []}
    if answer["error"] is None or not answer["error"] <= limit:
        reason = f"{answer['where']}: off by {answer['error']} of the largest value, allowed {limit:.2g}"
        return {"status": "wrong", "reason": reason}
    return {"status": "timed", "allowed": limit, **answer, "samples": []}
