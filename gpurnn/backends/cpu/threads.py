"""How many threads the compiled code takes."""

import contextlib
import contextvars
import ctypes
import functools
import math
import os
import sys
from pathlib import Path

from ...errors import one_line

_MOST_THREADS = 4096
_most = contextvars.ContextVar("gpurnn_threads", default=_MOST_THREADS)
QUOTA = ("/sys/fs/cgroup", "/proc/self/cgroup")  # the arguments of ``quota`` on a Linux system


def thread_count():
    """Threads of a time loop: GPURNN_NUM_THREADS, else OMP_NUM_THREADS, else the processors that this process may use.

    Under a cgroup CPU quota these are no more than the quota: with more, the kernel throttles all of them until the
    next period. Raises ValueError for a GPURNN_NUM_THREADS that is no number from 1 to 4096; of
    OMP_NUM_THREADS, which is other libraries', no more than that is taken, and nothing where it makes no sense. Inside
    ``at_most`` there are no more than it says.
    """
    return min(_wanted(), _most.get())


@contextlib.contextmanager
def at_most(count):
    """Let time loops take no more threads than ``count`` inside the block."""
    token = _most.set(count)
    try:
        yield
    finally:
        _most.reset(token)


def _wanted():
    """The threads that the environment asks for, or that there are processors for."""
    text = os.environ.get("GPURNN_NUM_THREADS", "")
    if text:
        count = _whole(text)
        if not 1 <= count <= _MOST_THREADS:
            got = one_line(repr(text), 60)
            raise ValueError(f"GPURNN_NUM_THREADS should be a whole number from 1 to {_MOST_THREADS}, got {got}")
        return count
    count = _whole(os.environ.get("OMP_NUM_THREADS", "").partition(",")[0])
    if count:
        return min(count, _MOST_THREADS)
    return min(processors(), quota(*QUOTA))


def processors():
    """The processors that this process may use. Of a Mac with fast and slow ones, the fast ones.

    Threads get equal parts of the work, so that the others would wait for one on a slow processor.
    """
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return (sys.platform == "darwin" and _fast_processors()) or os.cpu_count() or 1


@functools.cache
def _fast_processors():
    """How many fast processors macOS says there are; 0 where it does not say."""
    count, size = ctypes.c_int(0), ctypes.c_size_t(ctypes.sizeof(ctypes.c_int))
    try:
        ask = ctypes.CDLL(None).sysctlbyname
        failed = ask(b"hw.perflevel0.logicalcpu", ctypes.byref(count), ctypes.byref(size), None, ctypes.c_size_t(0))
    except (OSError, AttributeError):
        return 0
    return 0 if failed else max(count.value, 0)


def _whole(text):
    """The number in ``text``; 0 where it is not one of decimal digits, or has 20 digits or more."""
    return int(text) if text.isascii() and text.isdigit() and len(text) < 20 else 0


@functools.cache
def quota(root, groups):
    """How many processors' time Linux's control groups allow this process; inf where they set no limit.

    root: where they are mounted. groups: a file that names this process's groups, /proc/self/cgroup. The limit of a
    group applies to the groups in it, too. Inside a container the names may be those of the host, for which there is no
    folder; then the limit is that of the top folder.
    """
    try:
        lines = [line.split(":", 2) for line in Path(groups).read_text(encoding="utf-8", errors="replace").splitlines()]
    except OSError:
        return math.inf
    allowed = [math.inf]
    for _, controllers, name in lines:
        if controllers and "cpu" not in controllers.split(","):
            continue
        for mount in (root, f"{root}/cpu", f"{root}/cpu,cpuacct") if controllers else (root,):
            group = Path(mount, name.lstrip("/"))
            for folder in (group, *group.parents):
                if folder.is_relative_to(mount):
                    allowed.append(_limit(folder))
    return min(allowed)


def _limit(folder):
    """The limit of one control group: in cpu.max (version 2) or in two files (version 1)."""
    for names in (("cpu.max",), ("cpu.cfs_quota_us", "cpu.cfs_period_us")):
        try:
            quota, period = " ".join((folder / name).read_text(encoding="ascii") for name in names).split()
            if quota not in ("max", "-1"):
                return max(1, math.ceil(int(quota) / int(period)))
        except (OSError, ValueError, ZeroDivisionError):
            continue
    return math.inf
