"""The wheel of what was built: only where a compiler made the library of the backend "cpu" does it fit one platform.

pyproject.toml names this class. It is used when a wheel is made, and is not part of it.
"""

import os

from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.modified import newer_group


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
        build = self.get_finalized_command("build_ext")
        build.ensure_finalized()
        for extension in build.extensions:
            path = build.get_ext_fullpath(extension.name)
            if os.path.exists(path) and newer_group([*extension.sources, *extension.depends], path, "newer"):
                os.remove(path)  # of older sources: it would be taken where these are not compiled
        self.run_command("build_ext")
        return all(os.path.exists(path) for path in build.get_outputs())
