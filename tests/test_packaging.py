"""What a user installs: the wheel holds the kernels and the benchmark, away from the source tree as in it."""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import pytest
from helpers import ROOT

from gpurnn.backends import sources as kernel_sources

PARTS = ("pyproject.toml", "MANIFEST.in", "README.md", "LICENSE", ".ci", ".docs", "gpurnn", "kernels", "bench", "tests")


def sources(folder, *suffixes):
    """Paths below the folder that end in one of the suffixes, relative to it, sorted."""
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.suffix in suffixes)


def run(*command, cwd, **environment):
    """stdout of a command; its stderr is shown where it fails."""
    done = subprocess.run(command, cwd=cwd, env=os.environ | environment, capture_output=True, text=True)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done.stdout


def isolated(code, first, cwd):
    """stdout of Python code that can import from the folder ``first`` and the installed dependencies, nothing else.

    -S leaves out .pth files, so that an editable install of the checkout does not come to the rescue.
    """
    others = [entry for entry in sys.path if entry.endswith("-packages")]
    code = f"import sys; sys.path[:0] = [{str(first)!r}]; sys.path += {others!r}\n{code}"
    return run(sys.executable, "-I", "-S", "-c", code, cwd=cwd)


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """A copy of the sources without what builds and runs leave behind, and one kernel more, in a sub-folder."""
    tree = tmp_path_factory.mktemp("tree")
    for part in PARTS:
        if (ROOT / part).is_dir():
            shutil.copytree(ROOT / part, tree / part, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / part, tree / part)
    (tree / "kernels" / "cells").mkdir(exist_ok=True)
    (tree / "kernels" / "cells" / "probe.cuh").write_text("// a header in a sub-folder\n")
    return tree


@pytest.fixture(scope="module")
def built(tree, tmp_path_factory):
    """(sdist, wheel); the wheel is built from the sdist."""
    out = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), cwd=tree)
    (sdist,), (wheel,) = out.glob("*.tar.gz"), out.glob("*.whl")
    return sdist, wheel


@pytest.fixture(scope="module")
def installed(built, tmp_path_factory):
    """A folder that holds the wheel's contents as pip installs them."""
    target = tmp_path_factory.mktemp("installed")
    options = ["--no-deps", "--no-index", "--no-compile", "--disable-pip-version-check", "--target", str(target)]
    run(sys.executable, "-m", "pip", "install", *options, str(built[1]), cwd=target)
    return target


