"""The ``gpurnn`` command and its subcommands. What is heavy is imported by the command that needs it.

Exit codes: 0 done; 1 a run failed (diverged, damaged checkpoint, no GPU, disk full); 2 wrong arguments; 130 Ctrl-C.
"""

import errno
import importlib.metadata
import json
import math
import os
import platform
import sys
import textwrap
import time
from dataclasses import asdict, replace
from pathlib import Path

import click
from click.core import ParameterSource

from .module import DTYPES
from .text import CELLS, OPTIMIZERS, SCHEDULES, CharConfig

try:
    VERSION = importlib.metadata.version("gpurnn")
except importlib.metadata.PackageNotFoundError:
    VERSION = "unknown (a source checkout that is not installed)"


class _Commands(click.Group):
    """Turns the errors that a user can cause into one line and an exit code; loads ``bench`` when it is asked for."""

    def list_commands(self, ctx):
        return sorted([*super().list_commands(ctx), "bench"])

    def get_command(self, ctx, name):
        if name != "bench":
            return super().get_command(ctx, name)
        try:
            from .bench.cli import main as bench
        except ModuleNotFoundError:  # a checkout that is not installed
            from bench.cli import main as bench
        return bench

    def invoke(self, ctx):
        from .backend import BackendError
        from .checkpoint import CheckpointError
        from .training import TrainingError

        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            click.echo("\nInterrupted.", err=True)
            ctx.exit(130)
        except (BackendError, CheckpointError, TrainingError, OSError, MemoryError) as error:
            if ctx.params.get("debug") or getattr(error, "errno", None) == errno.EPIPE:  # click ends quietly on EPIPE
                raise
            _fail(error, 1)
        except (ValueError, TypeError) as error:
            if ctx.params.get("debug"):
                raise
            _fail(error, 2)


def _fail(error, code):
    failure = click.ClickException(" ".join((str(error) or type(error).__name__).split()))
    failure.exit_code = code
    raise failure from error


def _print_json(document):
    click.echo(json.dumps(document, indent=1))


_backend = click.option(
    "--backend",
    type=click.Choice(["auto", "cpu", "numpy", "cupy", "cuda"]),
    default="auto",
    help="Where to compute; 'auto' is the GPU where one works, else the CPU.",
)
_json = click.option("--json", "as_json", is_flag=True, help="Print one JSON document instead of text.")
_run = click.argument("run", type=click.Path(exists=True, file_okay=False))
_files = click.Path(exists=True, dir_okay=False)


@click.group(
    cls=_Commands,
    context_settings={"help_option_names": ["-h", "--help"], "show_default": True, "max_content_width": 80},
    epilog="""\b
A first minute (nothing is downloaded):
  gpurnn train text               train on text that comes with Python
  gpurnn sample runs/text-1       let the model write
  gpurnn plot runs/text-1         draw the loss curves""",
)
@click.version_option(VERSION, "-V", "--version", prog_name="gpurnn")
@click.option("--debug", is_flag=True, help="Show the Python traceback of an error.")
def main(debug):
    """Recurrent networks (LSTM, GRU, RNN) on the CPU and on NVIDIA GPUs."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a terminal that cannot show a character shows "?"


@main.group()
def train():
    """Train a model on one of the built-in tasks."""


_SETTINGS = {  # field of CharConfig -> (type, help)
    "cell": (click.Choice(list(CELLS)), "Recurrent cell."),
    "layers": (int, "Recurrent layers on top of each other."),
    "hidden": (int, "Hidden units in each layer."),
    "embedding": (int, "Size of a character's vector  [default: --hidden, at most the vocabulary's size]"),
    "dropout": (float, "Share of activations dropped between layers."),
    "steps": (int, "Sequence length: characters the gradient flows back through."),
    "batch": (int, "Sequences trained side by side."),
    "optimizer": (click.Choice(list(OPTIMIZERS)), "Optimiser."),
    "lr": (float, "Learning rate at its highest."),
    "weight_decay": (float, "Weight decay."),
    "schedule": (click.Choice(SCHEDULES), "How the learning rate falls: cosine to lr/20, step by 0.3 twice, plateau."),
    "warmup": (int, "Optimiser steps in which the learning rate rises from 0."),
    "clip": (float, "Largest norm of the gradient; 0: no limit."),
    "epochs": (int, "Passes over the text."),
    "valid": (float, "Share of the text, at its end, kept for validation."),
    "patience": (int, "Stop after this many epochs without a better validation loss."),
    "accumulate": (int, "Batches whose gradients make one optimiser step."),
    "dtype": (click.Choice(DTYPES), "Precision: of activations, and of weights in products."),
    "seed": (int, "Seed of all random draws  [default: a fresh one, shown]"),
}


def _settings(command):
    for name, (kind, text) in reversed(_SETTINGS.items()):
        option = click.option(f"--{name.replace('_', '-')}", type=kind, default=getattr(CharConfig, name), help=text)
        command = option(command)
    return command


@train.command(
    "text",
    epilog="""\b
