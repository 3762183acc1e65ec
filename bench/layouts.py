"""The layouts of ``bench.packed``: what each does with a batch of sequences in a training step.

``prepare(sequences, gradients)`` is what a batch is before a step. ``step(batch)`` is the timed work: (output, gradient
of the inputs), in its own order. ``parts(batch, array)`` is one array for each sequence of either.
"""

import numpy as np

import gpurnn
from gpurnn.data import pack, pad, unpack


class _Gpurnn:
    def __init__(self, problem, weights, backend="cpu"):
        self.problem = problem
        self.layer = gpurnn.LSTM(problem.H, problem.H, backend=backend)
        self.layer.load_state_dict(weights)

    def begin(self):
        self.layer.zero_grad()

    def grads(self):
        return {name: self.layer.grads[name] for name in ("weight_ih_l0", "weight_hh_l0")}

    def call(self, x, doutput, **marks):
        output, _, backward = self.layer.forward(x, **marks)
        return output, backward(doutput)[0]


class GpurnnPacked(_Gpurnn):
    def prepare(self, sequences, gradients):
        packed = pack(gradients)
        return sequences, packed.rows, packed.where

    def step(self, batch):
        sequences, doutput, _ = batch
        rows, reset, mask, _ = pack(sequences)
        return self.call(rows, doutput, reset=reset, mask=mask)

    def parts(self, batch, array):
        return unpack(array, batch[2])


class GpurnnPadded(_Gpurnn):
    def prepare(self, sequences, gradients):
        return sequences, pad(gradients)

    def step(self, batch):
        sequences, doutput = batch
        return self.call(pad(sequences), doutput, lengths=[len(one) for one in sequences])

    def parts(self, batch, array):
        return [array[: len(one), b] for b, one in enumerate(batch[0])]


class GpurnnResets(_Gpurnn):
    def prepare(self, sequences, gradients):
        reset = as_rows([np.arange(len(one)) == 0 for one in sequences], self.problem.rows)
        return as_rows(sequences, self.problem.rows), as_rows(gradients, self.problem.rows), reset, sequences

    def step(self, batch):
        return self.call(batch[0], batch[1], reset=batch[2])

    def parts(self, batch, array):
        return of_rows(array, batch[3])


class _Torch:
    def __init__(self, problem, weights):
        import torch
        from torch.nn.utils import rnn

        torch.set_num_threads(1)
        self.torch, self.rnn, self.problem = torch, rnn, problem
        self.layer = torch.nn.LSTM(problem.H, problem.H)
        self.layer.load_state_dict({name: torch.from_numpy(value) for name, value in weights.items()})

    def begin(self):
        self.layer.zero_grad()

    def grads(self):
        return {name: getattr(self.layer, name).grad.numpy() for name in ("weight_ih_l0", "weight_hh_l0")}

    def tensors(self, sequences):
        return [self.torch.from_numpy(one) for one in sequences]


class TorchPacked(_Torch):
    """The outputs stay packed, which is the best for torch."""

    def prepare(self, sequences, gradients):
        sequences, gradients = self.tensors(sequences), self.tensors(gradients)
        return sequences, self.rnn.pack_sequence(gradients, enforce_sorted=False)

    def step(self, batch):
        sequences, doutput = batch
        x = self.rnn.pad_sequence(sequences).requires_grad_()
        lengths = [len(one) for one in sequences]
        output = self.layer(self.rnn.pack_padded_sequence(x, lengths, enforce_sorted=False))[0]
        output.data.backward(doutput.data)
        return output, x.grad

    def parts(self, batch, array):
        if isinstance(array, self.rnn.PackedSequence):
            array, _ = self.rnn.pad_packed_sequence(array)
        return [array[: len(one), b].detach().numpy() for b, one in enumerate(batch[0])]


class TorchPadded(_Torch):
    """Without packing: what stands past the end of a sequence is computed, too."""

    def prepare(self, sequences, gradients):
        return self.tensors(sequences), self.rnn.pad_sequence(self.tensors(gradients))

    def step(self, batch):
        sequences, doutput = batch
        x = self.rnn.pad_sequence(sequences).requires_grad_()
        output = self.layer(x)[0]
        output.backward(doutput)
        return output, x.grad

    parts = TorchPacked.parts


