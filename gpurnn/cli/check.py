"""``gpurnn check``: whether every backend computes correctly here."""

import textwrap
import time
from dataclasses import asdict

import click

from ..dtypes import DTYPES
from . import options


@click.command(
    "check",
    epilog="""\b
Examples:
  gpurnn check --quick                  seconds: two options of each layer
  gpurnn check --backend cuda           on a machine with a GPU
  gpurnn check --cell gru --dtype float32 --json
  gpurnn check --cell cells.py:mine     a cell of yours, in a file or a module
Exit code 0: all right; 1: a wrong result, or a backend is missing.""",
)
@click.option("--backend", "backends", multiple=True, type=click.Choice(["cpu", "numpy", "cupy", "cuda"]),
              help="Backend to check; may be repeated  [default: all that work here]")  # fmt: skip
@click.option("--cell", "cells", multiple=True, metavar="NAME",
              help="Cell, 'other layers', or module:name or file.py:name of your own; may be repeated  "
                   "[default: all but your own]")  # fmt: skip
@click.option("--dtype", "dtypes", multiple=True, type=click.Choice(DTYPES), help="May be repeated  [default: all]")
@click.option("--quick", is_flag=True, help="Two options of each layer instead of eight.")
@options.as_json
def command(backends, cells, dtypes, quick, as_json):
    """Check that every backend computes correctly on this machine.

    Gradients are compared with finite differences, and results with NumPy in float64. Two runs must give equal bits.
    Sequences must give the same in a batch of different lengths, and in pieces, as they give alone and whole. Gates are
    checked in relative terms. Each number shown is the largest error, as a share of what is allowed.

    A cell of your own is one made by gpurnn.cell; the module or file that it is in runs.
    """
    from tqdm import tqdm

    from ..check import is_own_cell, load_cell, plans, run_checks

    cells = [load_cell(cell) if is_own_cell(cell) else cell for cell in cells]
    own = [cell for cell in cells if not isinstance(cell, str)]
    started = time.perf_counter()
    results = run_checks(
        backends, cells, dtypes, quick, lambda jobs: tqdm(jobs, unit=" layers", leave=False, disable=None)
    )
    wrong = [result for result in results if not result.right]
    if as_json:
        rows = [asdict(result) | {"right": result.right, "worst": str(result.worst)} for result in results]
        options.print_json({"right": not wrong, "seconds": time.perf_counter() - started, "results": rows})
    else:
        _print_checks(results, wrong)
        for backend, cell, schedule, reason in plans(own, backends):
            click.echo(_filled(f"{backend} runs {cell} as: {schedule}, {reason}"))
        click.echo(f"{len(results) - len(wrong)} of {len(results)} right, {time.perf_counter() - started:.0f} s")
    if wrong:
        click.get_current_context().exit(1)


def _print_checks(results, wrong):
    """A line for each backend, cell and dtype, then what is wrong."""
    names = {"gradient": 9, "reference": 10, "repeat": 7, "ragged": 8, "pieces": 8, "gates": 8}  # columns of 80
    lines = {}
    for result in results:
        shown = "equal" if result.check == "repeat" else f"{result.worst:.2g}"
        line = lines.setdefault((result.backend, result.cell, result.dtype), {})
        line[result.check] = shown if result.right else "WRONG"
    narrow = options.width() < 30 + sum(names.values())
    if not narrow:
        click.echo(f"{'on':6}{'cell':15}{'dtype':9}" + "".join(f"{name:>{width}}" for name, width in names.items()))
    for (backend, cell, dtype), found in lines.items():
        if narrow:
            shown = ", ".join(f"{name} {found[name]}" for name in names if name in found)
            click.echo(_filled(f"{backend}, {cell}, {dtype}: {shown}"))
        else:
            shown = "".join(f"{found.get(name, '-'):>{width}}" for name, width in names.items())
            click.echo(f"{backend:6}{cell:15}{dtype:9}{shown}")
    for r in wrong:
        click.echo(_filled(f"WRONG {r.backend}, {r.cell}, {r.dtype}, {r.check}: {r.detail}"))


def _filled(text):
    return textwrap.fill(text, min(80, options.width()), subsequent_indent="  ", break_long_words=False)
