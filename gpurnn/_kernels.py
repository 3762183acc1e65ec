"""The kernel sources: the one file that knows where the ``.cu`` files are.

``kernels/`` is a top-level folder of the repository and is installed as package data of ``gpurnn.kernels``; it is read
by path, never imported.
"""

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
