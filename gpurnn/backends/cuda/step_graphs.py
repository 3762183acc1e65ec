"""The timesteps of a pass that launches for each of them: launch by launch, or as CUDA graphs."""

import numpy as np

from ...errors import BackendError

_RECORDED = 64  # timesteps of a graph: longer sequences launch it again


def run_steps(loop, name, launches_of):
    """Run all timesteps of a pass of a ``Loop``, by graphs where the loop is recorded.

    name: that of the graphs. launches_of: makes what one timestep launches, of the device counter ``done`` or None:
    functions of the timestep, counted from ``done`` on.
    """
    if not loop.B:
        return
    if loop.recorded and name not in loop.graphs:
        loop.graphs[name] = _record(loop, name, launches_of)
    graphs = loop.graphs.get(name)
    if graphs is None:
        _launch_steps(launches_of(None), loop.T)
        return
    try:
        for graph in graphs:
            graph.launch()
    except BaseException:  # also Ctrl-C: the next call must begin at the first timestep
        if loop.steps_done is not None:
            loop.steps_done.fill(0)
        raise


def _record(loop, name, launches_of):
    """The graphs of all timesteps, of which equal ones are shared, or None where recording fails."""
    whole, rest = divmod(loop.T, _RECORDED)
    one = whole + (rest > 0) < 2
    if not one and loop.steps_done is None:
        loop.steps_done = loop.ops.xp.zeros(1, np.int32)
        _done(loop, 0)  # load the kernel now: a capture may not
    launches = launches_of(None if one else loop.steps_done)

    def steps(count):
        _launch_steps(launches, count)
        if not one:
            _done(loop, count)

    try:
        graphs = [loop.ops.device.record(lambda: steps(_RECORDED))] * whole if whole else []
        graphs += [loop.ops.device.record(lambda: steps(rest))] if rest else []
    except BackendError as error:
        loop.note(name, str(error))
        return None
    loop.note(name, None)
    return graphs


def _done(loop, count):
    """Launch what adds ``count`` to the device counter of timesteps."""
    loop.ops.kernels.launch("step.cu", "step_done", (), (1,), (1,), loop.T, count, loop.steps_done)


def _launch_steps(launches, count):
    for step in range(count):
        for launch in launches:
            launch(step)
