"""Exported C headers: bytes, microseconds a timestep, and error, beside ONNX Runtime at one sequence and one timestep.

  python -m bench.c_export

Prints a table in Markdown. Weights and inputs are random. Each time is the least mean of many short turns.
"""

import shutil
import subprocess
import tempfile
import time
from pathlib import Path

import click
import numpy as np

import gpurnn
from gpurnn.files import write_text_atomic
from gpurnn.interop.c import export_c
from gpurnn.pruning import prune

FORMS = {
    "float32": {},
    "int8": {"weights": "int8"},
    "int8, int16": {"weights": "int8", "activations": "int16"},
}
FLAGS = ("-O2", "-O3 -march=native")
MODELS = {"GRU 256 x 3": ("GRU", 256, 3), "LSTM 128": ("LSTM", 128, 1)}
PROGRAM = """
#define _POSIX_C_SOURCE 199309L
#include <stdio.h>
#include <stdlib.h>
#include <time.h>
#define NET_IMPLEMENTATION
#include "net.h"

static net_state state;

int main(int count, char **words) {
    const int turns = atoi(words[1]), steps = atoi(words[2]), T = atoi(words[3]);
    float *x = malloc(sizeof(float) * NET_INPUTS * (size_t)T), y[NET_OUTPUTS];
    if (count != 4 || !x || fread(x, sizeof(float) * NET_INPUTS, (size_t)T, stdin) != (size_t)T) return 1;
    net_init(&state);
    for (int t = 0; t < T; ++t) {
        net_step(&state, x + t * NET_INPUTS, y);
        fwrite(y, sizeof y, 1, stdout);
    }
    double least = 1e30;
    for (int turn = 0; turn < turns; ++turn) {
        struct timespec a, b;
        clock_gettime(CLOCK_MONOTONIC, &a);
        for (int t = 0; t < steps; ++t) net_step(&state, x + t % T * NET_INPUTS, y);
        clock_gettime(CLOCK_MONOTONIC, &b);
        const double each = (1e6 * (double)(b.tv_sec - a.tv_sec) + 1e-3 * (double)(b.tv_nsec - a.tv_nsec)) / steps;
        if (each < least) least = each;
    }
    fprintf(stderr, "%f", least);
    free(x);
    return 0;
}
"""


def model_of(kind, H, layers, dtype):
    """A stack of H units and inputs."""
    return getattr(gpurnn, kind)(H, H, layers, backend="numpy", dtype=dtype, seed=0)


def measure(model, options, x, flags, turns, steps, compiler):
    """(bytes of constants, outputs, microseconds a step) of a header, compiled with some flags."""
    with tempfile.TemporaryDirectory() as folder:
        header, source, program = (Path(folder) / name for name in ("net.h", "main.c", "main"))
        export_c(model, header, **options)
        size = int(header.read_text().split(" bytes of constants")[0].split()[-1])
        write_text_atomic(source, PROGRAM)
        subprocess.run([compiler, "-std=c99", *flags.split(), "-o", program, source], check=True)
        done = subprocess.run([program, str(turns), str(steps), str(len(x))], input=x.tobytes(), capture_output=True)
        if done.returncode:
            raise click.ClickException(f"the compiled model ended with {done.returncode}")
        return size, np.frombuffer(done.stdout, np.float32).reshape(len(x), -1), float(done.stderr)


def measure_onnx(model, x, turns, steps):
    """(bytes, outputs, microseconds a step) of ONNX Runtime on one thread, with states as inputs and outputs."""
    import onnxruntime

    from gpurnn.interop.onnx import export_onnx

    with tempfile.TemporaryDirectory() as folder:
        export_onnx(model, Path(folder) / "net.onnx", lengths=False)
        size, options = (Path(folder) / "net.onnx").stat().st_size, onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        session = onnxruntime.InferenceSession(
            str(Path(folder) / "net.onnx"), options, providers=["CPUExecutionProvider"]
        )
    first, *states = session.get_inputs()
    feeds = {one.name: np.zeros([1 if name == "B" else name for name in one.shape], np.float32) for one in states}

    def step(row):
        y, *last = session.run(None, {first.name: row[None, None]} | feeds)
        feeds.update(zip(feeds, last, strict=True))
        return y[0, 0]

    outputs, least = np.array([step(row) for row in x]), float("inf")
    for _ in range(turns):
        begin = time.perf_counter()
        for t in range(steps):
            step(x[t % len(x)])
        least = min(least, (time.perf_counter() - begin) / steps * 1e6)
    return size, outputs, least


@click.command()
@click.option("--turns", type=click.IntRange(1), default=200, show_default=True)
@click.option("--steps", type=click.IntRange(1), default=20, show_default=True, help="Timesteps of a turn.")
@click.option("--hidden", type=click.IntRange(1), help="Units of each layer  [default: those of the names]")
@click.option("--onnx/--no-onnx", default=True, help="Whether ONNX Runtime is measured, too.")
@click.option("--compiler", default="gcc", show_default=True)
def main(turns, steps, hidden, onnx, compiler):
    """Measure exported headers, and print a table."""
    if shutil.which(compiler) is None:
        raise click.ClickException(f"--compiler: {compiler} is not here")
    click.echo(f"| model | weights | bytes | {' | '.join(f'us, {flags}' for flags in FLAGS)} | error |")
    click.echo("|---|---|---|" + "---|" * (len(FLAGS) + 1))
    for name, (kind, H, layers) in MODELS.items():
        H = hidden or H
        x = np.random.default_rng(0).normal(size=(200, H)).astype(np.float32)
        expected = model_of(kind, H, layers, "float64")
        expected.load_state_dict(model_of(kind, H, layers, "float32").state_dict())
        exact = expected(x[:, None].astype(np.float64))[0][:, 0]
        for density in (1, 0.25):
            model = model_of(kind, H, layers, "float32")
            if density < 1:
                prune(model, density)
                expected.load_state_dict(model.state_dict())
                exact = expected(x[:, None].astype(np.float64))[0][:, 0]
            for form, options in FORMS.items():
                found = [measure(model, options, x, flags, turns, steps, compiler) for flags in FLAGS]
                times = " | ".join(f"{us:.1f}" for _, _, us in found)
                label = form if density == 1 else f"{form}, a quarter of the blocks"
                click.echo(
                    f"| {name} | {label} | {found[0][0]:,} | {times} | {np.abs(found[0][1] - exact).max():.1e} |"
                )
            if onnx and density == 1:
                size, y, us = measure_onnx(model, x, turns, steps)
                click.echo(f"| {name} | ONNX Runtime | {size:,} | {us:.1f} | | {np.abs(y - exact).max():.1e} |")


if __name__ == "__main__":
    main()
