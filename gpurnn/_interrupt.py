"""Ctrl-C while the ``gpurnn`` command is still being imported: it ends without a traceback, as it does later on.

This is imported first, and only where the process is that command: a program that imports gpurnn sees no difference.
"""

import os
import re
import sys


def is_command(words):
    """Whether a command line, as of ``sys.orig_argv``, is that of ``gpurnn`` or of ``python -m gpurnn``."""
    rest = iter(words[1:])
    for word in rest:
        if re.fullmatch("-[a-zA-Z]*m", word):
            return next(rest, "") == "gpurnn"
        if word == "-c":
            return False
        if word in ("-X", "-W"):
            next(rest, "")
        elif not word.startswith("-"):
            return os.path.splitext(os.path.basename(word))[0] == "gpurnn"
    return False


def _hook(kind, error, trace):
    if issubclass(kind, KeyboardInterrupt):
        os.write(2, b"\nInterrupted.\n")
        os._exit(130)
    sys.__excepthook__(kind, error, trace)


if is_command(sys.orig_argv):
    sys.excepthook = _hook
