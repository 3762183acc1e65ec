"""What commands share: their common options, and how they print."""

import json

import click

from .errors import printable
from .files import max_memory as memory_limit
from .files import parse_size, set_max_memory

backend = click.option(
    "--backend",
    type=click.Choice(["auto", "cpu", "numpy", "cupy", "cuda"]),
    default="auto",
    help="Where to compute; 'auto' is the GPU where one works, else the CPU.",
)
as_json = click.option("--json", "as_json", is_flag=True, help="Print one JSON document instead of text.")
run = click.argument("run", type=click.Path(exists=True, file_okay=False))


def _set_limit(ctx, _, value):
    if value is None:
        memory_limit()  # refuses a variable that is wrong before anything is done
        return
    try:
        parse_size(value)
    except ValueError as error:
        raise click.BadParameter(str(error), ctx) from error
    set_max_memory(value)
    ctx.call_on_close(lambda: set_max_memory(None))


max_memory = click.option(
    "--max-memory",
    metavar="SIZE",
    expose_value=False,
    callback=_set_limit,
    help="Most memory that one file may take, such as 4G; 0: no limit  [default: 512M]",
)


def say(text="", **options):
    """``click.echo`` of text that may come from data or models: control characters as escapes."""
    click.echo(printable(text), **options)


def say_pieces(pieces):
    """Print text that comes in pieces, each at once, as ``say`` does; a carriage return waits for what follows it."""
    held = ""
    for piece in pieces:
        text = held + piece
        held = "\r" if text.endswith("\r") else ""
        say(text.removesuffix("\r"), nl=False)
    say(held)


def print_json(document):
    click.echo(json.dumps(document, indent=1))
