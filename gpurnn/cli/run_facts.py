"""What a run is, from its folder: for ``gpurnn info RUN``."""

import time
from dataclasses import asdict, fields
from pathlib import Path

from .. import run_folder
from ..checkpoint import load_checkpoint
from ..errors import show_size
from ..tasks import get_task
from ..tasks.trained import load, read_run

_SHOWN = 4  # if there are more data files than this, only the first is named and the others are counted
_WIDEST = 60  # a longer text of a result, such as a sample, is not shown
_LONGEST = 8  # of a longer list of a result only the length is shown


def facts_of(folder):
    """JSON-ready facts of the run in a folder. Raises what ``load`` raises; ``trained`` is None before a checkpoint."""
    folder = Path(folder)
    settings, document = read_run(folder)
    last, best = (folder / name for name in run_folder.CHECKPOINTS)
    defaults = {f.name: f.default for f in fields(settings)}
    chosen = asdict(settings)
    trained, parameters = None, None
    if last.exists() or best.exists():
        parameters = load(folder, "numpy").model.parameter_count
        trained = _trained(settings, get_task(document["task"]), last, best)
    return {
        "run": str(folder),
        "task": document["task"],
        "data": document["data"]["summary"],
        "files": [{"path": file, "exists": Path(file).exists()} for file in document["files"]],
        "backend": document["backend"],
        "parameters": parameters,
        "settings": chosen,
        "changed": {name: value for name, value in chosen.items() if value != defaults[name] and name != "seed"},
        "trained": trained,
        "result": document.get("result"),
        "bytes": {name: (folder / name).stat().st_size for name in run_folder.taken(folder)},
    }


def _trained(settings, task, last, best):
    """How far the training has come, and its best score."""
    newest = last if last.exists() else best
    _, now = load_checkpoint(newest)
    found = {
        "epochs": now["epoch"],
        "of_epochs": settings.epochs,
        "updates": now["step"],
        "seconds": round(now["seconds"], 3),
        "saved": time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(newest.stat().st_mtime)),
        "best": None,
    }
    if best.exists():
        _, then = load_checkpoint(best)
        name, _ = task.watch
        kind = "validation" if settings.valid else "training"
        found["best"] = {"score": f"{kind} {name}", "value": then["best"], "epoch": then["epoch"]}
    return found


def rows_of(facts):
    """Name -> text for people, of ``facts_of``."""
    settings, trained, sizes = facts["settings"], facts["trained"], facts["bytes"]
    cell = f"{settings['cell']}, {settings['layers']} x {settings['hidden']} units"
    rows = {
        "Run": f"{facts['run']}, task {facts['task']}",
        "Data": _data(facts),
        "Model": cell if facts["parameters"] is None else f"{cell}, {facts['parameters']:,} parameters",
        "Settings": _settings(facts),
        "Backend": f"{facts['backend']}, {settings['dtype']}, seed {settings['seed']}",
        "Trained": "no checkpoint yet: the first one comes with the end of an epoch",
    }
    if trained:
        rows["Trained"] = (
            f"{trained['epochs']} of {trained['of_epochs']} epochs, {trained['updates']:,} updates, "
            f"{trained['seconds']:,.0f} s, saved {trained['saved']}"
        )
        if trained["best"]:
            rows["Best"] = "{score} {value:.4f}, in epoch {epoch}".format(**trained["best"])
    rows |= _of_task(facts) or _results(facts["result"] or {})
    whole = show_size(sum(sizes.values()))
    rows["Size"] = f"{whole}: " + ", ".join(f"{name} {show_size(size)}" for name, size in sizes.items())
    return rows


def _data(facts):
    names = [Path(file["path"]).name + ("" if file["exists"] else " (gone)") for file in facts["files"]]
    if len(names) > _SHOWN:
        names = [names[0], f"{len(names) - 1} more files"]
    source = ", ".join(names) or get_task(facts["task"]).without_files
    return f"{source}: {facts['data']}"


def _settings(facts):
    if not facts["changed"]:
        return "the defaults"
    changed = ", ".join(f"{name.replace('_', '-')} {value}" for name, value in facts["changed"].items())
    return f"{changed}; the others are the defaults"


def _of_task(facts):
    """What the task says of the result; None where it says nothing, or the result is not one that it gave."""
    try:
        return get_task(facts["task"]).result_rows(facts["result"] or {})
    except (LookupError, TypeError, ValueError, AttributeError):
        return None


def _results(result):
    """Name -> text of a run's result: its numbers in one row, those of each part of it, such as the test, apart."""
    whole = _numbers({name: value for name, value in result.items() if not isinstance(value, dict)})
    parts = {name: _numbers(value) for name, value in result.items() if isinstance(value, dict)}
    rows = {"Result": whole} | {name.replace("_", " ").capitalize(): text for name, text in parts.items()}
    return {name: text for name, text in rows.items() if text}


def _numbers(values):
    """The numbers of a dict, each with its name, those of a dict or list in it in brackets; longer texts are left out.

    >>> _numbers({"season": 12, "model": {"mae": 0.123456}, "margins": [1.5, 2.0], "sample": "x" * 70})
    'season 12, model (mae 0.1235), margins (1.5, 2)'
    """
    parts = []
    for name, value in values.items():
        if isinstance(value, dict):
            shown = _numbers(value) and f"({_numbers(value)})"
        elif isinstance(value, list):
            shown = f"({', '.join(map(_short, value))})" if len(value) <= _LONGEST else f"({len(value)} values)"
        else:
            shown = _short(value)
        if shown and len(f"{name}{value}" if isinstance(value, str) else "") < _WIDEST:
            parts.append(f"{name.replace('_', ' ')} {shown}")
    return ", ".join(parts)


def _short(value):
    return f"{value:.4g}" if isinstance(value, float) else str(value)
