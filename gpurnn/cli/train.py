"""``gpurnn train TASK``: one command for each task, made of its settings."""

import contextlib
import re
import time
from dataclasses import asdict, fields
from pathlib import Path

import click
from click.core import ParameterSource

from ..tasks import TASKS, get_task
from ..tasks.run import fresh_folder, prepare, schedule_ends
from ..tasks.settings import Settings, kind_of
from ..tasks.together import prepare_together
from ..tasks.trained import read_run
from ..train.parallel import KINDS, Group, find_place, init
from ..train.parallel.launchers import words_of
from ..train.parallel.start import check_same
from . import options


class _Tasks(options.FullHelpGroup):
    """One command for each task, made from its ``Settings`` when it is asked for."""

    def list_commands(self, ctx):
        return list(TASKS)

    def get_command(self, ctx, name):
        return _train_command(get_task(name)) if name in TASKS else None

    def hint(self, name):
        found = [f"gpurnn train {task} --problem {name}" for task in TASKS if name in _problems(task)]
        return f"It is a problem of another task: {found[0]}" if found else ""


def _problems(task):
    """The choices of a task's setting ``problem``; none for most tasks."""
    return next((f.metadata["choices"] for f in fields(get_task(task).Settings) if f.name == "problem"), ())


@click.group("train", cls=_Tasks)
def command():
    """Train a model on one of the built-in tasks."""


def _train_command(task):
    """``gpurnn train TASK``: the task's files, its settings as options, its own ones first."""
    settings, shared = fields(task.Settings), {f.name for f in fields(Settings)}
    params = [click.Argument(["files"], metavar=f"[{task.files_help}]...", nargs=-1, type=_file_type(task.name))]
    params += [_option(f) for f in sorted(settings, key=lambda f: f.name in shared)]

    def run(**arguments):
        _train(task, arguments)

    run.__doc__ = task.__doc__
    for decorate in reversed(_run_options(task.name)):
        run = decorate(run)
    again, further = f"{task.name} --out runs/mine --resume", f"{task.name} {task.files_help} --from runs/mine"
    width = max(len(again), len(further))
    made = click.command(
        task.name,
        epilog=f"""\b
Examples:
{task.examples.strip(chr(10))}
  gpurnn train {again:{width}}   after Ctrl-C
  gpurnn train {further:{width}}   train it further
Ctrl-C saves a checkpoint first; --resume then continues exactly there. --from
starts a new run: the weights of RUN, a fresh learning rate, other data.""",
    )(run)
    made.params = params + made.params
    return made


def _file_type(task):
    """The type of the argument FILE: of what is no file but one of the task's problems it says so."""
    hints = {problem: f"'{problem}' is no file but a problem: --problem {problem}" for problem in _problems(task)}
    return options.Input(exists=True, hints=hints)


def _option(f):
    """The command-line option of a field of ``Settings``."""
    kind, _ = kind_of(f)
    name, text = f"--{f.name.replace('_', '-')}", f.metadata["help"]
    if f.metadata.get("shown"):
        text += f"  [default: {f.metadata['shown']}]"
    if kind is bool:
        return click.Option([f"{name}/--no-{name[2:]}"], default=f.default, help=text)
    if f.name == "lr":
        return click.Option([name], type=_RateOrFind(), default=f.default, help=f"{text} 'find' asks the finder.")
    choices = f.metadata.get("choices")
    return click.Option([name], type=click.Choice(choices) if choices else kind, default=f.default, help=text)


class _RateOrFind(click.ParamType):
    """A number, or the word "find"."""

    name = "rate"

    def convert(self, value, param, ctx):
        return value if value == "find" else click.FLOAT.convert(value, param, ctx)


def _run_options(name):
    return (
        options.backend,
        click.option("--out", type=click.Path(file_okay=False),
                     help=f"Folder of the run  [default: a fresh runs/{name}-N]"),
        click.option("--resume", is_flag=True, help="Continue the run in --out with its own settings and data."),
        click.option("--overwrite", is_flag=True, help="Replace the run in --out."),
        click.option("--from", "start", metavar="RUN", type=click.Path(exists=True, file_okay=False),
                     help="Start from the model of RUN: its weights, settings and vocabulary. The FILEs are new."),
        click.option("--checkpoint-every", type=click.IntRange(1),
                     help="Updates between checkpoints, besides those at the end of each epoch."),
        click.option("--progress/--no-progress", default=True, help="Show a bar below the lines, on a terminal."),
        click.option("--flow", is_flag=True, help="Record how far back in time the gradient reaches."),
        click.option("--group", type=click.Choice(KINDS), default="auto",
                     help="What joins the processes that mpirun, srun or torchrun started: MPI, NCCL on GPUs; 'auto' "
                     "finds out."),
        options.max_memory,
        options.as_json,
    )  # fmt: skip


