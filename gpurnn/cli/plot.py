"""``gpurnn plot``: the training curves of a run."""

from pathlib import Path

import click

from .. import run_folder
from . import options


@click.command("plot")
@options.run
@options.max_memory
def command(run):
    """Draw the training curves of the folder RUN as PNG files."""
    from ..plots import plot_run

    for picture in (Path(run, name) for name in run_folder.PICTURES):
        if not run_folder.is_our_file(picture):
            raise ValueError(f"{picture} is not a picture that gpurnn drew, and stays: move it away")
    paths = plot_run(run)
    for path in paths if isinstance(paths, (list, tuple)) else [paths]:
        options.say(path)
