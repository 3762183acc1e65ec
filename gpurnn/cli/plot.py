"""``gpurnn plot``: the training curves of a run."""

import click

from . import options


@click.command("plot")
@options.run
@options.max_memory
def command(run):
    """Draw the training curves of the folder RUN as PNG files."""
    from ..plots import plot_run

    paths = plot_run(run)
    for path in paths if isinstance(paths, (list, tuple)) else [paths]:
        options.say(path)
