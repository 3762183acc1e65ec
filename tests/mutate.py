"""Small errors planted one at a time, and whether a test notices: ``python tests/mutate.py --seed 0 --count 40``.

A sample of what a slip of the hand could change in gpurnn/ and kernels/cpu/: a comparison, an operator, a number by
one, a condition's opposite, ``and`` for ``or``, a statement left out. Each is made in a copy of the project, where the
tests that belong to the file run until the first one fails. What survives is printed with its line: either a test is
missing, or the program means the same as before. The same seed plants the same errors.
"""

import argparse
import ast
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

# file -> its tests, where the name does not say it; the others have tests/test_NAME.py
TESTS = {
    "gpurnn/__init__.py": ["test_packaging.py", "test_module.py"],
    "gpurnn/backends/cuda/cublas.py": ["test_cublas.py", "test_cuda_layers.py"],
    "gpurnn/backends/cuda/cubins.py": ["test_device.py"],
    "gpurnn/backends/cuda/device.py": ["test_device.py", "test_cublas.py", "test_cuda_device.py"],
    "gpurnn/backends/sources.py": ["test_kernels.py", "test_packaging.py"],
    "gpurnn/backends/cuda/launch.py": ["test_kernels.py", "test_cuda_gate.py"],
    "gpurnn/backends/cuda/exchange.py": ["test_cuda_grid.py", "test_cuda_layers.py"],
    "gpurnn/backends/cuda/recording.py": ["test_cuda_updates.py"],
    "gpurnn/backends/cuda/sums.py": ["test_cuda_ops.py"],
    "gpurnn/train/record": ["test_cuda_updates.py"],
    "gpurnn/backends/cuda/libraries.py": ["test_backend.py", "test_cuda_gate.py", "test_device.py"],
    "gpurnn/backends/cuda/nvrtc.py": ["test_device.py", "test_cuda_gate.py"],
    "gpurnn/check/own_cells.py": ["test_own_cells.py"],
    "gpurnn/cells/library.py": ["test_library.py"],
    "gpurnn/recurrent/population.py": ["test_options.py"],
    "gpurnn/cells/options.py": ["test_options.py"],
    "gpurnn/cells/haste.py": ["test_options.py"],
    "gpurnn/cells/stored.py": ["test_stored.py", "test_bad_model_files.py"],
    "gpurnn/shards.py": ["test_parallel.py"],
    "bench/parallel": ["test_bench_parallel.py"],
    "gpurnn/train/members.py": ["test_parallel.py", "test_parallel_same.py", "test_parallel_mpi.py"],
    "gpurnn/train/parallel/start.py": ["test_parallel_same.py", "test_parallel.py"],
    "gpurnn/train/parallel/nccl.py": ["test_parallel_nccl.py"],
    "gpurnn/train/parallel/launchers.py": ["test_launchers.py"],
    "gpurnn/train/parallel/mpi.py": ["test_parallel_mpi.py"],
    "gpurnn/train/parallel/": [
        "test_parallel.py",
        "test_parallel_same.py",
        "test_parallel_mpi.py",
        "test_launchers.py",
    ],
    "gpurnn/tasks/together.py": ["test_parallel_mpi.py"],
    "gpurnn/cli/followers.py": ["test_launchers.py", "test_parallel_mpi.py"],
    "gpurnn/model_file/runs.py": ["test_model_runs.py"],
    "gpurnn/model_file/": ["test_save.py", "test_bad_model_files.py", "test_model_runs.py"],
    "gpurnn/tensors.py": ["test_bad_model_files.py", "test_save.py", "test_checkpoint.py"],
    "gpurnn/module/building.py": ["test_save.py", "test_bad_model_files.py"],
    "gpurnn/tasks/exported.py": ["test_model_runs.py", "test_onnx_runs.py"],
    "gpurnn/cli/file_facts.py": ["test_model_runs.py"],
    "gpurnn/backends/batch_statistics.py": ["test_options.py"],
    "gpurnn/recurrent/marks.py": ["test_marks.py"],
    "gpurnn/recurrent/heads.py": ["test_heads.py"],
    "gpurnn/recurrent/conversion.py": ["test_heads.py"],
    "gpurnn/backends/marks.py": ["test_marks.py", "test_states.py"],
    "gpurnn/backends/blocks.py": ["test_losses.py"],
    "gpurnn/backends/rebuild.py": ["test_states.py", "test_recurrent.py"],
    "gpurnn/backends/chunks.py": ["test_chunks.py"],
    "gpurnn/data/packing.py": ["test_pack.py"],
    "gpurnn/backends/cpu/native.py": ["test_cpu_ops.py", "test_system.py"],
    "gpurnn/backends/cpu/threads.py": ["test_threads.py", "test_system.py"],
    "gpurnn/files/system.py": ["test_system.py", "test_files.py"],
    "gpurnn/cli/info.py": ["test_info.py"],
    "gpurnn/backends/cpu/sharing.py": ["test_cpu_ops.py", "test_cells.py"],
    "gpurnn/backends/cpu/inference.py": ["test_inference.py"],
    "gpurnn/backends/cpu/packing.py": ["test_packing.py", "test_stepper.py"],
    "gpurnn/backends/cpu/step_program.py": ["test_stepper.py"],
    "gpurnn/backends/steps.py": ["test_stepper.py"],
    "gpurnn/backends/cpu/uncompiled.py": ["test_arguments.py", "test_cpu_ops.py", "test_system.py", "test_16_bit.py"],
    "gpurnn/module/stepper.py": ["test_stepper.py"],
    "gpurnn/module/quantized.py": ["test_quantized.py"],
    "gpurnn/backends/int8.py": ["test_int8.py", "test_quantized.py"],
    "kernels/cpu/int8.h": ["test_int8.py"],
    "kernels/cpu/int8_rows.h": ["test_int8.py"],
    "gpurnn/backends/cpu/state_arrays.py": ["test_marks.py"],
    "gpurnn/recurrent/calls.py": ["test_recurrent.py", "test_marks.py"],
    "gpurnn/recurrent/dropout.py": ["test_options.py", "test_recurrent.py"],
    "gpurnn/cells/struct_code.py": ["test_struct.py"],
    "gpurnn/cells/": [
        "test_traced.py",
        "test_tails.py",
        "test_random_cells.py",
        "test_recurrent.py",
        "test_recurrent_torch.py",
    ],
    "gpurnn/backends/cuda/schedules/tun": ["test_tuning.py"],
    "gpurnn/backends/cuda/schedules": [
        "test_cuda_block.py",
        "test_cuda_grid.py",
        "test_cuda_cluster.py",
        "test_cuda_fused.py",
        "test_tuning.py",
        "test_device.py",
    ],  # fmt: skip
    "gpurnn/backends/cuda/marks.py": ["test_cuda_marks.py"],
    "gpurnn/backends/cuda/": ["test_cuda_layers.py", "test_cuda_ops.py", "test_cuda_grid.py", "test_threads.py"],
    "gpurnn/backends/cpu/cells.py": ["test_cell_cache.py", "test_cells.py"],
    "gpurnn/backends/cpu/": ["test_cpu_ops.py", "test_robust.py", "test_16_bits.py"],
    "gpurnn/backends/switch.py": ["test_backend.py"],
    "gpurnn/interop/torch/": ["test_torch.py"],
    "gpurnn/interop/sklearn/": ["test_sklearn.py"],
    "gpurnn/interop/jax/weights.py": ["test_jax_weights.py"],
    "gpurnn/interop/jax/": ["test_jax.py"],
    "gpurnn/interop/arguments.py": ["test_torch.py", "test_jax.py"],
    "gpurnn/interop/configuration.py": ["test_torch.py", "test_jax.py"],
    "gpurnn/interop/derivatives.py": ["test_torch.py", "test_jax.py"],
    "gpurnn/module/": ["test_module.py", "test_copies.py", "test_freeze.py", "test_between.py", "test_summary.py"],
    "gpurnn/optim/": ["test_optim.py", "test_freeze.py", "test_copies.py"],
    "gpurnn/tasks/run.py": ["test_tasks_run.py", "test_train_command.py", "test_start.py"],
    "gpurnn/tasks/start.py": ["test_start.py", "test_train_command.py"],
    "gpurnn/plots.py": ["test_plots.py", "test_history_picture.py"],
    "gpurnn/cli/messages.py": ["test_messages.py"],
    "gpurnn/cli/train.py": ["test_train_command.py", "test_cli.py"],
    "gpurnn/train/callbacks.py": ["test_callbacks.py"],
    "gpurnn/train/find_lr.py": ["test_find_lr.py"],
    "gpurnn/train/loop.py": ["test_training.py", "test_callbacks.py"],
    "gpurnn/train/measure.py": ["test_training.py", "test_fit_arguments.py"],
    "gpurnn/train/progress.py": ["test_progress.py"],
    "gpurnn/train/s": ["test_training.py", "test_fit_arguments.py"],
    "gpurnn/train/": ["test_training.py", "test_loss_scale.py", "test_run_folder.py", "test_weights.py"],
    "gpurnn/_interrupt.py": ["test_terminal.py", "test_packaging.py"],
    "gpurnn/folder_lock.py": ["test_run_folder.py"],
    "gpurnn/data/encodings.py": ["test_encodings.py", "test_tables.py", "test_labelled.py"],
    "gpurnn/data/labelled.py": ["test_labelled.py", "test_tasks_classify.py"],
    "gpurnn/data/rows.py": ["test_labelled.py", "test_tasks_translate.py"],
    "gpurnn/data/pairs.py": ["test_tasks_translate.py"],
    "gpurnn/data/tokens.py": ["test_tokens.py"],
    "gpurnn/data/vocabulary.py": ["test_vocabulary.py"],
    "gpurnn/tasks/seen.py": ["test_seen.py"],
    "gpurnn/fonts.py": ["test_plots.py"],
    "gpurnn/data/images.py": ["test_tasks_longrange.py"],
    "gpurnn/data/midi.py": ["test_tasks_music.py"],
    "gpurnn/data/rolls.py": ["test_tasks_music.py"],
    "gpurnn/data/utterances.py": ["test_tasks_speech.py"],
    "gpurnn/tasks/speech/": ["test_tasks_speech.py"],
    "gpurnn/data/audio.py": ["test_audio.py"],
    "gpurnn/data/skipped.py": ["test_skipped.py"],
    "gpurnn/data/wav.py": ["test_wav.py"],
    "gpurnn/data/tables.py": ["test_tables.py", "test_tasks_series.py", "test_terminal.py"],
    "gpurnn/data/numerals.py": ["test_tables.py"],
    "gpurnn/data/dates.py": ["test_tables.py", "test_tasks_series.py"],
    "gpurnn/data/moments.py": ["test_tables.py", "test_tasks_series.py"],
    "gpurnn/tasks/series/": ["test_tasks_series.py", "test_tables.py"],
    "gpurnn/data/npz.py": ["test_hostile.py", "test_weights.py", "test_tasks_music.py"],
    "gpurnn/dtypes.py": ["test_module.py", "test_16_bit.py", "test_kernels.py"],
    "gpurnn/decoding.py": ["test_seq2seq.py"],
    "gpurnn/errors.py": ["test_module.py", "test_optim.py", "test_layers.py", "test_recurrent.py"],
    "gpurnn/interop/c/": ["test_c_files.py", "test_c_functions.py", "test_c_export.py"],
    "gpurnn/interop/onnx/runs.py": ["test_onnx_runs.py"],
    "gpurnn/interop/onnx/": ["test_onnx_import.py", "test_onnx_export.py", "test_onnx_bad_files.py"],
    "gpurnn/interop/keras/layers.py": ["test_keras_layers.py", "test_keras.py"],
    "gpurnn/interop/keras/": ["test_keras.py", "test_keras_bad_files.py"],
    "gpurnn/cli/export.py": ["test_onnx_runs.py", "test_model_runs.py", "test_c_files.py"],
    "gpurnn/cli/import_.py": ["test_onnx_runs.py"],
    "gpurnn/layers": ["test_layers.py", "test_unused.py"],
    "gpurnn/per_sample/": ["test_per_sample.py"],
    "gpurnn/backends/dual/": ["test_tangents.py"],
    "gpurnn/gradients.py": ["test_recurrent.py", "test_training.py"],
    "gpurnn/backends/ops.py": ["test_between.py", "test_recurrent.py", "test_losses.py", "test_layers.py"],
    "gpurnn/backends/machine.py": ["test_robust.py", "test_checkpoint.py"],
    "gpurnn/backends/time_loop.py": ["test_recurrent.py", "test_recurrent_torch.py"],
    "gpurnn/check/": ["test_check.py"],
    "gpurnn/data/batches.py": ["test_data.py"],
    "gpurnn/data/synthetic.py": ["test_data.py", "test_tasks_longrange.py"],
    "gpurnn/tasks/settings.py": ["test_tasks_run.py"],
    "gpurnn/tasks/text.py": ["test_tasks_text.py", "test_text_documents.py"],
    "gpurnn/tasks/task.py": ["test_tasks_run.py", "test_tasks_text.py"],
    "gpurnn/tasks/trained.py": ["test_tasks_run.py"],
    "gpurnn/testing/": ["test_testing.py"],
    "gpurnn/losses/": ["test_losses.py", "test_loss_kit.py", "test_extremes.py"],
    "gpurnn/backends/streams.py": ["test_threads.py", "test_cuda_layers.py"],
    "gpurnn/backends/records.py": ["test_recurrent.py", "test_cpu_ops.py"],
    "gpurnn/backends/weight_gradients.py": ["test_recurrent.py", "test_recurrent_torch.py"],
    "gpurnn/files/": ["test_files.py", "test_checkpoint.py"],
    "gpurnn/cli/": ["test_cli.py", "test_info.py", "test_terminal.py", "test_tasks_text.py", "test_tasks_run.py"],
    "gpurnn/recurrent/memory.py": ["test_memory.py", "test_states.py"],
    "gpurnn/recurrent/peak.py": ["test_memory.py"],
    "gpurnn/recurrent/checkpoints.py": ["test_memory.py", "test_states.py"],
    "gpurnn/recurrent/directions.py": ["test_memory.py", "test_states.py"],
    "gpurnn/recurrent/": ["test_recurrent.py", "test_recurrent_torch.py", "test_between.py"],
    "kernels/cpu/functions.h": ["test_cpu_ops.py", "test_functions.py"],
    "kernels/cpu/fingerprint.h": ["test_packing.py"],
    "kernels/cpu/step.h": ["test_stepper.py"],
    "kernels/cpu/stages.h": ["test_cells.py"],
    "kernels/cpu": ["test_cpu_ops.py", "test_cells.py"],
}
_LEFT_OUT = ("gpurnn/__main__.py", "gpurnn/_typing.py")
_COMPARE = {ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
            ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In}  # fmt: skip
