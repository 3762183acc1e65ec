"""Fonts for the text of pictures: Matplotlib's own, and others that are installed for the characters which it lacks."""

import functools
import logging
import unicodedata

import numpy as np

_log = logging.getLogger("gpurnn")


def families(text):
    """Names of the fonts that together have the characters of a text, Matplotlib's own first; as few as there are.

    Raises ImportError without Matplotlib.
    """
    return _covering(frozenset(text))[0]


def drawable(text):
    """The text with an escape such as ``\\\\u5c71`` for each character that no installed font has; white space as
    spaces, and nothing in place of characters that only say how others are drawn. Raises ImportError without
    Matplotlib."""
    text = "".join(" " if c.isspace() else "" if unicodedata.category(c) == "Cf" else c for c in text)
    missing = _covering(frozenset(text))[1]
    if missing:
        _say_missing()
    return "".join(c.encode("unicode_escape").decode() if c in missing else c for c in text)


@functools.cache  # once in a process
def _say_missing():
    _log.warning("no installed font has some characters of a picture: it shows escapes such as \\u5c71")


@functools.lru_cache(maxsize=256)
def _covering(characters):
    """(names of fonts, characters that none of all fonts has)."""
    from matplotlib.font_manager import FontProperties, findfont, fontManager, get_font

    default = findfont(FontProperties())
    names, missing = [get_font(default).family_name], _missing(characters, default)
    if not missing:
        return names, missing
    plain = [entry for entry in fontManager.ttflist if _is_plain(entry)]
    for entry in sorted(plain, key=lambda entry: ("Sans" not in entry.name, entry.name, entry.fname)):
        lacks = _missing(missing, entry.fname) if entry.name not in names else missing
        if len(lacks) < len(missing):
            names.append(entry.name)
            missing = lacks
        if not missing:
            break
    return names, missing


def _missing(characters, path):
    points = np.array([ord(c) for c in characters])
    return frozenset(np.array(list(characters))[~np.isin(points, _code_points(path))].tolist())


@functools.cache
def _code_points(path):
    """The code points that a font file has outlines for; none for one that cannot be read, or has bitmaps only."""
    from matplotlib.ft2font import FT2Font

    try:
        font = FT2Font(path)
        return np.array(list(font.get_charmap()), np.int64) if font.scalable else np.zeros(0, np.int64)
    except (RuntimeError, OSError, ValueError):
        return np.zeros(0, np.int64)


def _is_plain(entry):
    """Whether a font is upright and of ordinary weight, and shows characters rather than boxes for all of them."""
    return entry.style == "normal" and entry.weight in (400, "normal") and not entry.name.startswith("Last Resort")
