"""``python -m gpurnn``: the same as the ``gpurnn`` command."""

from .cli import main

main(prog_name="gpurnn")
