"""Streams: what stacked layers run on, one after another where a backend has only one."""

import contextlib


class Streams:
    """Streams on which stacked layers may overlap. This base class has one: work runs when it is issued.

    As a context manager it waits for all of them. count: how many layers run at once.
    """

    def __init__(self, count):
        self.count = count

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass

    def on(self, stream, after=-1):
        """A context manager: run its block on stream ``stream``, after everything queued on stream ``after`` so far."""
        return _HERE


_HERE = contextlib.nullcontext()
ONE_STREAM = Streams(1)
