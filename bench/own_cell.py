"""A cell of one's own in four libraries: how many lines it takes, and how long a training step.

  python -m bench.own_cell --out bench/results/own_cell_cpu.json

The cell is an LSTM with peepholes; its four texts are ``bench/rivals/own_*.py``. All have to give the same numbers.
Keras runs on JAX.
"""

import contextlib
import os
import shlex
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import click

from .cases import Case
from .results_file import write
from .rivals.own_cell import LIBRARIES, code_lines
from .run import run

RIVALS = tuple(f"own-{library}" for library in LIBRARIES)


@click.command()
@click.option("--threads", type=click.IntRange(1), default=os.cpu_count(), show_default=True)
@click.option("--rounds", type=click.IntRange(1), default=12, show_default=True, help="Turns of each library.")
@click.option("--seconds", type=float, default=0.3, show_default=True, help="Least duration of a turn.")
@click.option("-T", "T", type=click.IntRange(1), default=50, show_default=True)
@click.option("-B", "B", type=click.IntRange(1), default=32, show_default=True)
@click.option("-H", "H", type=click.IntRange(1), default=256, show_default=True)
@click.option("--compile", is_flag=True, help="Also torch.compile, which takes minutes for a loop of 50 timesteps.")
@click.option("--out", type=click.Path(dir_okay=False), help="JSON file.")
def main(threads, rounds, seconds, T, B, H, compile, out):
    """Count the lines of a cell of one's own in four libraries, and time a training step of each."""
    given = [Path(part).name if part == out else part for part in sys.argv[1:]]  # results are committed: no folder
    command = shlex.join(["python", "-m", "bench.own_cell", *given])
    case = Case("peephole", T, B, H, H, what="train")
    names = [*RIVALS, *(["own-torch-compile"] if compile else [])]
    document = run([case], names, threads=threads, rounds=rounds, seconds=seconds, command=command)
    with contextlib.suppress(PackageNotFoundError):
        document["environment"]["keras"] = version("keras")
    document["lines"] = {library: code_lines(library) for library in LIBRARIES}
    if out:
        write(out, document)
    for line in table(document):
        click.echo(line)


def table(document):
    """Lines of text: for each library its lines of code, milliseconds of a training step, and those of processor time
    of all threads; the least of all turns, as other work on the machine only adds to it."""
    yield f"{'':20}{'lines':>6}{'ms':>9}{'processor ms':>14}"
    for name, result in document["cases"][0]["results"].items():
        shown = f"  {result.get('reason')}"
        if result["status"] == "timed":
            wall, processor = (min(sample[clock] for sample in result["samples"]) for clock in ("host_s", "cpu_s"))
            shown = f"{wall * 1e3:9.2f}{processor * 1e3:14.2f}"
        yield f"{name.removeprefix('own-'):20}{document['lines'][name.split('-')[1]]:6}{shown}"


if __name__ == "__main__":
    main()
