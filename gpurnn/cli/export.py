"""``gpurnn export``: a trained model for other programs."""

from pathlib import Path

import click

from . import options


def _onnx(run, path, given):
    from ..interop.onnx.runs import export_run

    _refuse(given, ".onnx", activations=None, name=None)
    if given["weights"] == "int8":
        raise ValueError("weights: an .onnx has those of the run, float16 or bfloat16; int8 is for a .h")
    export_run(run, path, weights=given["weights"], states=given["states"], part=given["part"])


def _safetensors(run, path, given):
    from ..model_file.runs import export_run

    _refuse(given, ".safetensors", weights=None, states=True, part=None, activations=None, name=None)
    export_run(run, path)


def _c(run, path, given):
    from ..interop.c import export_c
    from ..tasks.trained import load

    _refuse(given, ".h", states=True, part=None)
    if given["weights"] not in (None, "int8"):
        raise ValueError(f"weights: a .h has those of the run in float32, or int8; {given['weights']} is for an .onnx")
    model = load(run, "numpy").model
    chosen = {"weights": given["weights"] or "float32", "activations": given["activations"] or "float32"}
    export_c(model, path, name=given["name"], **chosen)


def _refuse(given, suffix, **unset):
    """Raise ValueError for an option that files of this name do not have. unset: option -> its value if not given."""
    for option, value in unset.items():
        if given[option] != value:
            raise ValueError(f"{option}: a {suffix} has no such option: leave it out")


# the end of a file's name -> (run, path, options by name) -> None
WRITERS = {".onnx": _onnx, ".safetensors": _safetensors, ".h": _c}


@click.command(
    "export",
    epilog="""\b
Examples:
  gpurnn export runs/text-1 model.onnx
  gpurnn export runs/text-1 small.onnx --weights float16
  gpurnn export runs/text-1 weights.safetensors
  gpurnn export runs/translate-1 encoder.onnx --part encoder
  gpurnn export runs/series-1 model.h --weights int8""",
)
@options.run
@click.argument("file", metavar="FILE", type=click.Path(dir_okay=False))
@click.option(
    "--weights",
    type=click.Choice(["float16", "bfloat16", "int8"]),
    help="Dtype of the weights: float16 or bfloat16 in an .onnx, int8 in a .h  [default: the run's; float32 in a .h]",
)
@click.option(
    "--states/--no-states", default=True, help="Whether states are inputs and outputs of an .onnx, for streaming."
)
@click.option(
    "--part", type=click.Choice(["encoder", "decoder"]), help="One part of a translate run  [default: the whole model]"
)
@click.option(
    "--activations",
    type=click.Choice(["float32", "int16"]),
    help="With weights in int8: what a .h multiplies them with.  [default: float32]",
)
@click.option("--name", help="What the names in a .h begin with.  [default: the name of FILE]")
@options.overwrite
@options.max_memory
def command(run, file, overwrite, **given):
    """Write the trained model in the folder RUN to FILE, whose name says what it becomes: .onnx, .safetensors or .h.

    An .onnx holds the model, its vocabulary or classes, and what 'gpurnn import' needs to make a run of it again. It
    needs gpurnn[onnx]. A .safetensors holds the model and its vocabulary, too, without what only training needs:
    gpurnn.load(FILE) in Python makes a model of it, 'gpurnn import' a run. A .h is the model as C,
    timestep by timestep, for small devices.
    """
    path = Path(file)
    write = WRITERS.get(path.suffix.lower())
    if write is None:
        known = f"{', '.join([*WRITERS][:-1])} or {[*WRITERS][-1]}"
        raise ValueError(f"FILE: expected a name that ends with {known}, got {path.name}")
    if path.exists() and not overwrite:
        raise ValueError(f"FILE: {path} is there already: choose another name, or replace it with --overwrite")
    write(run, path, given)
    options.say(f"Wrote {path}, {path.stat().st_size:,} bytes.")
