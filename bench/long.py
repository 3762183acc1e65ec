"""Long sequences: bytes and time of a training step against T, with everything saved and in segments.

  python -m bench.long --out bench/results/long_cpu.json

An LSTM on the CPU (I 8, H 32, B 1). Each measurement is a process of its own, which reads the peak of its resident
memory from Linux. x, the output and their gradients grow with T whatever is saved; what is counted is the rest.
"""

import json
import os
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path

import click
import numpy as np

import gpurnn
from gpurnn.files import write_text_atomic

I, H, WARM = 8, 32, 2000  # WARM: timesteps of the call that loads code and threads
MEMORIES = {"everything saved": None, "sqrt": "sqrt"}


def resident(what):
    """Bytes of resident memory, "VmRSS" now or "VmHWM" at the peak: proc(5)."""
    text = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(re.search(rf"{what}:\s*(\d+) kB", text)[1]) << 10


def measure(T, memory, seed=0):
    """One training step, in this process: a dictionary of bytes and seconds."""
    layer = gpurnn.LSTM(I, H, backend="cpu", seed=seed, memory=memory)
    x = np.random.default_rng(seed).standard_normal((T, 1, I), dtype="float32")
    doutput = np.ones((T, 1, H), "float32")
    layer.forward(x[:WARM])[2](doutput[:WARM])
    layer.ops.empty_cache()
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # the peak begins anew
    before, wall, processor = resident("VmRSS"), time.perf_counter(), time.process_time()
    output, _, backward = layer.forward(x)
    dx, _ = backward(doutput)
    wall, processor = time.perf_counter() - wall, time.process_time() - processor
    peak, plan, returned = resident("VmHWM") - before, layer.plan(T, 1), output.nbytes + dx.nbytes
    return {
        "T": T, "peak_bytes": peak, "beyond_bytes": peak - returned, "plan_bytes": plan.peak_bytes,
        "recompute": plan.recompute, "host_s": wall, "cpu_s": processor,
    }  # fmt: skip


def measured_apart(T, memory):
    """``measure`` in a fresh process."""
    code = f"import json; from bench import long; print(json.dumps(long.measure({T}, {memory!r})))"
    command = [sys.executable, "-c", code]
    found = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[1])
    return json.loads(found.stdout)


def best(samples):
    """Of several turns the least of each number, as other work on the machine only adds to it."""
    return {name: min(sample[name] for sample in samples) for name in samples[0]}


def table(document):
    """Lines of text: for each T and memory megabytes beyond output and dx, what ``plan`` says of the peak as a share of
    what was measured, and microseconds of processor time a timestep."""
    yield f"{'T':>9}  {'memory':18}{'MB beyond':>10}{'plan':>7}{'us/step':>9}{'run twice':>11}"
    for name, rows in document["measured"].items():
        for row in rows:
            share, micros = row["plan_bytes"] / max(row["peak_bytes"], 1), row["cpu_s"] / row["T"] * 1e6
            numbers = f"{row['beyond_bytes'] / 1e6:10.1f}{share:7.2f}{micros:9.2f}{row['recompute']:11.0%}"
            yield f"{row['T']:9}  {name:18}{numbers}"


def picture(document, path):
    """Bytes and processor time against T."""
    from gpurnn.plots import new_figure, save_figure

    figure = new_figure(9, 3.6)
    for axis, key, title in zip(
        figure.subplots(1, 2),
        ("beyond_bytes", "cpu_s"),
        ("MB beyond output and dx", "microseconds a timestep"),
        strict=True,
    ):
        for name, rows in document["measured"].items():
            T = [row["T"] for row in rows]
            values = [row[key] / (1e6 if key == "beyond_bytes" else row["T"] * 1e-6) for row in rows]
            axis.plot(T, values, "o-", label=name)
        axis.set_xscale("log")
        axis.set_yscale("log" if key == "beyond_bytes" else "linear")
        axis.set_ylim(bottom=None if key == "beyond_bytes" else 0)
        axis.set_xlabel("T")
        axis.set_title(title)
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    save_figure(figure, path)


@click.command()
@click.option("-T", "lengths", type=click.IntRange(1), multiple=True, default=(10**3, 10**4, 10**5, 10**6))
@click.option("--rounds", type=click.IntRange(1), default=5, show_default=True, help="Turns of each measurement.")
@click.option("--out", type=click.Path(dir_okay=False), help="JSON file; a picture beside it, .png.")
def main(lengths, rounds, out):
    """Measure bytes and seconds of a training step of T timesteps, with and without memory='sqrt'."""
    from .machine import environment

    given = [Path(part).name if part == out else part for part in sys.argv[1:]]  # results are committed: no folder
    samples = {name: {T: [] for T in lengths} for name in MEMORIES}
    for _ in range(rounds):  # in turns, so that what else runs on the machine meets all of them
        for T in lengths:
            for name, memory in MEMORIES.items():
                samples[name][T].append(measured_apart(T, memory))
    document = {
        "format": 1, "kind": "long", "command": shlex.join(["python", "-m", "bench.long", *given]),
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), "environment": environment(()),
        "threads": os.environ.get("GPURNN_NUM_THREADS"), "rounds": rounds, "sizes": {"I": I, "H": H, "B": 1},
        "measured": {name: [best(found) for found in by_T.values()] for name, by_T in samples.items()},
    }  # fmt: skip
    for line in table(document):
        click.echo(line)
    if out:
        write_text_atomic(out, json.dumps(document, indent=1))
        picture(document, Path(out).with_suffix(".png"))


if __name__ == "__main__":
    main()
