"""``bench on-gpu``: all measurements for a GPU rented by the minute, the most valuable first, before a deadline.

Two commands of some minutes each. Part A: versions, whether every kernel is right, what the hardware costs, ours
against cuDNN. Part B, chosen by A's results: where all is right a profile, tuning, the tests that need a GPU; else a
search for the cause. Every result is appended at once to ``result.jsonl``, one JSON object a line, everything printed
to ``log.txt``; a kill at any moment leaves both readable. Every case has a time limit in a process of its own.
"""

import contextlib
import ctypes
import json
import os
import shutil
import signal
import time
from pathlib import Path

from gpurnn.files import FileError, check_target, make_folder, parse_json, read_bytes

from .gpu_workers import Pool, Trouble, one_line, plain

RESULTS, LOG = "result.jsonl", "log.txt"
RESERVE = 4.0  # seconds reserved for the table at the end
SIGNALS = signal.SIGTERM, signal.SIGINT, signal.SIGHUP
STATUSES = ("right", "done", "wrong", "failed", "timed out", "left out")  # done: there was nothing to compare with


class Stopped(BaseException):
    """A signal asked for the end."""


class Journal:
    """The two files of a folder. Each record is one line, written by one call and flushed to the disk.

    mirror: another folder, or None, whose files end with the same lines: one that is emptied between two commands could
    not show part B what part A has found.
    """

    def __init__(self, folder, constants, mirror=None):
        self.folder, self.constants, self.mirror = Path(folder), constants, mirror and Path(mirror)
        self._files = {RESULTS: [], LOG: []}
        for place in filter(None, (self.folder, self.mirror)):
            make_folder(place)
            for name in self._files:
                check_target(place / name)  # follows no link
            self._cut_half_a_line(place / RESULTS)
            for name, files in self._files.items():
                if place == self.mirror and not (place / name).exists():  # what came before belongs to it, too
                    shutil.copy(self.folder / name, place / name)
                files.append(os.open(place / name, os.O_APPEND | os.O_CREAT | os.O_WRONLY, 0o644))
        self.log_file = self._files[LOG][0]

    @staticmethod
    def _cut_half_a_line(path):
        """What a kill in the middle of a write has left of a last line."""
        if path.exists():
            text = path.read_bytes()
            os.truncate(path, text.rfind(b"\n") + 1)

    def record(self, **fields):
        self._append(RESULTS, json.dumps(plain(self.constants | fields), allow_nan=False))

    def log(self, text):
        """A line for the log and the terminal."""
        self._append(LOG, text)
        with contextlib.suppress(OSError):  # nobody may be reading any more
            print(text, flush=True)

    def _append(self, name, text):
        for file in self._files[name]:
            os.write(file, (text + "\n").encode())
            os.fsync(file)

    def close(self):
        """Close the files; the mirror gets what else lies in the folder."""
        for file in (file for files in self._files.values() for file in files):
            os.close(file)
        if self.mirror:
            for path in self.folder.glob("*tuned.json"):
                shutil.copy(path, self.mirror)


def read(folder):
    """All whole records of a folder, in order; none where there is no file."""
    path, found = Path(folder) / RESULTS, []
    if path.exists():
        lines = read_bytes(path, factor=8).split(b"\n")[:-1]  # what follows the last line end is half a line
        for number, line in enumerate(lines, 1):
            row = parse_json(line, f"{path}: line {number}", finite=False)
            if not isinstance(row, dict):
                raise FileError(f"{path}: line {number}: expected a record, got {type(row).__name__}")
            found.append(row)
    return found


def latest(records, part, rehearsal):
    """The records of the last run of a part, of rehearsals or of the others."""
    found = [row for row in records if row["part"] == part and row["rehearsal"] == rehearsal]
    return [row for row in found if row["run"] == found[-1]["run"]]


def missing_gpu(rehearsal):
    """Why this cannot run here, or None. Opens no GPU: that is for the processes."""
    if rehearsal:
        from .gpu_rehearsal import missing

        return missing()
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return "no NVIDIA driver was found (libcuda.so.1); --rehearse runs everything on the CPU, in small"
    return None


def collected(folder, path):
    """Make one document of a folder's records: see ``gpu_results.collect``."""
    from .gpu_results import collect
    from .results_file import write

    write(path, collect(read(folder)))


