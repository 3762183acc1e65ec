"""Every public name has a complete type: ``python .ci/check_types.py``, with pyright (extra ``dev``).

Public is what ``gpurnn.__all__`` and ``gpurnn.testing.__all__`` name, with all members of the classes. Pyright calls a
type complete where every parameter, result and attribute is annotated, and every type in an annotation is complete too.
"""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
MODULES = ("gpurnn", "gpurnn.testing")


def public():
    """Name -> what it stands for."""
    sys.path.insert(0, str(ROOT))
    for module in map(importlib.import_module, MODULES):
        yield from ((f"{module.__name__}.{name}", vars(module)[name]) for name in module.__all__)


def places(thing):
    """The full names of a function, or of a class and its bases."""
    classes = thing.__mro__ if isinstance(thing, type) else [thing]
    return [f"{one.__module__}.{one.__qualname__}" for one in classes]


def symbols():
    """Name -> what pyright says of it."""
    command = ["pyright", "--pythonpath", sys.executable, "--verifytypes", "gpurnn", "--ignoreexternal", "--outputjson"]
    found = subprocess.run(command, env=os.environ | {"PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE, text=True)
    document = json.loads(found.stdout)
    if "typeCompleteness" not in document:
        sys.exit(f"pyright: {found.stdout}")
    return {symbol["name"]: symbol for symbol in document["typeCompleteness"]["symbols"]}


def main():
    found, names = symbols(), dict(public())
    wrong = {name: thing for name, thing in names.items() if name not in found or not found[name]["isTypeKnown"]}
    for place in dict.fromkeys(place for thing in wrong.values() for place in places(thing)):
        for name, symbol in found.items():
            for fault in symbol["diagnostics"] if name == place or name.startswith(f"{place}.") else ():
                print(f"{name}: {' '.join(fault['message'].split())}")
    print(f"{len(names) - len(wrong)} of {len(names)} public names have a complete type")
    if wrong:
        sys.exit(f"incomplete: {', '.join(wrong)}")


if __name__ == "__main__":
    main()
