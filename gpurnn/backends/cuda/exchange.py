"""Exchange: what thread blocks need to wait for one another: words for numbers, and a flag that somebody gave up."""

import threading

import numpy as np


class Exchange:
    """The memory through which the blocks of schedule ``grid`` send numbers, on one stream. Those of ``cluster`` need
    only ``watched``.

    kernels/schedules/exchange.cuh describes it. Hold ``lock`` from ``take`` or ``empty`` until the kernel is
    launched.
    """

    patience = 1 << 22  # poll limit. A poll of L2 takes half a microsecond or more: some seconds in all

    def __init__(self, device):
        self.xp, self.lock = device.xp, threading.Lock()
        self.words, self.epoch = self.xp.zeros(0, np.uint64), 0
        self.ring = self.xp.zeros(0, np.uint32)
        self.failed = self.xp.zeros(1, np.int32)
        self.seen, self.refresh = device.mirror(self.failed)

    def take(self, numbers, epochs):
        """The last arguments of a kernel that needs this many words and epochs."""
        if self.words.size < numbers or self.epoch + epochs >= 1 << 32:
            self.words, self.epoch = self.xp.zeros(max(numbers, self.words.size), np.uint64), 0
        epoch, self.epoch = self.epoch, self.epoch + epochs
        return epoch, self.patience, self.words, self.failed

    def empty(self, numbers):
        """The last arguments of a kernel that needs this many empty words."""
        if self.ring.size < numbers:
            self.ring = self.xp.zeros(numbers, np.uint32)
        self.ring[:numbers] = 0xFFFFFFFF
        return self.patience, self.ring, self.failed

    def watched(self):
        """The last arguments of a kernel that needs no words."""
        return self.patience, self.failed

    def timed_out(self):
        """Whether a finished kernel has given up. One that still runs is not counted."""
        return bool(self.seen[0])
