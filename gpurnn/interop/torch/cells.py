"""RNNCell, LSTMCell and GRUCell as modules of torch: one timestep."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ...errors import ShapeError
from ..configuration import nested_state
from .layer import Layer

_NO_STACK = ("num_layers", "dropout", "bidirectional", "reverse", "wavefront", "residual", "reset_to", "masked_output")


class SingleStep(Layer):
    """What the three cells share: one timestep, arrays (B, I) and (B, H), parameters without a layer's number."""

    _suffix = "_l0"

    def __init__(self, kind: str, arguments: dict[str, Any], device: Any, dtype: torch.dtype | None) -> None:
        for name in _NO_STACK:
            if name in arguments:
                raise TypeError(f"{type(self).__name__}() takes no argument {name!r}: {kind} has it")
        super().__init__(kind, arguments | {"reset_to": "initial"}, device, dtype)

    def forward(self, input: Tensor, hx: Any = None, *, reset: Tensor | None = None, mask: Tensor | None = None) -> Any:
        """The new state, as torch.nn's cells return it.

        Parameters
        ----------
        input : Tensor
            (B, I) or (I,), of the dtype of the parameters.
        hx : Tensor or pair of Tensor, optional
            (B, H) or (H,), the LSTM's a pair (h (B, P), c (B, H)); None: the learned initial state, or zeros.
        reset, mask : Tensor of bool, optional
            (B,): as ``gpurnn.LSTMCell`` takes them.

        Returns
        -------
        Tensor or pair of Tensor
            As ``hx``.

        Raises
        ------
        ShapeError, DtypeError
            For an input that does not fit.
        """
        if input.dim() not in (1, 2) or input.shape[-1] != self.input_size:
            raise ShapeError(
                f"input: expected (B, {self.input_size}) or ({self.input_size},), got shape {tuple(input.shape)}"
            )
        state = self._parts_of(hx, input.dim())
        single = input.dim() == 1
        lift = (None, None) if single else (None,)
        marks = [one if one is None else one.reshape(1, -1) for one in (reset, mask)]
        final = self._run(input[lift], [part[lift] for part in state], [None, *marks])[1]
        return nested_state(self._state, [part[0, 0] if single else part[0] for part in final])


class RNNCell(SingleStep):
    """``torch.nn.RNNCell``.

    Parameters
    ----------
    input_size, hidden_size, bias, nonlinearity, device, dtype :
        As ``torch.nn.RNNCell``.
    **options
        As ``gpurnn.RNN``, by name, for what one timestep has.

    Examples
    --------
    >>> import torch, gpurnn.interop.torch as gt
    >>> gt.RNNCell(8, 16)(torch.zeros(3, 8)).shape
    torch.Size([3, 16])
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        nonlinearity: str | Callable[..., Any] = "tanh",
        device: Any = None,
        dtype: torch.dtype | None = None,
        **options: Any,
    ) -> None:
        given = {"input_size": input_size, "hidden_size": hidden_size, "bias": bias, "nonlinearity": nonlinearity}
        super().__init__("RNN", given | options, device, dtype)


class LSTMCell(SingleStep):
    """``torch.nn.LSTMCell``.

    Parameters
    ----------
    input_size, hidden_size, bias, device, dtype :
        As ``torch.nn.LSTMCell``.
    **options
        As ``gpurnn.LSTM``, by name, for what one timestep has.

    Examples
    --------
    >>> import torch, gpurnn.interop.torch as gt
    >>> h, c = gt.LSTMCell(8, 16)(torch.zeros(3, 8))
    >>> h.shape, c.shape
    (torch.Size([3, 16]), torch.Size([3, 16]))
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
        **options: Any,
    ) -> None:
        given = {"input_size": input_size, "hidden_size": hidden_size, "bias": bias}
        super().__init__("LSTM", given | options, device, dtype)


class GRUCell(SingleStep):
    """``torch.nn.GRUCell``.

    Parameters
    ----------
    input_size, hidden_size, bias, device, dtype :
        As ``torch.nn.GRUCell``.
    **options
        As ``gpurnn.GRU``, by name, for what one timestep has.

    Examples
    --------
    >>> import torch, gpurnn.interop.torch as gt
    >>> gt.GRUCell(8, 16)(torch.zeros(3, 8)).shape
    torch.Size([3, 16])
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
        **options: Any,
    ) -> None:
        given = {"input_size": input_size, "hidden_size": hidden_size, "bias": bias}
        super().__init__("GRU", given | options, device, dtype)
