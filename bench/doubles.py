"""Rivals for the tests of the benchmark itself."""

import time

from .judge import reference
from .rivals.prepared import Prepared


def sleeper(*given):
    """Sleeps 20 ms: for the tests of the clock."""
    return Prepared(lambda: time.sleep(0.02), lambda: reference(*given))


def liar(*given):
    """Computes half of what it should: for the test that a wrong rival is not timed."""
    return Prepared(lambda: None, lambda: {name: value / 2 for name, value in reference(*given).items()})


DOUBLES = {"sleeper": sleeper, "liar": liar}  # name -> prepare
