"""``gpurnn import``: a run of a file that ``gpurnn export`` wrote."""

import click

from . import options


@click.command(
    "import",
    epilog="""\b
Examples:
  gpurnn import model.onnx runs/imported
  gpurnn import weights.safetensors runs/imported""",
)
@click.argument("file", metavar="FILE", type=click.Path(exists=True, dir_okay=False))
@click.argument("run", metavar="RUN", type=click.Path(file_okay=False))
@options.max_memory
def command(file, run):
    """Make the folder RUN of FILE, an .onnx or a .safetensors that 'gpurnn export' wrote.

    The run can be used like one that was trained here, and be where another one starts (--from); it cannot be resumed.
    An .onnx needs gpurnn[onnx].
    """
    if file.lower().endswith(".safetensors"):
        from ..model_file.runs import import_run
    else:
        from ..interop.onnx.runs import import_run
    import_run(file, run)
    options.say(f"Wrote {run}: see 'gpurnn info {options.quoted(run)}'.")
