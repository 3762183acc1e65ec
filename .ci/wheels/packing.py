"""A wheel for a platform: the one that fits any platform, with the compiled library in it.

Two wheels of the same content have the same bytes.
"""

import base64
import hashlib
import zipfile
from pathlib import Path

_DATE = (1980, 1, 1, 0, 0, 0)  # the first that a ZIP file can hold
_MODE = 0o100644 << 16  # a regular file; the library is loaded, not run


def read(wheel):
    """{name: content} of a wheel, in order of names."""
    with zipfile.ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in sorted(archive.namelist()) if not name.endswith("/")}


def write(pure, target, library, out):
    """Make the wheel of ``target`` in the folder ``out`` from the file ``pure`` and a library. Returns its path."""
    files = read(pure)
    name, version = Path(pure).name.split("-")[:2]
    info = f"{name}-{version}.dist-info"
    if library is not None:
        files[f"{name}/{target.library}"] = Path(library).read_bytes()
        files[f"{info}/WHEEL"] = _of_platform(files[f"{info}/WHEEL"].decode(), target.tags).encode()
    del files[f"{info}/RECORD"]
    tags = "any" if library is None else ".".join(target.tags)
    path = Path(out, f"{name}-{version}-py3-none-{tags}.whl")
    files[f"{info}/RECORD"] = _record(files, f"{info}/RECORD").encode()  # the last one, as wheels have it
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in files.items():
            entry = zipfile.ZipInfo(name, _DATE)
            entry.external_attr, entry.compress_type, entry.create_system = _MODE, zipfile.ZIP_DEFLATED, 3
            archive.writestr(entry, content, compresslevel=9)
    return path


def differences(one, other):
    """Where two wheels of one name differ, as sentences; none where their bytes are equal."""
    if not Path(other).is_file():
        yield f"there is no {other}"
        return
    if Path(one).read_bytes() == Path(other).read_bytes():
        return
    first, second = read(one), read(other)
    for name in sorted({*first, *second}):
        if name not in first or name not in second:
            yield f"{name}: only one of the two has it"
        elif first[name] != second[name]:
            pairs = zip(first[name], second[name], strict=False)
            at = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(first[name]), len(second[name])))
            yield f"{name}: different from byte {at:,} on"
    if first == second:
        yield "the same files, stored in another way"


def _of_platform(text, tags):
    """The file WHEEL with other tags."""
    lines = [line for line in text.splitlines() if line.strip() and not line.startswith(("Tag:", "Root-Is-Purelib:"))]
    return "\n".join([*lines, "Root-Is-Purelib: false", *(f"Tag: py3-none-{tag}" for tag in tags), ""])


def _record(files, name):
    lines = []
    for path, content in files.items():
        digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
        lines.append(f"{path},sha256={digest},{len(content)}\n")
    return "".join([*lines, f"{name},,\n"])
