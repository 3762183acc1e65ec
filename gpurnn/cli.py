"""The ``gpurnn`` command and its subcommands. What is heavy is imported by the command that needs it.

Exit codes: 0 done; 1 a run failed (diverged, damaged run or checkpoint, folder in use, no GPU, disk full); 2 wrong
arguments, or a file that is not what it should be; 130 Ctrl-C; 143 SIGTERM.
"""

import contextlib
import errno
import importlib.metadata
import os
import platform
import sys
import textwrap
import time
from dataclasses import asdict, fields
from pathlib import Path

import click
from click.core import ParameterSource

from . import _interrupt, options
from .dtypes import DTYPES
from .errors import one_line, printable
from .files import check_target
from .tasks import TASKS, get_task
from .tasks.run import Settings, kind_of

_VERBS = {verb: task for task, verbs in TASKS.items() for verb in verbs}

try:
    VERSION = importlib.metadata.version("gpurnn")
except importlib.metadata.PackageNotFoundError:
    VERSION = "unknown (a source checkout that is not installed)"


class _Whole(click.Group):
    """Shows the first sentence of each command whole, where click cuts it to a line."""

    def format_commands(self, ctx, formatter):
        commands = {name: self.get_command(ctx, name) for name in self.list_commands(ctx)}
        with formatter.section("Commands"):
            formatter.write_dl([(name, command.get_short_help_str(limit=1000)) for name, command in commands.items()])


class _Commands(_Whole):
    """Turns the errors that a user can cause into one line and an exit code; loads ``bench`` and the tasks' verbs when
    they are asked for."""

    def list_commands(self, ctx):
        return sorted({*super().list_commands(ctx), "bench", *_VERBS})

    def get_command(self, ctx, name):
        if name in _VERBS:
            return get_task(_VERBS[name]).verbs[name]
        if name != "bench":
            return super().get_command(ctx, name)
        try:
            from .bench.cli import main as bench
        except ModuleNotFoundError:  # a checkout that is not installed
            from bench.cli import main as bench
        return bench

    def main(self, *arguments, **more):
        _interrupt.imports_done()
        return super().main(*arguments, **more)

    def make_context(self, *arguments, **more):
        try:
            return super().make_context(*arguments, **more)
        except KeyboardInterrupt:
            _interrupted(terminated=False)

    def invoke(self, ctx):
        try:
            return self._invoke(ctx)
        except KeyboardInterrupt as signal:
            _interrupted(
                terminated=type(signal).__name__ == "Terminated"
            )  # of gpurnn/train, which may not be imported yet

    def _invoke(self, ctx):
        from .checkpoint import CheckpointError
        from .errors import BackendError, DivergedError
        from .train import TrainingError

        try:
            return super().invoke(ctx)
        except click.UsageError as error:
            error.message = printable(error.message)
            raise
        except (
            BackendError, CheckpointError, DivergedError, TrainingError, OSError, MemoryError, ImportError
        ) as error:  # fmt: skip
            if ctx.params.get("debug") or getattr(error, "errno", None) == errno.EPIPE:  # click ends quietly on EPIPE
                raise
            _fail(error, 1)
        except (ValueError, TypeError) as error:
            if ctx.params.get("debug"):
                raise
            _fail(error, 2)


def _interrupted(terminated):
    click.echo("\nInterrupted.", err=True)
    sys.exit(143 if terminated else 130)


def _fail(error, code):
    failure = click.ClickException(one_line(error, 2000))
    failure.exit_code = code
    raise failure from error


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


class _Tasks(_Whole):
    """One command for each task, made from its ``Settings`` when it is asked for."""

    def list_commands(self, ctx):
        return list(TASKS)

    def get_command(self, ctx, name):
        return _train_command(get_task(name)) if name in TASKS else None


@main.group(cls=_Tasks)
def train():
    """Train a model on one of the built-in tasks."""


