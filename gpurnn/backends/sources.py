"""The C++ and CUDA sources in ``kernels/``: where they are, and their text. Only this file reads them.

``kernels/`` is a top-level folder of the repository and is installed as package data of ``gpurnn.kernels``; it is read
by path, never imported.
"""

import re
from pathlib import Path


def kernel_dir():
    """Folder of the CUDA sources: inside the package where it is installed, beside it in a source checkout.

    A source checkout is an editable install or the bare repository. Raises FileNotFoundError where neither is there.
    """
    package = Path(__file__).resolve().parents[1]
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


def kernel_path(file):
    """The path of a CUDA source by its bare name, in whichever folder it is; no two have the same name.

    Raises FileNotFoundError.

    >>> kernel_path("step.cu").relative_to(kernel_dir()).as_posix()
    'schedules/step.cu'
    """
    for path in kernel_dir().rglob(file):
        return path
    raise FileNotFoundError(f"{kernel_dir()} has no file {file}")


def kernel_source(file, struct=None):
    """The text of a kernel file for NVRTC, with our own headers in place of its ``#include "..."`` lines.

    struct: C++ of a generated cell. It follows the other cells, in a namespace of its own.

    It is one text because the cache of compiled kernels is keyed by it: a header that NVRTC found by itself could
    change unseen. A header is named relative to the file that includes it, and included once. ``#line`` makes the
    compiler's messages name the original file and line.
    """
    folder, seen = kernel_dir().resolve(), set()

    def text(path):
        if path in seen:
            return ""
        seen.add(path)
        name = path.relative_to(folder).as_posix()
        lines = [f'#line 1 "{name}"']
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            header = re.match(r'\s*#include "([^"]+)"', line)
            lines += [text((path.parent / header[1]).resolve()), f'#line {number + 1} "{name}"'] if header else [line]
        if struct is not None and name == "cells/all.cuh":
            lines += ["namespace generated {", '#line 1 "generated cell"', struct, "}"]
        return "\n".join(lines) + "\n"

    return text(kernel_path(file).resolve())
