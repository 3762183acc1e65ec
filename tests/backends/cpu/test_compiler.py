"""The C++ compiler for traced cells on Linux, macOS and Windows: which one is found, and its options."""

import os
import subprocess
import sys
from types import SimpleNamespace

import pytest

from gpurnn.backends.cpu import compiler


@pytest.fixture(autouse=True)
def found(monkeypatch):
    """The programs that are there: name -> path. What they say of themselves is their path."""
    paths = {}
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.delenv("GPURNN_CPU_CELLS", raising=False)
    monkeypatch.setattr(compiler.shutil, "which", paths.get)
    system = SimpleNamespace(environ=os.environ, stat=lambda path: SimpleNamespace(st_mtime_ns=1))
    monkeypatch.setattr(compiler, "os", system)
    monkeypatch.setattr(compiler, "run", lambda command, text=b"": SimpleNamespace(stdout=command[0].encode()))
    compiler._described.cache_clear()
    yield paths
    compiler._described.cache_clear()


def on(monkeypatch, system):
    monkeypatch.setattr(sys, "platform", system)


def test_the_first_that_is_there(found, monkeypatch):
    found |= {"g++": "/bin/g++", "clang++": "/bin/clang++"}
    assert compiler.find() == (("/bin/g++",), b"/bin/g++")
    monkeypatch.setenv("CXX", "clang++ -stdlib=libc++")
    assert compiler.find()[0] == ("/bin/clang++", "-stdlib=libc++")
    monkeypatch.setenv("CXX", "icpx")
    with pytest.raises(compiler.CompilerError, match="CXX names icpx, which is not there: install one, such as"):
        compiler.find()


@pytest.mark.parametrize("system, advice", [
    ("linux", "such as g\\+\\+, or"), ("darwin", "xcode-select --install"), ("win32", "g\\+\\+ of MSYS2"),
])  # fmt: skip
def test_what_to_install(system, advice, monkeypatch):
    on(monkeypatch, system)
    with pytest.raises(compiler.CompilerError, match=f"no C\\+\\+ compiler was found.*{advice}"):
        compiler.find()


def test_a_path_of_windows(found, monkeypatch):
    """With backslashes and spaces."""
    on(monkeypatch, "win32")
    path = r"C:\Program Files\LLVM\bin\clang++.exe"
    found[path] = path
    monkeypatch.setenv("CXX", path)
    assert compiler.find()[0] == (path,)
    monkeypatch.setenv("CXX", f'"{path}" -O1')
    assert compiler.find()[0] == (path, "-O1")


def test_macos_offers_no_window(found, monkeypatch):
    """Without the command line tools, /usr/bin/c++ opens a window and waits."""
    on(monkeypatch, "darwin")
    asked = []

    def ask(command, **options):
        asked.append(command)
        return SimpleNamespace(returncode=answer)

    monkeypatch.setattr(subprocess, "run", ask)
    found |= {"c++": "/usr/bin/c++", "clang++": "/opt/homebrew/bin/clang++"}
    answer = 2
    assert compiler.find()[0] == ("/opt/homebrew/bin/clang++",) and asked == [["/usr/bin/xcode-select", "-p"]]
    answer = 0
    assert compiler.find()[0] == ("/usr/bin/c++",)


@pytest.mark.parametrize("system, suffix", [("linux", ".so"), ("darwin", ".dylib"), ("win32", ".dll")])
def test_names_and_options(system, suffix, monkeypatch):
    on(monkeypatch, system)
    gcc, clang = compiler.options(b"g++ (GCC) 14", 1), compiler.options(b"clang version 19", 0)
    assert compiler.library_suffix() == suffix and gcc[-1] == clang[-1] == "-"
    assert "-mavx2" in gcc and "-mavx2" not in clang
    windows = system == "win32"
    assert ("-fPIC" in gcc) == ("-fPIC" in clang) != windows  # clang refuses it there
    assert ("-static" in gcc) == ("-static" in clang) == windows  # or the compiler's libraries are not found
    assert ("-Wa,-muse-unaligned-vector-move" in gcc) == windows and not any("-Wa" in option for option in clang)


def test_switched_off(found, monkeypatch):
    found["c++"] = "/bin/c++"
    monkeypatch.setenv("GPURNN_CPU_CELLS", "off")
    with pytest.raises(compiler.CompilerError, match="GPURNN_CPU_CELLS switches it off"):
        compiler.find()
