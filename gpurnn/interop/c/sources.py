"""The functions of kernels/c that a header needs."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable

from ...backends.sources import kernel_dir

_FILES = "functions.h", "products.h"
_NAME = re.compile(r"\bgpurnn_(\w+)")


@functools.lru_cache(maxsize=1)
def _functions() -> dict[str, str]:
    """Name, without the prefix, -> text, in the order of the files."""
    found = {}
    for file in _FILES:
        for part in re.split(r"\n\n+", (kernel_dir() / "c" / file).read_text(encoding="utf-8")):
            code = "\n".join(line for line in part.splitlines() if not line.startswith("//"))
            if code:
                name = _NAME.search(code)
                assert name, part
                found[name[1]] = part.strip("\n")
    return found


def functions(names: Iterable[str], prefix: str) -> str:
    """The text of these functions, and of those that they call, with another prefix."""
    known, needed, todo = _functions(), set(), list(names)
    while todo:
        name = todo.pop()
        if name not in needed:
            needed.add(name)
            todo += _NAME.findall(known[name])
    chosen = "\n\n".join(text for name, text in known.items() if name in needed)
    return _NAME.sub(rf"{prefix}_\1", chosen).replace("GPURNN_", f"{prefix.upper()}_")
