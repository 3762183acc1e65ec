"""The kernel sources: the one file that knows where the ``.cu`` files are.

``kernels/`` is a top-level folder of the repository and is installed as package data of ``gpurnn.kernels``; it is read
by path, never imported.
"""

import re
from pathlib import Path


def kernel_dir():
    """Folder of the CUDA sources: inside the package where it is installed, beside it in a source checkout.

    A source checkout is an editable install or the bare repository. Raises FileNotFoundError where neither is there.
    """
    package = Path(__file__).resolve().parent
    for folder in (package / "kernels", package.parent / "kernels"):
        if (folder / "common.cuh").is_file():
            return folder
    raise FileNotFoundError(f"the CUDA sources of gpurnn are missing from {package}: install gpurnn again")


def kernel_files():
    """Names of all CUDA sources relative to ``kernel_dir()``, sorted, with forward slashes.

    >>> "common.cuh" in kernel_files()
    True
    """
    folder = kernel_dir()
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.suffix in (".cu", ".cuh"))


def kernel_source(file):
    """The text of a kernel file with our own headers in place of its ``#include "..."`` lines, ready for NVRTC.

    One text, because CuPy's cache knows only the text it is given: a header that NVRTC finds by itself could change
    unseen. ``#line`` keeps every line under its file's own name in messages. Each header is taken once.
    """
    seen = set()

    def text(name):
        if name in seen:
            return ""
        seen.add(name)
        lines = [f'#line 1 "{name}"']
        for number, line in enumerate((kernel_dir() / name).read_text(encoding="utf-8").splitlines(), 1):
            header = re.match(r'\s*#include "([^"]+)"', line)
            lines += [text(header[1]), f'#line {number + 1} "{name}"'] if header else [line]
        return "\n".join(lines) + "\n"

    return text(file)
