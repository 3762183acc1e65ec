"""The library's own NVRTC with its own options, behind a cache on disk, for every architecture."""

import hashlib
import os
import tempfile
from pathlib import Path

from gpurnn.backends.cuda import nvrtc as _nvrtc
from gpurnn.backends.cuda.nvrtc import CompileError, Program, version

__all__ = ["ARCHITECTURES", "CompileError", "Program", "cached", "cache_folder", "compile", "missing", "version"]

ARCHITECTURES = (75, 80, 86, 89, 90, 100, 120)


def missing():
    """Why NVRTC cannot be used here, or None."""
    try:
        _nvrtc.library()
    except OSError as error:
        return str(error)
    return None


def compile(source, *, file="kernel.cu", arch=90, options=(), expressions=(), machine_code=True):
    """``source`` compiled for ``sm_<arch>`` with the library's options and ``options``; results are cached on disk.

    file: the name that messages and line tables show. expressions: kernels to instantiate, such as
    ``step<float>``; their mangled names are in ``Program.lowered``. machine_code: with ptxas's work, the cubin and the
    log, or else the same PTX alone in half the time, and with ``.loc`` lines. Raises CompileError with NVRTC's log.
    """
    how = (f"-arch=sm_{arch}", "-Xptxas", "-v") if machine_code else (f"-arch=compute_{arch}", "-lineinfo")
    flags = (*_nvrtc.OPTIONS, *how, *_nvrtc.include_options(), *options)
    key = repr((version(), source, file, flags, tuple(expressions)))

    def make(new):
        program = _nvrtc.compile(source, flags, expressions, file)
        (new / "kernel.ptx").write_text(program.ptx)
        (new / "kernel.cubin").write_bytes(program.cubin)
        (new / "log").write_text(program.log)
        (new / "lowered").write_text("\n".join(program.lowered.values()))

    folder = cached("ptx", key, make)
    lowered = (folder / "lowered").read_text().splitlines()
    return Program(
        (folder / "kernel.ptx").read_text(),
        (folder / "kernel.cubin").read_bytes(),
        (folder / "log").read_text(),
        dict(zip(expressions, lowered, strict=True)),
    )


def cache_folder():
    """Where compiled things are kept between runs; GPURNN_TEST_CACHE moves it."""
    root = os.environ.get("GPURNN_TEST_CACHE") or Path(tempfile.gettempdir()) / f"gpurnn-test-cache-{os.getuid()}"
    folder = Path(root)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def cached(kind, key, make):
    """A folder of the cache, which ``make(folder)`` fills where there is none of this kind and key yet: one process
    does, others that want the same wait for it. Nobody sees half of one."""
    import fcntl  # here, because nothing is compiled where it is missing

    folder = cache_folder() / kind / hashlib.sha256(key.encode()).hexdigest()[:32]
    if not folder.is_dir():
        folder.parent.mkdir(exist_ok=True)
        with open(folder.with_suffix(".lock"), "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # which ends with the file or the process
            if not folder.is_dir():
                with tempfile.TemporaryDirectory(dir=folder.parent, ignore_cleanup_errors=True) as temporary:
                    new = Path(temporary) / "new"
                    new.mkdir()
                    make(new)
                    new.rename(folder)
    return folder
