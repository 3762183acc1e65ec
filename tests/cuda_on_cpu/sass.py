"""Machine code of NVIDIA GPUs, as nvdisasm prints it: instructions with what the compiler says of their timing.

From compute capability 7.0 on an instruction takes 16 bytes, and the upper ones say how it waits (Jia et al.,
"Dissecting the NVIDIA Volta GPU Architecture via Microbenchmarking", arXiv 1804.06826, 2.1): the cycles until the next
instruction may issue; which of 6 scoreboards it sets until its result is there, which until its operands are read;
which of them it waits for.
"""

import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from gpurnn.backends.cuda.libraries import wheel_folders

# Cycles from issue until a result is there, by the beginning of an operation's name. Published for an H100 or H800:
# arXiv 2501.12084 (shared memory 29, L2 263), arXiv 1804.06826 (shuffles, special functions, conversions).
LATENCY = {"LDS": 29, "LDSM": 33, "LDG": 263, "LD": 263, "MUFU": 23, "SHFL": 24, "F2F": 14, "F2FP": 6, "I2F": 14,
           "S2R": 20, "STS": 12, "STG": 12, "ST": 12, "BAR": 30, "MEMBAR": 31, "LDC": 30}  # fmt: skip
READ = 20  # cycles until an instruction of the memory pipeline has read its operands: a guess
# MEMBAR: 500 cycles, once in 16 timesteps.
ISSUE_HMMA = 6.26  # cycles from one HMMA of a scheduler to the next: published for an H100


@dataclass(frozen=True)
class Instruction:
    """stall: cycles until the next one may issue. sets: the scoreboard that it sets until its result is there, and the
    one until it has read its operands, or None. waits: those that it waits for."""

    op: str
    stall: int
    sets: tuple
    waits: tuple


