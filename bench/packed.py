"""Sequences of different length in a training step: packed with resets, padded, and as torch packs them.

  python -m bench.packed --words reviews.txt --characters names/ --out packed_cpu.json

A step goes from lists of sequences, arrays on the host, to every gradient of one LSTM layer, those of its inputs
included. Putting a list together is part of it: that is what a training does with each batch. The loss is taken where
the outputs are, so these need not be put into another order. All layouts hold the same sequences, and are timed in
turns on one thread. Before one is timed its results are compared with those of each sequence alone, in float64.

In the problem ``resets`` there is no list, but rows with resets in them, as reinforcement learning has them. For
torch's LSTM the rows are split at the resets, the parts padded and maybe packed, and the outputs put back into rows;
or a loop over the timesteps calls its LSTMCell.

The number that counts is nanoseconds of processor time for a timestep: other work on the machine hardly adds to it.
"""

import json
import os
import shlex
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import click
import numpy as np

import gpurnn
from gpurnn.data import pack
from gpurnn.data.encodings import read_lines, text_files
from gpurnn.data.vocabulary import words
from gpurnn.files import make_folder, write_text_atomic

from .cases import Case
from .judge import allowed, furthest, inputs
from .layouts import LAYOUTS, RESET_LAYOUTS, layouts_of
from .machine import environment
from .results_file import ratio
from .run import environment_of

FORMAT, KIND = 1, "packed"
BATCHES, SEQUENCES = 4, 64  # in a step; so that it has short and long batches
RESETS = "resets"
DRAWN = "drawn"
MEDIAN, SPREAD, LONGEST = 20, 0.6, 200  # of drawn lengths: log-normal, as those of sentences about are
ROWS, STEPS, RATE = 128, 128, 0.03  # of the problem with resets: rows, their timesteps, resets for each timestep


@dataclass(frozen=True)
class Problem:
    """Sequences in batches, for one LSTM of H units with as many inputs.

    batches: for each the lengths of its sequences. rows: 0, or as many rows with resets are the one batch, in which its
    sequences stand one behind another.
    """

    name: str
    batches: list
    H: int
    rows: int = 0

    @property
    def tokens(self):
        """Timesteps of all sequences together."""
        return sum(map(sum, self.batches))

    @property
    def case(self):
        """The case that says which weights, and which errors are allowed."""
        return Case("lstm", max(map(max, self.batches)), len(self.batches[0]), self.H, self.H, what="train")

    def data(self, bucket=False):
        """For each batch (sequences, gradients of their outputs, their numbers); bucket: of similar length."""
        draw, lengths = np.random.default_rng(3), [length for batch in self.batches for length in batch]
        pairs = [draw.standard_normal((2, length, self.H), dtype="float32") for length in lengths]
        order = np.argsort(lengths, kind="stable") if bucket else np.arange(len(lengths))
        for numbers in np.split(order, np.cumsum([len(batch) for batch in self.batches])[:-1]):
            yield [pairs[n][0] for n in numbers], [pairs[n][1] for n in numbers], numbers.tolist()


# ---- lengths


def drawn_lengths(count):
    """Lengths from 1 to ``LONGEST``, log-normal."""
    draw = np.random.default_rng(1)
    return np.clip(np.rint(MEDIAN * np.exp(SPREAD * draw.standard_normal(count))), 1, LONGEST).astype(int).tolist()


def text_lengths(path, unit):
    """How many words or characters the lines of text files have, without empty ones."""
    paths = text_files([path], (".txt", ".pos", ".neg"))
    counts = (len(words(line)) if unit == "words" else len(line) for file in paths for line in read_lines(file))
    return [count for count in counts if count]


def mixed(name, lengths, H):
    """``BATCHES`` batches of ``SEQUENCES`` of these lengths, drawn. Raises ValueError where there are too few."""
    needed = BATCHES * SEQUENCES
    if len(lengths) < needed:
        raise ValueError(f"{name}: expected at least {needed} sequences, got {len(lengths)}")
    chosen = np.random.default_rng(2).permutation(len(lengths))[:needed]
    return Problem(name, np.array(lengths)[chosen].reshape(BATCHES, SEQUENCES).tolist(), H)


def with_resets(H):
    """``ROWS`` rows of ``STEPS`` timesteps with resets: the parts between these, row by row."""
    reset = np.random.default_rng(4).random((ROWS, STEPS)) < RATE
    reset[:, 0] = True
    return Problem(RESETS, [np.diff([*np.flatnonzero(reset), ROWS * STEPS]).tolist()], H, rows=ROWS)