_BINARY = {ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult,
           ast.Mod: ast.FloorDiv, ast.BitOr: ast.BitAnd, ast.BitAnd: ast.BitOr}  # fmt: skip
_CPP = [  # a piece of C++ -> what becomes of it
    (r"(?<=[\w)\]]) < (?=[\w(])", " <= "), (r"(?<=[\w)\]]) <= (?=[\w(])", " < "), (r"(?<=[\w)\]]) > (?=[\w(])", " >= "),
    (r" == ", " != "), (r" != ", " == "), (r" && ", " || "), (r" \|\| ", " && "), (r"(?<=[\w)\]]) \+ (?=[\w(])", " - "),
    (r"(?<=[\w)\]]) - (?=[\w(])", " + "), (r"(?<=[\w)\]]) \* (?=[\w(])", " + "), (r" \+= ", " -= "), (r"\b1\b", "2"),
    (r"\b0\b", "1"),
]  # fmt: skip


@dataclass(frozen=True)
class Mutation:
    """One error: what it is in words, and the bytes [start, stop) of the file that ``new`` takes the place of."""

    file: str
    line: int
    told: str
    start: int
    stop: int
    new: str

    def planted(self, text):
        """The file's text with the error in it."""
        before = text.encode()
        return (before[: self.start] + self.new.encode() + before[self.stop :]).decode()

    def __str__(self):
        return f"{self.file}:{self.line}: {self.told}"


