"""Statistics of the whole training data, for layers that normalize over the batch inside the time loop."""

from __future__ import annotations

from typing import Any

from ..backends.batch_statistics import MOMENTUM
from ..module import Module
from .layer import Recurrent


def set_population_statistics(model: Module, *inputs: Any, **options: Any) -> None:
    """Make the running statistics of all layers with ``batch_norm`` those of one large batch.

    So Cooijmans et al. 2017 measure at test time. The running means that training leaves lag behind the weights, and
    average the variances of batches, which says something else where a timestep is nearly the same in all sequences of
    most batches, such as a blank row at the border of an image.

    Parameters
    ----------
    model : Module
        Stays in its mode; runs in training mode, in ``forward``.
    *inputs, **options
        Of one call of the model: as many sequences as fit into memory.

    Examples
    --------
    >>> layer = gpurnn.RNN(2, 3, batch_norm=True, backend="numpy", seed=1)
    >>> x = np.random.default_rng(0).standard_normal((4, 50, 2)).astype("float32")
    >>> gpurnn.recurrent.set_population_statistics(layer, x)
    >>> bool(np.allclose(layer.eval()(x)[0], layer.train()(x)[0], atol=0.05))
    True
    """
    layers = [module for _, module in model.modules() if isinstance(module, Recurrent) and module.cell.over_batch]
    buffers = [array for layer in layers for array in layer.buffers.values()]
    training = [(module, module.training) for _, module in model.modules()]
    before = [array.copy() for array in buffers]
    try:
        model.train()
        for array in buffers:
            array[...] = 0
        model.forward(*inputs, **options)
        for array in buffers:
            array /= MOMENTUM
    except BaseException:
        for array, values in zip(buffers, before, strict=True):
            array[...] = values
        raise
    finally:
        for module, mode in training:
            module.training = mode
