"""Rows in blocks, whose temporary arrays stay small."""

import numpy as np


def blocks(rows, count, width, xp):
    """Cut ``count`` rows of ``width`` elements into blocks; yields ``(part, index)``.

    ``part`` is the slice within the rows that count; ``index`` selects the same rows from all of them. On the host a
    block and its temporaries fit in cache. On a GPU blocks are large: few launches, yet bounded memory.
    """
    size = max(1, (1 << 17 if xp is np else 1 << 26) // max(width, 1))
    for start in range(0, count, size):
        part = slice(start, min(start + size, count))
        yield part, part if rows is None else rows[part]
