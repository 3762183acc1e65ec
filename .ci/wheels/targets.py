"""What the wheels are built for."""

from typing import NamedTuple

# Levels of kernels/cpu/api.cpp, and the interface: a piece each.
_X86, _ARM = 4, 2


class Target(NamedTuple):
    """One platform.

    zig: as Zig names it, with the oldest version of its C library or system. tags: of the wheel's platform. library:
    the file in the package. pieces: what kernels/cpu/api.cpp is divided into. flags: for the linker.
    """

    name: str
    zig: str
    tags: tuple[str, ...]
    library: str
    pieces: int
    flags: tuple[str, ...]


_EXPORTS = "-Wl,--version-script={exports}"  # without it the library offers its operators new and delete to others
_ELF = (_EXPORTS, "-Wl,-z,noexecstack")
# A library for macOS holds the name by which programs find it. Without this one it is the path of the build's folder.
# -x: without the names of functions inside, which -s alone leaves there.
_MACHO = ("-Wl,-install_name,@rpath/_native.dylib", "-Wl,-x")


def _linux(machine, pieces):
    old = (f"manylinux2014_{machine}", f"manylinux_2_17_{machine}")
    yield Target(f"manylinux-{machine}", f"{machine}-linux-gnu.2.17", old, "_native.so", pieces, _ELF)
    new = (f"musllinux_1_2_{machine}",)
    yield Target(f"musllinux-{machine}", f"{machine}-linux-musl", new, "_native.so", pieces, _ELF)


TARGETS = (
    *_linux("x86_64", _X86),
    Target("macos-x86_64", "x86_64-macos.11.0", ("macosx_11_0_x86_64",), "_native.dylib", _X86, _MACHO),
    Target("windows-x86_64", "x86_64-windows-gnu", ("win_amd64",), "_native.dll", _X86, ()),
    *_linux("aarch64", _ARM),
    Target("macos-arm64", "aarch64-macos.11.0", ("macosx_11_0_arm64",), "_native.dylib", _ARM, _MACHO),
    Target("windows-arm64", "aarch64-windows-gnu", ("win_arm64",), "_native.dll", _ARM, ()),
)
