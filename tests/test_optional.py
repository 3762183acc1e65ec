"""With nothing but the core packages every test file is collected, and what needs more skips and says so."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import optional
import pytest
from optional import given, missing_package, needs

st = optional.optional("hypothesis.strategies")
TESTS = Path(__file__).parent
ROOT = TESTS.parent
CORE = ("numpy", "click", "tqdm", "safetensors")  # what gpurnn depends on
PYTEST = ("pytest", "_pytest", "pluggy", "iniconfig", "packaging", "pygments", "exceptiongroup", "tomli")
SCRIPTS = (*TESTS.rglob("*.py"), *(ROOT / ".ci").rglob("*.py"))
OURS = ("gpurnn", "bench", "cuda_on_cpu", "blocked", *(path.stem for path in SCRIPTS))
# Imported first, as a plugin of pytest's or by itself, it hides all that is neither Python's own nor in ALLOWED.
BLOCKED = """
import json, os, sys

allowed = {*sys.stdlib_module_names, *os.environ["ALLOWED"].split()}

class Narrowed:
    def __init__(self, finder):
        self.finder = finder

    def __getattr__(self, name):
        return getattr(self.finder, name)

    def find_spec(self, name, path=None, target=None):
        top = name.partition(".")[0]
        known = top in allowed or top.startswith("_sysconfigdata")
        return self.finder.find_spec(name, path, target) if known else None

sys.meta_path[:] = map(Narrowed, sys.meta_path)

def pytest_collection_modifyitems(items):
    with open(os.environ["COLLECTED"], "w") as file:  # before -m leaves some out
        json.dump([item.nodeid for item in items], file)

pytest_collection_modifyitems.pytest_impl = {"tryfirst": True}
"""


@pytest.fixture
def blocked(tmp_path):
    """Python with only the core packages and ``more``: the finished process."""
    (tmp_path / "blocked.py").write_text(BLOCKED)

    def run(*args, more=()):
        environment = {
            "ALLOWED": " ".join((*CORE, *OURS, *more)),
            "COLLECTED": str(tmp_path / "collected.json"),
            "GPURNN_TEST_CACHE": str(tmp_path / "cache"),
            "PYTHONPATH": os.pathsep.join((str(tmp_path), str(ROOT))),
            "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
            "PYTEST_ADDOPTS": "",
        }
        return subprocess.run(
            [sys.executable, *args], cwd=ROOT, env=os.environ | environment, capture_output=True, text=True
        )

    return run


def test_the_library_needs_the_core_packages_only(blocked):
    code = (
        "import blocked, importlib, pkgutil, gpurnn\n"
        "names = [module.name for module in pkgutil.walk_packages(gpurnn.__path__, 'gpurnn.')]\n"
        "for name in names:\n"
        "    if not name.endswith('__main__') and '._native' not in name and '.interop.' not in name:\n"
        "        importlib.import_module(name)\n"
        "print(len(names))"
    )
    done = blocked("-W", "error", "-c", code)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 30


@pytest.mark.slow
@pytest.mark.parametrize("more", [(), ("nvidia",)], ids=["core", "core and NVRTC"])
def test_every_test_file_is_collected(more, blocked, tmp_path):
    done = blocked("-m", "pytest", "-p", "blocked", "--collect-only", "-q", "-m", "gpu", more=(*PYTEST, *more))
    assert done.returncode == 0, done.stdout + done.stderr
    selected, collected = map(int, re.search(r"^(\d+)/(\d+) tests collected", done.stdout, re.M).groups())
    items = json.loads((tmp_path / "collected.json").read_text())
    assert len(items) == collected and 100 < selected < collected
    assert "error" not in done.stdout.splitlines()[-1]
    files = {item.partition("::")[0] for item in items}
    assert {file for file in files if file.startswith("tests/")} == {
        path.relative_to(ROOT).as_posix() for path in TESTS.rglob("test_*.py")
    }
    inside = [path for path in (ROOT / "gpurnn").rglob("*.py") if "interop" not in path.parts]  # the rest needs more
    examples = {path for path in inside if ">>> " in path.read_text(encoding="utf-8")}
    assert files >= {path.relative_to(ROOT).as_posix() for path in examples}
    assert not (tmp_path / "cache").exists()  # and nothing is compiled for it


@pytest.mark.slow
def test_what_needs_more_skips_and_says_so(blocked):
    files = (
        "attention", "backend", "gpu", "losses", "module", "optional", "tasks_speech", "testing", "tokens", "training",
    )  # fmt: skip
    names = [
        str(path.relative_to(ROOT)) for path in TESTS.rglob("test_*.py") if path.stem.removeprefix("test_") in files
    ]
    assert len(names) == len(files)
    done = blocked("-m", "pytest", "-p", "blocked", "-q", *names, more=PYTEST)
    assert done.returncode == 0, done.stdout + done.stderr
    reasons = re.findall(r"^SKIPPED .*?: (.*)$", done.stdout, re.M)
    for package in ("torch", "hypothesis", "matplotlib", "scipy", "ml_dtypes"):
        assert f"needs {package}" in reasons
    assert any(reason.startswith("needs a GPU: ") for reason in reasons)
    assert int(re.search(r"(\d+) passed", done.stdout)[1]) > 500


# ---- the helpers


@pytest.mark.long
@needs("hypothesis")
def test_a_property_that_does_not_hold_fails():
    seen = []

    @given(lambda: st.integers(0, 100), max_examples=50)
    def holds(number):
        seen.append(number)

    @given(lambda: st.integers(0, 100))
    def does_not(number):
        assert number < 7

    holds()
    assert 20 < len(set(seen)) <= 50
    with pytest.raises(AssertionError):
        does_not()


def test_only_what_is_not_here_is_missing(monkeypatch):
    monkeypatch.setattr(optional, "MISSING", ["torch"])
    ours, theirs = ModuleNotFoundError("no", name="torch.nn"), ModuleNotFoundError("no", name="mido")
    assert missing_package(ours) == "torch" and missing_package(theirs) is None
    assert missing_package(ValueError("torch")) is None
    try:
        try:
            raise ours
        except ImportError as error:
            raise ValueError("install torch") from error
    except ValueError as error:
        assert missing_package(error) == "torch"