# ---- what can go wrong


def python_mutations(file, text):
    """Every ``Mutation`` of a Python file."""
    tree = ast.parse(text)
    for parent in ast.walk(tree):
        for child in ast.iter_child_nodes(parent):
            child.parent = parent
    starts = [0]  # bytes before each line
    for line in text.splitlines(keepends=True):
        starts.append(starts[-1] + len(line.encode()))
    found = []
    for node in ast.walk(tree):
        for new in _changed(node):
            told, code = f"{_told(node)}  ->  {_told(new)}", ast.unparse(new)
            start = starts[node.lineno - 1] + node.col_offset
            stop = starts[node.end_lineno - 1] + node.end_col_offset
            # brackets keep together what is inside
            code = code if isinstance(node, ast.stmt) else f"({code})"
            found.append(Mutation(file, node.lineno, told, start, stop, code))
    return found


def _changed(node):
    """A node's mutations, each a node of its own."""
    if isinstance(node, ast.Compare) and len(node.ops) == 1:
        yield ast.Compare(node.left, [_COMPARE[type(node.ops[0])]()], node.comparators)
    elif isinstance(node, ast.BinOp) and type(node.op) in _BINARY and not _is_text(node):
        yield ast.BinOp(node.left, _BINARY[type(node.op)](), node.right)
    elif isinstance(node, ast.BoolOp):
        yield ast.BoolOp(ast.And() if isinstance(node.op, ast.Or) else ast.Or(), node.values)
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
        yield node.operand
    elif isinstance(node, ast.Constant) and type(node.value) is bool:
        if isinstance(node.parent, ast.keyword) and node.parent.arg == "copy":
            return  # astype(..., copy=True) costs time and memory, and means the same
        yield ast.Constant(not node.value)
    elif isinstance(node, ast.Constant) and type(node.value) is int and not isinstance(node.parent, ast.FormattedValue):
        yield ast.Constant(node.value + 1)
    elif isinstance(node, ast.IfExp):
        yield ast.IfExp(node.test, node.orelse, node.body)
    elif isinstance(node, ast.AugAssign) or (isinstance(node, ast.Expr) and not isinstance(node.value, ast.Constant)):
        yield ast.Pass()


