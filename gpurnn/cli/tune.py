"""``gpurnn tune``: the schedules, measured on this machine's GPU."""

import click

from ..dtypes import DTYPES
from ..files import check_target
from . import options


@click.command(
    "tune",
    epilog="""\b
Examples:
  gpurnn tune                            usual sizes in float32, some minutes
  gpurnn tune --cell lstm --hidden 100 --batch 16 --dtype bfloat16
  gpurnn tune --show
The table is in GPURNN_TUNED, else gpurnn/tuned.json in the user's cache.""",
)
@click.option("--dtype", "dtypes", multiple=True, type=click.Choice(DTYPES),
              help="May be repeated  [default: float32]")  # fmt: skip
@options.layer_sizes
@click.option("--show", is_flag=True, help="Print the table, which may be of several machines; measure nothing.")
@click.option("--forget", is_flag=True, help="Delete the table; then estimates decide again.")
@options.as_json
def command(dtypes, cells, hidden, batches, bidirectional, tf32, show, forget, as_json):
    """Measure the schedules on this machine's GPU; layers then take the quickest.

    Times are in microseconds, for one timestep and for what a call does before the first one: of the quickest schedule,
    with how many times as long as estimated it took (x1.00 is as estimated), and of the next. A batch size is rounded
    up to a power of two. For sizes that were not measured, estimates decide.
    """
    from tqdm import tqdm

    from ..backends import get_backend
    from ..backends.cuda.schedules import tuned_table, tuning

    if not show:
        tuned_table.check_file()
        check_target(tuned_table.path())  # before minutes are spent
    if forget:
        tuned_table.path().unlink(missing_ok=True)
        click.echo(f"Forgotten: {tuned_table.path()}")
        return
    if show:
        table = tuned_table.read()
    else:
        ops = get_backend("cuda")
        sizes = cells or tuning.CELLS, hidden or (32, 64, 128, 192, 256), batches or (1, 8, 32, 128)
        problems = tuning.problems(*sizes, dtypes or ("float32",), 1 + bidirectional, tf32)
        table = tuning.tune(ops, problems, lambda jobs: tqdm(jobs, unit=" loops", disable=None))
        table = tuned_table.read() | table  # another may have measured meanwhile
        tuned_table.write(table)
    rows = tuning.rows(table)
    if as_json:
        options.print_json({"file": str(tuned_table.path()), "rows": rows})
        return
    for device in dict.fromkeys(row["device"] for row in rows):
        options.say(device)
        for row in rows:
            if row["device"] == device:
                error = row["errors"].get(next(iter(row["ways"]), None))
                options.say(
                    f"  {row['name']:37}{row['told'][0]:>17}{f'x{error:.2f}' if error else '':>7}"
                    + "".join(f"{text:>17}" for text in row["told"][1:2])
                )
    click.echo(
        f"{len(rows)} time loops are known: {tuned_table.path()}" if rows else "Nothing is known yet: run gpurnn tune"
    )
