"""The NumPy backend against torch on the CPU, with the same number of threads: ``python -m bench.cpu_rnn``.

Each rival runs in a process of its own, because the thread pools of two BLAS libraries in one process hold the cores
against each other; the processes take turns (A B A B), so that drift of the machine meets both. Same weights, same
input, the same work: forward as inference, or forward and backward to every gradient (dx included), input GEMM
included. Results are compared before anything is timed.
"""

import json
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path

import click
import numpy as np

SIZES = ((1, 64), (1, 256), (16, 128), (32, 256), (64, 512), (128, 1024))
CELLS = ("lstm", "gru", "rnn")
RIVALS = ("gpurnn", "torch", "floor")


def setup_gpurnn(cell, T, B, H, x, doutput):
    import gpurnn

    layer = {"lstm": gpurnn.LSTM, "gru": gpurnn.GRU, "rnn": gpurnn.RNN}[cell](H, H, backend="cpu", seed=0)

    def forward():
        return layer(x)[0]

    def train():
        layer.zero_grad()
        output, _, backward = layer.forward(x)
        dx, _ = backward(doutput)
        return output, dx, layer.grads["weight_hh_l0"]

    return forward, train


def setup_torch(cell, T, B, H, x, doutput):
    import torch

    import gpurnn

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    name = {"lstm": "LSTM", "gru": "GRU", "rnn": "RNN"}[cell]
    layer = getattr(torch.nn, name)(H, H)
    same = getattr(gpurnn, name)(H, H, backend="cpu", seed=0).state_dict()
    layer.load_state_dict({key: torch.from_numpy(value) for key, value in same.items()})
    x, doutput = torch.from_numpy(x).requires_grad_(), torch.from_numpy(doutput)

    def forward():
        with torch.no_grad():
            return layer(x)[0].numpy()

    def train():
        layer.zero_grad()
        x.grad = None
        output, _ = layer(x)
        output.backward(doutput)
        return output.detach().numpy(), x.grad.numpy(), layer.weight_hh_l0.grad.numpy()

    return forward, train


def setup_floor(cell, T, B, H, x, doutput):
    """The matrix products alone, with NumPy's BLAS and in gpurnn's memory order: what no gate arithmetic can
    undercut."""
    rows = {"lstm": 4, "gru": 3, "rnn": 1}[cell] * H
    draw = np.random.default_rng(0)
    w_ih, w_hh = (draw.standard_normal((rows, H), dtype="float32") for _ in range(2))
    gates, h = (draw.standard_normal((n, T, B), dtype="float32") for n in (rows, H))
    z, dh, dw = np.empty((rows, B), "float32"), np.empty((H, B), "float32"), np.empty((rows, H), "float32")
    flat_x, flat_gates, flat_h = x.reshape(T * B, H), gates.reshape(rows, T * B), h.reshape(H, T * B)
    ax, dx = np.empty_like(flat_gates), np.empty_like(flat_x)

    def forward():
        np.matmul(w_ih, flat_x.T, out=ax)
        for t in range(T):
            np.matmul(w_hh, h[:, t], out=z)

    def train():
        forward()
        for _ in range(T):
            np.matmul(w_hh.T, z, out=dh)
        np.matmul(flat_gates, flat_x, out=dw)
        np.matmul(flat_gates, flat_h.T, out=dw)
        np.matmul(flat_gates.T, w_ih, out=dx)

    return forward, train


SETUPS = {"gpurnn": setup_gpurnn, "torch": setup_torch, "floor": setup_floor}


def work():
    """A rival's process: reads cases, sets them up, answers with digests and times."""
    rival = sys.argv[2]
    cases = {}
    for line in sys.stdin:
        order = json.loads(line)
        key = (order["cell"], order["T"], order["B"], order["H"])
        if key not in cases:
            cases.clear()
            cell, T, B, H = key
            draw = np.random.default_rng(0).standard_normal((2, T, B, H)).astype("float32")
            cases[key] = SETUPS[rival](*key, draw[0], draw[1])
        forward, train = cases[key]
        if order["do"] == "digest":
            weights = np.random.default_rng(1)
            answer = []
            for array in (forward(), *train()):
                answer.append(float(np.sum(array.astype("float64") * weights.standard_normal(array.shape))))
                answer.append(float(np.linalg.norm(array.astype("float64"))))
        else:
            run = forward if order["do"] == "forward" else train
            run()
            count, start = 0, time.perf_counter()
            while count < 2 or time.perf_counter() - start < order["seconds"]:
                run()
                count += 1
            answer = (time.perf_counter() - start) / count
        print(json.dumps(answer), flush=True)