def _is_text(node):
    """Whether an operation joins or repeats strings, which are messages mostly."""
    sides = (node.left, node.right)
    return any(isinstance(side, ast.JoinedStr) or isinstance(getattr(side, "value", None), str) for side in sides)


def _told(node):
    text = " ".join(ast.unparse(node).split())
    return text if len(text) <= 60 else text[:57] + "..."


def cpp_mutations(file, text):
    """Every ``Mutation`` of a C++ file: pieces of its lines, comments and preprocessor lines apart."""
    found, before = [], 0
    for number, line in enumerate(text.splitlines(keepends=True), 1):
        code = line.partition("//")[0]
        if code.strip() and not code.lstrip().startswith(("#", "template", "static_assert", "asm")):
            for pattern, new in _CPP:
                for piece in re.finditer(pattern, code):
                    told = f"{' '.join(code.split())[:70]}  :{piece[0]} ->{new} at column {piece.start()}"
                    start, stop = (before + len(code[:place].encode()) for place in piece.span())
                    found.append(Mutation(file, number, told, start, stop, new))
        before += len(line.encode())
    return found


def all_mutations(root=ROOT, only=None):
    """Those of every file, or of the files whose names hold one of ``only``; in order."""
    found = []
    for path in sorted([*(root / "gpurnn").rglob("*.py"), *(root / "kernels/cpu").glob("*.*")]):
        file = path.relative_to(root).as_posix()
        if file in _LEFT_OUT or (only and not any(part in file for part in only)):
            continue
        text = path.read_text(encoding="utf-8")
        found += python_mutations(file, text) if path.suffix == ".py" else cpp_mutations(file, text)
    return found


