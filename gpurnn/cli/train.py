"""``gpurnn train TASK``: one command for each task, made of its settings."""

import contextlib
import time
from dataclasses import asdict, fields
from pathlib import Path

import click
from click.core import ParameterSource

from ..tasks import TASKS, get_task
from ..tasks.run import fresh_folder, prepare
from ..tasks.settings import Settings, kind_of
from ..tasks.trained import read_run
from . import options


class _Tasks(options.Whole):
    """One command for each task, made from its ``Settings`` when it is asked for."""

    def list_commands(self, ctx):
        return list(TASKS)

    def get_command(self, ctx, name):
        return _train_command(get_task(name)) if name in TASKS else None


@click.group("train", cls=_Tasks)
def command():
    """Train a model on one of the built-in tasks."""


def _train_command(task):
    """``gpurnn train TASK``: the task's files, its settings as options, its own ones first."""
    settings, shared = fields(task.Settings), {f.name for f in fields(Settings)}
    params = [click.Argument(["files"], metavar=f"[{task.files_help}]...", nargs=-1, type=options.INPUT)]
    params += [_option(f) for f in sorted(settings, key=lambda f: f.name in shared)]

    def run(**arguments):
        _train(task, **arguments)

    run.__doc__ = task.__doc__
    for decorate in reversed(_run_options(task.name)):
        run = decorate(run)
    made = click.command(
        task.name,
        epilog=f"""\b
Examples:
{task.examples.strip(chr(10))}
  gpurnn train {task.name} --out runs/mine --resume                 after Ctrl-C
  gpurnn train {task.name} --out runs/mine --resume --epochs 20     train on
Ctrl-C saves a checkpoint first; --resume then goes on exactly there.""",
    )(run)
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
            say(options.row("Note", ended))
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
    from ..train import Terminated

    task, folder = run.task, run.folder
    facts = {
        "run": str(folder),
        "task": task.name,
        "files": run.files,
        "data": run.data.summary,
        "notes": run.data.notes,
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
        say(options.row(name, value))
    for note in run.data.notes:
        say(options.row("Note", note))
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
