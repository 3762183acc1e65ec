"""The layers without a time loop, and ``Sequential``, which joins layers.

``y = layer(x)`` is inference and saves nothing. ``y, backward = layer.forward(x)`` and ``dx = backward(doutput)`` are
for training: ``backward`` adds the gradients of the parameters to ``layer.grads``. Whether Dropout and BatchNorm act as
in training depends on ``train()`` and ``eval()`` alone.

``forward`` of Linear, TiedLinear and Embedding saves its input by reference: do not write to the input before
``backward``. The same holds for a Sequential that begins with one of them or with a recurrent layer. The other layers
save nothing that you hold, and no layer saves its output. ``backward`` may be called again: it returns the same result
and adds to the gradients once more. A Sequential with a recurrent layer allows this only after
``forward(x, retain=True)``; every layer here takes ``retain``.
"""

from .dropout import Dropout
from .embedding import Embedding
from .linear import Linear, TiedLinear
from .norm import BatchNorm, LayerNorm
from .pooling import Pooling
from .sequential import Sequential

__all__ = ["BatchNorm", "Dropout", "Embedding", "LayerNorm", "Linear", "Pooling", "Sequential", "TiedLinear"]
