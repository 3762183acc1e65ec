"""What a suite says of one of our rivals beside the best of others at each point: suite ``grid``.

A point is a case that both were timed in. Its ratio is the best other's median time over ours: above 1 we are faster.
"""

import math
from dataclasses import dataclass

from .results_file import faster, floor, in_int8, ratio, timed

OURS = "gpurnn-cpu"
OTHERS = ("torch-cpu", "onnxruntime", "jax")  # in float32; a rival in int8 competes where a page names it
NEAR = 1.3  # times its floor that a point should take at most
_WORST = 5


@dataclass(frozen=True)
class Point:
    """row: of the document. ours, other: names of rivals, the other being the fastest of all that compete."""

    row: dict
    ours: str
    other: str

    @property
    def value(self):
        """How many times as fast ours is."""
        return faster(*self._samples)

    @property
    def interval(self):
        """(low, high): the 95 % interval of that."""
        return ratio(*self._samples)[1:]

    @property
    def _samples(self):
        found = timed(self.row)
        return found[self.other]["samples"], found[self.ours]["samples"]

    @property
    def floor(self):
        """How many times its floor ours takes, or None where no floor is known: it is one of weights in float32."""
        share = None if in_int8(self.ours) else floor(self.row, self.ours)
        return share and 1 / share[0]


def points(document, what, ours=OURS, others=OTHERS):
    """The points of one pass."""
    found = []
    for row in document["cases"]:
        results = timed(row)
        here = [name for name in others if name in results]
        if row["case"]["what"] == what and ours in results and here:
            found.append(Point(row, ours, min(here, key=lambda name, results=results: results[name]["median_s"])))
    return found


def geometric_mean(values):
    """Of positive numbers, at least one."""
    return math.exp(math.fsum(map(math.log, values)) / len(values))


def lines(document, what, ours=OURS, *others):
    """Lines of a page: a table with a row for each cell and H and a column for each B, what it says as a whole, and
    the points where ours is slowest beside the others."""
    found = points(document, what, ours, others or OTHERS)
    if not found:
        raise ValueError(f"no case of the pass {what} has times of {ours} and of {' or '.join(others or OTHERS)}")
    values = {_place(point): f"{point.value:.2f}" for point in found}
    yield from _table(values, what)
    yield ""
    yield f"{_sums(found)}."
    for other in others or OTHERS:
        alone = points(document, what, ours, (other,))
        if len(others or OTHERS) > 1 and alone:
            yield f"Beside {other} alone: {_sums(alone)}."
    yield from ["", *worst(found)]


def floor_lines(document, what, ours=OURS):
    """Lines of a page: the same table with how many times its floor ours takes."""
    found = [Point(row, ours, ours) for row in document["cases"] if row["case"]["what"] == what and ours in timed(row)]
    floors = {_place(point): point.floor for point in found if point.floor}
    if not floors:
        raise ValueError(f"no case of the pass {what} has a time of {ours} and a floor")
    yield from _table({place: f"{value:.2f}" for place, value in floors.items()}, what)
    near = sum(value <= NEAR for value in floors.values())
    yield ""
    yield f"{len(floors)} points: geometric mean {geometric_mean(floors.values()):.2f}; {near} at most {NEAR}."


def overview(documents, ours=OURS, *others):
    """Lines of a table with a row for each document and pass."""
    heads = ("pass", "points", "geometric mean", "below 1", "with their interval", "the slowest", f"floor x {NEAR}")
    yield f"| threads, instruction set | {' | '.join(heads)} |"
    yield "|---|---|---:|---:|---:|---:|---|---:|"
    for document in documents:
        threads = f"{document['threads']}, {document['isa']}" if document.get("isa") else f"{document['threads']}"
        for what in ("inference", "train"):
            found = points(document, what, ours, others or OTHERS)
            if not found:
                continue
            behind = [point for point in found if point.value < 1]
            slowest = min(found, key=lambda point: point.value)
            cells = [
                threads, what, len(found), f"{geometric_mean([point.value for point in found]):.2f}", len(behind),
                sum(point.interval[1] < 1 for point in behind), f"{_name(slowest)}: {slowest.value:.2f}",
                sum((point.floor or NEAR + 1) <= NEAR for point in found),
            ]  # fmt: skip
            yield f"| {' | '.join(map(str, cells))} |"


def worst(found):
    """Lines of a table of the points with the smallest ratios."""
    yield "| the slowest | fastest other | its time | ours | ratio, 95 % interval | times the floor |"
    yield "|---|---|---:|---:|---:|---:|"
    for point in sorted(found, key=lambda point: point.value)[:_WORST]:
        results = timed(point.row)
        theirs, ours = (f"{results[name]['median_s'] * 1e6:,.0f} us" for name in (point.other, point.ours))
        low, high = point.interval
        times = f"{point.floor:.2f}" if point.floor else "-"
        ratios = f"{point.value:.2f} [{low:.2f}, {high:.2f}]"
        yield f"| {_name(point)} | {point.other} | {theirs} | {ours} | {ratios} | {times} |"


def _sums(found):
    """What points say as a whole."""
    behind = [point for point in found if point.value < 1]
    surely = sum(point.interval[1] < 1 for point in behind)
    mean = geometric_mean([point.value for point in found])
    return f"{len(found)} points: geometric mean {mean:.2f}; {len(behind)} below 1, of {surely} the whole interval"


def _name(point):
    cell, H, B = _place(point)
    return f"{cell} B{B} H{H}"


def _place(point):
    case = point.row["case"]
    return case["cell"], case["H"], case["B"]


def _table(texts, what):
    """Lines of a table. texts: by (cell, H, B); the cells stand in their order."""
    cells = dict.fromkeys(cell for cell, _, _ in texts)
    sizes, batches = (sorted({place[n] for place in texts}) for n in (1, 2))
    yield f"| {what}, H | " + " | ".join(f"B {B}" for B in batches) + " |"
    yield "|---|" + "---:|" * len(batches)
    for cell in cells:
        for H in [H for H in sizes if any((cell, H, B) in texts for B in batches)]:
            yield f"| {cell} {H} | " + " | ".join(texts.get((cell, H, B), "-") for B in batches) + " |"
