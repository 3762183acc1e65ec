"""The library of the backend "cpu", and the wheel of what was built: only with the library does it fit one platform.

pyproject.toml names these classes. They are used when gpurnn is installed or a wheel is made, and are not part of it.
"""

import os

from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.modified import newer_group


class Library(build_ext):
    """Forgets a library of older sources: it would be taken where these cannot be compiled."""

    def run(self):
        given = self.inplace  # as an editable install has it: the library lies beside the sources, too
        for self.inplace in (False, given):
            for extension in self.extensions:
                path = self.get_ext_fullpath(extension.name)
                if os.path.exists(path) and newer_group([*extension.sources, *extension.depends], path, "newer"):
                    os.remove(path)
        super().run()


class Wheel(bdist_wheel):
    """Marks a wheel py3-none-PLATFORM, as the library needs nothing of Python's; without the library py3-none-any."""

    def run(self):
        if not self._compiled():
            self.distribution.ext_modules = None
            self.root_is_pure = True
            self.warn(
                "gpurnn is built without its compiled code, as no C++ compiler works here: the backend 'cpu' will be "
                "array code, which is slower. The wheel fits any platform"
            )
        super().run()

    def get_tag(self):
        return "py3", "none", super().get_tag()[2]

    def _compiled(self):
        """Whether the library can be built. It is built now, and only copied later."""
        self.run_command("build_ext")
        return all(os.path.exists(path) for path in self.get_finalized_command("build_ext").get_outputs())
