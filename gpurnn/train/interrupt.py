"""Ctrl-C and SIGTERM during a training: the step ends first."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator

from .history import Terminated


@contextlib.contextmanager
def deferred_interrupt() -> Iterator[Callable[[], type[KeyboardInterrupt] | None]]:
    """Inside the block, record the first Ctrl-C or SIGTERM instead of raising; a second one raises at once.

    Yields a function that returns the exception to raise, or None if there was no signal. A signal for which the
    program has a handler of its own is left to it.
    """
    received = []
    kinds = {signal.SIGINT: KeyboardInterrupt, signal.SIGTERM: Terminated}
    usual = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}
    if threading.current_thread() is not threading.main_thread():
        usual = {}

    def handler(number, frame):
        if received:
            raise kinds[number]
        received.append(kinds[number])

    changed = [number for number, before in usual.items() if signal.getsignal(number) is before]
    for number in changed:
        signal.signal(number, handler)
    try:
        yield lambda: received[0] if received else None
    finally:
        for number in changed:
            signal.signal(number, usual[number])
