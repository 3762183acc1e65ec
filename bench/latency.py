"""How long single runs take, one by one: what ``--steps`` asks for. A run of a case with T = 1 is one timestep.

What the clock and the calls around a run take, some 150 ns, is measured with a run that does nothing and taken off.
"""

import time

import numpy as np

from .rivals.prepared import Prepared

_TURNS = 5  # so that drift of the machine meets all rivals
_LONGEST = 20.0  # seconds of all runs of a rival; a slow one makes fewer
_WARM = 100  # runs before each turn that are not counted
_PERCENTILES = (50, 99)


def clock_runs(prepared, count):
    """Nanoseconds of each of ``count`` runs, as a list of whole numbers: less what the clock takes."""
    for _ in range(min(_WARM, count)):
        prepared.run()
    prepared.wait()
    empty = int(np.median(_clocked(Prepared(lambda: None, None), 1000)))
    return [max(each - empty, 0) for each in _clocked(prepared, count)]


def _clocked(prepared, count):
    clock, run, wait, found = time.perf_counter_ns, prepared.run, prepared.wait, [0] * count
    for n in range(count):
        start = clock()
        run()
        wait()
        found[n] = clock() - start
    return found


def latency(case, workers, results, steps):
    """Name -> {"steps", "p50_s", "p99_s", "turns"}: how long a run takes at most in half of all runs and in 99 of 100.

    workers: name -> process. results: with the median of each rival. steps: how many runs; fewer where they would
    take more than ``_LONGEST`` seconds; 0: no rival is clocked. turns: the percentiles of each turn.
    """
    if not steps:
        return {}
    counts = {name: min(steps, int(_LONGEST / results[name]["median_s"]) + 1) for name in workers}
    found = {name: [] for name in workers}
    for _ in range(_TURNS):
        for name, worker in workers.items():
            answer = worker.ask(case, "clock", count=-(-counts[name] // _TURNS))
            found[name].append(answer.get("nanoseconds"))
    return {name: summary(turns) for name, turns in found.items() if None not in turns}


def summary(turns):
    """What is saved of lists of nanoseconds."""
    seconds = [np.array(turn) / 1e9 for turn in turns]
    middle, high = np.percentile(np.concatenate(seconds), _PERCENTILES)
    each = [[float(value) for value in np.percentile(turn, _PERCENTILES)] for turn in seconds]
    return {"steps": sum(map(len, turns)), "p50_s": float(middle), "p99_s": float(high), "turns": each}


def latency_table(document, *names):
    """Lines of a table of runs that were clocked one by one: for each case microseconds at the 50th and the 99th
    percentile of each rival, and how many runs it made. names: of rivals; none: all that were clocked."""
    clocked = [row for row in document["cases"] if any("latency" in result for result in row["results"].values())]
    all_names = dict.fromkeys(name for row in clocked for name, found in row["results"].items() if "latency" in found)
    names = names or tuple(all_names)
    yield "| cell, B, H | " + " | ".join(names) + " | runs of each |"
    yield "|---|" + "---:|" * (len(names) + 1)
    for row in clocked:
        found = [row["results"].get(name, {}).get("latency") for name in names]
        texts = [f"{one['p50_s'] * 1e6:,.1f} / {one['p99_s'] * 1e6:,.1f}" if one else "-" for one in found]
        counts = sorted(one["steps"] for one in found if one)
        runs = " to ".join(f"{count:,}" for count in dict.fromkeys((counts[0], counts[-1]))) if counts else "-"
        case = row["case"]
        yield f"| {case['cell']} {case['B']}, {case['H']} | " + " | ".join([*texts, runs]) + " |"
