"""How: a process for each rival, turn by turn, every sample kept, the results written after each case.

Processes, because the thread pools of two BLAS libraries in one process hold the cores against each other; turns
(A B A B), so that drift of the machine meets all. Before a rival is timed its results are compared with float64; one
that is wrong is reported as wrong and not timed.
"""

import contextlib
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from . import rivals as _rivals
from .cases import CELLS, Case

FORMAT = 1
EPS = {"float32": 2.0**-23, "float64": 2.0**-52, "float16": 2.0**-10, "bfloat16": 2.0**-7}
TF32 = 2.0**-10


def inputs(case):
    """(weights by torch's names, x, doutput): NumPy arrays, float32, the same in every process; in 16-bit numbers."""
    import gpurnn

    kind = {"lstm": gpurnn.LSTM, "gru": gpurnn.GRU, "rnn": gpurnn.RNN}[case.cell]
    layer = kind(case.I, case.H, case.L, bidirectional=case.bidirectional, backend="numpy", seed=0)
    draw = np.random.default_rng(1)
    D = 2 if case.bidirectional else 1
    x = draw.standard_normal((case.T, case.B, case.I), dtype="float32")
    doutput = draw.standard_normal((case.T, case.B, D * case.H), dtype="float32")
    weights = layer.state_dict()
    if case.dtype in ("float16", "bfloat16"):  # so that no rival differs by how it rounds what it is given
        dtype = gpurnn.module.check_dtype(case.dtype)
        weights = {name: value.astype(dtype).astype("float32") for name, value in weights.items()}
        x, doutput = (array.astype(dtype).astype("float32") for array in (x, doutput))
    return weights, x, doutput


def reference(case, weights, x, doutput):
    """Name -> float64 array: what every rival should find, by gpurnn on NumPy in float64 (proven in its own tests)."""
    from dataclasses import replace

    exact = replace(case, dtype="float64", precision="float32")
    prepare, _ = _rivals.RIVALS["gpurnn-numpy"]
    return prepare(exact, weights, x.astype("float64"), doutput.astype("float64")).results()


def allowed(case):
    """Error that results may have, as a share of an array's largest value: a rounding of the inputs' precision for each
    term of the sums of one step, and for each step that passes it on. Wrong results are wrong by 0.01 and more."""
    eps = TF32 if case.precision == "tf32" else EPS[case.dtype]
    return min(eps * (case.H + case.I) ** 0.5 * case.steps**0.5 * CELLS[case.cell], 0.2)


# ---- a rival's process


def work(name):
    """Reads orders from standard input, a JSON object a line, and answers each with a line of JSON."""
    prepared = key = None
    for line in sys.stdin:
        order = json.loads(line)
        try:
            if order["case"] != key:
                key, case = order["case"], Case(**order["case"])
                prepared = None
                start = time.perf_counter()
                prepare, _ = (_rivals.RIVALS | _rivals.HIDDEN)[name]
                prepared = prepare(case, *inputs(case))
                prepared.run()
                prepared.wait()
                setup = time.perf_counter() - start
            if order["do"] == "check":
                answer = {"setup_s": setup, "peak_host_bytes": _peak_bytes()} | _errors(case, prepared)
            else:
                answer = _time(prepared, order["seconds"])
        except Exception as error:  # a rival's failure is a line of the report, not the end of the run
            key, answer = None, {"failed": f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]}
        print(json.dumps(answer), flush=True)


def _peak_bytes():
    """Most memory this process has held so far, its libraries included; None where the system does not say."""
    try:
        import resource
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _errors(case, prepared):
    expected = reference(case, *inputs(case))
    got = prepared.results()
    worst, where = 0.0, ""
    for name, value in expected.items():
        if name not in got:
            return {"error": None, "where": f"{name} is missing"}
        share = float(np.abs(got[name] - value).max(initial=0) / np.abs(value).max(initial=1e-30))
        if not share <= worst:
            worst, where = share, name
    return {"error": worst, "where": where}


def _time(prepared, seconds):
    """One sample: seconds of one run, over as many runs as fill the given time; on a GPU the device's own time too.

    A third of that time goes before, not measured: the threads of a process that waited for its turn must wake up.
    """
    warm, start = 0, time.perf_counter()
    while warm < 1 or time.perf_counter() - start < seconds / 3:
        prepared.run()
        warm += 1
    prepared.wait()
    count, start = 0, time.perf_counter()
    while True:
        prepared.run()
        count += 1
        if count >= 2 and time.perf_counter() - start >= seconds:
            break
    launched = time.perf_counter() - start
    prepared.wait()
    answer = {
        "host_s": (time.perf_counter() - start) / count,
        "launch_s": launched / count,
        "runs": count,
        "warm": warm,
    }
    if prepared.events:
        answer["device_s"] = prepared.events(count) / count
    return answer