class TorchSplit(_Torch):
    """Rows are split at their resets, the parts padded and packed, and the outputs put back into rows.

    The parts are padded by one assignment. With ``torch.split`` and ``pad_sequence`` the backward pass would write all
    of the padded array once for each part.
    """

    def prepare(self, sequences, gradients):
        rows = self.problem.rows
        reset = as_rows([np.arange(len(one)) == 0 for one in sequences], rows)
        return *self.tensors([as_rows(sequences, rows), as_rows(gradients, rows), reset]), sequences

    def step(self, batch):
        x, doutput, reset, _ = batch
        x = x.detach().requires_grad_()
        output = self.outputs(x, reset)
        output.backward(doutput)
        return output, x.grad

    def outputs(self, x, reset):
        torch, (T, B, H) = self.torch, x.shape
        starts = reset.t().flatten().nonzero().flatten()
        lengths = torch.diff(starts, append=torch.tensor([T * B]))
        there = torch.arange(lengths.max()) < lengths[:, None]
        padded = x.new_zeros(*there.shape, H)
        padded[there] = x.transpose(0, 1).reshape(T * B, H)
        return self.of_parts(padded, lengths)[there].reshape(B, T, H).transpose(0, 1)

    def of_parts(self, padded, lengths):
        packed = self.rnn.pack_padded_sequence(padded, lengths, batch_first=True, enforce_sorted=False)
        return self.rnn.pad_packed_sequence(self.layer(packed)[0], batch_first=True)[0]

    def parts(self, batch, array):
        return of_rows(array.detach().numpy(), batch[3])


class TorchSplitPadded(TorchSplit):
    """The same without packing."""

    def of_parts(self, padded, lengths):
        return self.layer(padded.transpose(0, 1))[0].transpose(0, 1)


class TorchCell(TorchSplit):
    """A loop over the timesteps in Python: ``LSTMCell``, whose state is multiplied by zero at a reset."""

    def __init__(self, problem, weights):
        super().__init__(problem, weights)
        self.cell = self.torch.nn.LSTMCell(problem.H, problem.H)
        for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"):  # the layer's own, with their gradients
            setattr(self.cell, name, getattr(self.layer, f"{name}_l0"))

    def outputs(self, x, reset):
        h = c = x.new_zeros(x.shape[1], self.problem.H)
        outputs, stays = [], (~reset).to(x.dtype)[..., None]
        for one, stay in zip(x, stays, strict=True):
            h, c = self.cell(one, (h * stay, c * stay))
            outputs.append(h)
        return self.torch.stack(outputs)


def as_rows(sequences, rows):
    """(T, rows, ...) of sequences that stand one behind another, row by row."""
    flat = np.concatenate(sequences)
    return np.ascontiguousarray(flat.reshape(rows, -1, *flat.shape[1:]).swapaxes(0, 1))


def of_rows(array, sequences):
    """The part of each sequence in such rows."""
    flat = array.swapaxes(0, 1).reshape(-1, *array.shape[2:])
    return np.split(flat, np.cumsum([len(one) for one in sequences])[:-1])


# Name -> (class, whether its batches are of similar length)
LAYOUTS = {
    "gpurnn packed": (GpurnnPacked, False),
    "gpurnn padded": (GpurnnPadded, False),
    "gpurnn bucketed": (GpurnnPadded, True),
    "torch packed": (TorchPacked, False),
    "torch padded": (TorchPadded, False),
    "torch bucketed, packed": (TorchPacked, True),
}
RESET_LAYOUTS = {
    "gpurnn resets": (GpurnnResets, False),
    "torch split, packed": (TorchSplit, False),
    "torch split, padded": (TorchSplitPadded, False),
    "torch cell in a loop": (TorchCell, False),
}


def layouts_of(problem):
    return RESET_LAYOUTS if problem.rows else LAYOUTS
