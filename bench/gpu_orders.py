"""Inside the processes of ``bench on-gpu``: what they are asked to do, and how they answer.

A process is "gpurnn" (CuPy and the library), "torch", "tools" (no GPU: commands), "compile N", or "test" (for the tests
of the script).
"""

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path

import numpy as np

from .gpu_cases import Smoke, from_dict
from .gpu_workers import die_with_the_parent, one_line, plain

LOGGED = 200_000  # characters of a command's output that go to the log
SAMPLE = 1 << 20  # numbers of an array that are compared with torch's


class Session:
    """The state of one process: what it has prepared, and the devices it has opened."""

    def __init__(self, kind, rehearsal):
        self.kind, self.rehearsal = kind.split()[0], rehearsal
        self.prepared = self.probed = None

    def warm(self, pool=True):
        """Import what this kind of process needs and open the GPU. pool: False to have each array allocated by itself,
        so that a checker of memory sees its ends."""
        if self.kind in ("gpurnn", "compile"):
            import gpurnn  # noqa: F401

            if self.rehearsal:
                from .gpu_rehearsal import missing

                if missing():
                    raise RuntimeError(missing())
            if self.kind == "gpurnn":  # to compile, nobody needs the GPU
                self._open()
            if not pool and not self.rehearsal:
                import cupy

                cupy.cuda.set_allocator(None)
        elif self.kind == "torch":
            self._open_torch()
        return {}

    def _open(self):
        if not self.rehearsal:
            import cupy

            int(cupy.zeros(4, "float32").sum())

    def _open_torch(self):
        import torch

        torch.zeros(4, device="cpu" if self.rehearsal else "cuda").sum().item()

    def healthy(self):
        """Whether the CUDA context still computes."""
        try:
            self._open_torch() if self.kind == "torch" else self._open() if self.kind == "gpurnn" else None
        except Exception:
            return False
        return True

    def do(self, order):
        return getattr(self, "do_" + order.pop("do"))(**order)

    def device(self):
        """A fresh device for ``CudaOps``."""
        if self.rehearsal:
            from .gpu_rehearsal import device

            return device()
        import cupy

        from gpurnn.backends.cuda.device import CupyDevice

        return CupyDevice(cupy)

    # ---- versions, compiling

    def do_versions(self):
        from .machine import clocks, environment
        from .rivals import packages

        found = {"environment": environment(packages(), ask_torch=False), "clocks": clocks()}
        if not self.rehearsal:
            import cupy

            try:
                found["nvrtc"] = list(cupy.cuda.nvrtc.getVersion())
            except Exception as error:  # another version of CuPy may hold it elsewhere
                found["nvrtc"] = str(error)
        return found

    def do_torch_versions(self):
        import torch

        found = {"torch": torch.__version__, "torch_cuda": torch.version.cuda}
        return found | {"cudnn": torch.backends.cudnn.version() if torch.cuda.is_available() else None}

    def do_kernels(self, cases):
        """(file, name expression, struct) of all kernels that cases need."""
        from gpurnn.backends.cuda.ops import CudaOps

        from .gpu_smoke import kernels, make_ops

        device, found = self.device(), {}
        for case in map(from_dict, cases):
            ops = make_ops(device, case.kernel) if isinstance(case, Smoke) else CudaOps(device)
            try:
                found |= dict.fromkeys(kernels(case, ops))
            except ValueError:  # no schedule for it: the case itself will say why
                continue
        return {"kernels": sorted(found)}

    def do_compile(self, kernels):
        device, failed = self.device(), {}
        for file, expression, struct in kernels:
            try:
                (device.load if self.rehearsal else device.compile)(file, expression, struct)
            except Exception as error:
                failed[expression] = str(error)[:500]
        return {"failed_kernels": failed}

    # ---- right or wrong

    def do_smoke(self, case):
        from .gpu_smoke import run

        return run(from_dict(case), self.device(), self._poison)

    def _poison(self):
        """Fill memory that the next arrays will be made of with NaN."""
        if not self.rehearsal:  # the emulator watches what was never written
            import cupy

            cupy.get_default_memory_pool().free_all_blocks()
            cupy.empty(1 << 28, "uint8").fill(255)

    # ---- probe

    def do_probe(self, name):
        from . import gpu_rehearsal, probe, probe_memory
        from .probe_device import Gpu

        if self.rehearsal:
            probe_memory.CHASES, probe_memory.KILOBYTES = {"L2": 1 << 10, "memory": 1 << 16}, (2,)
            probe_memory.THREADS = probe.THREADS = 64
        if self.probed is None:
            self.probed = gpu_rehearsal.EmulatedGpu() if self.rehearsal else Gpu()
        if name == "weights_read" and self.rehearsal:
            return {"probe": {name: probe.weights_read(self.probed, 8192)}}
        return {"probe": probe.probe(self.probed, (name,))}

    # ---- against cuDNN

    def do_prepare(self, case, path):
        """Make a case ready, run it once, and leave a sample of its results in a file."""
        from .judge import inputs

        case = from_dict(case)
        start = time.perf_counter()
        self.prepared = None  # its memory is free before the next one's is taken
        prepare, what = self._rival(case)
        self.prepared = prepare(what, *inputs(case))
        self.prepared.run()
        self.prepared.wait()
        setup = time.perf_counter() - start
        results = self.prepared.results()
        np.savez(path, **{name: value.ravel()[:: value.size // SAMPLE | 1] for name, value in results.items()})
        return {"setup_s": setup, "device_bytes": self.prepared.device_bytes()} | self._how(case)

    def _rival(self, case):
        """(how it is prepared, the case as it can do it)."""
        from dataclasses import replace

        from . import rivals
        from .rivals.gpurnn import gpurnn_rival

        if not self.rehearsal:
            if self.kind == "gpurnn":
                self._cooperative_again()
            return rivals.RIVALS["torch-cuda" if self.kind == "torch" else "gpurnn-cuda"][0], case
        if self.kind == "torch":  # which has no 16-bit layers on every processor
            return rivals.RIVALS["torch-cpu"][0], replace(case, dtype="float32", precision="float32")
        from gpurnn.backends.cuda.ops import CudaOps

        self.ops = CudaOps(self.device())
        return gpurnn_rival(self.ops), case

    def _how(self, case):
        """Which candidates the library chooses, and which of its loops were recorded."""
        if self.kind == "torch":
            return {}
        import gpurnn

        from .gpu_smoke import chosen

        ops = self.ops if self.rehearsal else gpurnn.get_backend("cuda")
        return {"chosen": chosen(case, ops), "recordings": ops.recordings()[-8:]}

    @staticmethod
    def _cooperative_again():
        """The backend leaves schedule grid alone for good once it has failed; here each case stands for itself."""
        from dataclasses import replace

        import gpurnn

        device = gpurnn.get_backend("cuda").device
        device.limits = replace(device.limits, cooperative=True)

    def do_time(self, seconds):
        from .run import time_runs

        return time_runs(self.prepared, seconds)

    def do_once(self, case):
        """A case of the headline, three times: for a profiler or a checker that watches this process."""
        from .judge import inputs

        case = from_dict(case)
        prepare, what = self._rival(case)
        prepared = prepare(what, *inputs(case))
        for _ in range(3):
            prepared.run()
        prepared.wait()
        return {}

    # ---- tune

    def do_tune(self, cell, H, B, dtype, tf32, path):
        """Measure the schedules of one size; the table in the file at ``path`` grows."""
        os.environ["GPURNN_TUNED"] = path
        from gpurnn.backends.cuda.ops import CudaOps
        from gpurnn.backends.cuda.schedules import tuned_table, tuning

        ops = CudaOps(self.device(), measured=tuned_table.read())
        ops = ops.with_precision("tf32" if tf32 else "float32")
        how = {"lengths": (2, 3), "least": 0.0} if self.rehearsal else {}
        problems = tuning.problems([cell], [H], [B], [dtype], tf32=tf32)
        table = tuning.tune(ops, problems, **how)
        tuned_table.write(table)
        rows = [row for row in tuning.rows(table) if f" H{H} B{B} {'tf32' if tf32 else dtype} " in row["name"]]
        return {"rows": [{"name": row["name"], "ways": row["ways"]} for row in rows]}

    # ---- commands

    def do_command(self, command, seconds):
        """Run a command for at most this many seconds; its output goes to the log, its end into the answer."""
        print("$", *command, flush=True)
        with tempfile.TemporaryFile() as output:
            process = subprocess.Popen(
                command, stdout=output, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, start_new_session=True,
                preexec_fn=die_with_the_parent, cwd=Path(__file__).resolve().parent.parent,
            )  # fmt: skip
            try:
                code = process.wait(seconds)
            except subprocess.TimeoutExpired:
                code = None
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
            output.seek(0)
            text = output.read().decode(errors="replace")
        print(text if len(text) < LOGGED else f"{text[: LOGGED // 2]}\n...\n{text[-LOGGED // 2 :]}", flush=True)
        lines = [line for line in text.splitlines() if line.strip()]
        return {"exit": code, "last": [line[:300] for line in lines[-8:]], "text": text[-20_000:]}

    # ---- for the tests of the script

    def do_sleep(self, seconds):
        time.sleep(seconds)
        return {"status": "right"}

    def do_hang(self):
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        while True:
            pass

    def do_die(self, how):
        os.kill(os.getpid(), signal.Signals[how])
        time.sleep(10)

    def do_fail(self, text):
        raise ValueError(text)


def work(kind, answers, rehearsal):
    """Do orders until standard input ends."""
    die_with_the_parent()
    session = Session(kind, rehearsal)

    def answer(value):
        os.write(answers, (json.dumps(plain(value)) + "\n").encode())

    try:
        answer(session.warm())
    except Exception as error:
        answer({"failed": one_line(error), "dead": True})
        return
    for line in sys.stdin:
        order = json.loads(line)
        try:
            answer(session.do(order))
        except Exception as error:
            traceback.print_exc()
            dead = not session.healthy()
            answer({"failed": one_line(error) + " (the CUDA context died of it)" * dead, "dead": dead})


def sources():
    """(hash of all sources that a result depends on, how many they are)."""
    import hashlib

    import gpurnn
    from gpurnn.backends.sources import kernel_dir

    folders = Path(gpurnn.__file__).parent, kernel_dir(), Path(__file__).parent
    found, count = hashlib.sha256(), 0
    for folder in folders:
        for path in sorted(folder.rglob("*")):
            if re.search(r"\.(py|cu|cuh|h|cpp)$", path.name):
                found.update(path.relative_to(folder).as_posix().encode() + b"\0" + path.read_bytes())
                count += 1
    return found.hexdigest()[:16], count


def tool(name):
    """The path of one of CUDA's tools, or None."""
    import shutil

    for folder in (None, "/usr/local/cuda/bin"):
        found = shutil.which(name, path=folder)
        if found:
            return found
    return None


def once(kind, order):
    """The command that does one order in a process of its own, for a tool that watches it."""
    from .run import command_of

    return command_of("gpu-worker", kind, "--once", json.dumps(order))