# ---- a layout with its batches, and what is right


class Prepared:
    """A layout with the batches of a problem."""

    def __init__(self, problem, weights, make, bucket):
        self.layout = make(problem, weights)
        self.batches, self.numbers = [], []
        for sequences, gradients, numbers in problem.data(bucket):
            self.batches.append(self.layout.prepare(sequences, gradients))
            self.numbers.append(numbers)

    def run(self):
        self.layout.begin()
        for batch in self.batches:
            self.layout.step(batch)

    def results(self):
        """Name -> array: outputs and their gradients of all sequences in the problem's order, gradients of weights."""
        self.layout.begin()
        parts = {}
        for batch, numbers in zip(self.batches, self.numbers, strict=True):
            for name, array in zip(("output", "dx"), self.layout.step(batch), strict=True):
                ours = zip(numbers, self.layout.parts(batch, array), strict=True)
                parts |= {(name, number): np.array(part, "float64") for number, part in ours}
        joined = {name: np.concatenate([parts[key] for key in sorted(parts) if key[0] == name]) for name in _NAMES}
        return joined | {name: np.array(grad, "float64") for name, grad in self.layout.grads().items()}


_NAMES = "output", "dx"


def reference(problem, weights):
    """What ``Prepared.results`` should be: each sequence alone, in float64."""
    layer = gpurnn.LSTM(problem.H, problem.H, backend="numpy", dtype="float64")
    layer.load_state_dict(weights)
    layer.zero_grad()
    outputs, dxs = [], []
    for sequences, gradients, _ in problem.data():
        for x, doutput in zip(sequences, gradients, strict=True):
            output, _, backward = layer.forward(x[:, None].astype("float64"))
            outputs.append(output[:, 0])
            dxs.append(backward(doutput[:, None].astype("float64"))[0][:, 0])
    grads = {name: layer.grads[name].copy() for name in ("weight_ih_l0", "weight_hh_l0")}
    return {"output": np.concatenate(outputs), "dx": np.concatenate(dxs)} | grads


# ---- a run


def measure(problem, rounds, seconds, names=None):
    """The row of a problem in the results: each layout that is right, timed in turns."""
    weights, _, _ = inputs(problem.case)
    expected, limit = reference(problem, weights), allowed(problem.case)
    results, able = {}, {}
    for name, (make, bucket) in layouts_of(problem).items():
        if names and name not in names:
            continue
        try:
            prepared = Prepared(problem, weights, make, bucket)
        except ImportError as error:
            results[name] = {"status": "not here", "reason": str(error)}
            continue
        error, where = furthest(prepared.results(), expected)
        results[name] = {"status": "timed" if error <= limit else "wrong", "error": float(error), "where": where}
        if error <= limit:
            able[name] = prepared
            results[name]["samples"] = []
    for _ in range(rounds):
        for name, prepared in able.items():
            results[name]["samples"].append(sample(prepared.run, seconds))
    lengths = [length for batch in problem.batches for length in batch]
    return {
        "name": problem.name, "H": problem.H, "sequences": len(lengths), "batches": len(problem.batches),
        "tokens": problem.tokens, "median_length": int(np.median(lengths)), "longest": max(lengths),
        "allowed": limit, "filled": filled(problem), "results": results,
    }  # fmt: skip


def sample(run, seconds):
    """Seconds of one step and of its processor time, over as many steps as fill the given time; one before, not
    measured."""
    run()
    count, start, processor = 0, time.perf_counter(), time.process_time()
    while not count or time.perf_counter() - start < seconds:
        run()
        count += 1
    return {
        "host_s": (time.perf_counter() - start) / count,
        "cpu_s": (time.process_time() - processor) / count,
        "runs": count,
    }


def filled(problem):
    """The share of the places that hold a timestep: packed, padded, and padded in batches of similar length."""
    if problem.rows:
        return {}

    def padded(bucket):
        sizes = [[len(one) for one in sequences] for sequences, _, _ in problem.data(bucket)]
        return problem.tokens / sum(len(batch) * max(batch) for batch in sizes)

    packed = [pack([np.zeros(length, bool) for length in batch]).rows.size for batch in problem.batches]
    return {"packed": problem.tokens / sum(packed), "padded": padded(False), "bucketed": padded(True)}


