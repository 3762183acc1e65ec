"""RNN, LSTM, GRU and Recurrent as modules of torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from ...cells import Cell
from .layer import Stack


class RNN(Stack):
    """``torch.nn.RNN`` with gpurnn's time loop, and every option of ``gpurnn.RNN``.

    Parameters
    ----------
    input_size, hidden_size, num_layers, nonlinearity, bias, batch_first, dropout, bidirectional, device, dtype :
        As ``torch.nn.RNN``. Initial values are those of torch for the same seed.
    **options
        As ``gpurnn.RNN``, by name: ``layer_norm``, ``zoneout``, ``heads``, ``backend``, ...

    Raises
    ------
    TypeError, ValueError
        As ``gpurnn.RNN``; for ``batch_norm``, which has no form here yet.

    Examples
    --------
    >>> import torch, gpurnn.interop.torch as gt
    >>> output, h = gt.RNN(8, 16)(torch.zeros(5, 3, 8))
    >>> output.shape, h.shape
    (torch.Size([5, 3, 16]), torch.Size([1, 3, 16]))
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int | Sequence[int],
        num_layers: int = 1,
        nonlinearity: str | Callable[..., Any] = "tanh",
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
        **options: Any,
    ) -> None:
        given = {"nonlinearity": nonlinearity, "bias": bias, "dropout": dropout, "bidirectional": bidirectional}
        sizes = {"input_size": input_size, "hidden_size": hidden_size, "num_layers": num_layers}
        super().__init__("RNN", sizes | given | options, batch_first, device, dtype)


class LSTM(Stack):
    """``torch.nn.LSTM`` with gpurnn's time loop, and every option of ``gpurnn.LSTM``.

    Parameters
    ----------
    input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional, proj_size, device, dtype :
        As ``torch.nn.LSTM``. Initial values are those of torch for the same seed.
    **options
        As ``gpurnn.LSTM``, by name: ``layer_norm``, ``peephole``, ``heads``, ``backend``, ...

    Raises
    ------
    TypeError, ValueError
        As ``gpurnn.LSTM``; for ``batch_norm``, which has no form here yet.

    Examples
    --------
    >>> import torch, gpurnn.interop.torch as gt
    >>> lstm = gt.LSTM(8, 16, num_layers=2, bidirectional=True, batch_first=True)
    >>> output, (h, c) = lstm(torch.zeros(3, 5, 8), lengths=[5, 0, 2])
    >>> output.sum().backward()
    >>> output.shape, h.shape, lstm.weight_ih_l0.grad.shape
    (torch.Size([3, 5, 32]), torch.Size([4, 3, 16]), torch.Size([64, 8]))
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int | Sequence[int],
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        proj_size: int = 0,
        device: Any = None,
        dtype: torch.dtype | None = None,
        **options: Any,
    ) -> None:
        given = {"bias": bias, "dropout": dropout, "bidirectional": bidirectional, "proj_size": proj_size}
        sizes = {"input_size": input_size, "hidden_size": hidden_size, "num_layers": num_layers}
        super().__init__("LSTM", sizes | given | options, batch_first, device, dtype)


class GRU(Stack):
    """``torch.nn.GRU`` with gpurnn's time loop, and every option of ``gpurnn.GRU``.

    Parameters
    ----------
    input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional, device, dtype :
        As ``torch.nn.GRU``. Initial values are those of torch for the same seed.
    **options
        As ``gpurnn.GRU``, by name: ``reset_after``, ``layer_norm``, ``heads``, ``backend``, ...

    Raises
    ------
    TypeError, ValueError
        As ``gpurnn.GRU``; for ``batch_norm``, which has no form here yet.

    Examples
    --------
    >>> import torch, gpurnn.interop.torch as gt
    >>> reset = torch.zeros(5, 3, dtype=torch.bool)
    >>> output, h = gt.GRU(8, 16, reset_after=False)(torch.zeros(5, 3, 8), reset=reset)
    >>> output.shape, h.shape
    (torch.Size([5, 3, 16]), torch.Size([1, 3, 16]))
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int | Sequence[int],
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
        **options: Any,
    ) -> None:
        given = {"bias": bias, "dropout": dropout, "bidirectional": bidirectional}
        sizes = {"input_size": input_size, "hidden_size": hidden_size, "num_layers": num_layers}
        super().__init__("GRU", sizes | given | options, batch_first, device, dtype)


class Recurrent(Stack):
    """A stack of any cell: ``gpurnn.Recurrent`` as a module of torch.

    Parameters
    ----------
    cell : TracedCell
        From the decorator ``gpurnn.cell``, or one of ``gpurnn.cells``.
    input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional, proj_size, device, dtype :
        As ``LSTM``.
    **options
        As ``gpurnn.Recurrent``, by name.

    Raises
    ------
    TypeError, ValueError
        As ``gpurnn.Recurrent``.

    Examples
    --------
    >>> import torch, gpurnn.interop.torch as gt
    >>> layer = gt.Recurrent(gpurnn.cells.mingru, 8, 16)
    >>> output, h = layer(torch.zeros(5, 3, 8))
    >>> output.shape
    torch.Size([5, 3, 16])
    """

    def __init__(
        self,
        cell: Cell,
        input_size: int,
        hidden_size: int | Sequence[int],
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        proj_size: int = 0,
        device: Any = None,
        dtype: torch.dtype | None = None,
        **options: Any,
    ) -> None:
        given = {"bias": bias, "dropout": dropout, "bidirectional": bidirectional, "proj_size": proj_size}
        sizes = {"cell": cell, "input_size": input_size, "hidden_size": hidden_size, "num_layers": num_layers}
        super().__init__("Recurrent", sizes | given | options, batch_first, device, dtype)
