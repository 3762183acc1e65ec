"""The compiled library of each target, by Zig's C++ compiler, piece by piece.

A piece lies under a hash of everything that decides its content, and is compiled once.
"""

import hashlib
import os
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

SOURCE = "kernels/cpu/api.cpp"
# Those of pyproject.toml, and -fwrapv, which Python's own options have. -ffp-contract=fast: as GCC does by itself,
# products are fused with sums across the functions that are inlined.
FLAGS = (
    "-std=c++17", "-O2", "-g0", "-fvisibility=hidden", "-fno-math-errno", "-fwrapv", "-ffp-contract=fast", "-pthread",
    "-Wno-psabi",
)  # fmt: skip
_EXPORTS = "{ global: gpurnn_native_*; local: *; };\n"


def zig(*arguments, **options):
    """Run Zig; its output. Raises SystemExit with what it says where it fails."""
    command = [sys.executable, "-m", "ziglang", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace", **options)
    if done.returncode:
        sys.exit(f"{' '.join(command)}\n{done.stdout}{done.stderr}")
    return done.stdout


def sources(root):
    """A hash of all that a piece may include."""
    found = hashlib.sha256()
    for path in sorted(Path(root, "kernels").rglob("*")):
        if path.suffix in (".h", ".cpp", ".cuh"):
            found.update(f"{path.relative_to(root).as_posix()}\0".encode() + path.read_bytes())
    return found.hexdigest()


class Builder:
    """Compiles for several targets at once. folder: where pieces and libraries lie."""

    def __init__(self, root, folder, jobs):
        self.root, self.folder, self.jobs = Path(root), Path(folder), jobs
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "exports").write_text(_EXPORTS, encoding="utf-8")
        self._basis = sources(root), zig("version"), FLAGS

    def libraries(self, targets):
        """{target: the path of its library}. Pieces of all targets are compiled in turn, the slow ones first."""
        pieces = sorted(((target, n) for target in targets for n in range(target.pieces)), key=lambda piece: -piece[1])
        with ThreadPoolExecutor(self.jobs) as pool:
            objects = dict(zip(pieces, pool.map(lambda piece: self._piece(*piece), pieces), strict=True))
            linked = pool.map(lambda t: self._link(t, [objects[t, n] for n in range(t.pieces)]), targets)
            return dict(zip(targets, linked, strict=True))

    def _piece(self, target, number):
        return self._made((target.zig, number), ".o", f"{target.name}, piece {number}", lambda to: zig(
            "c++", "-target", target.zig, *FLAGS, *_position(target), f"-DGPURNN_PIECE={number}", "-c", SOURCE,
            "-o", to,
            cwd=self.root, env=self._environment(),
        ))  # fmt: skip

    def _link(self, target, objects):
        flags = [flag.format(exports=self.folder / "exports") for flag in target.flags]
        key = ("-O2", target.zig, target.pieces, _EXPORTS, *target.flags)  # also of the C++ library, which Zig builds
        suffix = Path(target.library).suffix
        return self._made(key, suffix, f"{target.name}, linking", lambda to: zig(
            "c++", "-target", target.zig, "-O2", "-shared", "-s", "-pthread", *flags, "-o", to, *objects,
            cwd=self.folder, env=self._environment(),
        ))  # fmt: skip

    def _made(self, key, suffix, label, make):
        """What lies under the hash of ``key``, made if it does not."""
        name = hashlib.sha256(repr((self._basis, key)).encode()).hexdigest()[:32]
        path = self.folder / f"{name}{suffix}"
        if not path.is_file():
            started = time.monotonic()
            # A library of Windows and macOS holds the name under which it was linked
            room = self.folder / f"{name}.making"
            room.mkdir(exist_ok=True)
            made = room / f"_native{suffix}"
            make(made)
            os.replace(made, path)
            shutil.rmtree(room)
            print(f"  {label}: {time.monotonic() - started:.0f} s", flush=True)
        return path

    def _environment(self):
        """Zig's own caches go into the same folder; the C libraries that it builds lie there, too."""
        return os.environ | {
            "ZIG_GLOBAL_CACHE_DIR": str(self.folder / "zig"),
            "ZIG_LOCAL_CACHE_DIR": str(self.folder / "zig"),
        }


def _position(target):
    return () if "windows" in target.zig else ("-fPIC",)
