"""Exchange: what thread blocks need to wait for one another: words for numbers, and a flag that somebody gave up."""

import threading

import numpy as np

from ...errors import BackendError


class Exchange:
    """The memory through which the blocks of schedule ``grid`` send numbers, on one stream. Those of ``cluster`` need
    only ``watched``.

    kernels/schedules/exchange.cuh describes it. Everything that differs between two launches lies in device memory, so
    that a CUDA graph may hold a launch. Hold ``lock`` from ``take`` or ``empty`` until ``done``.
    """

    patience = 1 << 22  # poll limit. A poll of L2 takes half a microsecond or more: some seconds in all

    def __init__(self, device, kernels):
        self.device, self.kernels = device, kernels
        self.xp, self.lock = device.xp, threading.Lock()
        # each memory has epochs of its own: a graph may still use an older one
        self.words, self.epoch = self.xp.zeros(0, np.uint64), self.xp.zeros(1, np.uint32)
        self.ring = self.xp.zeros(0, np.uint32)
        self.failed = self.xp.zeros(1, np.int32)
        self.seen, self._refresh = device.mirror(self.failed)

    def take(self, numbers):
        """The last arguments of a kernel that needs this many words with epochs."""
        if self.words.size < numbers:
            self._check_room("words")
            self.words, self.epoch = self.xp.zeros(numbers, np.uint64), self.xp.zeros(1, np.uint32)
        return self.epoch, self.patience, self.words, self.failed

    def empty(self, numbers):
        """The last arguments of a kernel that needs this many empty words."""
        if self.ring.size < numbers:
            self._check_room("ring")
            self.ring = self.xp.zeros(numbers, np.uint32)
        self.ring[:numbers] = 0xFFFFFFFF
        return self.patience, self.ring, self.failed

    def watched(self):
        """The last arguments of a kernel that needs no words."""
        return self.patience, self.failed

    def _check_room(self, what):
        """Raise BackendError under capture: the memory must outlive the graph, and be zero before it runs."""
        if self.device.is_capturing():
            raise BackendError(f"the {what} of schedule 'grid' are too few: run a call of this shape first")

    def done(self, epochs):
        """To be called behind the launch. epochs: how many it has used, None where it used empty words."""
        if epochs is not None:
            self.kernels.launch(
                "epochs.cu", "epochs_done", (), (1,), (256,), epochs, self.words.size, self.epoch, self.words
            )
        if not self.device.is_capturing():  # nothing may be copied to the host then: whoever runs the graph asks later
            self.refresh()

    def refresh(self):
        """Have ``timed_out`` know of everything that was launched before."""
        self._refresh()

    def timed_out(self):
        """Whether a finished kernel has given up. One that still runs is not counted."""
        return bool(self.seen[0])