def table(row):
    """Lines of text: nanoseconds of processor time for a timestep, the median of all turns, and how many times that of
    the first layout it is, with the 95 % interval."""
    shares = "".join(f", {name} {share:.0%} full" for name, share in row["filled"].items())
    yield (
        f"{row['name']}, H {row['H']}: {row['sequences']} sequences, median {row['median_length']}, longest "
        f"{row['longest']}, {row['tokens']:,} timesteps{shares}"
    )
    found = compared(row)
    for name, result in row["results"].items():
        if name in found:
            nanoseconds, (middle, low, high) = found[name]
            yield f"  {name:24}{nanoseconds:10,.0f} ns{middle:8.2f} ({low:.2f} to {high:.2f})"
        else:
            yield f"  {name:24}{result['status']}: {result.get('reason') or result['where']}"


def compared(row):
    """Layout -> (nanoseconds of processor time for a timestep, (how many times that of the first one, its interval)),
    of those that were timed."""
    samples = {
        name: [{"host_s": one["cpu_s"]} for one in result["samples"]]
        for name, result in row["results"].items()
        if result["status"] == "timed"
    }
    first = next(iter(samples.values()), None)
    return {
        name: (float(np.median([one["host_s"] for one in cpu])) / row["tokens"] * 1e9, ratio(cpu, first))
        for name, cpu in samples.items()
    }


def markdown(document, resets):
    """Lines of a table: the problems with resets, or the others; microseconds of the first layout, the others beside
    it."""
    rows = [row for row in document["problems"] if (row["name"] == RESETS) is resets]
    names = list(RESET_LAYOUTS if resets else LAYOUTS)
    yield f"| H | sequences | full | {names[0]} | {' | '.join(names[1:])} |"
    yield f"|---:|---|---|{'---:|' * len(names)}"
    for row in rows:
        found, full = compared(row), ", ".join(f"{share:.0%}" for share in row["filled"].values()) or "100%"
        others = (f"{found[name][1][0]:.2f}" if name in found else "-" for name in names[1:])
        yield f"| {row['H']} | {row['name']} | {full} | {found[names[0]][0] / 1e3:.1f} | {' | '.join(others)} |"


def problems(word_files, character_files, sizes):
    """A problem for each text and H, or for drawn lengths where no text is given, and one with resets for each H."""
    given = [(path, unit) for unit, paths in (("words", word_files), ("characters", character_files)) for path in paths]
    lengths = {f"{unit} of {Path(path).stem}": text_lengths(path, unit) for path, unit in given}
    lengths = lengths or {DRAWN: drawn_lengths(BATCHES * SEQUENCES)}
    return [
        one for H in sizes for one in (*(mixed(name, counts, H) for name, counts in lengths.items()), with_resets(H))
    ]


@click.command()
@click.option("--words", "word_files", multiple=True, type=click.Path(exists=True), help="Lines of words; repeatable.")
@click.option("--characters", "character_files", multiple=True, type=click.Path(exists=True), help="Of characters.")
@click.option("-H", "sizes", multiple=True, type=click.IntRange(1), default=(128, 256), show_default=True)
@click.option("--rounds", type=click.IntRange(1), default=8, show_default=True, help="Turns of each layout.")
@click.option("--seconds", type=float, default=0.5, show_default=True, help="Least duration of a turn.")
@click.option("--out", type=click.Path(dir_okay=False), help="JSON file.")
def main(word_files, character_files, sizes, rounds, seconds, out):
    """Time a training step on sequences of different length, packed and padded, beside torch's PackedSequence.

    Lengths are those of the lines of text files or folders, or drawn ones: log-normal, median 20, at most 200.
    """
    files = {*word_files, *character_files, out}  # results are committed: no folder
    command = shlex.join(["python", "-m", "bench.packed", *(Path(a).name if a in files else a for a in sys.argv[1:])])
    started = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    document = {
        "format": FORMAT, "kind": KIND, "command": command, "started": started, "threads": 1, "rounds": rounds,
        "environment": environment(["torch"] if _has_torch() else []), "problems": [],
    }  # fmt: skip
    try:
        chosen = problems(word_files, character_files, sizes)
    except ValueError as error:
        raise click.ClickException(str(error)) from error
    for problem in chosen:
        document["problems"].append(measure(problem, rounds, seconds))
        click.echo("\n".join(table(document["problems"][-1])))
        if out:
            make_folder(Path(out).parent)
            write_text_atomic(out, json.dumps(document, indent=1))


def _has_torch():
    try:
        import torch  # noqa: F401
    except ImportError:
        return False
    return True


if __name__ == "__main__":
    if os.environ.get("OMP_NUM_THREADS") != "1":  # which BLAS reads when it is loaded
        os.execve(sys.executable, [sys.executable, "-m", "bench.packed", *sys.argv[1:]], environment_of(1))
    main()
