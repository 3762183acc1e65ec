"""What commands share: their common options, and how they print."""

import difflib
import importlib.metadata
import json
import os
import re
import shlex
import shutil
import sys
import textwrap
from pathlib import Path

import click

from ..cells import CELLS
from ..errors import printable
from ..files import max_memory as memory_limit
from ..files import parse_size, set_max_memory
from ..train.progress import fitted, is_terminal

try:
    VERSION = importlib.metadata.version("gpurnn")
except importlib.metadata.PackageNotFoundError:
    VERSION = "unknown (a source checkout that is not installed)"

backend = click.option(
    "--backend",
    type=click.Choice(["auto", "cpu", "numpy", "cupy", "cuda"]),
    default="auto",
    help="Where to compute; 'auto' is the GPU where one works, else the CPU.",
)
as_json = click.option("--json", "as_json", is_flag=True, help="Print one JSON document instead of text.")
overwrite = click.option("--overwrite", is_flag=True, help="Replace a file that this command did not write.")
run = click.argument("run", type=click.Path(exists=True, file_okay=False))


class Input(click.Path):
    """A file or folder to read. hints: name -> what to say where it is given and no such file exists."""

    def __init__(self, hints=None, **options):
        super().__init__(**options)
        self.hints = hints or {}

    def convert(self, value, param, ctx):
        if value == "-":
            self.fail("'-': data are read more than once. Save what comes from a pipe to a file.", param, ctx)
        if "*" in str(value) and not Path(value).exists():
            self.fail(
                f"no file is called {value!r}. Leave out the quotes, so that the shell lists the files.", param, ctx
            )
        if value in self.hints and not Path(value).exists():
            self.fail(f"{self.hints[value]}.", param, ctx)
        return super().convert(value, param, ctx)


INPUT = Input(exists=True)
_READING = {
    "encoding": click.option("--encoding", help="Encoding of the files, such as latin-1  [default: the run's]"),
    "text": click.option("--text", help="Column of the texts, by name or number  [default: the run's]"),
    "label": click.option("--label", help="Column of the labels, by name or number  [default: the run's]"),
    "strict": click.option(
        "--strict/--no-strict", default=None, help="Refuse a file that has a bad line  [default: the run's]"
    ),
}


def reading(*names):
    """Options that say how files are read; each is None where it is not given."""

    def decorate(command):
        for name in reversed(names):
            command = _READING[name](command)
        return command

    return decorate


def _set_limit(ctx, _, value):
    if value is None:
        memory_limit()  # refuses a variable that is wrong before anything is done
        return
    try:
        parse_size(value)
    except ValueError as error:
        raise click.BadParameter(str(error), ctx) from error
    set_max_memory(value)
    ctx.call_on_close(lambda: set_max_memory(None))


max_memory = click.option(
    "--max-memory",
    metavar="SIZE",
    expose_value=False,
    callback=_set_limit,
    help="Memory limit for each file, such as 4G; 0: no limit  [default: 512M]",
)


def say(text="", **options):
    """Print text that may come from data or models: ``click.echo``, with control characters as escapes."""
    click.echo(printable(text), **options)


def say_pieces(pieces):
    """Print text that comes in pieces, each at once, as ``say`` does; a carriage return waits for what follows it."""
    held = ""
    for piece in pieces:
        text = held + piece
        held = "\r" if text.endswith("\r") else ""
        say(text.removesuffix("\r"), nl=False)
    say(held)


def print_json(document):
    click.echo(json.dumps(document, indent=1))


def width():
    """Columns for text that we wrap ourselves: those of the terminal or of COLUMNS, or else 80."""
    return max(20, shutil.get_terminal_size().columns)


def row(name, value):
    """A fact, as "name   value", broken into as many lines as the terminal needs."""
    return _filled(f"{name:12}{value}", " " * 12)


def wrapped(text):
    """Text with its lines broken between words where they are too long for the terminal or COLUMNS; whole in a file or
    a pipe without COLUMNS."""
    if not (is_terminal(sys.stdout) or os.environ.get("COLUMNS")):
        return text
    return "\n".join(_filled(line, " " * len(_NAMED.match(line)[0])) for line in text.split("\n"))


def joined(parts):
    """Parts of a line, on one; on a terminal that is too narrow for it, the others below the first."""
    line = "  ".join(parts)
    return line if wrapped(line) == line else "\n    ".join(parts)


_NAMED = re.compile(r" *(?:\S+(?: \S+){0,2} {2,})?")  # what stands before the value in "Name   value"


def _filled(line, indent):
    return textwrap.fill(
        line, width(), subsequent_indent=indent, break_on_hyphens=False, break_long_words=False,
        replace_whitespace=False, drop_whitespace=True,
    )  # fmt: skip


def for_stream(line, err=False):
    """A line as the stream shows it: broken between words on a terminal, whole in a file or a pipe."""
    return fitted(line, sys.stderr if err else sys.stdout)


def quoted(*words):
    """Words as a shell takes them, on one line."""
    return shlex.join(map(str, words))


def can_plot():
    """Whether Matplotlib is there and can be imported."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError:
        return False
    return True


COMMAND = "gpurnn.command"  # the key in the context's meta under which the called command is stored


class FullHelpGroup(click.Group):
    """A group that shows the first sentence of each command whole, which click cuts, and notes which one is called."""

    def resolve_command(self, ctx, args):
        self._refuse_unknown(ctx, args[0])
        name, command, rest = super().resolve_command(ctx, args)
        ctx.meta[COMMAND] = command
        return name, command, rest

    def _refuse_unknown(self, ctx, name):
        """Raise UsageError, with the names that are like it, where there is no command of this name."""
        if name.startswith("-") or self.get_command(ctx, name) is not None:
            return
        like = [f"'{one}'" for one in difflib.get_close_matches(name, self.list_commands(ctx))]
        offer = f"Did you mean {' or '.join(like)}?" if like else ""
        ctx.fail(f"No such command {name!r}. {self.hint(name) or offer}".rstrip())

    def hint(self, name):
        """What to do instead of calling an unknown command ``name``; empty where only a like name can be offered."""
        return ""

    def format_commands(self, ctx, formatter):
        commands = {name: self.get_command(ctx, name) for name in self.list_commands(ctx)}
        with formatter.section("Commands"):
            formatter.write_dl([(name, command.get_short_help_str(limit=1000)) for name, command in commands.items()])


def layer_sizes(command):
    """Options that name layers: cells, hidden sizes, batches, directions."""
    cells = click.Choice(list(CELLS))
    for option in reversed([
        click.option("--cell", "cells", multiple=True, type=cells, help="May be repeated  [default: all]"),
        click.option("--hidden", multiple=True, type=click.IntRange(1), help="H; may be repeated."),
        click.option("--batch", "batches", multiple=True, type=click.IntRange(1), help="B; may be repeated."),
        click.option("--bidirectional", is_flag=True, help="Both directions at once."),
        click.option("--tf32", is_flag=True, help="float32 multiplied as tf32, as with precision='tf32'."),
    ]):  # fmt: skip
        command = option(command)
    return command
