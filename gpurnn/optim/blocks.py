"""Flat buffers in blocks, and the check of the model that owns them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from ..module import Module, refuse_quantized

# Elements worked on at once. An update passes about ten times over its arrays. On a CPU a block stays in the cache
# between the passes; on a GPU a block is large enough to hide the launches, and it bounds the scratch memory.
CPU_BLOCK = 1 << 14
GPU_BLOCK = 1 << 22


def block_size(xp: Any, size: int) -> int:
    """The elements of one block of a buffer of ``size`` elements."""
    return max(1, min(size, CPU_BLOCK if xp is np else GPU_BLOCK))


def blocks(size: int, block: int) -> Iterator[slice]:
    """Slices of at most ``block`` elements that cover ``size`` elements."""
    return (slice(start, start + block) for start in range(0, size, block))


def check_model(model: Module) -> None:
    """Raise TypeError unless ``model`` is a Module, RuntimeError where it is quantized."""
    if not isinstance(model, Module):
        raise TypeError(
            f"model should be a gpurnn layer or model, got {type(model).__name__}; give the model, not its parameters"
        )
    refuse_quantized(model, "an optimizer")
