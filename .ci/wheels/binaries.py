"""What a compiled library offers and needs, read from its file: ELF, Mach-O or PE.

A library offers the functions gpurnn_native_* and, but for macOS, no others; it needs only what the oldest system of
its tag has.
"""

import shutil
import subprocess
from pathlib import Path

PREFIX = "gpurnn_native_"
# Libraries that a wheel may expect: of the tags' policies, of macOS and of Windows 10.
_SYSTEM = (
    "libc.so", "libc.so.6", "libm.so.6", "libpthread.so.0", "libdl.so.2", "ld-linux-aarch64.so.1",
    "ld-linux-x86-64.so.2", "/usr/lib/libSystem.B.dylib", "kernel32.dll", "ntdll.dll",
)  # fmt: skip
# What Zig's linker, which knows no list of exports, exports of every library for macOS: operators new and delete of its
# C++ runtime, all sizes and alignments of them, and two names that are no functions.
_MACOS = ("_Zna", "_Znw", "_Zda", "_Zdl", "__dso_handle", "_mh_dylib_header")
# The newest version of a C library or system that a library may ask for: that of its wheel's tag.
_OLDEST = {"glibc": (2, 17), "musl": (), "macOS": (11, 0), "Windows": (10, 0)}
_UCRT = "api-ms-win-crt-"  # a part of Windows since version 10


def facts(path):
    """What ``_facts`` makes of a library. oldest: the version of its C library, or of its system."""
    head = Path(path).read_bytes()[:4]
    read = {b"\x7fELF": _elf, b"\xcf\xfa\xed\xfe": _macho}.get(head, _pe)
    return read(path)


def faults(found):
    """What is wrong with ``facts``, as sentences."""
    ours = (PREFIX, *_MACOS) if found["kind"].startswith("Mach-O") else PREFIX
    strangers = [name for name in found["exports"] if not name.startswith(ours)]
    missing = [
        name for name in found["needs"] if name.lower() not in _SYSTEM_LOWER and not name.lower().startswith(_UCRT)
    ]
    if not found["exports"]:
        yield "it exports nothing"
    name, _, version = found["oldest"].partition(" ")
    if tuple(map(int, version.split(".") if version else ())) > _OLDEST[name]:
        yield f"it needs {found['oldest']}"
    if not found["stripped"]:
        yield "it has symbols of its inside"
    if (found["kind"], found["machine"]) == ("Mach-O, not signed", "arm64"):
        yield "it is not signed, which processors by Apple ask for"
    if strangers:
        yield f"it exports {', '.join(strangers)}"
    if missing:
        yield f"it needs {', '.join(missing)}"


def places(path, folders):
    """Which of the folders of a build a library names, as sentences: it would have other bytes in other folders."""
    content = Path(path).read_bytes()
    for folder in folders:
        if str(folder).encode() in content:
            yield f"it holds the path {folder}"


_SYSTEM_LOWER = {name.lower() for name in _SYSTEM}


def _elf(path):
    from elftools.elf.elffile import ELFFile

    with open(path, "rb") as file:
        elf = ELFFile(file)
        names = [s.name for s in elf.get_section_by_name(".dynsym").iter_symbols() if s["st_shndx"] != "SHN_UNDEF"]
        needs = [
            tag.needed for tag in elf.get_section_by_name(".dynamic").iter_tags() if tag.entry.d_tag == "DT_NEEDED"
        ]
        versions = elf.get_section_by_name(".gnu.version_r")
        used = [one.name for _, more in versions.iter_versions() for one in more] if versions else []
        used = [tuple(map(int, name.removeprefix("GLIBC_").split("."))) for name in used if name.startswith("GLIBC_")]
        oldest = "glibc " + ".".join(map(str, max(used))) if used else "musl"
        stripped = elf.get_section_by_name(".symtab") is None
        return _facts("ELF", elf["e_machine"].removeprefix("EM_"), filter(None, names), needs, oldest, stripped)


def _macho(path):
    from macholib import mach_o
    from macholib.MachO import MachO
    from macholib.SymbolTable import SymbolTable

    file = MachO(str(path))
    (header,) = file.headers
    needs, oldest, signed = [], None, False
    for load, command, data in header.commands:
        if load.cmd == mach_o.LC_LOAD_DYLIB:
            needs.append(data.rstrip(b"\0").decode())
        elif load.cmd == mach_o.LC_BUILD_VERSION:
            oldest = f"macOS {command.minos >> 16}.{command.minos >> 8 & 255}"
        elif load.cmd == mach_o.LC_VERSION_MIN_MACOSX:
            oldest = f"macOS {command.version >> 16}.{command.version >> 8 & 255}"
        elif load.cmd == mach_o.LC_CODE_SIGNATURE:
            signed = True
    machine = {mach_o.CPU_TYPE_ARM64 if hasattr(mach_o, "CPU_TYPE_ARM64") else 0x100000C: "arm64"}
    table = SymbolTable(file)
    names = [name.decode().removeprefix("_") for _, name in table.extdefsyms]
    inside = [name for _, name in table.localsyms if not name.endswith(b"__thunk")]  # which the linker itself adds
    kind = "Mach-O, signed" if signed else "Mach-O, not signed"
    return _facts(kind, machine.get(header.header.cputype, "x86_64"), names, needs, oldest, not inside)


def _pe(path):
    import pefile

    file = pefile.PE(str(path))
    machine = {0x8664: "x86_64", 0xAA64: "arm64"}[file.FILE_HEADER.Machine]
    names = [symbol.name.decode() for symbol in file.DIRECTORY_ENTRY_EXPORT.symbols]
    needs = [entry.dll.decode() for entry in file.DIRECTORY_ENTRY_IMPORT]
    header = file.OPTIONAL_HEADER
    oldest = f"Windows {header.MajorSubsystemVersion}.{header.MinorSubsystemVersion}"
    return _facts("PE", machine, names, needs, oldest, not file.FILE_HEADER.NumberOfSymbols)


def _facts(kind, machine, exports, needs, oldest, stripped):
    return {"kind": kind, "machine": machine, "exports": sorted(exports), "needs": sorted(needs), "oldest": oldest,
            "stripped": stripped}  # fmt: skip


def audit(wheel):
    """What auditwheel says of a Linux wheel, in one line; None where it is not here."""
    command = shutil.which("auditwheel")
    if command is None:
        return None
    done = subprocess.run([command, "show", str(wheel)], capture_output=True, encoding="utf-8", errors="replace")
    if done.returncode:  # it may not know the wheel's C library where that is not this machine's
        return f"nothing: {(done.stderr.strip() or 'no message').splitlines()[-1]}"
    return " ".join(done.stdout.split())
