"""CudaStreams: a CUDA stream for each of the stacked layers that overlap."""

import contextlib

from ..streams import Streams


class CudaStreams(Streams):
    """A CUDA stream for each layer. They start after the current stream's work so far, which then waits for them.

    CuPy returns memory to the stream that allocated it, without knowing which others still read it. So hold what one
    stream writes for another until all are done.
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
