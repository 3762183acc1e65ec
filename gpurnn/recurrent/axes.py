"""From the caller's axes to (T, B, F), and back."""

from ..arrays import refuse_loss
from ..errors import ShapeError, check_shape


def check_input(layer, x):
    """``x`` as (T, B, I), and whether it came as a single sequence (T, I)."""
    x = layer.ops.asfloat(x, layer.dtype, "x")
    if x.ndim not in (2, 3):
        raise ShapeError(f"x: expected 2-D (one sequence) or 3-D (a batch), got {x.ndim}-D {x.shape}")
    if x.shape[-1] != layer.input_size:
        raise ShapeError(f"x: last axis must be equal to input_size. Expected {layer.input_size}, got {x.shape[-1]}")
    single = x.ndim == 2
    if single:
        x = x[:, None, :]
    elif layer.batch_first:
        x = x.transpose(1, 0, 2)
    return x, single


def check_doutput(layer, doutput, shape, single):
    """The gradient with respect to the output as (T, B, D*P) = ``shape``."""
    refuse_loss("doutput", doutput, shape)
    doutput = layer.ops.asfloat(doutput, layer.dtype, "doutput")
    T, B, F = shape
    if single:
        check_shape("doutput", doutput, (T, F))
        return doutput[:, None, :]
    if layer.batch_first:
        check_shape("doutput", doutput, (B, T, F))
        return doutput.transpose(1, 0, 2)
    if doutput.shape != shape:
        check_shape("doutput", doutput, shape)
    return doutput


def outward(layer, array, single):
    """An array (T, B, F) with the caller's axes."""
    if single:
        return array[:, 0]
    return array.transpose(1, 0, 2) if layer.batch_first else array
