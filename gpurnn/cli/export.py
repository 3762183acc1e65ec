"""``gpurnn export``: a trained model for other programs."""

from pathlib import Path

import click

from . import options


def _onnx(run, path, given):
    from ..interop.onnx.runs import export_run

    export_run(run, path, weights=given["weights"], states=given["states"], part=given["part"])


def _safetensors(run, path, given):
    from ..model_file.runs import export_run

    plain = {"weights": None, "states": True, "part": None}
    for name in plain:
        if given[name] != plain[name]:
            raise ValueError(f"--{name}: a .safetensors holds the whole model as it is; it is an option of an .onnx")
    export_run(run, path)


# the end of a file's name -> (run, path, options by name) -> None
WRITERS = {".onnx": _onnx, ".safetensors": _safetensors}


@click.command(
    "export",
    epilog="""\b
Examples:
  gpurnn export runs/text-1 model.onnx
  gpurnn export runs/text-1 small.onnx --weights float16
  gpurnn export runs/text-1 weights.safetensors
  gpurnn export runs/translate-1 encoder.onnx --part encoder""",
)
@options.run
@click.argument("file", metavar="FILE", type=click.Path(dir_okay=False))
@click.option(
    "--weights",
    type=click.Choice(["float16", "bfloat16"]),
    help="Dtype of the weights in an .onnx  [default: the run's]",
)
@click.option(
    "--states/--no-states", default=True, help="Whether states are inputs and outputs of an .onnx, for streaming."
)
@click.option(
    "--part", type=click.Choice(["encoder", "decoder"]), help="One part of a translate run  [default: the whole model]"
)
@options.overwrite
@options.max_memory
def command(run, file, overwrite, **given):
    """Write the trained model in the folder RUN to FILE, whose name says what it becomes: .onnx or .safetensors.

    An .onnx holds the model, its vocabulary or classes, and what 'gpurnn import' needs to make a run of it again. It
    needs gpurnn[onnx]. A .safetensors holds the model and its vocabulary, too, without what only training needs:
    gpurnn.load(FILE) in Python makes a model of it, and 'gpurnn info FILE' describes it.
    """
    path = Path(file)
    write = WRITERS.get(path.suffix.lower())
    if write is None:
        raise ValueError(f"FILE: expected a name that ends with {' or '.join(WRITERS)}, got {path.name}")
    if path.exists() and not overwrite:
        raise ValueError(f"FILE: {path} is there already: choose another name, or replace it with --overwrite")
    write(run, path, given)
    options.say(f"Wrote {path}, {path.stat().st_size:,} bytes.")
