"""The compile gate: every kernel, every type, every architecture; registers, stack, spills and shared memory beside
what was accepted before (``resources.json``).

    PYTHONPATH=tests python -m cuda_on_cpu.gate             the table, with blocks per multiprocessor
    PYTHONPATH=tests python -m cuda_on_cpu.gate --accept    make it the accepted one
"""

import argparse
import json
import os
import re
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

from gpurnn.backends.sources import kernel_source

from . import nvrtc
from .kernel_list import FIRST, KERNELS

ACCEPTED = Path(__file__).parent / "resources.json"
# For sm_89 the compiler makes of every kernel what it makes for sm_86: no source and no instruction that they use tells
# them apart, and all figures are equal. So only these files are compiled for both.
SAME, BOTH = {89: 86}, ("step.cu", "block_mma.cu")
BLOCK = 256  # threads that the table's blocks per multiprocessor are computed for

# CUDA C++ Programming Guide, technical specifications per compute capability: warps and blocks that live on a
# multiprocessor at once, KB of shared memory on a multiprocessor and for one block.
_LIMITS = {
    75: (32, 16, 64, 64),
    80: (64, 32, 164, 163),
    86: (48, 16, 100, 99),
    89: (48, 24, 100, 99),
    90: (64, 32, 228, 227),
    100: (64, 32, 228, 227),
    120: (48, 24, 100, 99),
}
_REGISTERS = 65536  # 32-bit registers of a multiprocessor, a quarter to each of its 4 parts, 256 at a time to a warp


@dataclass(frozen=True)
class Resources:
    """What one kernel needs on one architecture. Registers a thread; bytes a thread, or a block (shared)."""

    registers: int
    stack: int
    spill_stores: int
    spill_loads: int
    shared: int


def global_functions(source):
    """Names of the ``__global__`` functions of a CUDA source."""
    source = re.sub(r"//[^\n]*|/\*.*?\*/", " ", source, flags=re.S)
    # Qualifiers with arguments go first. An unknown one is taken for a kernel's name, so that the list's test fails.
    arguments = r"\s*\((?:[^()]|\([^()]*\))*\)"
    source = re.sub(rf"\b__(?:launch_bounds|cluster_dims|in_clusters|block_size|maxnreg)__{arguments}", " ", source)
    return re.findall(r"\b__global__\b[^(){};]*?(\w+)\s*\(", source)


def list_problems(kernels, sources):
    """What is wrong between a list like ``KERNELS`` and the sources, file name -> text: a list of sentences."""
    problems = []
    for file, source in sources.items():
        there = set(global_functions(source))
        listed = {re.match(r"\w+", expression)[0] for expression in kernels.get(file, ())}
        problems += [f"{file}: {name} has no entry in kernel_list.py" for name in sorted(there - listed)]
        problems += [f"{file}: kernel_list.py names {name}, which is gone" for name in sorted(listed - there)]
    problems += [f"kernel_list.py names {file}, which is gone" for file in sorted(kernels.keys() - sources.keys())]
    return problems


def parse_log(log):
    """ptxas's report (-Xptxas -v): mangled name -> Resources."""
    found = {}
    for part in log.split("Compiling entry function '")[1:]:
        name = part[: part.index("'")]
        frame = re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", part)
        used = re.search(r"Used (\d+) registers", part)
        if not (frame and used):
            raise ValueError(f"no figures for {name} in ptxas's report:\n{part}")
        shared = re.search(r"(\d+) bytes smem", part)
        found[name] = Resources(int(used[1]), *map(int, frame.groups()), int(shared[1]) if shared else 0)
    return found


def measure(file, source, expressions, arch):
    """name expression -> Resources of one file on one architecture."""
    program = nvrtc.compile(source, file=file, arch=arch, expressions=tuple(expressions))
    report = parse_log(program.log)
    return {expression: report[program.lowered[expression]] for expression in expressions}


def measure_all(kernels=KERNELS, architectures=nvrtc.ARCHITECTURES):
    """(file, name expression, architecture) -> Resources; NVRTC runs in parallel threads."""
    wanted = [(file, arch) for file in kernels for arch in architectures if arch >= FIRST.get(file, 0)]
    instead = {(file, arch): (file, arch if file in BOTH else SAME.get(arch, arch)) for file, arch in wanted}
    jobs = list(dict.fromkeys(instead.values()))
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        tables = pool.map(lambda job: measure(job[0], kernel_source(job[0]), kernels[job[0]], job[1]), jobs)
        found = dict(zip(jobs, tables, strict=True))
    return {
        (file, expression, arch): resources
        for file, arch in wanted
        for expression, resources in found[instead[file, arch]].items()
    }