def tests_of(file, root=ROOT):
    """The test files that belong to a file, as paths from the project's folder."""
    folder = next((key for key in TESTS if file.startswith(key)), None)
    name = re.sub(r"^tasks/", "tasks_", file.removeprefix("gpurnn/")).replace("/", "_").removesuffix(".py").lstrip("_")
    names = TESTS[folder] if folder else [f"test_{name}.py"]
    return [path.relative_to(root).as_posix() for name in names for path in (root / "tests").rglob(name)]


# ---- whether it is noticed


class Copies:
    """Copies of the project, each used by one run at a time."""

    def __init__(self, count):
        self.folder = tempfile.TemporaryDirectory(prefix="gpurnn-mutate-")
        self.free = [Path(self.folder.name) / str(k) for k in range(count)]
        ignored = shutil.ignore_patterns(".git", "__pycache__", ".venv", "build", "*.egg-info", ".pytest_cache", "runs")
        for place in self.free:
            shutil.copytree(ROOT, place, ignore=ignored)

    def run(self, mutation, seconds):
        """``(noticed, why)``: by which test, or that it does not compile, or that the tests did not end in time."""
        place = self.free.pop()
        path = place / mutation.file
        before = path.read_text(encoding="utf-8")
        try:
            path.write_text(mutation.planted(before), encoding="utf-8")
            if not mutation.file.endswith(".py"):
                build = "-c", "from setuptools import setup; setup()", "-q", "build_ext", "--inplace"
                built = _python(place, 300, *build)
                if built is None or built.returncode or "error:" in built.stderr:
                    return True, "does not compile"
            pytest = "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "-p", "no:xdist"
            done = _python(place, seconds, *pytest, *tests_of(mutation.file, place))
            if done is None:
                return True, "the tests did not end"
            failed = re.findall(r"^(?:FAILED|ERROR) (\S+)", done.stdout, re.M)
            return done.returncode != 0, failed[0] if failed else f"pytest ended with {done.returncode}"
        finally:
            path.write_text(before, encoding="utf-8")
            self.free.append(place)

    def close(self):
        self.folder.cleanup()


