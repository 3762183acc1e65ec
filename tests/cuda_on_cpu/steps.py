"""What the machine code of schedule `block` says about a timestep on an H200: a table in Markdown, an ESTIMATE.

    pip install nvidia-cuda-nvdisasm
    PYTHONPATH=tests python -m cuda_on_cpu.steps > bench/results/block_estimate.md

Each kernel is the one that the cost model would choose. Its time loop is taken out of nvdisasm's text and its
instructions are counted, all branches as if taken, so at most; loops within it as often as the template arguments say.
What stands apart from the product, between barriers, only warps do that own a sequence.
"""

import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from gpurnn.backends.cuda import schedules
from gpurnn.backends.cuda.launch import kernel_of
from gpurnn.backends.cuda.libraries import wheel_folders
from gpurnn.backends.cuda.schedules.cost import BARRIERS
from gpurnn.backends.sources import kernel_source
from gpurnn.cells import CELLS
from gpurnn.dtypes import ITEMSIZE

from . import nvrtc
from .gate import parse_log

CLOCK = 1.98e9
H200 = schedules.Device(90, 132, 227 * 1024, CLOCK)
NAMES = "lstm", "gru", "rnn_tanh"
KINDS = {"float32": ("float32", False), "tf32": ("float32", True), "bfloat16": ("bfloat16", False)}
CASES = [
    *((cell, 128, I, kind, False) for cell in NAMES for kind in KINDS for I in (0, 8)),
    *((cell, 128, 0, kind, True) for cell in NAMES for kind in KINDS),
    *(("lstm", 192, 0, "bfloat16", backward) for backward in (False, True)),
    *(("gru", 224, 0, "bfloat16", backward) for backward in (False, True)),
]
TENSOR = {2: 2680, 4: 1340}  # operations a clock of mma.sync, by bytes of a number: published measurements on an H100


def nvdisasm(cubin):
    """The machine code of a program as text. Raises SystemExit where the tool is missing."""
    paths = [folder / "bin/nvdisasm" for folder in wheel_folders()]
    tool = next((str(path) for path in paths if path.is_file()), shutil.which("nvdisasm"))
    if not tool:
        sys.exit("nvdisasm is missing: pip install nvidia-cuda-nvdisasm")
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(cubin)
        return subprocess.run([tool, "-c", file.name], capture_output=True, text=True, check=True).stdout


def instructions(text, name):
    """Of one kernel: the operations in order, and the jumps back, (from, to) as places in that order."""
    part = text[text.index(f".text.{name}:") :]
    end = part.find("\n.section", 1)
    operations, labels, jumps = [], {}, []
    for line in part[: end if end > 0 else None].splitlines():
        label = re.match(r"(\.L_x_\d+):", line)
        if label:
            labels[label[1]] = len(operations)
        code = re.search(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\d\s+)?([A-Z][\w.]*)", line)
        if code:
            target = re.search(r"BRA.*`\((\.L_x_\d+)\)", line)
            if target and target[1] in labels:
                jumps.append((len(operations), labels[target[1]]))
            operations.append(code[1])
    return operations, jumps


def products(operations):
    return sum(op.startswith(("FFMA", "HMMA")) for op in operations)


def time_loop(operations, jumps):
    """The smallest loop with a barrier and most of the products: its operations, and the loops within it."""
    loops = [(to, at) for at, to in jumps if any(op.startswith("BAR") for op in operations[to : at + 1])]
    most = max(products(operations[to : at + 1]) for to, at in loops)
    start, end = min((loop for loop in loops if products(operations[loop[0] : loop[1] + 1]) > 0.9 * most),
                     key=lambda loop: loop[1] - loop[0])  # fmt: skip
    inner = [operations[to : at + 1] for at, to in jumps if start <= to and at < end and (to, at) != (start, end)]
    return operations[start : end + 1], inner


def of_a_step(candidate, problem, operations, jumps):
    """Instructions of a timestep: of one warp that does everything, and of a warp on average."""
    body, inner = time_loop(operations, jumps)
    parts = [[]]
    for op in body:
        parts[-1].append(op)
        if op.startswith("BAR"):
            parts.append([])
    product = max(parts, key=products)
    count, share = len(product), 1.0
    if candidate.kernel == "block":
        HP, S, KREG, R = candidate.numbers[:4]
        share = min(R, S) / S
        for loop in inner:
            quads = -(-candidate.inputs // 4 // S) if candidate.inputs and KREG * S == HP else (HP // S - KREG) // 4
            if products(loop) >= 4:
                count += (quads * 4 * problem.products * R / products(loop) - 1) * len(loop)
    rest = len(body) - len(product)
    return round(count + rest), count + share * rest


def row(cell, H, I, kind, backward):
    dtype, tf32 = KINDS[kind]
    problem = schedules.Problem(CELLS[cell], H, 512, 16, 1, dtype, False, backward, tf32, I)
    found = [candidate for candidate in schedules.block_candidates(problem, H200) if bool(candidate.inputs) == bool(I)]
    found = [candidate for candidate in found if not tf32 or candidate.kernel == "block_mma"]
    candidate = min(found, key=lambda candidate: candidate.total(problem.T))
    file, expression, struct = kernel_of(problem, candidate)
    program = nvrtc.compile(kernel_source(file, struct), file=file, arch=90, expressions=(expression,))
    name = program.lowered[expression]
    count, average = of_a_step(candidate, problem, *instructions(nvdisasm(program.cubin), name))
    warps, multiplied = (
        candidate.threads // 32,
        H * (problem.products * H + problem.gates * candidate.inputs) * candidate.rows,
    )
    issue = average * warps / 4
    tensor = candidate.kernel == "block_mma"
    arithmetic = 2 * multiplied / TENSOR[ITEMSIZE[dtype]] if tensor else multiplied / 128
    cycles = max(issue, arithmetic) + BARRIERS
    registers = parse_log(program.log)[name].registers
    held = f"{100 * candidate.held:.0f} + {100 - 100 * candidate.held:.0f}"
    return (
        f"| `{expression}` | {kind} | {candidate.rows} | {candidate.threads} | {registers} | {held} | {count} "
        f"| {issue:.0f} | {arithmetic:.0f} | {cycles:.0f} | {cycles / CLOCK * 1e6:.2f} | {CLOCK / cycles / 1e6:.2f} |"
    )


COLUMNS = (
    "kernel dtype sequences threads registers on-chip instructions issue arithmetic step us million-steps-a-second"
)
HEAD = f"""# Schedule `block` on an H200: an estimate, nothing here was measured

Made by `PYTHONPATH=tests python -m cuda_on_cpu.steps` from the machine code for sm_90 (NVRTC {{version}}), B 16, T 512.
Where IP, the last number of a forward kernel's name, is not 0, W_ih x is made within the launch.

on chip: % of the weights in registers + in shared memory. Instructions: of a warp in a timestep, all branches counted,
so at most. Cycles: issue, at 4 instructions a multiprocessor; arithmetic, the product at 128 multiply-adds, on tensor
cores at the published rate of mma.sync; a step, the longer of the two and {BARRIERS} of latency (barriers,
the cell, loads and stores), which is a guess until a GPU has measured it. Seconds at {CLOCK / 1e9:.2f} GHz.

| {" | ".join(COLUMNS.split()).replace("-", " ")} |
|---|---|{"---:|" * 10}"""


if __name__ == "__main__":
    print(HEAD.format(version=".".join(map(str, nvrtc.version()))))
    for case in CASES:
        print(row(*case), flush=True)