def blocks_per_multiprocessor(resources, threads, arch, dynamic_shared=0):
    """How many blocks of ``threads`` live on one multiprocessor at once; 0: a block does not fit at all.

    The rules of NVIDIA's cuda_occupancy.h: registers are handed out to warps in units of 256, and no warp takes them
    from two parts of the multiprocessor; shared memory in units of 128 bytes (256 on sm_75) with 1 KB for the system
    from sm_80 on. Named barriers, 16 to a block, are not counted.
    """
    if threads > 1024:
        return 0
    warps_limit, blocks_limit, shared_limit, block_limit = _LIMITS[arch]
    warps = -(-threads // 32)
    by_warps = warps_limit // warps
    registers = -(-resources.registers * 32 // 256) * 256
    by_registers = _REGISTERS // 4 // registers * 4 // warps if registers else blocks_limit
    unit = 256 if arch == 75 else 128
    used = resources.shared + dynamic_shared
    if used > block_limit * 1024:
        return 0
    taken = -(-(used + (0 if arch == 75 else 1024)) // unit) * unit
    by_shared = shared_limit * 1024 // taken if taken else blocks_limit
    return min(by_warps, blocks_limit, by_registers, by_shared)


def spills(table):
    """Sentences about every kernel that keeps registers in memory."""
    return [
        f"{file}: {expression} for sm_{arch}: {r.spill_stores} bytes of spill stores, {r.spill_loads} of loads, "
        f"{r.stack} bytes of stack"
        for (file, expression, arch), r in table.items()
        if r.spill_stores or r.spill_loads or r.stack
    ]


def growth(table, accepted):
    """Sentences about every figure above the accepted one; a kernel that is new counts, too."""
    problems = []
    for key, resources in table.items():
        file, expression, arch = key
        before = accepted.get(key)
        if before is None:
            problems.append(f"{file}: {expression} for sm_{arch} is not in resources.json")
            continue
        for name in ("registers", "shared"):
            old, new = getattr(before, name), getattr(resources, name)
            if new > old:
                problems.append(f"{file}: {expression} for sm_{arch}: {name} grew from {old} to {new}")
    if problems:
        problems.append("if that is meant: PYTHONPATH=tests python -m cuda_on_cpu.gate --accept")
    return problems


def read_accepted(path=ACCEPTED):
    """(NVRTC version, table) that was accepted."""
    data = json.loads(path.read_text())
    table = {
        (file, expression, int(arch)): Resources(*figures)
        for file, kernels in data["kernels"].items()
        for expression, by_arch in kernels.items()
        for arch, figures in by_arch.items()
    }
    return tuple(data["nvrtc"]), table


def accept(table, path=ACCEPTED):
    kernels = {}
    for (file, expression, arch), resources in table.items():
        kernels.setdefault(file, {}).setdefault(expression, {})[arch] = list(asdict(resources).values())
    lines = [
        f"  {json.dumps(file)}: {{\n"
        + ",\n".join(f"   {json.dumps(name)}: {json.dumps(by_arch)}" for name, by_arch in by_name.items())
        + "\n  }"
        for file, by_name in kernels.items()
    ]
    fields = json.dumps(list(Resources.__dataclass_fields__))
    path.write_text(
        f'{{\n "nvrtc": {json.dumps(nvrtc.version())},\n "figures": {fields},\n "kernels": {{\n'
        + ",\n".join(lines)
        + "\n }\n}\n"
    )


def print_table(table):
    archs = sorted({arch for _, _, arch in table})
    print(f"registers / bytes of shared memory / blocks of {BLOCK} threads per multiprocessor; spills are marked !")
    print(f"{'':43}" + "".join(f"{f'sm_{arch}':>11}" for arch in archs))
    for file, expression in dict.fromkeys((file, expression) for file, expression, _ in table):
        cells = ""
        for arch in archs:
            r = table.get((file, expression, arch))
            if r is None:
                cells += f"{'-':>11}"
                continue
            mark = "!" if r.spill_stores or r.stack else ""
            cells += f"{f'{r.registers}/{r.shared}/{blocks_per_multiprocessor(r, BLOCK, arch)}{mark}':>11}"
        print(f"{expression:43.43}{cells}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--accept", action="store_true", help="write these figures to resources.json as accepted")
    given = parser.parse_args()
    table = measure_all()
    print_table(table)
    if given.accept:
        accept(table)
        print(f"accepted: {ACCEPTED.name}, NVRTC {'.'.join(map(str, nvrtc.version()))}")
        return 0
    problems = spills(table)
    version, accepted = read_accepted()
    if version == nvrtc.version():
        problems += growth(table, accepted)
    else:  # another ptxas hands out registers differently: its figures say nothing about the kernels
        print(f"not compared: {ACCEPTED.name} is for NVRTC {version}, here is {nvrtc.version()}")
    print("\n".join(problems) or "no problems")
    return int(bool(problems))


if __name__ == "__main__":
    sys.exit(main())
