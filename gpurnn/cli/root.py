"""The ``gpurnn`` command and its subcommands. Each command imports what it needs, so that ``--help`` is quick.

Exit codes: 0 done; 1 a run failed (diverged, damaged run or checkpoint, folder in use, no GPU, disk full); 2 wrong
arguments, or a file that is not what it should be; 130 Ctrl-C; 143 SIGTERM.
"""

import errno
import importlib
import sys

import click

from .. import _interrupt
from ..errors import one_line, printable
from . import options
from .followers import said_once
from .messages import as_options

COMMANDS = (  # each has a module of its name, or of the one in _MODULES
    "check", "classify", "compose", "evaluate", "export", "forecast", "import", "info", "plot", "sample", "train",
    "transcribe", "translate", "tune", "warmup",
)  # fmt: skip
_MODULES = {"import": "import_"}  # a keyword of Python


class _Commands(options.FullHelpGroup):
    """Loads a command when it is asked for; turns the errors that a user can cause into one line and an exit code."""

    def list_commands(self, ctx):
        return sorted((*COMMANDS, "bench"))

    def get_command(self, ctx, name):
        if name in COMMANDS:
            return importlib.import_module(f".{_MODULES.get(name, name)}", __package__).command
        if name != "bench":
            return None
        try:
            from ..bench.cli import main as bench
        except ModuleNotFoundError:  # a checkout that is not installed
            from bench.cli import main as bench
        return bench

    def main(self, args=None, *arguments, **more):
        _interrupt.imports_done()
        with said_once(sys.argv[1:] if args is None else list(args)):
            return super().main(args, *arguments, **more)

    def make_context(self, *arguments, **more):
        try:
            return super().make_context(*arguments, **more)
        except KeyboardInterrupt:
            _interrupted(terminated=False)

    def invoke(self, ctx):
        try:
            return self._invoke(ctx)
        except KeyboardInterrupt as signal:
            _interrupted(terminated=type(signal).__name__ == "Terminated")  # of train/, which may not be imported yet

    def _invoke(self, ctx):
        from ..checkpoint import CheckpointError
        from ..errors import BackendError, DivergedError
        from ..train import TrainingError

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
            _fail(error, 1, ctx)
        except (ValueError, TypeError) as error:
            if ctx.params.get("debug"):
                raise
            _fail(error, 2, ctx)


def _interrupted(terminated):
    click.echo("\nInterrupted.", err=True)
    sys.exit(143 if terminated else 130)


def _fail(error, code, ctx):
    failure = click.ClickException(as_options(one_line(error, 2000), ctx.meta.get(options.COMMAND)))
    failure.exit_code = code
    raise failure from error


@click.group(
    cls=_Commands,
    context_settings={"help_option_names": ["-h", "--help"], "show_default": True, "max_content_width": 80},
    epilog="""\b
A first minute (nothing is downloaded):
  gpurnn train text               train on text that comes with Python
  gpurnn sample runs/text-1       write text with the model
  gpurnn plot runs/text-1         draw the loss curves (needs gpurnn[plot])""",
)
@click.version_option(options.VERSION, "-V", "--version", prog_name="gpurnn")
@click.option("--debug", is_flag=True, help="Show the Python traceback of an error.")
def main(debug):
    """Recurrent networks (LSTM, GRU, RNN) on the CPU and on NVIDIA GPUs."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a terminal that cannot show a character shows "?"
