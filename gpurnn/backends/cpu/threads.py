"""How many threads the compiled code takes."""

import functools
import math
import os
from pathlib import Path

from ...errors import one_line

_MOST_THREADS = 4096
QUOTA = ("/sys/fs/cgroup", "/proc/self/cgroup")  # the arguments of ``quota`` on a Linux system


def thread_count():
    """Threads of a time loop: GPURNN_NUM_THREADS, else OMP_NUM_THREADS, else the processors that this process may use.

    In a container with a limit of processor time no more than that is worth: with more, all of them would be stopped
    together until the next period. Raises ValueError for a GPURNN_NUM_THREADS that is no number from 1 to 4096; of
    OMP_NUM_THREADS, which is other libraries', no more than that is taken, and nothing where it makes no sense.
    """
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
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(count, quota(*QUOTA))


def _whole(text):
    """The number that ``text`` is in decimal digits; 0 where it is none, or has more digits than a number may."""
    return int(text) if text.isascii() and text.isdigit() and len(text) < 20 else 0


@functools.cache
def quota(root, groups):
    """Processors' worth of time that Linux's control groups allow this process; inf where they set no limit.

    root: where they are mounted. groups: a file that names this process's groups, /proc/self/cgroup. A limit of a group
    around another holds for both. Inside a container the names may be those outside, where no such folder is: then the
    limit stands at the top.
    """
    try:
        lines = [line.split(":", 2) for line in Path(groups).read_text().splitlines()]
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
    """The limit that a control group sets: cpu.max of version 2, or two files of version 1."""
    for names in (("cpu.max",), ("cpu.cfs_quota_us", "cpu.cfs_period_us")):
        try:
            quota, period = " ".join((folder / name).read_text() for name in names).split()
            if quota not in ("max", "-1"):
                return max(1, math.ceil(int(quota) / int(period)))
        except (OSError, ValueError, ZeroDivisionError):
            continue
    return math.inf
