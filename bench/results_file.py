"""A results file: how it is written and read, and what it says of a rival in a case."""

import json
import random
import statistics
from pathlib import Path

from gpurnn.files import FileError, make_folder, parse_json, read_bytes, write_text_atomic

from .rivals import RIVALS

FORMAT = 2
_ROW = {"name", "case", "steps", "floors", "results"}


def write(path, document):
    """Write JSON so that a reader or a kill finds the old file or the new one, never half of one."""
    make_folder(Path(path).parent)
    write_text_atomic(path, json.dumps(document, indent=1))


def load(path):
    """The document in a file. Raises ValueError where there is none."""
    document = parse_json(read_bytes(path, factor=8), path, finite=False)
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise FileError(f"{path}: expected a benchmark file of format {FORMAT}")
    rows = document.get("cases")
    if not isinstance(rows, list) or not all(isinstance(row, dict) and set(row) >= _ROW for row in rows):
        raise FileError(f"{path}: expected cases, each with {', '.join(sorted(_ROW))}")
    return document


def timed(row):
    """Rival -> its result, of those that were timed in a case."""
    return {name: result for name, result in row["results"].items() if result["status"] == "timed"}


def rivals(document):
    """Names of those that were timed anywhere, in their order."""
    return list(dict.fromkeys(name for row in document["cases"] for name in timed(row)))


def device(name):
    """ "cpu" or "gpu": where a rival runs."""
    return RIVALS[name][1] if name in RIVALS else "cpu"


def in_int8(name):
    """Whether a rival's weights are in int8."""
    return "int8" in name


def floor(row, name):
    """(share of the floor's time in a rival's, what sets the floor), or None where no floor is known."""
    found = row["floors"].get(device(name))
    return found and (found[0] / timed(row)[name]["median_s"], found[1])


def beats_floor(row, name):
    """Whether a rival is faster than its floor. No program is: the floor's rates were measured too low then."""
    found = floor(row, name)
    return bool(found) and found[0] > 1


def times(samples):
    """Seconds of each sample: the device's where there is one, else the host's."""
    return [sample.get("device_s", sample["host_s"]) for sample in samples]


def faster(a, b):
    """How many times as fast b is as a: the median over the pairs. a, b: samples of one run, taken in turns."""
    return statistics.median(_pairs(a, b))


def ratio(a, b):
    """(median, low, high): ``faster`` with its 95 % interval, by a bootstrap over the pairs (2,000 draws)."""
    pairs = _pairs(a, b)
    return interval(lambda draw: statistics.median(draw.choices(pairs, k=len(pairs))), statistics.median(pairs))


def _pairs(a, b):
    return [x / y for x, y in zip(times(a), times(b), strict=False)]


def interval(draw_one, middle):
    """(middle, low, high): with the 95 % interval of what ``draw_one`` gives, by 2,000 draws."""
    draw = random.Random(0)
    drawn = sorted(draw_one(draw) for _ in range(2000))
    return middle, drawn[50], drawn[-51]


def machine_line(document, counted="median"):
    """One sentence: the machine, versions, date, how it was timed. counted: which of a rival's turns."""
    machine = document["environment"]
    gpu = machine["gpu"]
    parts = [f"{machine['cpu']}, {document['threads']} threads{_isa(document)}"]
    if gpu:
        parts.append(f"{gpu['name']}, driver {gpu['driver']}, CUDA {gpu['cuda']}, CuPy {gpu['cupy']}")
    parts.append(f"NumPy {machine['numpy']} with {machine['blas']}")
    names = (("torch", "torch"), ("cudnn", "cuDNN"), ("jax", "JAX"), ("onnxruntime", "ONNX Runtime"))
    parts += [f"{text} {machine[key]}" for key, text in names if machine.get(key)]
    return f"{'; '.join(parts)}; {document['started'][:10]}; {counted} of {_turns(document)} turns each."


def _isa(document):
    return f", {document['isa']}" if document.get("isa") else ""


def _turns(document):
    """How many turns a rival had: "5", or "1 to 5" where slow ones had fewer."""
    if not document.get("limit"):
        return f"{document['rounds']}"
    counts = {len(result["samples"]) for row in document["cases"] for result in timed(row).values()}
    return " to ".join(map(str, sorted({min(counts), max(counts)}))) if counts else "0"
