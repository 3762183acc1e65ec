"""What the modules for torch share: parameters, the call of the operator, sequences in torch's forms."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from ...dtypes import DTYPES
from ...errors import DtypeError, ShapeError, check_flag
from ..configuration import configure, evaluating, find, flat_state, initial_values, nested_state, uniform_bound
from .operators import recurrent

_ELSEWHERE = {
    "seed": "Draws come from torch's generator: torch.manual_seed",
    "dtype": "Give one of torch's",
}


class Layer(torch.nn.Module):
    """What all modules here share: parameters of torch's names, the configured layer, and the call of its operator.

    kind: a name in ``interop.configuration.KINDS``. arguments: of that layer. _suffix: what its parameters' names lose.
    """

    _suffix = ""

    def __init__(self, kind: str, arguments: dict[str, Any], device: Any, dtype: torch.dtype | None) -> None:
        super().__init__()
        dtype = torch.get_default_dtype() if dtype is None else dtype
        if str(dtype).removeprefix("torch.") not in DTYPES:
            raise DtypeError(f"dtype should be one of torch.{', torch.'.join(DTYPES)}, got {dtype}")
        for name, why in _ELSEWHERE.items():
            if name in arguments:
                raise TypeError(f"{type(self).__name__}() takes no argument {name!r}. {why}")
        self._kind = kind
        self._configure(arguments)
        for name, value in arguments.items():
            super().__setattr__(name, value)
        found = find(self._texts[1])
        self._names = tuple(name.removesuffix(self._suffix) for name in found.names)
        for name, shape in zip(self._names, found.shapes, strict=True):
            self.register_parameter(name, torch.nn.Parameter(torch.empty(shape, device=device, dtype=dtype)))
        self.reset_parameters()

    def _configure(self, arguments):
        """Set what calls read: for evaluation and training the layer's text and whether it draws. Compiled graphs take
        it from here, as torch cannot look into ``configuration``."""
        alone = arguments.get("num_layers", 1) == 1  # torch accepts a dropout that does nothing
        text = configure(self._kind, arguments | {"dropout": 0.0} if alone else arguments)
        self._arguments, self._state = arguments, find(text).state
        self._texts = evaluating(text), text
        self._draws = tuple(find(text).draws for text in self._texts)

    def __setattr__(self, name: str, value: Any) -> None:
        """Set an attribute. An argument of the constructor, such as ``dropout``, is checked and used from then on."""
        arguments = self.__dict__.get("_arguments", {})
        if name in arguments and arguments[name] != value:
            self._configure(arguments | {name: value})
        super().__setattr__(name, value)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._configure(self._arguments)  # the cell of a pickle may be new to this process

    def reset_parameters(self) -> None:
        """Draw initial values: with ``init="uniform"``, the default, those of torch.nn for the same seed."""
        bound = uniform_bound(self._texts[1])
        weights = [getattr(self, name) for name in self._names]
        if bound is not None:
            for weight in weights:
                torch.nn.init.uniform_(weight, -bound, bound)
            return
        values = initial_values(self._texts[1], int(torch.randint(2**62, ())))
        with torch.no_grad():
            for weight, value in zip(weights, values.values(), strict=True):
                weight.copy_(torch.from_numpy(value.copy()))

    def _run(self, x: Tensor, state: list[Tensor], marks: list[Tensor | None]) -> tuple[Tensor, list[Tensor]]:
        """Output (T, B, D*P) and parts of the final state of x (T, B, I)."""
        if not torch.compiler.is_compiling():
            _refuse_transforms(x)
        weights = [getattr(self, name) for name in self._names]
        x, state = _autocast(x, state)
        _check_tensors(x, weights, state)
        parts = [part for parts in self._state for part in parts]
        for part, tensor in zip(parts, state, strict=False):
            expected = (part.rows, x.shape[1], part.size)
            if tuple(tensor.shape) != expected:
                raise ShapeError(f"hx: expected {part.kind} of shape {expected}, got {tuple(tensor.shape)}")
        key = torch.randint(2**62, (), dtype=torch.int64) if self._draws[self.training] else None
        needed = torch.is_grad_enabled() and any(one.requires_grad for one in (x, *weights, *state))
        output, *final = recurrent(x, weights, state, [*marks, key], self._texts[self.training], needed)
        return output, final[:-1]

    def _parts_of(self, hx: Any, axes: int) -> list[Tensor]:
        """The parts of a state that was given, each with this many axes."""
        parts = [] if hx is None else flat_state(self._state, hx, "hx", "tensor")
        for part in parts:
            if not isinstance(part, Tensor):
                raise TypeError(f"hx: expected a tensor for each state, got {type(part).__name__}")
            if part.dim() != axes:
                raise ShapeError(f"hx: expected {axes} axes, as the input, got shape {tuple(part.shape)}")
        return parts

    def extra_repr(self) -> str:
        """The arguments that differ from the defaults."""
        return find(self._texts[1]).layer._sizes_text()


def _autocast(x, state):
    """Under autocast on a GPU x and state in its dtype, as torch.nn's layers cast them; on a CPU in float32."""
    device = x.device.type
    if not torch.is_autocast_enabled(device):
        return x, state
    dtype = torch.get_autocast_dtype(device) if device == "cuda" else torch.float32
    return x.to(dtype), [part.to(dtype) for part in state]


def _refuse_transforms(x):
    """Raise RuntimeError inside what would not reach the time loop: torch.func's transforms and forward mode."""
    if torch._C._are_functorch_transforms_active():
        raise RuntimeError(
            "torch.func (vmap, grad, jvp, ...) cannot transform this layer. For gradients use torch.autograd.grad; for "
            "those of each sequence a layer of gpurnn and gpurnn.per_sample_gradients, for products with second "
            "derivatives gpurnn.hvp, for derivatives along a direction gpurnn.jvp"
        )
    if forward_ad._current_level >= 0:
        raise RuntimeError(
            "forward-mode differentiation of torch does not reach this layer: for derivatives along a direction take a "
            "layer of gpurnn and gpurnn.jvp"
        )


