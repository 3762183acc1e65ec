"""What a model file holds: for ``gpurnn info FILE``."""

from ..errors import show_size
from ..model_file import read_facts

_MOST = 20  # rows of layers; the others are counted


def facts_of(path):
    """JSON-ready facts of a model file. Raises what ``gpurnn.load`` raises."""
    return read_facts(path)


def rows_of(facts):
    """Name -> text for people, of ``facts_of``."""
    whole, *layers = facts["layers"]
    rows = {
        "File": f"{facts['file']}, {show_size(facts['bytes'])}",
        "Model": f"{whole['shown']}, {facts['parameters']:,} parameters, {facts['dtype']}",
    }
    if facts["quantized"]:
        more = ", and what they multiply" if facts["activations"] else ""
        rows["In 8 bits"] = f"{facts['quantized']:,} weights more{more}"
    if facts["frozen"]:
        rows["Frozen"] = ", ".join(facts["frozen"])
    for number, layer in enumerate(layers[:_MOST], 1):
        more = f", {layer['quantized']:,} weights in 8 bits" if layer["quantized"] else ""
        rows[f"Layer {number}"] = f"{layer['name']}: {layer['shown']}, {layer['parameters']:,} parameters{more}"
    if len(layers) > _MOST:
        rows["Layers"] = f"{len(layers) - _MOST} more"
    if facts["sizes"]:
        rows["Sizes"] = ", ".join(f"{name} {size:,}" for name, size in facts["sizes"].items())
    if facts["run"]:
        run = facts["run"]
        rows["Run"] = f"task {run['task']}, {run['progress']['epoch']} epochs; {run['data']['summary']}"
    return rows