def _train_command(task):
    """``gpurnn train TASK``: the task's files, its settings as options, its own ones first."""
    settings, shared = fields(task.Settings), {f.name for f in fields(Settings)}
    params = [click.Argument(["files"], metavar=f"[{task.files_help}]...", nargs=-1, type=click.Path(exists=True))]
    params += [_option(f) for f in sorted(settings, key=lambda f: f.name in shared)]

    def command(**arguments):
        _train(task, **arguments)

    command.__doc__ = task.__doc__
    for decorate in reversed(_run_options(task.name)):
        command = decorate(command)
    made = click.command(
        task.name,
        epilog=f"""\b
Examples:
{task.examples.strip(chr(10))}
  gpurnn train {task.name} --out runs/mine --resume                 after Ctrl-C
  gpurnn train {task.name} --out runs/mine --resume --epochs 20     train on
Ctrl-C saves a checkpoint first; --resume then goes on exactly there.""",
    )(command)
    made.params = params + made.params
    return made


def _option(f):
    """The command-line option of a field of ``Settings``."""
    kind, _ = kind_of(f)
    name, text = f"--{f.name.replace('_', '-')}", f.metadata["help"]
    if f.metadata.get("shown"):
        text += f"  [default: {f.metadata['shown']}]"
    if kind is bool:
        return click.Option([f"{name}/--no-{name[2:]}"], default=f.default, help=text)
    choices = f.metadata.get("choices")
    return click.Option([name], type=click.Choice(choices) if choices else kind, default=f.default, help=text)


def _run_options(name):
    return (
        options.backend,
        click.option("--out", type=click.Path(file_okay=False),
                     help=f"Folder of the run  [default: a fresh runs/{name}-N]"),
        click.option("--resume", is_flag=True, help="Continue the run in --out with its own settings and data."),
        click.option("--overwrite", is_flag=True, help="Replace the run in --out."),
        click.option("--checkpoint-every", type=click.IntRange(1), help="Save also after this many updates."),
        click.option("--progress/--no-progress", default=True, help="Show a progress bar."),
        click.option("--flow", is_flag=True, help="Record how far back in time the gradient reaches."),
        options.max_memory,
        options.as_json,
    )  # fmt: skip


def _train(task, files, backend, out, resume, overwrite, checkpoint_every, progress, flow, as_json, **settings):
    """Train a model of ``task`` and say what is done."""
    from .tasks.run import fresh_folder, prepare, read_run

    ctx = click.get_current_context()
    say = lambda line="": options.say(line, err=as_json)  # noqa: E731  (stdout is for the JSON document)
    if resume and not out:
        raise click.UsageError("--resume needs --out, the folder of the run to continue.")
    if resume and overwrite:
        raise click.UsageError("--resume and --overwrite exclude each other.")
    if task.train_needs_files and not files and not resume:
        raise click.UsageError(f"Missing argument '{task.files_help}...'.")
    if resume:
        given = {name for name in ctx.params if ctx.get_parameter_source(name) is not ParameterSource.DEFAULT}
        old = read_run(out, task.name)[0]
        settings = {name: value for name, value in settings.items() if name in given}
        backend = backend if "backend" in given else None
        if settings.get("epochs", 0) > old.epochs and old.schedule in ("cosine", "step"):
            ended = f"the {old.schedule} schedule ended with epoch {old.epochs}: the learning rate stays low"
            say(_row("Note", ended))
    folder = Path(out) if out else fresh_folder(task.name)
    try:
        run = prepare(task.name, files, folder, backend=backend, resume=resume, overwrite=overwrite, **settings)
    except BaseException:
        if not out:
            with contextlib.suppress(OSError):
                folder.rmdir()
        raise
    with run:
        _train_prepared(ctx, say, run, checkpoint_every, progress, flow, as_json)


