"""``gpurnn warmup``: the CUDA kernels, compiled ahead of time."""

import os

import click

from ..dtypes import DTYPES
from . import options


@click.command(
    "warmup",
    epilog="""\b
Examples:
  gpurnn warmup --dtype float32 --dtype bfloat16
  gpurnn warmup --cell lstm --hidden 128 --batch 32""",
)
@click.option("--dtype", "dtypes", multiple=True, type=click.Choice(DTYPES), help="May be repeated  [default: all]")
@options.layer_sizes
def command(dtypes, cells, hidden, batches, bidirectional, tf32):
    """Compile the CUDA kernels ahead of time, so that no first call waits.

    They stay in gpurnn's cache (the folder kernels in GPURNN_CACHE, else in ~/.cache/gpurnn) until gpurnn, CUDA or the
    GPU changes. Kernels of schedules that depend on sizes are compiled for those that --hidden and --batch [1] name.
    """
    from concurrent.futures import ThreadPoolExecutor

    from tqdm import tqdm

    from ..backends import get_backend
    from ..backends.cuda.launch import kernel_names, kernels_of
    from ..backends.cuda.schedules.tuning import CELLS, problems

    ops = get_backend("cuda")
    names = kernel_names(dtypes or DTYPES)
    for problem in problems(cells or CELLS, hidden, batches or (1,), dtypes or DTYPES, 1 + bidirectional, tf32):
        names += [name for name in kernels_of(problem, ops.candidate(problem)) if name not in names]
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # the compiler does not hold Python's lock
        compiled = pool.map(lambda name: ops.device.compile(*name), names)
        for name, _ in zip(names, tqdm(compiled, total=len(names), unit=" kernels", disable=None), strict=True):
            ops.device.load(*name)
    click.echo(f"{len(names)} kernels are ready for sm_{ops.device.arch}.")