class Rival:
    """A worker process that answers one order at a time."""

    def __init__(self, name, threads):
        root = str(Path(__file__).resolve().parent.parent)
        environment = os.environ | {
            key: str(threads) for key in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
        }
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
        command = [sys.executable, __file__, "--worker", name]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )

    def ask(self, **order):
        self.process.stdin.write(json.dumps(order) + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        if not answer:
            raise click.ClickException("a worker ended; its error stands above")
        return json.loads(answer)

    def close(self):
        self.process.stdin.close()
        self.process.wait()


@click.command(context_settings={"show_default": True})
@click.option("--threads", default=os.cpu_count(), help="Threads of BLAS and torch.")
@click.option("-T", "steps", default=50, help="Timesteps.")
@click.option("--cell", "cells", multiple=True, type=click.Choice(CELLS), default=CELLS)
@click.option("--rounds", default=7, help="Turns of each rival; the median counts.")
@click.option("--seconds", default=0.3, help="Least duration of a turn.")
@click.option("--min-h", default=0, help="Only sizes with at least this H.")
@click.option("--json", "path", type=click.Path(dir_okay=False), help="Also write the results here.")
def main(threads, steps, cells, rounds, seconds, min_h, path):
    """Time gpurnn's NumPy backend and torch.nn on the CPU side by side; ratio > 1 means gpurnn is faster.

    floor is the time of the matrix products alone with NumPy's BLAS: torch / floor is the ratio that no NumPy code can
    exceed here.
    """
    rivals = {name: Rival(name, threads) for name in RIVALS}
    rows = []
    click.echo(f"float32, T = {steps}, I = H, {threads} threads; microseconds a timestep, ratio = torch / gpurnn")
    heads = f"{'gpurnn':>10}{'torch':>10}{'floor':>10}{'ratio':>7}{'spread':>12}{'at most':>9}"
    click.echo(f"{'cell':5}{'B':>5}{'H':>6} {'pass':8}{heads}")
    for cell in cells:
        for B, H in SIZES:
            if min_h > H:
                continue
            case = dict(cell=cell, T=steps, B=B, H=H)
            digests = [np.array(rivals[name].ask(do="digest", **case)) for name in RIVALS[:2]]
            if np.abs(digests[0] - digests[1]).max() > 1e-3 * np.abs(digests[1]).max():
                raise click.ClickException(f"results differ, not timed: {case} {digests}")
            for do in ("forward", "train"):
                times = {name: [] for name in rivals}
                for _ in range(rounds):
                    for name, rival in rivals.items():
                        times[name].append(rival.ask(do=do, seconds=seconds, **case))
                        time.sleep(0.05)  # the other's idle threads stop spinning
                ratios = sorted(b / a for a, b in zip(times["gpurnn"], times["torch"], strict=True))
                ours, theirs, floor = (statistics.median(times[name]) / steps * 1e6 for name in RIVALS)
                ratio, limit = statistics.median(ratios), theirs / floor
                figures = dict(gpurnn_us=ours, torch_us=theirs, floor_us=floor, ratio=ratio, ratios=ratios)
                rows.append(case | dict(what=do, **figures))
                spread = f"{ratios[0]:.2f}..{ratios[-1]:.2f}"
                figures = f"{ours:10.1f}{theirs:10.1f}{floor:10.1f}{ratio:7.2f}{spread:>12}{limit:9.2f}"
                click.echo(f"{cell:5}{B:5}{H:6} {do:8}{figures}")
    for rival in rivals.values():
        rival.close()
    if path:
        import torch

        machine = dict(processor=_processor(), cores=os.cpu_count(), python=platform.python_version())
        machine |= dict(numpy=np.__version__, torch=torch.__version__, date=time.strftime("%Y-%m-%d"))
        Path(path).write_text(json.dumps(dict(machine=machine, threads=threads, steps=steps, rows=rows), indent=1))


def _processor():
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        work()
    else:
        main()
