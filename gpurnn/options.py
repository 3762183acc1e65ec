"""What commands share: their common options, and how they print JSON."""

import json

import click

backend = click.option(
    "--backend",
    type=click.Choice(["auto", "cpu", "numpy", "cupy", "cuda"]),
    default="auto",
    help="Where to compute; 'auto' is the GPU where one works, else the CPU.",
)
as_json = click.option("--json", "as_json", is_flag=True, help="Print one JSON document instead of text.")
run = click.argument("run", type=click.Path(exists=True, file_okay=False))


def print_json(document):
    click.echo(json.dumps(document, indent=1))
