"""Data: batches, and a module for each file format that is read. A task only says what it does with the data."""

from .batches import Batch, BatchSource, SequenceBatches, TextBatches, check_index, order_batches, pad
from .packing import Packed, Places, pack, unpack
from .synthetic import adding_problem, copy_memory

__all__ = [
    "Batch", "BatchSource", "Packed", "Places", "SequenceBatches", "TextBatches", "adding_problem", "check_index",
    "copy_memory", "order_batches", "pack", "pad", "unpack",
]  # fmt: skip
