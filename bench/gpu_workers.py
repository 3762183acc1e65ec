"""The processes of ``bench on-gpu``. They stay warm from case to case; one that exceeds a time limit is killed.

A kernel that hangs, a process that dies, or a CUDA context that is dead after an error costs one case only: the next
order starts a fresh process.
"""

import contextlib
import ctypes
import json
import math
import os
import select
import signal
import subprocess
import time

import numpy as np

from .run import command_of, environment_of

START_SECONDS = 60  # for imports and the CUDA context; torch takes longest
REST_SECONDS = 15  # after two starts in a row that failed


class Trouble(Exception):
    """An order has no result. status: "failed" or "timed out"."""

    def __init__(self, status, reason):
        super().__init__(reason)
        self.status, self.reason = status, reason


class Worker:
    """One process that does one order after another. Orders go to its standard input as lines of JSON, answers come
    back through a pipe. Whatever the process and its libraries print goes to the log."""

    def __init__(self, kind, rehearsal, log, threads):
        answers, theirs = os.pipe()
        command = command_of("gpu-worker", kind, "--answers", str(theirs), *["--rehearse"] * rehearsal)
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=log, stderr=log, pass_fds=(theirs,), start_new_session=True,
            env=environment_of(threads),
        )  # fmt: skip
        os.close(theirs)
        self.kind, self.answers, self.buffer, self.warm = kind, answers, b"", False
        self.asked_at = time.monotonic()

    def send(self, order):
        self.asked_at = time.monotonic()
        with contextlib.suppress(BrokenPipeError):  # it has died: its answer says so
            self.process.stdin.write(json.dumps(order).encode() + b"\n")
            self.process.stdin.flush()

    def receive(self, until):
        """The next answer. Raises Trouble, the process being dead then, where none comes before ``until``."""
        while b"\n" not in self.buffer:
            left = max(0.0, until - time.monotonic())  # what has come already counts even then
            if not select.select([self.answers], [], [], left)[0]:
                self.kill()
                taken = time.monotonic() - self.asked_at
                raise Trouble("timed out", f"no answer of the process '{self.kind}' in {taken:.1f} s: killed")
            piece = os.read(self.answers, 1 << 16)
            if not piece:
                self.kill()
                raise Trouble("failed", f"the process '{self.kind}' died: {_how(self.process.returncode)}")
            self.buffer += piece
        line, _, self.buffer = self.buffer.partition(b"\n")
        return json.loads(line)

    def kill(self, seconds=5.0):
        """End the process and all that it has started. Waits up to this many seconds for one that the driver holds
        back."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(seconds)
        with contextlib.suppress(OSError):
            self.process.stdin.close()
        if self.answers is not None:
            os.close(self.answers)
        self.answers = None

    @property
    def alive(self):
        return self.answers is not None and self.process.poll() is None


def _how(code):
    if code is None:
        return "it does not end"
    return f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"


class Pool:
    """The workers by kind. end: when, by ``time.monotonic``, nothing may go on any more.

    spared: kinds of which another process waits, started ahead, for when the first has died: a start takes seconds.
    """

    spared = ("gpurnn",)

    def __init__(self, rehearsal, log, end, threads):
        self.rehearsal, self.log, self.end, self.threads = rehearsal, log, end, threads
        self.workers, self.spares, self.failed_starts = {}, {}, {}

    def start(self, *kinds):
        """Start these, without waiting for them."""
        for kind in kinds:
            if kind not in self.workers or not self.workers[kind].alive:
                self.stop(kind)
                spare = self.spares.pop(kind, None)
                self.workers[kind] = spare if spare and spare.alive else self._new(kind)
                if kind in self.spared:
                    self.spares[kind] = self._new(kind)

    def _new(self, kind):
        return Worker(kind, self.rehearsal, self.log, self.threads)

    def ask(self, kind, order, seconds):
        """The answer of a worker, which has this many seconds for it once it is warm. Raises Trouble."""
        answer = self.ask_all([(kind, order)], seconds)[0]
        if isinstance(answer, Trouble):
            raise answer
        return answer

    def ask_all(self, orders, seconds):
        """The answers, or Troubles, to (kind, order) pairs, each kind once, that are given out together."""
        self.start(*(kind for kind, _ in orders if not self._rests(kind)))
        answers = [self._try(self._warm, kind) for kind, _ in orders]
        for (kind, order), trouble in zip(orders, answers, strict=True):
            if not trouble:
                self.workers[kind].send(order)
        until = min(time.monotonic() + seconds, self.end)
        both = zip(orders, answers, strict=True)
        return [trouble or self._try(self._answer, kind, until) for (kind, _), trouble in both]

    def _try(self, act, *args):
        try:
            return act(*args)
        except Trouble as trouble:
            return trouble

    def _warm(self, kind):
        if self._rests(kind):
            raise Trouble("failed", f"the process '{kind}' did not start twice: not tried again for {REST_SECONDS} s")
        worker = self.workers[kind]
        if worker.warm:
            return
        try:
            self._answer(kind, min(worker.asked_at + START_SECONDS, self.end))
        except Trouble as trouble:
            self.failed_starts.setdefault(kind, []).append(time.monotonic())
            raise Trouble(trouble.status, f"{trouble.reason} (at its start)") from None
        worker.warm, self.failed_starts[kind] = True, []

    def _rests(self, kind):
        """Whether two starts in a row have failed just now: a GPU that is lost costs seconds then, not everything."""
        failed = self.failed_starts.get(kind, ())
        return len(failed) >= 2 and time.monotonic() - failed[-1] < REST_SECONDS

    def _answer(self, kind, until):
        answer = self.workers[kind].receive(until)
        if answer.get("dead"):  # its CUDA context is of no use any more
            self.stop(kind)
        if "failed" in answer:
            raise Trouble("failed", answer["failed"])
        return answer

    def stop(self, *kinds):
        for kind in kinds:
            if kind in self.workers:
                self.workers.pop(kind).kill()

    def close(self):
        for worker in (*self.workers.values(), *self.spares.values()):
            worker.kill(0.5)


def plain(value):
    """A value that JSON can hold: NumPy's numbers become Python's, NaN and infinities become text."""
    if isinstance(value, dict):
        return {str(key): plain(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(inner) for inner in value]
    if isinstance(value, np.generic):
        value = value.item()
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def one_line(error):
    """An exception as one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:500]


def die_with_the_parent():
    """On Linux, have this process killed when its parent dies, so that nothing is left on the GPU."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