def run_part(part, minutes, folder, rehearsal, choose=None, start=None, mirror=None):
    """Do one part; the exit code is 1 where something was not right.

    mirror: as in ``Journal``.

    choose(rehearsal, records of part A): the part's (items, group ends, decision); by default those of gpu_items.py.
    start: when the time began, by ``time.monotonic``.
    """
    start = time.monotonic() if start is None else start
    name = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    before = latest(read(folder), "A", rehearsal)
    journal = Journal(folder, {"run": f"{name} {os.getpid()}", "part": part, "rehearsal": rehearsal}, mirror)
    pool = Pool(rehearsal, journal.log_file, start + 60 * minutes - RESERVE / 2, os.cpu_count() or 1)
    pool.folder = journal.folder
    records, status, current = [], "ended", None
    try:
        for number in SIGNALS:
            signal.signal(number, _stop)
        items, ends, decision = (choose or _choose(part))(rehearsal, before)
        journal.log(f"part {part}, {minutes:g} minutes, {len(items)} items: {decision}" + REHEARSAL * rehearsal)
        journal.record(group="begin", name=f"part {part}", status="done", decision=decision, started=name,
                       minutes=minutes, items=len(items))  # fmt: skip
        if choose is None:
            pool.start("gpurnn", "torch", "tools")
        for current in items:
            row = perform(current, pool, start, start + 60 * minutes, ends)
            records.append(row)
            journal.record(**row)
            journal.log(f"{row['at']:6.1f} s {row['seconds']:6.1f} s  {row['status']:9} {row['group']}: {row['name']}"
                        + f"  {row.get('reason', '')}"[:300])  # fmt: skip
    except Stopped as stopped:
        status = str(stopped)
        if current and (not records or records[-1]["name"] != current.name):
            journal.record(group=current.group, name=current.name, status="left out", reason=f"{status} meanwhile")
    finally:
        for number in SIGNALS:
            signal.signal(number, signal.SIG_IGN)  # the end is near anyway
        pool.close()
        counts = {status: sum(row["status"] == status for row in records) for status in STATUSES}
        spent = time.monotonic() - start
        journal.record(group="end", name=f"part {part}", status="done", how=status, seconds=spent, counts=counts)
        _print_table(journal, rehearsal, part, spent, status)
        journal.close()
    return 143 if status != "ended" else int(any(counts[bad] for bad in ("wrong", "failed", "timed out")))


REHEARSAL = "  -- A REHEARSAL ON THE CPU: no time here is a measurement"


def _choose(part):
    from .gpu_items import part_a, part_b

    return part_b if part == "B" else lambda rehearsal, _: part_a(rehearsal)


def _stop(number, _):
    raise Stopped(f"stopped by {signal.Signals(number).name}")


def perform(item, pool, start, end, ends):
    """One item's record, however it goes."""
    now = time.monotonic()
    left = end - RESERVE - now
    row = {"group": item.group, "name": item.name, "parameters": item.parameters, "at": now - start}
    if left < item.needs:
        return row | {"status": "left out", "reason": f"{max(left, 0):.0f} s left of all", "seconds": 0.0}
    if now - start > (end - start) * ends.get(item.group, 1.0):
        return row | {"status": "left out", "reason": f"the time of '{item.group}' was over", "seconds": 0.0}
    try:
        found = {"status": "right"} | item.run(pool, min(item.seconds, left))
    except Trouble as trouble:
        found = {"status": trouble.status, "reason": trouble.reason}
        if trouble.status == "timed out" and left < item.seconds:  # which says nothing of the case
            found = {"status": "left out", "reason": f"cut short by the end of all after {left:.1f} s"}
    except Exception as error:  # of this script: the others are asked all the same
        found = {"status": "failed", "reason": f"{one_line(error)} (in the script itself)"}
    return row | found | {"seconds": time.monotonic() - now}


def _print_table(journal, rehearsal, part, spent, status):
    from .gpu_results import lines

    for line in lines(latest(read(journal.folder), part, rehearsal)):
        journal.log(line)
    journal.log(f"part {part} {status} after {spent:.0f} s; records in {RESULTS}, everything else in {LOG}"
                + REHEARSAL * rehearsal)  # fmt: skip