def test_every_package_is_listed():
    """Quickly, what the wheel's tests would find: a folder that pyproject.toml does not name is in no wheel."""
    listed = re.search(r"^packages = \[(.*?)^\]", (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.M | re.S)[1]
    found = {path.parent.relative_to(ROOT).as_posix() for path in (ROOT / "gpurnn").rglob("__init__.py")}
    elsewhere = {"gpurnn.bench", "gpurnn.bench.rivals", "gpurnn.kernels"}
    assert set(re.findall(r'"(.*?)"', listed)) == {name.replace("/", ".") for name in found} | elsewhere


@pytest.mark.slow
def test_wheel_holds_every_source_and_nothing_else(built, tree):
    with zipfile.ZipFile(built[1]) as wheel:
        names = {name for name in wheel.namelist() if ".dist-info/" not in name}
    expected = {f"gpurnn/{name}" for name in sources(tree / "gpurnn", ".py", ".typed")}
    expected |= {f"gpurnn/bench/{name}" for name in sources(tree / "bench", ".py", ".cu")}
    expected |= {f"gpurnn/kernels/{name}" for name in sources(tree / "kernels", ".cu", ".cuh", ".h")}
    expected.add("gpurnn/kernels/cpu/cell.cpp")  # with the headers, so that cells can be compiled at their first use
    compiled = names - expected
    assert names >= expected and len(compiled) <= 1
    assert all(re.fullmatch(r"gpurnn/_native\.\w+\.(so|pyd)", name) for name in compiled)


def plant_an_older_library(folder):
    """A library of older sources, which is not to be taken for these. Returns its paths."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"_native{suffix}" for suffix in set(EXTENSION_SUFFIXES) & {".abi3.so", ".pyd"}]
    for path in paths:
        path.touch()
        os.utime(path, (0, 0))
    return paths


@pytest.mark.slow
def test_a_wheel_fits_one_platform_only_where_something_was_compiled(built, tree, tmp_path):
    compiled = any("_native" in name for name in zipfile.ZipFile(built[1]).namelist())
    assert built[1].name.endswith("-py3-none-any.whl") != compiled
    assert "-py3-none-" in built[1].name  # the library serves every version of Python
    copy = tmp_path / "tree"
    shutil.copytree(tree, copy, ignore=shutil.ignore_patterns("build", "_native*", "*.egg-info"))
    plant_an_older_library(copy / "build" / f"lib.{sysconfig.get_platform()}-{sys.implementation.cache_tag}" / "gpurnn")
    command = sys.executable, "-m", "build", "--no-isolation", "--wheel", "--outdir", str(tmp_path), str(copy)
    nothing = f"{sys.executable} -c raise(SystemExit(1))"
    environment = os.environ | {"CC": nothing, "CXX": nothing}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name == "gpurnn-0.1.0-py3-none-any.whl"
    names = zipfile.ZipFile(wheel).namelist()
    assert "gpurnn/kernels/cpu/cell.cpp" in names and not any("_native" in name for name in names)
    assert "no C++ compiler works here" in done.stderr, done.stderr


@pytest.mark.slow
def test_sdist_holds_the_tests(built, tree):
    with tarfile.open(built[0]) as sdist:
        names = {name.partition("/")[2] for name in sdist.getnames()}
    assert names > {f"tests/{name}" for name in sources(tree / "tests", ".py")}
    assert names > {f"gpurnn/{name}" for name in sources(tree / "gpurnn", ".md")} > {"gpurnn/docs/index.md"}
    assert names > {".ci/run", ".ci/wheels/__main__.py", ".ci/conda/recipe.yaml", "LICENSE", "README.md"}
    assert names > {".docs/conf.py", ".docs/static/site.css"}
    assert names > {"bench/__init__.py", "kernels/common.cuh", "kernels/cells/probe.cuh"}
    assert names > {f"kernels/{name}" for name in sources(tree / "kernels", ".cpp", ".h")} > {"kernels/cpu/api.cpp"}
    assert not [name for name in names if name.endswith(".pyc")]


@pytest.mark.slow
def test_installed_kernels_are_those_of_the_folder(installed, tree, tmp_path):
    code = "from gpurnn.backends import sources; print(sources.kernel_dir(), *sources.kernel_files())"
    folder, *names = isolated(code, installed, tmp_path).split()
    assert Path(folder) == installed / "gpurnn" / "kernels"
    assert names == sources(tree / "kernels", ".cu", ".cuh")
    assert len(names) > 2


@pytest.mark.slow
def test_installed_names(installed, tmp_path):
    """The benchmark is gpurnn.bench; the bare names bench, kernels and tests belong to others."""
    code = "import gpurnn.bench, importlib.util as util; print(gpurnn.bench.__file__)\n"
    code += "print(*(util.find_spec(name) for name in ('bench', 'kernels', 'tests')))"
    folder, others = isolated(code, installed, tmp_path).splitlines()
    assert Path(folder).parent == installed / "gpurnn" / "bench"
    assert others == "None None None"


@pytest.mark.slow
def test_installed_commands(installed, tmp_path):
    expected = "gpurnn, version 0.1.0\n"
    code = "import runpy; sys.argv[:] = ['gpurnn', '--version']; runpy.run_module('gpurnn', run_name='__main__')"
    assert isolated(code, installed, tmp_path) == expected
    (script,) = (installed / "bin").iterdir()
    assert script.stem == "gpurnn"
    assert run(str(script), "--version", cwd=tmp_path, PYTHONPATH=str(installed)) == expected


@pytest.mark.slow
def test_requirements(installed):
    """What pip will install: light for everybody, CuPy and PyTorch only where asked for."""
    (metadata,) = installed.glob("gpurnn-*.dist-info/METADATA")
    requires = re.findall(r"^Requires-Dist: ([\w-]+)\S*(.*)$", metadata.read_text(), re.MULTILINE)
    assert {name for name, rest in requires if "extra" not in rest} == {"numpy", "click", "tqdm", "safetensors"}
    extras = {name: re.search(r'extra == "(\w+)"', rest)[1] for name, rest in requires if "cupy" in name}
    assert extras == {"cupy-cuda12x": "cuda12", "cupy-cuda13x": "cuda13"}


def test_bare_checkout_finds_its_kernels(tmp_path):
    folder = isolated("from gpurnn.backends import sources; print(sources.kernel_dir())", ROOT, tmp_path)
    assert Path(folder.strip()) == ROOT / "kernels"
    assert kernel_sources.kernel_files() == sources(ROOT / "kernels", ".cu", ".cuh")


@pytest.mark.slow
def test_editable_install_finds_its_kernels(tree, tmp_path):
    target = tmp_path / "editable"
    options = ["--no-deps", "--no-index", "--no-build-isolation", "--disable-pip-version-check"]
    command = [sys.executable, "-m", "pip", "install", *options, "--target", str(target), "-e", str(tree)]
    older = plant_an_older_library(tree / "gpurnn")
    run(*command, cwd=tmp_path, CC="false", CXX="false")  # no compiler: gpurnn installs all the same
    assert older and not any(path.exists() for path in older)
    code = f"import site; site.addsitedir({str(target)!r}); import gpurnn.bench; from gpurnn.backends import sources\n"
    code += "print(gpurnn.bench.__file__, sources.kernel_dir())"
    bench, kernels = isolated(code, target, tmp_path).split()
    assert Path(bench).parent == tree / "bench"
    assert Path(kernels) == tree / "kernels"


def test_missing_kernels_are_named(monkeypatch, tmp_path):
    monkeypatch.setattr(kernel_sources, "__file__", str(tmp_path / "gpurnn/backends/sources.py"))
    with pytest.raises(FileNotFoundError, match="CUDA sources of gpurnn are missing from .*install gpurnn again"):
        kernel_sources.kernel_dir()


@pytest.mark.long
def test_import_is_light():
    """Under 0.3 s, NumPy included, and without what only some users need.

    The least of five, in seconds of the processor: what else the machine does at the time must not count.
    """
    code = "import time; start = time.process_time(); import gpurnn; print(time.process_time() - start)\n"
    code += "import sys; print(*{'cupy', 'torch', 'matplotlib', 'scipy', 'click', 'tqdm'} & set(sys.modules))"
    answers = [run(sys.executable, "-c", code, cwd=ROOT).splitlines() for _ in range(5)]
    assert {heavy for _, heavy in answers} == {""}
    assert min(float(seconds) for seconds, _ in answers) < 0.3