def _check_tensors(x, weights, state):
    """Raise unless parameters and state are on the device of x and of its dtype."""
    for name, tensor in (("the parameters", weights[0]), *(("hx", part) for part in state)):
        if tensor.device != x.device:
            raise ValueError(f"input: is on {x.device}, and {name} on {tensor.device}. Move them with .to()")
    wanted = weights[0].dtype
    if x.dtype != wanted and not (wanted == torch.float32 and x.dtype in (torch.float16, torch.bfloat16)):
        raise DtypeError(f"input: expected dtype {wanted}, that of the parameters, got {x.dtype}")
    for part in state:
        if part.dtype != x.dtype:
            raise DtypeError(f"hx: expected dtype {x.dtype}, that of the input, got {part.dtype}")


class Stack(Layer):
    """What RNN, LSTM, GRU and Recurrent share: sequences in torch's forms."""

    def __init__(
        self, kind: str, arguments: dict[str, Any], batch_first: bool, device: Any, dtype: torch.dtype | None
    ) -> None:
        if arguments["dropout"] and arguments["num_layers"] == 1:
            rate = arguments["dropout"]
            warnings.warn(f"dropout={rate} acts between layers: with num_layers=1 it does nothing", stacklevel=3)
        super().__init__(kind, arguments, device, dtype)
        self.batch_first = check_flag("batch_first", batch_first)
        self.mode = f"RNN_{self.nonlinearity}".upper() if kind == "RNN" else kind.upper()  # as torch.nn's

    def forward(
        self,
        input: Tensor | PackedSequence,
        hx: Any = None,
        *,
        lengths: Tensor | Sequence[int] | int | None = None,
        reset: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> tuple[Any, Any]:
        """Output and final state, as torch.nn's layers return them.

        Parameters
        ----------
        input : Tensor or PackedSequence
            (T, B, I), or (B, T, I) with ``batch_first``, or (T, I); of the dtype of the parameters.
        hx : Tensor or tuple of Tensor, optional
            Initial state: (L*D, B, P), the LSTM's a pair (h (L*D, B, P), c (L*D, B, H)); without the B axis for one
            sequence. None: the learned initial state, or zeros.
        lengths : Tensor or sequence of int, optional
            (B,), each 0..T in any order; not with a PackedSequence, which has its own.
        reset, mask : Tensor of bool, optional
            (T, B), or as the axes of input: see ``gpurnn.LSTM``.

        Returns
        -------
        output : Tensor or PackedSequence
            (T, B, D*P), as the axes of input; zero past the end of a sequence.
        state : Tensor or tuple of Tensor
            As ``hx``.

        Raises
        ------
        ShapeError, DtypeError
            For an input that does not fit.
        """
        if isinstance(input, PackedSequence):
            if not (lengths is None and reset is None and mask is None):
                raise ValueError("lengths, reset and mask: a PackedSequence has lengths; pad the batch for these")
            return self._forward_packed(input, hx)
        if input.dim() not in (2, 3):
            raise ShapeError(f"input: expected 2 axes (one sequence) or 3 (a batch), got shape {tuple(input.shape)}")
        self._check_features(input)
        single = input.dim() == 2
        x = input.unsqueeze(1) if single else input.transpose(0, 1) if self.batch_first else input
        marks = [one if one is None or single or not self.batch_first else one.transpose(0, 1) for one in (reset, mask)]
        marks = [one if one is None or not single else one.unsqueeze(1) for one in marks]
        state = self._parts_of(hx, input.dim())
        state = [part.unsqueeze(1) for part in state] if single else state
        output, final = self._run(x, state, [_as_lengths(lengths, single), *marks])
        if single:
            return output.squeeze(1), nested_state(self._state, [part.squeeze(1) for part in final])
        return output.transpose(0, 1) if self.batch_first else output, nested_state(self._state, final)

    def _forward_packed(self, packed, hx):
        data, batch_sizes, order, back = packed
        self._check_features(data)
        x, lengths = pad_packed_sequence(PackedSequence(data, batch_sizes))
        state = self._parts_of(hx, 3)
        if order is not None:
            state = [part.index_select(1, order) for part in state]
        output, final = self._run(x, state, [lengths, None, None])
        if back is not None:
            final = [part.index_select(1, back) for part in final]
        output = pack_padded_sequence(output, lengths)
        return PackedSequence(output.data, batch_sizes, order, back), nested_state(self._state, final)

    def _check_features(self, x):
        if x.shape[-1] != self.input_size:
            raise ShapeError(f"input: expected input_size = {self.input_size} features, got shape {tuple(x.shape)}")

    def flatten_parameters(self) -> None:
        """Do nothing: there is nothing to gain here. It is what torch.nn's layers have for cuDNN."""

    @property
    def all_weights(self) -> list[list[torch.nn.Parameter]]:
        """For each layer and direction its parameters."""
        each = len(self._names) // (self.num_layers * (2 if self.bidirectional else 1))
        weights = [getattr(self, name) for name in self._names]
        return [weights[first : first + each] for first in range(0, len(weights), each)]


def _as_lengths(lengths, single):
    if lengths is None or isinstance(lengths, Tensor):
        return lengths if lengths is None or lengths.dim() else lengths.unsqueeze(0)
    return torch.tensor([lengths] if single and isinstance(lengths, int) else lengths, dtype=torch.int64)