def _train_prepared(ctx, say, run, checkpoint_every, progress, flow, as_json):
    from .train import Terminated

    task, folder = run.task, run.folder
    facts = {
        "run": str(folder),
        "task": task.name,
        "files": run.files,
        "data": run.data.summary,
        "parameters": run.model.parameter_count,
        "backend": run.model.ops.name,
        "settings": asdict(run.settings),
    }
    chosen = run.settings
    source = [Path(file).name for file in run.files] or [task.without_files]
    source = ", ".join(source if len(source) < 4 else [source[0], f"{len(source) - 1} more files"])
    rows = {
        "Data": f"{source}: {run.data.summary}",
        "Model": f"{chosen.cell}, {chosen.layers} x {chosen.hidden} units, {facts['parameters']:,} parameters",
        "Backend": f"{facts['backend']}, {chosen.dtype}, seed {chosen.seed}",
        "Run": f"{folder}, epochs: {chosen.epochs}, batches in each: {len(run.data.train)}",
    }
    for name, value in rows.items():
        say(_row(name, value))
    again = f"gpurnn train {task.name} --out {folder} --resume"
    start = time.perf_counter()
    try:
        history = run.train(checkpoint_every=checkpoint_every, progress=progress, flow=flow)
    except KeyboardInterrupt as signal:
        saved = (
            f"saved in {folder}. To continue:\n  {again}" if (folder / "last.json").exists() else "nothing saved yet."
        )
        options.say(f"\nStopped, {saved}", err=True)
        ctx.exit(143 if isinstance(signal, Terminated) else 130)
    seconds = time.perf_counter() - start

    result, text = run.finish(history)
    if as_json:
        options.print_json(facts | {"epochs": len(history.epochs), "seconds": round(seconds, 3)} | result)
        return
    say(f"\nDone in {seconds:.0f} s.\n{text}")
    say("\nNext:")
    for line in (*task.next, "gpurnn plot {run}"):
        say(f"  {line.format(run=folder)}")
    say(f"  {again} --epochs {2 * chosen.epochs}")


def _row(name, value):
    """A line of a list of facts, as many of a terminal as it takes."""
    return textwrap.fill(
        f"{name:12}{value}", 80, subsequent_indent=" " * 12, break_on_hyphens=False, break_long_words=False
    )


@main.command(
    epilog="""\b
Example:
  gpurnn evaluate runs/text-1 other.txt"""
)
@options.run
@click.argument("files", metavar="FILE...", nargs=-1, type=click.Path(exists=True))
@options.backend
@options.max_memory
@options.as_json
def evaluate(run, files, backend, as_json):
    """How good the model in the folder RUN is on the data in FILEs."""
    from .files import naming
    from .tasks.run import load

    trained = load(run, backend)
    if trained.task.evaluate_needs_files and not files:
        raise click.UsageError("Missing argument 'FILE...'.")
    with naming(files):
        result, text = trained.task.evaluate(trained, files)
    if as_json:
        options.print_json(result)
    else:
        options.say(text)