def _train(task, arguments):
    """Train a model of ``task``, and print what is being done."""
    ctx = click.get_current_context()
    names = [f.name for f in fields(task.Settings)]
    settings, asked = {name: arguments.pop(name) for name in names}, arguments
    _check_together(task, asked)
    group = init(asked.pop("group"))
    group.quiet = True
    with group:
        check_same(group, {"the options": lambda: _typed(ctx)})
        _train_in(group, ctx, task, asked, settings)


def _typed(ctx):
    """The command line of a process: task, files, and the values of all options by their names."""
    names = {param.name: max(param.opts, key=len) for param in ctx.command.params}
    return {"the task": ctx.info_name, **{names.get(name, name): value for name, value in ctx.params.items()}}


def _train_in(group, ctx, task, asked, settings):
    """Train with the processes of ``group``; the first one prints."""
    say = lambda line="": group.is_first and options.say(line, err=asked["as_json"])  # noqa: E731  (stdout is for JSON)
    if asked["resume"] or asked["start"]:
        given = {name for name in ctx.params if ctx.get_parameter_source(name) is not ParameterSource.DEFAULT}
        settings = {name: value for name, value in settings.items() if name in given}
    if asked["resume"]:
        asked["backend"] = asked["backend"] if "backend" in given else None
        group.first(lambda: _note_the_schedule(say, task, asked["out"], settings.get("epochs", 0)), "--resume")
    find = settings.get("lr") == "find"
    if find and asked["resume"]:
        raise click.UsageError("--lr find begins a training: a resumed run keeps its rate.")
    if find:
        del settings["lr"]
    with prepare_together(group, lambda: _prepare(task, asked, settings, find)) as run:
        facts = _show(say, run, asked["start"])
        if find:
            say(options.row("Note", f"the finder suggests --lr {run.settings.lr:g}"))
        _train_prepared(ctx, say, run, asked, facts)


def _prepare(task, asked, settings, find):
    """The ``Run``, with the learning rate that the finder suggests where it should."""
    folder = Path(asked["out"]) if asked["out"] else fresh_folder(task.name)
    how = {name: asked[name] for name in ("backend", "resume", "overwrite", "start")}
    try:
        run = prepare(task.name, asked["files"], folder, **how, **settings)
        if find:
            run.find_lr()
        return run
    except BaseException:
        if not asked["out"]:
            with contextlib.suppress(OSError):
                folder.rmdir()
        raise


def _check_together(task, asked):
    """Raise UsageError for options that do not go together, or lack another one."""
    if asked["resume"] and not asked["out"]:
        raise click.UsageError("--resume needs --out, the folder of the run to continue.")
    for one, other in (("resume", "overwrite"), ("resume", "start")):
        if asked[one] and asked[other]:
            raise click.UsageError(f"--{one} and --{'from' if other == 'start' else other} exclude each other.")
    if task.train_needs_files and not asked["files"] and not asked["resume"]:
        raise click.UsageError(f"Missing argument '{task.files_help}...'.")


def _note_the_schedule(say, task, folder, epochs):
    """Print a note if a resumed run would continue after its learning-rate schedule has ended."""
    old = read_run(folder, task.name)[0]
    ended = schedule_ends(folder, old)
    if ended is not None and epochs > ended:
        say(
            options.row(
                "Note",
                f"the {old.schedule} schedule of the learning rate was made for {ended} epoch{'s' * (ended != 1)}: the "
                f"rate stays low after them. A new schedule: --from {options.quoted(folder)} instead of --resume",
            )
        )