def _python(place, seconds, *arguments):
    """A finished process in a copy, or None where it took too long."""
    environment = os.environ | {"PYTHONPATH": str(place), "PYTHONDONTWRITEBYTECODE": "1"}
    try:
        return subprocess.run(
            [sys.executable, *arguments], cwd=place, env=environment, capture_output=True, text=True, timeout=seconds
        )
    except subprocess.TimeoutExpired:
        return None


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, default=40, help="errors planted [40]")
    parser.add_argument("--only", action="append", help="part of a file's name; may be repeated")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="copies that run side by side")
    parser.add_argument("--seconds", type=float, default=600, help="longest run of a file's tests [600]")
    parser.add_argument("--list", action="store_true", help="print the errors and plant none")
    options = parser.parse_args(arguments)
    mutations = all_mutations(only=options.only)
    chosen = random.Random(options.seed).sample(mutations, min(options.count, len(mutations)))
    print(f"{len(chosen)} of {len(mutations)} errors, seed {options.seed}", flush=True)
    if options.list:
        print("\n".join(map(str, chosen)))
        return 0
    copies, survived, start = Copies(options.jobs), [], time.monotonic()
    try:
        with ThreadPoolExecutor(options.jobs) as pool:
            results = pool.map(lambda mutation: copies.run(mutation, options.seconds), chosen)
            for mutation, (noticed, why) in zip(chosen, results, strict=True):
                print(f"{'noticed ' if noticed else 'SURVIVED'} {mutation}   [{why}]", flush=True)
                survived += [] if noticed else [mutation]
    finally:
        copies.close()
    share = 100 * (1 - len(survived) / max(1, len(chosen)))
    print(f"noticed: {len(chosen) - len(survived)} of {len(chosen)}, {share:.0f} %, {time.monotonic() - start:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