@main.command()
@options.run
@options.max_memory
def plot(run):
    """Draw the training curves of the folder RUN as PNG files."""
    try:
        from .plots import plot_run

        paths = plot_run(run)
    except ImportError as error:
        raise click.ClickException(f"plots need Matplotlib ({error}). Run: pip install 'gpurnn[plot]'") from error
    for path in paths if isinstance(paths, (list, tuple)) else [paths]:
        options.say(path)


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
@options.as_json
def check(backends, cells, dtypes, quick, as_json):
    """Check on this machine that every backend computes rightly.

    Gradients against finite differences, results against NumPy in float64, equal bits in two runs, sequences of
    different lengths and in pieces, gates in relative terms. The numbers are the largest error as a share of what is
    allowed.
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
        options.print_json({"right": not wrong, "seconds": time.perf_counter() - started, "results": rows})
    else:
        _print_checks(results, wrong)
        click.echo(f"{len(results) - len(wrong)} of {len(results)} right, {time.perf_counter() - started:.0f} s")
    if wrong:
        click.get_current_context().exit(1)


def _print_checks(results, wrong):
    """A line for each backend, cell and dtype, then what is wrong."""
    names = {"gradient": 9, "reference": 10, "repeat": 7, "ragged": 8, "pieces": 8, "gates": 8}  # columns of 80
    lines = {}
    for result in results:
        shown = "equal" if result.check == "repeat" else f"{result.worst:.2g}"
        line = lines.setdefault((result.backend, result.cell, result.dtype), {})
        line[result.check] = shown if result.right else "WRONG"
    click.echo(f"{'on':6}{'cell':15}{'dtype':9}" + "".join(f"{name:>{width}}" for name, width in names.items()))
    for (backend, cell, dtype), found in lines.items():
        shown = "".join(f"{found.get(name, '-'):>{width}}" for name, width in names.items())
        click.echo(f"{backend:6}{cell:15}{dtype:9}{shown}")
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

    They stay in gpurnn's cache (the folder kernels in GPURNN_CACHE, else in ~/.cache/gpurnn) until gpurnn, CUDA or the
    GPU changes. Kernels of schedules that depend on sizes are compiled for those that --hidden and --batch [1] name.
    """
    from concurrent.futures import ThreadPoolExecutor

    from tqdm import tqdm

    from .backends import get_backend
    from .backends.cuda.launch import kernel_names, kernel_of
    from .backends.cuda.schedules.tuning import CELLS, problems

    ops = get_backend("cuda")
    names = kernel_names(dtypes or DTYPES)
    for problem in problems(cells or CELLS, hidden, batches or (1,), dtypes or DTYPES, 1 + bidirectional, tf32):
        name = kernel_of(problem, ops.candidate(problem))
        if name:
            names.append(name)
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # the compiler does not hold Python's lock
        compiled = pool.map(lambda name: ops.device.compile(*name), names)
        for name, _ in zip(names, tqdm(compiled, total=len(names), unit=" kernels", disable=None), strict=True):
            ops.device.load(*name)
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
@options.as_json
def tune(dtypes, cells, hidden, batches, bidirectional, tf32, show, forget, as_json):
    """Measure the schedules on this machine's GPU; layers then take the quickest.

    Times are microseconds of a timestep and of a call before the first; a batch stands for all up to the next power of
    two. Sizes that were not measured go by estimates.
    """
    from tqdm import tqdm

    from .backends import get_backend
    from .backends.cuda.schedules import tuned_table, tuning

    if not show:
        tuned_table.check_file()
        check_target(tuned_table.path())  # before minutes are spent
    if forget:
        tuned_table.path().unlink(missing_ok=True)
        click.echo(f"Forgotten: {tuned_table.path()}")
        return
    if show:
        table = tuned_table.read()
    else:
        ops = get_backend("cuda")
        sizes = cells or tuning.CELLS, hidden or (32, 64, 128, 192, 256), batches or (1, 8, 32, 128)
        problems = tuning.problems(*sizes, dtypes or ("float32",), 1 + bidirectional, tf32)
        table = tuning.tune(ops, problems, lambda jobs: tqdm(jobs, unit=" loops", disable=None))
        table = tuned_table.Table(tuned_table.read().entries | table.entries)  # another may have measured meanwhile
        tuned_table.write(table)
    rows = tuning.rows(table)
    if as_json:
        options.print_json({"file": str(tuned_table.path()), "rows": rows})
        return
    for device in dict.fromkeys(row["device"] for row in rows):
        options.say(device)
        for row in rows:
            if row["device"] == device:
                options.say(f"  {row['name']:44}" + "".join(f"{text:>17}" for text in row["told"][:2]))
    click.echo(
        f"{len(rows)} time loops are known: {tuned_table.path()}" if rows else "Nothing is known yet: run gpurnn tune"
    )


@main.command()
@options.as_json
def info(as_json):
    """What this installation is and what it can use: versions, CPU, GPU."""
    import numpy as np

    from .backends import backends, get_backend
    from .backends.cpu.ops import describe
    from .backends.cuda.launch import kernel_files

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
        "cpu": describe(),
        "gpu": _gpu(get_backend("cuda").xp) if available["cuda"] is None else None,
        "kernels": kernel_files(),
    }
    if as_json:
        options.print_json(document)
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
    rows["'cpu'"] = document["cpu"]
    rows["Runs"] = (
        "'numpy': array code, one timestep after another. 'cpu': compiled code. 'cupy': array code on the GPU. "
        "'cuda': one launch for a whole "
        "sequence where the weights fit on the chip, else a fused kernel and a cuBLAS product for each timestep, "
        "recorded as a CUDA graph; sums, masks, optimisers in kernels of their own. "
        "layer.plan(T, B) says what a call takes; 'gpurnn check' whether all of it is right here."
    )
    for name, value in rows.items():
        click.echo(_row(name, value))


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
