"""CudaStreams: a CUDA stream for each of the stacked layers that overlap."""

import contextlib

from ..ops import Streams


class CudaStreams(Streams):
    """A stream for each layer. They begin when the current stream has come here, and it goes on when they are done.

    Memory returns to the stream it was taken on, which does not know who else still reads it: what one stream has
    written for another has to be held until the end.
    """

    def __init__(self, device, count):
        super().__init__(count)
        self.device, self.streams = device, device.streams(count)

    def __enter__(self):
        for stream in self.streams:
            self.device.wait(stream, None)
        return self

    def __exit__(self, *error):
        for stream in self.streams:
            self.device.wait(None, stream)

    @contextlib.contextmanager
    def on(self, stream, after=-1):
        if after >= 0:
            self.device.wait(self.streams[stream], self.streams[after])
        with self.streams[stream]:
            yield
