"""Modules stand on floors: what one imports lies below it, so that no imports run in a circle.

An import inside a function counts like one at the top of a file. Importing a module does not count as importing the
``__init__.py`` of its package, unless a name of that is taken. Imports by name (importlib) are not seen.
"""

import ast
import re

import pytest
from helpers import ROOT


def modules(root, package):
    """Dotted name -> file. An ``__init__.py`` goes by the name of its folder."""
    files = {path.relative_to(root).with_suffix("").parts: path for path in (root / package).rglob("*.py")}
    return {".".join(parts[:-1] if parts[-1] == "__init__" else parts): path for parts, path in files.items()}


def imported(name, path, known):
    """Module of ``known`` -> the line where the module ``name`` imports it first."""
    package, found = name.split(".")[: None if path.stem == "__init__" else -1], {}
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = [alias.name for alias in node.names] if isinstance(node, (ast.Import, ast.ImportFrom)) else []
        if isinstance(node, ast.ImportFrom):
            above = package[: len(package) + 1 - node.level] if node.level else []
            source = ".".join([*above, *filter(None, [node.module])])
            names = [f"{source}.{taken}" if f"{source}.{taken}" in known else source for taken in names]
        for other in known.keys() & set(names):
            found[other] = min(node.lineno, found.get(other, node.lineno))
    return found


def circles(root, package):
    """For each set of modules that all need each other, the imports between them as text."""
    known = modules(root, package)
    arrows = {name: imported(name, path, known) for name, path in known.items()}
    needs = {name: set(found) for name, found in arrows.items()}
    for middle in needs:  # what they need in turn: Warshall's algorithm
        for found in needs.values():
            found |= needs[middle] if middle in found else set()
    sets = {frozenset(b for b in needs[a] if a in needs[b]) for a in needs} - {frozenset()}
    ends = [[(a, line, b) for a in some for b, line in arrows[a].items() if b in some] for some in sets]
    return sorted([f"{known[a].relative_to(root)}:{line} imports {b}" for a, line, b in sorted(some)] for some in ends)


def test_no_test_file_imports_another():
    """What several of them need lies in helpers.py."""
    for path in (ROOT / "tests").rglob("test_*.py"):
        taken = re.findall(r"^\s*(?:from|import) (test_\w+)", path.read_text(encoding="utf-8"), re.M)
        assert set(taken) <= {path.stem}, path.name


@pytest.mark.parametrize("package", ["gpurnn", "bench"])
def test_no_imports_run_in_a_circle(package):
    found = circles(ROOT, package)
    assert not found, "\n".join(line for circle in found for line in ["a circle:", *circle])


def test_circles_are_found(tmp_path):
    (tmp_path / "p" / "sub").mkdir(parents=True)
    files = {"__init__": "from .a import x", "a": "def f():\n from . import b", "b": "import p.a", "c": "import p.b"}
    for name, text in (files | {"sub/__init__": "from ..c import y", "sub/d": "from .. import z"}).items():
        (tmp_path / "p" / f"{name}.py").write_text(text)
    assert circles(tmp_path, "p") == [["p/a.py:2 imports p.b", "p/b.py:1 imports p.a"]]