Examples:
  gpurnn train text                              about a minute on a laptop
  gpurnn train text book1.txt book2.txt --epochs 10 --out runs/books
  gpurnn train text book.txt --cell gru --layers 2 --dropout 0.2
  gpurnn train text --out runs/books --resume                 after Ctrl-C
  gpurnn train text --out runs/books --resume --epochs 20     train on
Ctrl-C saves a checkpoint first; --resume then goes on exactly there.""",
)
@click.argument("files", metavar="[FILE]...", nargs=-1, type=_files)
@_settings
@_backend
@click.option("--out", type=click.Path(file_okay=False), help="Folder of the run  [default: a fresh runs/text-N]")
@click.option("--resume", is_flag=True, help="Continue the run in --out with its own settings and text.")
@click.option("--overwrite", is_flag=True, help="Replace the run in --out.")
@click.option("--checkpoint-every", type=click.IntRange(1), help="Save also after every so many optimiser steps.")
@click.option("--progress/--no-progress", default=True, help="Show a progress bar.")
@click.option("--flow", is_flag=True, help="Record how far back in time the gradient reaches.")
@_json
@click.pass_context
def train_text(ctx, files, backend, out, resume, overwrite, checkpoint_every, progress, flow, as_json, **settings):
    """Train a character language model on UTF-8 text FILEs, joined in order.

    It learns to predict the next character; 'gpurnn sample' then lets it write. Without a FILE it trains on the English
    help texts that come with Python.
    """
    from .text import load_run, prepare_text, read_config, sample

    say = lambda line="": click.echo(line, err=as_json)  # noqa: E731  (stdout is for the JSON document)
    if resume and not out:
        raise click.UsageError("--resume needs --out, the folder of the run to continue.")
    if resume and overwrite:
        raise click.UsageError("--resume and --overwrite exclude each other.")
    given = {name for name in ctx.params if ctx.get_parameter_source(name) is not ParameterSource.DEFAULT}
    if resume:
        old = read_config(out)[0]
        config = replace(old, **{name: settings[name] for name in _SETTINGS if name in given})
        backend = backend if "backend" in given else None
        if config.epochs > old.epochs and config.schedule in ("cosine", "step"):
            say(
                f"Note        the {config.schedule} schedule ended with epoch {old.epochs}: the learning rate stays low"
            )
    else:
        config = CharConfig(**settings)
    folder = Path(out) if out else _fresh_folder()
    run = prepare_text(files, folder, config, backend=backend, resume=resume, overwrite=overwrite)

    facts = {
        "run": str(folder),
        "files": run.files,
        "characters": run.characters,
        "vocabulary": len(run.vocabulary),
        "parameters": int(run.model.flat_params.size),
        "backend": run.model.ops.name,
        "config": asdict(config),
    }
    source = ", ".join(Path(file).name for file in run.files) or "Python's help texts (give FILEs for your own)"
    say(f"Text        {source}: {run.characters:,} characters, {len(run.vocabulary)} different ones")
    say(f"Model       {config.cell}, {config.layers} x {config.hidden} units, {facts['parameters']:,} parameters")
    say(f"Backend     {facts['backend']}, {config.dtype}, seed {config.seed}")
    say(f"Run         {folder}, {config.epochs} epochs of {len(run.train_batches)} batches")
    again = f"gpurnn train text --out {folder} --resume"
    start = time.perf_counter()
    try:
        history = run.train(checkpoint_every=checkpoint_every, progress=progress, flow=flow)
    except KeyboardInterrupt:
        saved = (
            f"saved in {folder}. To continue:\n  {again}" if (folder / "last.json").exists() else "nothing saved yet."
        )
        click.echo(f"\nStopped, {saved}", err=True)
        ctx.exit(130)
    seconds = time.perf_counter() - start

    model, vocabulary, _ = load_run(folder, facts["backend"])
    text = "".join([run.opening, *sample(model, vocabulary, run.opening, seed=config.seed)])
    kind = "validation" if config.valid else "training"
    loss = min(record["validation_loss" if config.valid else "train_loss"] for record in history.epochs)
    nats, bits = round(loss, 4), round(loss / math.log(2), 4)
    if as_json:
        facts |= {"epochs": len(history.epochs), "seconds": round(seconds, 3), "loss": kind, "nats": nats, "bits": bits}
        _print_json(facts | {"sample": text})
        return
    say(f"\nDone in {seconds:.0f} s. Best {kind} loss {nats} nats = {bits} bits per character. A sample:\n")
    say(text)
    say(f"\nNext:\n  gpurnn sample {folder} --length 1000\n  gpurnn plot {folder}")
    say(f"  {again} --epochs {2 * config.epochs}")


def _fresh_folder():
    number = 1
    while (folder := Path("runs", f"text-{number}")).exists():
        number += 1
    return folder


@main.command(
    epilog="""\b
