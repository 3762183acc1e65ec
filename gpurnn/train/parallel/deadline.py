"""An end for a process that waits where Python cannot end it.

``MPI_Init`` waits for all processes that the launcher started, for ever, and holds Python's lock meanwhile: no thread
and no signal handler of this process runs. So a second, small process watches: this file, as a program.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator


@contextlib.contextmanager
def ended_after(seconds: float, text: str) -> Iterator[None]:
    """If the block takes longer, write a text to standard error and end this process."""
    words = [sys.executable, "-I", "-S", os.path.abspath(__file__), str(os.getpid()), str(seconds), text]
    try:
        watch = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL)
    except OSError:  # no further process may be started: nothing watches
        yield
        return
    try:
        yield
    finally:
        watch.kill()
        watch.stdin.close()
        watch.wait()


def _watch(process: str, seconds: str, text: str) -> None:
    """Wait on the other side; the end of that process, which closes standard input, ends this one, too."""
    threading.Thread(target=lambda: (sys.stdin.buffer.read(), os._exit(0)), daemon=True).start()
    time.sleep(float(seconds))
    sys.stderr.write(text)
    sys.stderr.flush()
    os.kill(int(process), getattr(signal, "SIGKILL", signal.SIGTERM))
    os._exit(0)


if __name__ == "__main__":
    _watch(*sys.argv[1:])