class Worker:
    """A rival's process, which answers one order at a time."""

    def __init__(self, name, threads):
        environment = os.environ | {
            key: str(threads) for key in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
        }
        if __package__ == "bench":  # a checkout: wherever it is run from
            root = str(Path(__file__).resolve().parent.parent)
            environment["PYTHONPATH"] = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
        command = [sys.executable, "-m", __package__, "worker", name]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )

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
        "threads": threads, "rounds": rounds, "environment": environment(), "ceilings": ceilings(), "cases": [],
    }  # fmt: skip
    unable = {name: _rivals.missing(name) if name in _rivals.RIVALS else None for name in names}
    workers = {name: Worker(name, threads) for name in names if unable[name] is None}
    try:
        for case in progress(cases) if progress else cases:
            results = {name: {"status": "not here", "reason": reason} for name, reason in unable.items() if reason}
            results |= _run_case(case, workers, rounds, seconds)
            floor = floor_seconds(case, document["ceilings"])
            row = {"name": case.name, "case": case.as_dict(), "flops": case.flops, "bytes": case.bytes}
            document["cases"].append(row | {"steps": case.steps, "floor_s": floor, "results": results})
            if out:
                write(out, document)
    finally:
        for worker in workers.values():
            worker.close()
    return document


def _run_case(case, workers, rounds, seconds):
    results, right = {}, []
    for name, worker in workers.items():
        reason = _rivals.refuses(name, case)
        if reason:
            results[name] = {"status": "not taken", "reason": reason}
            continue
        answer = worker.ask(case, "check")
        limit = allowed(case)
        if "failed" in answer:
            results[name] = {"status": "failed", "reason": answer["failed"]}
        elif answer["error"] is None or not answer["error"] <= limit:
            reason = f"{answer['where']}: off by {answer['error']} of the largest value, allowed {limit:.2g}"
            results[name] = {"status": "wrong", "reason": reason}
        else:
            results[name] = {"status": "timed", "allowed": limit, **answer, "samples": []}
            right.append(name)
    for _ in range(rounds):
        for name in right:
            results[name]["samples"].append(workers[name].ask(case, "time", seconds=seconds))
            time.sleep(0.02)  # the other's idle threads stop spinning
    for name in right:
        samples = results[name]["samples"]
        failed = [sample["failed"] for sample in samples if "failed" in sample]
        if failed:
            results[name] = {"status": "failed", "reason": failed[0]}
            continue
        results[name]["median_s"] = statistics.median(times(samples))
    return results


def times(samples):
    """Seconds of each sample: the device's where there is one, else the host's."""
    return [sample.get("device_s", sample["host_s"]) for sample in samples]


def write(path, document):
    """Write JSON so that a reader or a kill finds the old file or the new one, never half of one."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".tmp", delete=False) as file:
        json.dump(document, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    os.replace(file.name, path)


# ---- the machine


def environment():
    """Versions and hardware, JSON-ready."""
    import gpurnn

    found = {
        "python": platform.python_version(), "platform": platform.platform(), "cpu": _cpu(), "cpus": os.cpu_count(),
        "numpy": np.__version__, "blas": np.show_config(mode="dicts")["Build Dependencies"]["blas"].get("name"),
        "gpurnn": gpurnn.__version__, "commit": _commit(), "gpu": None, "torch": None, "cudnn": None,
    }  # fmt: skip
    if _rivals.missing("torch-cpu") is None:
        probe = "import torch; print(torch.__version__, torch.backends.cudnn.version())"
        asked = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True)
        if asked.returncode == 0:
            found["torch"], found["cudnn"] = asked.stdout.split()
    if gpurnn.backends()["cuda"] is None:
        cupy = gpurnn.get_backend("cuda").xp
        properties = cupy.cuda.runtime.getDeviceProperties(cupy.cuda.Device().id)
        found["gpu"] = {
            "name": properties["name"].decode(), "cupy": cupy.__version__,
            "driver": cupy.cuda.runtime.driverGetVersion(), "cuda": cupy.cuda.runtime.runtimeGetVersion(),
        }  # fmt: skip
    return found


def _cpu():
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()


def _commit():
    root = Path(__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return None
    asked = subprocess.run(["git", "-C", str(root), "describe", "--always", "--dirty"], capture_output=True, text=True)
    return asked.stdout.strip() or None


def ceilings():
    """What this machine's CPU reaches at best, measured: float32 GEMM (flop/s) and copy (bytes/s, read and written)."""
    a = np.ones((768, 768), np.float32)
    out = np.empty_like(a)
    block = np.ones(1 << 23, np.float32)
    copy = np.empty_like(block)
    gemm = min(_seconds(lambda: np.matmul(a, a, out=out)) for _ in range(5))
    moved = min(_seconds(lambda: np.copyto(copy, block)) for _ in range(5))
    return {"cpu_gemm_flops": 2 * 768**3 / gemm, "cpu_copy_bytes": 2 * block.nbytes / moved}


def _seconds(action):
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def floor_seconds(case, ceilings):
    """The least time on this CPU: the products at the GEMM's best rate, or the bytes at the copy's."""
    return max(case.flops / ceilings["cpu_gemm_flops"], case.bytes / ceilings["cpu_copy_bytes"])
