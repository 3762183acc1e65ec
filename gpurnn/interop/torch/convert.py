"""Models of torch.nn that run gpurnn's time loops: their recurrent layers replaced, weights and all."""

from __future__ import annotations

from typing import TypeVar

import torch

from .cells import GRUCell, LSTMCell, RNNCell
from .kinds import GRU, LSTM, RNN

M = TypeVar("M", bound=torch.nn.Module)

_TWINS = {  # exact classes: what a subclass computes is its own affair
    torch.nn.RNN: RNN, torch.nn.LSTM: LSTM, torch.nn.GRU: GRU,
    torch.nn.RNNCell: RNNCell, torch.nn.LSTMCell: LSTMCell, torch.nn.GRUCell: GRUCell,
}  # fmt: skip
_ARGUMENTS = (
    "input_size", "hidden_size", "num_layers", "nonlinearity", "bias", "batch_first", "dropout", "bidirectional",
    "proj_size",
)  # fmt: skip


def convert(model: M) -> M:
    """Replace every ``nn.RNN``, ``nn.LSTM``, ``nn.GRU`` and their cells in a model, in place.

    The new layers have the very parameters of the old ones, so that an optimizer of the model stays right. They also
    have their hooks and their mode. Layers of derived classes and layers whose parameters are computed from others
    (weight norm, parametrizations) stay as they are.

    Parameters
    ----------
    model : torch.nn.Module
        If it is such a layer itself, it stays as it is, and the new layer is returned.

    Returns
    -------
    torch.nn.Module
        The model.

    Raises
    ------
    TypeError
        For what is no module.

    Examples
    --------
    >>> import torch, gpurnn.interop.torch as gt
    >>> model = torch.nn.ModuleDict({"rnn": torch.nn.LSTM(8, 16), "head": torch.nn.Linear(16, 2)})
    >>> type(gt.convert(model)["rnn"]).__module__
    'gpurnn.interop.torch.kinds'
    """
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    if _is_plain(model):
        return _twin(model)
    twins = {}  # a layer in two places stays one
    for module in list(model.modules()):
        for name, child in module._modules.items():
            if child is not None and _is_plain(child):
                if child not in twins:
                    twins[child] = _twin(child)
                module._modules[name] = twins[child]
                if vars(module).get(name) is child:
                    vars(module)[name] = twins[child]
    return model


def _is_plain(module):
    """Whether it is one of torch's own layers, with parameters that are its own."""
    twin = type(module) in _TWINS
    return twin and not any(name.endswith(("_g", "_v", "_orig")) for name in module._parameters)


def _twin(old):
    arguments = {name: getattr(old, name) for name in _ARGUMENTS if hasattr(old, name)}
    if isinstance(old, (torch.nn.LSTM, torch.nn.GRU, torch.nn.LSTMCell, torch.nn.GRUCell)):
        arguments.pop("nonlinearity", None)
    if not arguments.get("proj_size"):
        arguments.pop("proj_size", None)
    first = next(old.parameters())
    new = _TWINS[type(old)](**arguments, device="meta", dtype=first.dtype)
    for name in new._names:
        new._parameters[name] = old._parameters[name]
    for name, value in vars(old).items():
        if "hook" in name:
            vars(new)[name] = value
    return new.train(old.training)
