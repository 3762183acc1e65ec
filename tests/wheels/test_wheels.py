"""The scripts of .ci/wheels, without compiling: what is in a wheel, what is said of a library."""

import csv
import hashlib
import os
import re
import shutil
import subprocess
import sys
import zipfile
from base64 import urlsafe_b64decode

import pytest
from helpers import ROOT

import gpurnn

sys.path.append(str(ROOT / ".ci" / "wheels"))
import binaries
import packing
from targets import TARGETS


@pytest.fixture
def pure(tmp_path):
    """A wheel that fits any platform."""
    path = tmp_path / "gpurnn-0.1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as wheel:
        wheel.writestr("gpurnn/__init__.py", "# a module\n")
        text = "Wheel-Version: 1.0\nGenerator: setuptools\nRoot-Is-Purelib: true\nTag: py3-none-any\n\n"
        wheel.writestr("gpurnn-0.1.0.dist-info/WHEEL", text)
        wheel.writestr("gpurnn-0.1.0.dist-info/METADATA", "Metadata-Version: 2.4\nName: gpurnn\nVersion: 0.1.0\n")
        wheel.writestr("gpurnn-0.1.0.dist-info/RECORD", "")
    return path


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.name)
def test_a_wheel_of_a_platform(target, pure, tmp_path):
    library = tmp_path / "library"
    library.write_bytes(b"compiled" * 1000)
    path = packing.write(pure, target, library, tmp_path)
    assert path.name == f"gpurnn-0.1.0-py3-none-{'.'.join(target.tags)}.whl"
    assert {entry.date_time for entry in zipfile.ZipFile(path).infolist()} == {(1980, 1, 1, 0, 0, 0)}
    files = packing.read(path)
    assert files[f"gpurnn/{target.library}"] == library.read_bytes()
    lines = files["gpurnn-0.1.0.dist-info/WHEEL"].decode().splitlines()
    assert "Root-Is-Purelib: false" in lines and "Wheel-Version: 1.0" in lines
    assert [line for line in lines if line.startswith("Tag:")] == [f"Tag: py3-none-{tag}" for tag in target.tags]
    rows = list(csv.reader(files["gpurnn-0.1.0.dist-info/RECORD"].decode().splitlines()))
    assert rows[-1] == ["gpurnn-0.1.0.dist-info/RECORD", "", ""] and {name for name, *_ in rows} == set(files)
    for name, digest, size in rows[:-1]:
        assert urlsafe_b64decode(digest.removeprefix("sha256=") + "=") == hashlib.sha256(files[name]).digest()
        assert int(size) == len(files[name])


def test_equal_content_gives_equal_bytes(pure, tmp_path):
    library = tmp_path / "library"
    library.write_bytes(b"compiled")
    first, second = tmp_path / "first", tmp_path / "second"
    first.mkdir(), second.mkdir()
    one = packing.write(pure, TARGETS[0], library, first).read_bytes()
    library.touch()
    assert packing.write(pure, TARGETS[0], library, second).read_bytes() == one
    same = packing.write(pure, None, None, first)
    assert same.name == pure.name and set(packing.read(same)) == set(packing.read(pure))


def test_wheels_of_two_builds_are_compared(pure, tmp_path):
    """Where they differ is said: in which file, from which byte on, or in how they are stored."""
    (tmp_path / "other").mkdir()
    library = tmp_path / "library"
    library.write_bytes(bytes(3000))
    one = packing.write(pure, TARGETS[0], library, tmp_path)
    other = packing.write(pure, TARGETS[0], library, tmp_path / "other")
    assert list(packing.differences(one, other)) == []
    library.write_bytes(bytes(2999) + b"1")
    packing.write(pure, TARGETS[0], library, other.parent)
    name = f"gpurnn/{TARGETS[0].library}: different from byte 2,999 on"
    record, found = packing.differences(one, other)
    assert found == name and record.startswith("gpurnn-0.1.0.dist-info/RECORD: different from byte ")
    files = packing.read(one)
    with zipfile.ZipFile(other, "w") as wheel:
        for name in files:
            wheel.writestr(zipfile.ZipInfo(name, (2026, 1, 1, 0, 0, 0)), files[name])
    assert list(packing.differences(one, other)) == ["the same files, stored in another way"]
    with zipfile.ZipFile(other, "a") as wheel:
        wheel.writestr("more", "")
    assert list(packing.differences(one, other)) == ["more: only one of the two has it"]
    other.unlink()
    assert list(packing.differences(one, other)) == [f"there is no {other}"]


