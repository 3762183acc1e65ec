"""``gpurnn evaluate``: how good a model is on other data."""

import click

from ..files import naming
from ..tasks.trained import load
from . import options


@click.command(
    "evaluate",
    epilog="""\b
Example:
  gpurnn evaluate runs/text-1 other.txt""",
)
@options.run
@click.argument("files", metavar="FILE...", nargs=-1, type=click.Path(exists=True))
@options.backend
@options.max_memory
@options.as_json
def command(run, files, backend, as_json):
    """How good the model in the folder RUN is on the data in FILEs."""
    trained = load(run, backend)
    if trained.task.evaluate_needs_files and not files:
        raise click.UsageError("Missing argument 'FILE...'.")
    with naming(files):
        result, text = trained.task.evaluate(trained, files)
    if as_json:
        options.print_json(result)
    else:
        options.say(text)
