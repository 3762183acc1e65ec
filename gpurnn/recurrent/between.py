"""What lies between the layers of a stack: residual sums and dropout."""

from .dropout import drop


def to_next(layer, k, y, below, silent, mask):
    """What layer ``k`` hands on of its output ``y``.

    below: its input. silent: a function that sets an array to zero in place where the output is zero, and returns it.
    mask: of the dropout, or None.
    """
    if layer.residual and k and below.shape == y.shape:
        y = y + below
        y = silent(y) if k == layer.num_layers - 1 else y
    return y if mask is None else drop(layer, y, mask)


def with_residual(layer, k, dx, dy, silent):
    """The gradient with respect to the input of layer ``k``: that of its time loop, and that of its output where the
    input was added. dy: None for zeros. silent: as in ``to_next``."""
    if not layer.residual or not k or dy is None or dy.shape != dx.shape:
        return dx
    return dx + (dy if k < layer.num_layers - 1 else silent(dy.copy()))
