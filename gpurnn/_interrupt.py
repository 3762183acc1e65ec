"""Ctrl-C while the ``gpurnn`` command is still being imported: it ends without a traceback, as it does later on.

The signal is noted and nothing is raised until the imports are done: raised inside one, it becomes whatever error the
half-made module meets. A second one ends the process at once. This is imported first, and acts only where the process
is that command: a program that imports gpurnn sees no difference. It imports only what Python has loaded by then.
"""

import _signal as signal  # the part that is compiled in
import os
import sys

_noted = []  # the signals


def is_command(words):
    """Whether a command line, as of ``sys.orig_argv``, is that of ``gpurnn`` or of ``python -m gpurnn``."""
    rest = iter(words[1:])
    for word in rest:
        if word.endswith("m") and word[0] == "-" and word[1:].isalpha():
            return next(rest, "") == "gpurnn"
        if word == "-c":
            return False
        if word in ("-X", "-W"):
            next(rest, "")
        elif not word.startswith("-"):
            return os.path.splitext(os.path.basename(word))[0] == "gpurnn"
    return False


def imports_done():
    """From here on Ctrl-C raises KeyboardInterrupt; ends the process where there was one."""
    if signal.getsignal(signal.SIGINT) is _note:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if _noted:
        _end()


def _note(number, frame):
    if _noted:
        _end()
    _noted.append(number)


def _end():
    os.write(2, b"\nInterrupted.\n")
    os._exit(130)


def _hook(kind, error, trace):
    if _noted or issubclass(kind, KeyboardInterrupt):
        _end()
    sys.__excepthook__(kind, error, trace)


if is_command(sys.orig_argv):
    sys.excepthook = _hook
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _note)
