"""The command line: the only place that prints. One file a command, imported when it is asked for."""

from .root import main

__all__ = ["main"]