def _show(say, run, start):
    """Print what is trained on what; returns the same facts as a JSON-ready dict."""
    task, chosen = run.task, run.settings
    facts = {
        "run": str(run.folder),
        "task": task.name,
        "files": run.files,
        "data": run.data.summary,
        "notes": [*run.data.notes, *_slow_dtype(run)],
        "parameters": run.model.parameter_count,
        "backend": run.model.ops.name,
        "settings": asdict(chosen),
    }
    source = [Path(file).name for file in run.files] or [task.without_files]
    source = ", ".join(source if len(source) < 4 else [source[0], f"{len(source) - 1} more files"])
    rows = {
        "Data": f"{source}: {run.data.summary}",
        "Model": f"{chosen.cell}, {chosen.layers} x {chosen.hidden} units, {facts['parameters']:,} parameters",
        "Backend": f"{facts['backend']}, {chosen.dtype}, seed {chosen.seed}",
        "Run": f"{run.folder}, epochs: {chosen.epochs}, batches in each: {len(run.data.train)}",
    }
    if run.group is not None:
        rows["Group"] = f"{run.group.size} processes over {run.group.kind.upper()}, each with its part of every batch"
        facts["group"] = [run.group.kind, run.group.size]
    if start:
        rows["From"] = f"{start}: its weights, settings and what it knows of data"
        facts["from"] = str(start)
    for name, value in rows.items():
        say(options.row(name, value))
    for note in facts["notes"]:
        say(options.row("Note", note))
    return facts


def _slow_dtype(run):
    """A note, as a list of one, on a dtype that is slow on the run's backend; else an empty list."""
    if run.settings.dtype not in ("float16", "bfloat16") or run.model.ops.name != "numpy":
        return []
    return [
        "float16 and bfloat16 are array code on the backend numpy: up to three times slower than float32, and no "
        "memory is saved: use --dtype float32, or --backend cpu where it is compiled"
    ]


def _train_prepared(ctx, say, run, asked, facts):
    from ..train import Terminated
    from ..train.progress import Progress, duration

    group = run.group or Group()
    started = words_of(find_place()) if group.size > 1 else []
    again = options.quoted(*started, "gpurnn", "train", run.task.name, "--out", run.folder, "--resume")
    progress = Progress(lambda line: say(options.for_stream(line, err=asked["as_json"])), bar=asked["progress"])
    start = time.perf_counter()
    try:
        history = run.train(
            checkpoint_every=asked["checkpoint_every"], progress=False, flow=asked["flow"], callbacks=[progress]
        )
    except KeyboardInterrupt as signal:
        saved = (
            f"saved in {run.folder}. To continue:\n  {again}"
            if (run.folder / "last.json").exists()
            else "nothing saved yet."
        )
        if group.is_first:
            options.say(f"\nStopped, {saved}", err=True)
        group.close()
        ctx.exit(143 if isinstance(signal, Terminated) else 130)
    seconds = time.perf_counter() - start

    finished = group.first(lambda: run.finish(history), "the result")
    result, text = finished or ({}, "")
    diverged = group.send(bool(result.get("diverged")), "the result")
    if asked["as_json"] and group.is_first:
        options.print_json(facts | {"epochs": len(history.epochs), "seconds": round(seconds, 3)} | result)
    elif not asked["as_json"]:
        say(f"\n{'Diverged' if diverged else 'Done'} in {duration(seconds)}.\n{options.wrapped(text)}")
    if diverged:
        rate = f"a lower --lr (it was {run.settings.lr:g})"
        limit = "" if run.settings.clip else " and a limit of the gradient's norm (--clip 1)"
        raise click.ClickException(f"the training diverged: try {rate}{limit}")
    if group.is_first and not asked["as_json"]:
        _say_next(say, run, started, again, history.stopped)


def _say_next(say, run, started, again, stopped):
    """Print commands that are worth trying after a training, quoted for a shell."""
    say("\nNext:")
    plots = options.can_plot()
    for line in run.task.next_commands(run.settings):
        line = line if plots else re.sub(r" --plot \S+", "", line)
        say(f"  {line.format(run=options.quoted(run.folder))}")
    if plots:
        say(f"  gpurnn plot {options.quoted(run.folder)}")
    if run.settings.schedule in ("constant", "plateau") and stopped == "epochs":
        say(f"  {again} --epochs {2 * run.settings.epochs}")
    else:  # its learning-rate schedule, or its patience, has run out
        files = run.files if len(run.files) < 4 else [run.files[0], "..."]
        shown = [_short(file) for file in files]
        say(f"  {options.quoted(*started, 'gpurnn', 'train', run.task.name, *shown, '--from', run.folder)}")


def _short(file):
    """A file's name as it may be typed here: relative where it lies below the working directory."""
    with contextlib.suppress(ValueError):
        return str(Path(file).relative_to(Path.cwd()))
    return file
