"""``gpurnn bench parallel``: training by several processes on this machine, and what more of them should cost."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import socket
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import click

from .machine import environment
from .parallel_cost import Link, fit_link, predict

MORE = (8, 16, 64, 256, 1024)
_PACKAGES = ("mpi4py", "mpich", "torch")  # whose versions are written, where they are installed
FAR = 2  # times, from which on prediction and measurement have little to do with each other


@click.command("parallel")
@click.option("--ranks", type=click.IntRange(2), default=2, help="Processes, each with one thread.")
@click.option("-H", "--hidden", type=click.IntRange(1), default=256)
@click.option("--layers", type=click.IntRange(1), default=2)
@click.option("--vocabulary", type=click.IntRange(2), default=100)
@click.option("-B", "--batch", type=click.IntRange(1), default=32, help="Sequences of one process.")
@click.option("-T", "--steps", type=click.IntRange(1), default=64)
@click.option("--updates", type=click.IntRange(1), default=20, help="Timed updates in each round.")
@click.option("--rounds", type=click.IntRange(1), default=3, help="How often everything is measured, in turn.")
@click.option("--rival/--no-rival", default=True, help="Time torch with DistributedDataParallel over gloo, too.")
@click.option("--link", "other", metavar="SECONDS,BYTES", help="Predict for this latency and bandwidth instead.")
@click.option("--launch", default="mpirun -n {ranks}", help="The command that starts the processes.")
@click.option("--json", "file", type=click.Path(dir_okay=False), help="Write all figures to this file.")
def command(ranks, hidden, layers, vocabulary, batch, steps, updates, rounds, rival, other, launch, file):
    """Time training by several processes: strong and weak scaling, the time in sums, and a prediction for more.

    Weak scaling: each process has --batch sequences. Strong: they divide as many. Each has one thread. "apart" are as
    many processes that know nothing of each other: what they lose is the machine's.
    """
    spec = {"hidden": hidden, "layers": layers, "vocabulary": vocabulary, "steps": steps, "updates": updates + 3,
            "warmups": 3}  # fmt: skip
    runs = {
        "one": (1, batch, ""),
        "apart": (ranks, batch, ""),
        "weak": (ranks, ranks * batch, ""),
        "strong": (ranks, batch, ""),
    }
    if rival:
        runs |= {"torch one": (1, batch, "torch"), "torch weak": (ranks, ranks * batch, "torch")}
    found = {name: [] for name in runs}
    for number in range(rounds):
        for name, (size, B, kind) in runs.items():
            link = name == "weak" and number == 0
            more = {"batch": B, "rival": kind, "apart": name == "apart", "link": link, "port": _free_port()}
            found[name].append(_start(size, spec | more, launch))
    figures = summarize(found, ranks, other)
    for line in lines(figures):
        click.echo(line)
    if file:
        from gpurnn.files import write_bytes_atomic

        installed = [name for name in _PACKAGES if any(metadata.distributions(name=name))]
        document = {"environment": environment(installed), "spec": spec, "found": found, "figures": figures}
        write_bytes_atomic(Path(file), json.dumps(document).encode())


def _start(size, spec, launch):
    """What process 0 of ``size`` reports. launch: the command that starts several."""
    here = str(Path(__file__).resolve().parents[1])
    more = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "GPURNN_NUM_THREADS": "1"}
    more["PYTHONPATH"] = os.pathsep.join(filter(None, [here, os.environ.get("PYTHONPATH", "")]))
    words = [sys.executable, "-m", f"{__package__}.parallel_worker", json.dumps(spec)]
    if size > 1:
        first, *others = shlex.split(launch.format(ranks=size))
        found = shutil.which(first) or shutil.which(first, path=str(Path(sys.executable).parent))
        if found is None:
            raise click.ClickException(f'there is no {first} here: pip install "gpurnn[mpi]" mpich')
        words = [found, *others, *words]
    done = subprocess.run(words, env=os.environ | more, capture_output=True, text=True)
    if done.returncode:
        raise click.ClickException(f"{' '.join(words[:3])} ... failed: {done.stderr.strip()[-2000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def _free_port():
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def summarize(found, ranks, other=None):
    """The figures that are shown: of the best round each, efficiencies, the link, and predictions.

    found: name -> what each round reported. other: "SECONDS,BYTES" of another link.
    """
    best = {name: min(rounds, key=lambda one: one["quick"]) for name, rounds in found.items()}
    one, apart, weak, strong = (best[name]["quick"] for name in ("one", "apart", "weak", "strong"))
    figures = {
        "ranks": ranks, "update": {name: one["quick"] for name, one in best.items()},
        "machine": one / apart, "group": apart / weak,
        "weak efficiency": one / weak, "strong efficiency": one / strong / ranks,
        "time in sums": best["weak"]["reduce"] / best["weak"]["update"], "bytes": best["one"]["bytes"],
    }  # fmt: skip
    if "torch weak" in best:
        figures["torch weak efficiency"] = best["torch one"]["quick"] / best["torch weak"]["quick"]
    measured = next(one["link"] for one in found["weak"] if one["link"])
    link = fit_link(*map(list, zip(*measured["sums"], strict=True)), measured["message"])
    figures["link"] = {"latency": link.latency, "message": link.message, "bandwidth": link.bandwidth}
    figures["checked"] = predict(link, apart, figures["bytes"], ranks)[0], weak
    if other:
        latency, bandwidth = (float(number) for number in other.split(","))
        link = Link(latency, measured["message"], bandwidth)
    figures["predicted"] = {str(count): predict(link, apart, figures["bytes"], count) for count in (ranks, *MORE)}
    return figures


def lines(figures):
    """The figures as lines."""
    ranks = figures["ranks"]
    for name, seconds in figures["update"].items():
        yield f"{name:12} {1e3 * seconds:9.2f} ms an update (mean of the quickest quarter, best round)"
    yield f"efficiency   weak {figures['weak efficiency']:.3f}, strong {figures['strong efficiency']:.3f}"
    yield f"             weak: {figures['machine']:.3f} of the machine, times {figures['group']:.3f} of the exchange"
    if "torch weak efficiency" in figures:
        yield f"torch DDP    weak {figures['torch weak efficiency']:.3f}"
    yield f"sums         {figures['time in sums']:.1%} of an update; none of it is hidden by the backward pass"
    link = figures["link"]
    yield (
        f"link         latency {1e6 * link['latency']:.0f} us, {1e6 * link['message']:.1f} us a message, "
        f"{link['bandwidth'] / 1e9:.2f} GB/s, fitted to sums of {ranks} processes"
    )
    expected, measured = figures["checked"]
    yield f"model        {1e3 * expected:.2f} ms predicted for {ranks} processes, {1e3 * measured:.2f} ms measured"
    if not 1 / FAR < measured / expected < FAR:
        yield (
            f"             they differ by more than a factor of {FAR}: the predictions below do not hold here. Is the "
            "machine busy, or are there more processes than processors?"
        )
    for count, (seconds, efficiency) in figures["predicted"].items():
        yield f"predicted    {count:>5} processes: {1e3 * seconds:9.2f} ms an update, efficiency {efficiency:.3f}"