Examples:
  gpurnn sample runs/text-1 --prompt "The " --length 1000
  gpurnn sample runs/text-1 --temperature 0        the likeliest each time
  gpurnn sample runs/text-1 --top-p 0.9 --seed 1   the same text each time"""
)
@_run
@click.option("--prompt", default="", show_default=False, help="What the model continues.")
@click.option("--length", default=300, help="Characters to write.")
@click.option("--temperature", default=0.8, help="Below 1: more likely, duller text; above: wilder. 0: the likeliest.")
@click.option("--top-k", type=int, help="Choose among the K likeliest characters only.")
@click.option("--top-p", type=float, help="Choose among the likeliest that have probability P together.")
@click.option("--seed", type=int, help="Seed of the draws  [default: a fresh one]")
@_backend
@_json
def sample(run, prompt, length, temperature, top_k, top_p, seed, backend, as_json):
    """Let the trained model in the folder RUN write text."""
    from .rng import check_seed
    from .text import load_run, sample

    model, vocabulary, _ = load_run(run, backend)
    seed = check_seed(seed)
    characters = sample(model, vocabulary, prompt, length, temperature, top_k, top_p, seed)
    unknown = vocabulary.unknown(prompt)
    if unknown:
        click.echo(f"The model never saw {unknown!r} of the prompt: taken as unknown.", err=True)
    if as_json:
        _print_json({"prompt": prompt, "unknown": unknown, "seed": seed, "text": "".join(characters)})
        return
    click.echo(prompt, nl=False)
    for character in characters:
        click.echo(character, nl=False)
    click.echo()


@main.command(
    epilog="""\b
Example:
  gpurnn evaluate runs/text-1 other.txt"""
)
@_run
@click.argument("files", metavar="FILE...", nargs=-1, required=True, type=_files)
@_backend
@_json
def evaluate(run, files, backend, as_json):
    """How well the model in the folder RUN predicts the text in FILEs."""
    from .text import evaluate_text

    result = evaluate_text(run, files, backend)
    if as_json:
        _print_json(result)
        return
    click.echo(f"Cross-entropy  {result['nats']:.4f} nats = {result['bits']:.4f} bits per character")
    click.echo(f"Perplexity     {result['perplexity']:.3f}")
    click.echo(f"Accuracy       {result['accuracy']:.2%} of the next characters were the likeliest")
    click.echo(f"Text           {result['characters']:,} characters, {result['unknown']:,} unknown to the model")


@main.command()
@_run
def plot(run):
    """Draw the training curves of the folder RUN as PNG files."""
    try:
        from .plots import plot_run

        paths = plot_run(run)
    except ImportError as error:
        raise click.ClickException(f"plots need Matplotlib ({error}). Run: pip install 'gpurnn[plot]'") from error
    for path in paths if isinstance(paths, (list, tuple)) else [paths]:
        click.echo(path)


@main.command(
    epilog="""\b
Examples:
  gpurnn check --quick                  seconds: two options of each layer
  gpurnn check --backend cuda           on a machine with a GPU
  gpurnn check --cell gru --dtype float32 --json
