"""What reading leaves out: one bad file among many is no reason to refuse the others, but it is reported."""

import contextlib
import logging

from ..errors import FileError, one_line

_log = logging.getLogger("gpurnn")
_SHOWN = 3  # reasons that are reported


class Skipped:
    """Counts the bad ones among many files or lines, and logs their number at the end, with the first reasons.

    Parameters
    ----------
    what : str
        Their plural.
    whole : str or Path, optional
        The file or folder that they are of, where their errors do not name it.
    strict : bool
        Raise the error of the first bad one instead.

    Examples
    --------
    >>> skipped, values = Skipped("lines", "numbers.txt"), []
    >>> for number, text in enumerate(["1", "2", "x"], 1):
    ...     with skipped.catching(f"line {number}"):
    ...         values.append(int(text))
    >>> skipped.done()
    >>> values, skipped.reasons
    ([1, 2], ["line 3: invalid literal for int() with base 10: 'x'"])
    """

    def __init__(self, what, whole=None, strict=False):
        self.what, self.strict = what, strict
        self.start = "" if whole is None else f"{whole}: "
        self.tried, self.count, self.reasons = 0, 0, []  # reasons: the first few

    @contextlib.contextmanager
    def catching(self, place=None):
        """Around the reading of one: its ValueError or OSError ends the block, and is counted.

        place: what the reason begins with, where the error does not name the place itself.
        """
        self.tried += 1
        try:
            yield
        except (ValueError, OSError) as error:
            known = isinstance(error, OSError) and error.filename and error.strerror
            text = f"{error.filename}: {error.strerror}" if known else one_line(error, 400)
            text = f"{place}: {text}" if place else text
            if self.strict and not (place or self.start):
                raise
            if self.strict:
                raise FileError(f"{self.start}{text}") from error
            self.count += 1
            if self.count <= _SHOWN:
                self.reasons.append(text)

    def done(self):
        """Log what was skipped. Raises FileError if nothing was left."""
        if self.count and self.count == self.tried:
            others = f" (none of the {self.count:,} {self.what} can be used)" if self.count > 1 else ""
            raise FileError(f"{self.start}{self.reasons[0]}{others}")
        if self.count:
            counted = f"{self.start}{self.count:,} of {self.tried:,} {self.what} skipped:"
            more = [f"and {self.count - _SHOWN:,} more"] if self.count > _SHOWN else []
            _log.warning("%s", "\n  ".join([counted, *self.reasons, *more]))
