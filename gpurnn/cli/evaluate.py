"""``gpurnn evaluate``: how good a model is on other data."""

from dataclasses import fields, replace

import click

from ..files import naming
from ..tasks.trained import load
from . import options


@click.command(
    "evaluate",
    epilog="""\b
Examples:
  gpurnn evaluate runs/text-1 other.txt
  gpurnn evaluate runs/classify-1 other.csv --text review --label stars""",
)
@options.run
@click.argument("files", metavar="FILE...", nargs=-1, type=options.INPUT)
@options.reading("encoding", "text", "label", "strict")
@options.backend
@options.max_memory
@options.as_json
def command(run, files, encoding, text, label, strict, backend, as_json):
    """Measure how good the model in the folder RUN is on the data in FILEs."""
    trained = load(run, backend)
    if trained.task.evaluate_needs_files and not files:
        raise click.UsageError("Missing argument 'FILE...'.")
    trained.settings = with_reading(trained, encoding=encoding, text=text, label=label, strict=strict)
    with naming(files):
        result, summary = trained.task.evaluate(trained, files)
    if as_json:
        options.print_json(result)
    else:
        options.say(options.wrapped(summary))


def with_reading(trained, **given):
    """The settings of a run, with the options for reading files that the command line gives. Raises UsageError for an
    option that the run's task does not have."""
    given = {name: value for name, value in given.items() if value is not None}
    unknown = given.keys() - {f.name for f in fields(trained.settings)}
    if unknown:
        raise click.UsageError(f"--{min(unknown)} is not for a run of the task {trained.task.name}.")
    return replace(trained.settings, **given)