def test_a_library_names_no_folder_of_its_build(tmp_path):
    """As one for macOS does by default: its own path."""
    library = tmp_path / "library"
    library.write_bytes(b"\xcf\xfa\xed\xfe" + bytes(24) + b"@rpath/_native.dylib\0/elsewhere\0")
    folders = tmp_path / "pieces", tmp_path / "sources"
    assert list(binaries.places(library, folders)) == []
    library.write_bytes(bytes(9) + f"{folders[1]}/_native.dylib".encode())
    assert list(binaries.places(library, folders)) == [f"it holds the path {folders[1]}"]
    flags = [target.flags for target in TARGETS if target.library.endswith(".dylib")]
    assert flags == [("-Wl,-install_name,@rpath/_native.dylib", "-Wl,-x")] * 2


@pytest.mark.parametrize("arguments, said", [
    (["windows"], "unknown targets windows: expected some of manylinux-x86_64, "),
    (["--jobs", "0"], "--jobs should be 1 or more, got 0"),
    (["--compare", "nowhere"], "nowhere, which is none"),
    (["win_amd64", "--jobs", "0", "--help"], "compilations at a time"),
])  # fmt: skip
def test_wrong_arguments_are_named_before_anything_is_installed(arguments, said, tmp_path):
    copy = tmp_path / ".ci" / "wheels"  # its environment would lie in this folder
    shutil.copytree(ROOT / ".ci" / "wheels", copy, ignore=shutil.ignore_patterns("__pycache__"))
    found = subprocess.run(
        [sys.executable, copy, *arguments], env=os.environ | {"PIP_NO_INDEX": "1"}, capture_output=True, text=True
    )
    assert said in " ".join((found.stdout + found.stderr).split())
    assert found.returncode == (0 if "--help" in arguments else 2) and not (tmp_path / "build").exists()


def test_every_platform_has_a_wheel_of_its_own():
    tags = [tag for target in TARGETS for tag in target.tags]
    assert len(set(tags)) == len(tags) and len({target.name for target in TARGETS}) == len(TARGETS) == 8
    assert {"manylinux2014_x86_64", "manylinux2014_aarch64", "macosx_11_0_arm64", "macosx_11_0_x86_64"} < set(tags)
    assert {"win_amd64", "win_arm64", "musllinux_1_2_x86_64", "musllinux_1_2_aarch64"} < set(tags)


FAULTLESS = {"kind": "ELF", "machine": "x86_64", "exports": ["gpurnn_native_level"], "needs": ["libc.so.6"],
             "oldest": "glibc 2.17", "stripped": True}  # fmt: skip


@pytest.mark.parametrize("changed, fault", [
    ({}, []),
    ({"kind": "PE", "needs": ["KERNEL32.dll", "api-ms-win-crt-heap-l1-1-0.dll"], "oldest": "Windows 6.0"}, []),
    ({"exports": []}, ["it exports nothing"]),
    ({"exports": ["gpurnn_native_level", "_Znwm"], "needs": ["ld-linux-x86-64.so.2"]}, ["it exports _Znwm"]),
    ({"kind": "Mach-O, signed", "exports": ["gpurnn_native_level", "_Znwm", "__dso_handle"]}, []),
    ({"kind": "Mach-O, signed", "exports": ["gpurnn_native_level", "_stranger"]}, ["it exports _stranger"]),
    ({"kind": "Mach-O, not signed", "oldest": "macOS 11.0"}, []),
    ({"kind": "Mach-O, not signed", "oldest": "macOS 11.1", "machine": "arm64"},
     ["it needs macOS 11.1", "it is not signed, which processors by Apple ask for"]),
    ({"needs": ["libstdc++.so.6", "libc.so"], "oldest": "musl"}, ["it needs libstdc++.so.6"]),
    ({"oldest": "glibc 2.4"}, []),
    ({"oldest": "glibc 2.28", "stripped": False}, ["it needs glibc 2.28", "it has symbols of its inside"]),
])  # fmt: skip
def test_faults_of_a_library(changed, fault):
    assert list(binaries.faults(FAULTLESS | changed)) == fault


def test_the_conda_recipe_asks_for_the_same(monkeypatch):
    """Its versions and requirements are those of pyproject.toml."""
    yaml = pytest.importorskip("yaml")
    recipe = yaml.safe_load((ROOT / ".ci" / "conda" / "recipe.yaml").read_text(encoding="utf-8"))
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert recipe["schema_version"] == 1 and recipe["context"]["version"] == gpurnn.__version__
    required = set(re.findall(r'"([^"]+)"', re.search(r"^dependencies = \[(.*)\]$", text, re.M)[1]))
    python = re.search(r'^requires-python = "(.*)"$', text, re.M)[1]
    assert {line.replace(" ", "") for line in recipe["requirements"]["run"]} == required | {f"python{python}"}
    assert recipe["build"]["python"]["entry_points"] == ["gpurnn = gpurnn.cli:main"]
    assert 'gpurnn = "gpurnn.cli:main"' in text and f'description = "{recipe["about"]["summary"]}"' in text
