"""Packages that tests use and a machine may lack: what needs one skips there, and every test file is still collected.

    torch = optional("torch")                             # imported by the first test that uses it

    @given(lambda: st.text(max_size=20))                  # the strategies of hypothesis, made when the test runs
    def test_every_text_comes_back(text): ...

conftest.py makes the ImportError of a package that is not here a skip, wherever in a test it comes from.
"""

import importlib
import importlib.util

import pytest

# What the extra "test" installs, by import name; "nvidia" is NVRTC. CI has them all but flax, equinox and optuna, which
# bring much with them: their tests skip there.
# CuPy is not among them: tests that need it are marked gpu, or ask for it themselves.
PACKAGES = (
    "build", "setuptools", "pip", "tensorboardX",
    "torch", "jax", "flax", "equinox", "expecttest", "ml_dtypes", "matplotlib", "scipy", "sacrebleu", "mido",
    "soundfile", "hypothesis", "threadpoolctl", "sklearn", "onnx", "keras", "h5py", "xdist", "nvidia",
    "mpi4py", "optuna",
)  # fmt: skip


def _is_here(package):
    try:
        return importlib.util.find_spec(package) is not None
    except (ImportError, ValueError):
        return False


MISSING = [package for package in PACKAGES if not _is_here(package)]


def missing_package(error):
    """The package that is not here and whose import ``error`` speaks of, or what ``error`` came from; else None."""
    while error is not None:
        package = (getattr(error, "name", None) or "").partition(".")[0]
        if isinstance(error, ImportError) and package in MISSING:
            return package
        error = error.__cause__ or error.__context__
    return None


def needs(package):
    """A mark: skip the test where the package is not here. For tests of commands, which turn errors into text."""
    return pytest.mark.skipif(package in MISSING, reason=f"needs {package}")


class optional:
    """A module that is imported when a test first asks it for something."""

    def __init__(self, name):
        self._name = name

    def __getattr__(self, attribute):
        if attribute.startswith("__") or attribute == "_mock_name":  # pytest asks every name of a test file for these
            raise AttributeError(attribute)
        return getattr(importlib.import_module(self._name), attribute)


def given(*strategies, **options):
    """``hypothesis.given`` of what the functions in ``strategies`` return, with ``options`` for ``settings``."""

    def decorate(test):
        # A shared machine is slow at times, and a test that fails today must fail again tomorrow.
        settings = {"deadline": None, "derandomize": True} | options

        def run():  # without the test's arguments, which pytest would take for fixtures
            import hypothesis

            hypothesis.settings(**settings)(hypothesis.given(*(make() for make in strategies))(test))()

        run.__name__, run.__doc__, run.__module__ = test.__name__, test.__doc__, test.__module__
        return run

    return decorate