Exit code 0: all right; 1: something computes wrongly, or a backend is missing."""
)
@click.option("--backend", "backends", multiple=True, type=click.Choice(["cpu", "numpy", "cupy", "cuda"]),
              help="Backend to check; may be repeated  [default: all that work here]")  # fmt: skip
@click.option("--cell", "cells", multiple=True, help="Cell, or 'other layers'; may be repeated  [default: all]")
@click.option("--dtype", "dtypes", multiple=True, type=click.Choice(DTYPES), help="May be repeated  [default: all]")
@click.option("--quick", is_flag=True, help="Two options of each layer instead of eight.")
@_json
def check(backends, cells, dtypes, quick, as_json):
    """Check on this machine that every backend computes rightly.

    Gradients against finite differences, results against NumPy in float64, equal bits in two runs, sequences of
    different lengths. The numbers are the largest error as a share of what is allowed.
    """
    from tqdm import tqdm

    from .check import run_checks

    started = time.perf_counter()
    results = run_checks(
        backends, cells, dtypes, quick, lambda jobs: tqdm(jobs, unit=" layers", leave=False, disable=None)
    )
    wrong = [result for result in results if not result.right]
    if as_json:
        rows = [asdict(result) | {"right": result.right, "worst": str(result.worst)} for result in results]
        _print_json({"right": not wrong, "seconds": time.perf_counter() - started, "results": rows})
    else:
        _print_checks(results, wrong)
        click.echo(f"{len(results) - len(wrong)} of {len(results)} right, {time.perf_counter() - started:.0f} s")
    if wrong:
        click.get_current_context().exit(1)


def _print_checks(results, wrong):
    """A line for each backend, cell and dtype, then what is wrong."""
    names = ("gradient", "reference", "repeat", "ragged")
    lines = {}
    for result in results:
        shown = "equal" if result.check == "repeat" else f"{result.worst:.2g}"
        line = lines.setdefault((result.backend, result.cell, result.dtype), {})
        line[result.check] = shown if result.right else "WRONG"
    click.echo(f"{'backend':8}{'cell':16}{'dtype':10}" + "".join(f"{name:>11}" for name in names))
    for (backend, cell, dtype), found in lines.items():
        click.echo(f"{backend:8}{cell:16}{dtype:10}" + "".join(f"{found.get(name, '-'):>11}" for name in names))
    for r in wrong:
        text = f"WRONG {r.backend}, {r.cell}, {r.dtype}, {r.check}: {r.detail}"
        click.echo(textwrap.fill(text, 80, subsequent_indent="  "))


def _sizes(command):
    """Options that name layers: cells, hidden sizes, batches, directions."""
    cells = click.Choice(["rnn", "lstm", "gru"])
    for option in reversed([
        click.option("--cell", "cells", multiple=True, type=cells, help="May be repeated  [default: all]"),
        click.option("--hidden", multiple=True, type=click.IntRange(1), help="H; may be repeated."),
        click.option("--batch", "batches", multiple=True, type=click.IntRange(1), help="B; may be repeated."),
        click.option("--bidirectional", is_flag=True, help="Both directions at once."),
        click.option("--tf32", is_flag=True, help="float32 multiplied as tf32, as with precision='tf32'."),
    ]):  # fmt: skip
        command = option(command)
    return command


@main.command(
    epilog="""\b
Examples:
  gpurnn warmup --dtype float32 --dtype bfloat16
  gpurnn warmup --cell lstm --hidden 128 --batch 32"""
)
@click.option("--dtype", "dtypes", multiple=True, type=click.Choice(DTYPES), help="May be repeated  [default: all]")
@_sizes
def warmup(dtypes, cells, hidden, batches, bidirectional, tf32):
    """Compile the CUDA kernels ahead, so that no first call waits.

    They stay in CuPy's cache (CUPY_CACHE_DIR, else ~/.cupy/kernel_cache) until gpurnn, CuPy or the GPU changes. Kernels
    of schedules that depend on sizes are compiled for those that --hidden and --batch [1] name.
    """
    from tqdm import tqdm

    from .backend import get_backend
    from .cuda_ops import kernel_names, way_name
    from .tuning import CELLS, works

    ops = get_backend("cuda")
    names = kernel_names(dtypes or DTYPES)
    for work in works(cells or CELLS, hidden, batches or (1,), dtypes or DTYPES, 1 + bidirectional, tf32):
        name = way_name(work, ops.choose(work)[0])
        if name:
            names.append(name)
    for file, expression in tqdm(names, unit=" kernels", disable=None):
        ops.device.load(file, expression)
    click.echo(f"{len(names)} kernels are ready for sm_{ops.device.arch}.")


@main.command(
    epilog="""\b
Examples:
  gpurnn tune                            usual sizes in float32, some minutes
  gpurnn tune --cell lstm --hidden 100 --batch 16 --dtype bfloat16
  gpurnn tune --show
The table is kept in GPURNN_TUNED, else gpurnn/tuned.json in the user's cache folder."""
)
@click.option("--dtype", "dtypes", multiple=True, type=click.Choice(DTYPES),
              help="May be repeated  [default: float32]")  # fmt: skip