def nvdisasm(cubin):
    """The machine code of a program as text. Raises SystemExit where the tool is missing."""
    paths = [folder / "bin/nvdisasm" for folder in wheel_folders()]
    tool = next((str(path) for path in paths if path.is_file()), shutil.which("nvdisasm"))
    if not tool:
        sys.exit("nvdisasm is missing: pip install nvidia-cuda-nvdisasm")
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(cubin)
        command = [tool, "-c", "-hex", file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def instructions(text, name):
    """Of one kernel: its instructions in order, and the jumps, (from, to) as places in that order."""
    part = text[text.index(f".text.{name}:") :]
    end = part.find("\n//---", 1)
    found, labels, jumps, code = [], {}, [], None
    for line in part[: end if end > 0 else None].splitlines():
        label = re.match(r"(\.L_x_\d+):", line)
        if label:
            labels[label[1]] = len(found)
        first = re.search(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\d\s+)?([A-Z][\w.]*)(.*)/\* 0x[0-9a-f]{16} \*/", line)
        second = re.match(r"\s+/\* (0x[0-9a-f]{16}) \*/", line)
        if first:
            code = first
        elif second and code:
            target = re.search(r"`\((\.L_x_\d+)\)", code[2]) if code[1].startswith("BRA") else None
            if target:
                jumps.append((len(found), target[1]))
            found.append(_decode(code[1], int(second[1], 16) >> 41))
            code = None
    return found, [(at, labels[target]) for at, target in jumps if target in labels]


def _decode(op, control):
    stall, write, read, wait = control & 15, control >> 5 & 7, control >> 8 & 7, control >> 11 & 63
    return Instruction(
        op, stall, tuple(one if one < 6 else None for one in (write, read)), tuple(k for k in range(6) if wait >> k & 1)
    )


def products(instructions):
    """How many of these multiply matrices."""
    return sum(one.op.startswith(("FFMA", "HMMA")) for one in instructions)


def time_loop(instructions, jumps):
    """The smallest loop with a barrier, most of the products and a poll, if there are polls: its instructions, and of
    the loops within it where they begin and end. An mbarrier is a barrier, and a wait there a poll.

    Of a loop that polls again what was loaded before it, only the check counts, or nothing where a jump leads over it;
    of one that waits at an mbarrier the first wait: as if everything had arrived.
    """
    back = [(to, at) for at, to in jumps if to <= at]
    loops = [
        (to, at) for to, at in back if any(one.op.startswith(("BAR", "SYNCS")) for one in instructions[to : at + 1])
    ]
    if any(map(_is_poll, instructions)):
        loops = [(to, at) for to, at in loops if any(map(_is_poll, instructions[to : at + 1]))]
    most = max(products(instructions[to : at + 1]) for to, at in loops)
    start, end = min((loop for loop in loops if products(instructions[loop[0] : loop[1] + 1]) > 0.9 * most),
                     key=lambda loop: loop[1] - loop[0])  # fmt: skip
    inner = [(to, at) for to, at in back if start <= to and at < end and (to, at) != (start, end)]
    dropped = set()
    for to, at in inner:
        polls = [k for k in range(to, at + 1) if _is_poll(instructions[k])]
        ways_out = sorted(leaves for leaves, target in jumps if to <= leaves <= at < target)
        if polls and ways_out and ways_out[0] < polls[0] and any(map(_is_poll, instructions[start:to])):
            dropped.update(range(ways_out[0] + 1, at + 1))
            over = [
                (a, b) for a, b in jumps if start <= a < to and at < b <= end and not _is_more(instructions[a + 1 : b])
            ]
            dropped.update(*(range(a + 1, b) for a, b in over if not any(map(_is_poll, instructions[a + 1 : to]))))
        elif polls and ways_out and instructions[polls[0]].op.startswith("SYNCS"):
            dropped.update(range(ways_out[0] + 1, at + 1))
    places, body = {}, []
    for k in range(start, end + 1):
        places[k] = len(body)
        if k not in dropped:
            body.append(instructions[k])
    return body, [(places[to], places[at] + (at not in dropped)) for to, at in inner]


def _is_more(instructions):
    """Whether there is more than another poll in these."""
    return products(instructions) or any(
        one.op.startswith(("BAR", "ST")) and "SYS" not in one.op for one in instructions
    )


def _is_poll(one):
    waits = one.op.startswith("SYNCS.PHASECHK") and one.op.endswith("TRYWAIT")
    return waits or (one.op.startswith("LD") and ".STRONG.GPU" in one.op)


def _is_sent(one):
    return one.op.startswith("STAS") or (one.op.startswith("ST") and ".STRONG.GPU" in one.op)


@dataclass(frozen=True)
class Timing:
    """One warp alone in one turn of a loop. cycles: from its beginning to the next. waits: instructions that waited for
    another's result longer than for the one before them. waited: cycles of that."""

    cycles: int
    waits: int
    waited: int


def timing(body, hop=0):
    """``Timing`` of a loop's second turn, all branches as if nothing were jumped over.

    hop: cycles from a store to another thread block's words until a load sees it, both say STRONG; or from an
    asynchronous store until a wait at an mbarrier ends. A poll behind n stores
    of its turn is for the n-th of the turn before: a kernel with two tiles sends twice in a turn.
    """
    time, sends, ready = 0, [], [0] * 6
    for _ in range(2):
        start, waits, waited, before, sends, sending = time, 0, 0, sends, [], False
        for one in body:
            until = max((ready[scoreboard] for scoreboard in one.waits), default=0)
            if until > time:
                waits, waited, time = waits + 1, waited + until - time, until
            done = time + LATENCY.get(one.op.partition(".")[0], 12)
            if _is_poll(one):
                sending = False
                done = max([done, *(sent + hop for sent in (before + sends)[len(sends) : len(sends) + 1])])
            if _is_sent(one) and not sending:
                sending = True
                sends.append(time)  # the first store counts: later ones empty old words, once in 16 timesteps
            for scoreboard, when in zip(one.sets, (done, min(done, time + READ)), strict=True):
                if scoreboard is not None:
                    ready[scoreboard] = max(ready[scoreboard], when)
            time += max(one.stall, 1) if not one.op.startswith("BAR") else LATENCY["BAR"]
    return Timing(time - start, waits, waited)