@_sizes
@click.option("--show", is_flag=True, help="Print what is known of all machines; measure nothing.")
@click.option("--forget", is_flag=True, help="Delete the table; estimates count again.")
@_json
def tune(dtypes, cells, hidden, batches, bidirectional, tf32, show, forget, as_json):
    """Measure the schedules on this machine's GPU; layers then take the quickest.

    Times are microseconds of a timestep and of a call before the first; a batch stands for all up to the next power of
    two. Sizes that were not measured go by estimates.
    """
    from tqdm import tqdm

    from . import tuning
    from .backend import get_backend

    if forget:
        tuning.path().unlink(missing_ok=True)
        click.echo(f"Forgotten: {tuning.path()}")
        return
    if show:
        table = tuning.read()
    else:
        ops = get_backend("cuda")
        sizes = cells or tuning.CELLS, hidden or (32, 64, 128, 192, 256), batches or (1, 8, 32, 128)
        works = tuning.works(*sizes, dtypes or ("float32",), 1 + bidirectional, tf32)
        table = tuning.tune(ops, works, lambda jobs: tqdm(jobs, unit=" walks", disable=None))
        tuning.write(table)
    rows = tuning.rows(table)
    if as_json:
        _print_json({"file": str(tuning.path()), "rows": rows})
        return
    for device in dict.fromkeys(row["device"] for row in rows):
        click.echo(device)
        for row in rows:
            if row["device"] == device:
                click.echo(f"  {row['name']:44}" + "".join(f"{text:>17}" for text in row["told"][:2]))
    click.echo(f"{len(rows)} walks are known: {tuning.path()}" if rows else "Nothing is known yet: run gpurnn tune")


@main.command()
@_json
def info(as_json):
    """What this installation is and what it can use: versions, CPU, GPU."""
    import numpy as np

    from ._kernels import kernel_files
    from .backend import backends, get_backend

    build = np.show_config(mode="dicts")["Build Dependencies"]["blas"]
    blas = {"name": build.get("name"), "version": build.get("version"), "threads": None}
    try:
        from threadpoolctl import threadpool_info

        pools = [pool for pool in threadpool_info() if pool["user_api"] == "blas"]
        if pools:
            blas["threads"] = pools[0]["num_threads"]
    except ImportError:
        pass
    available = backends()
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    document = {
        "gpurnn": VERSION,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "numpy": np.__version__,
        "blas": blas,
        "cpus": cpus,
        "backends": available,
        "gpu": _gpu(get_backend("cuda").xp) if available["cuda"] is None else None,
        "kernels": kernel_files(),
    }
    if as_json:
        _print_json(document)
        return
    threads = "" if blas["threads"] is None else f", {blas['threads']} threads"
    rows = {
        "gpurnn": VERSION,
        "Python": f"{document['python']} on {document['platform']}",
        "NumPy": f"{np.__version__} with {blas['name']} {blas['version']}{threads}; {cpus} CPUs",
        "GPU": ", ".join(f"{name} {value}" for name, value in (document["gpu"] or {"": "none in use"}).items()).strip(),
        "Kernels": f"{len(document['kernels'])} CUDA files: {', '.join(document['kernels'])}",
    }
    rows |= {f"'{name}'": "works" if reason is None else reason for name, reason in available.items()}
    rows["Runs"] = (
        "'numpy': array code, one timestep after another. 'cupy': the same on the GPU. 'cuda': one launch for a whole "
        "sequence where the weights fit on the chip, else a fused kernel and a cuBLAS product for each timestep, "
        "recorded as a CUDA graph; sums, masks, optimisers in kernels of their own. "
        "layer.plan(T, B) says what a call takes; 'gpurnn check' whether all of it is right here."
    )
    for name, value in rows.items():
        click.echo(textwrap.fill(f"{name:10}{value}", 80, subsequent_indent=" " * 10, break_on_hyphens=False))


def _gpu(cupy):
    """Name, memory and versions of the current GPU."""
    properties = cupy.cuda.runtime.getDeviceProperties(cupy.cuda.Device().id)
    driver, runtime = cupy.cuda.runtime.driverGetVersion(), cupy.cuda.runtime.runtimeGetVersion()
    return {
        "name": properties["name"].decode(),
        "compute capability": f"{properties['major']}.{properties['minor']}",
        "GiB": round(properties["totalGlobalMem"] / 2**30, 1),
        "driver CUDA": f"{driver // 1000}.{driver % 1000 // 10}",
        "runtime CUDA": f"{runtime // 1000}.{runtime % 1000 // 10}",
        "CuPy": cupy.__version__,
    }
