"""The model of ``gpurnn train translate`` written with torch, and trained alike: what the comparison is with.

>>> python -m bench.translation train.tsv test.tsv --valid-file valid.tsv --seed 1

Same batches, sizes, initial distributions, losses, optimiser, schedule and number of epochs. Parameters have gpurnn's
names, so the weights of the best epoch load into gpurnn's model, and both are decoded by the same code. Random draws
(initial weights, dropout) are torch's own.
"""

import torch
from torch import nn

CELLS = {"lstm": nn.LSTM, "gru": nn.GRU, "rnn": nn.RNN}


class TorchAttention(nn.Module):
    """``gpurnn.Attention`` in torch's operations."""

    def __init__(self, query_size, memory_size, score):
        super().__init__()
        H, E = query_size, memory_size
        shapes = {
            "dot": {},
            "general": {"weight": (H, E)},
            "additive": {"weight_query": (H, H), "weight_memory": (H, E), "weight_score": (H,)},
        }
        self.score = score
        for name, shape in shapes[score].items():
            bound = shape[-1] ** -0.5
            self.register_parameter(name, nn.Parameter(torch.empty(shape).uniform_(-bound, bound)))

    def forward(self, queries, memory, valid):
        """queries (U, B, H), memory (T, B, E), valid (T, B) -> context (U, B, E)."""
        q, m = queries.transpose(0, 1), memory.transpose(0, 1)
        if self.score == "dot":
            scores = q @ m.transpose(1, 2)
        elif self.score == "general":
            scores = q @ (m @ self.weight.T).transpose(1, 2)
        else:
            keys = m @ self.weight_memory.T
            scores = torch.tanh((q @ self.weight_query.T)[:, :, None] + keys[:, None]) @ self.weight_score
        scores = scores.masked_fill(~valid.T[:, None], -torch.inf)
        return (torch.softmax(scores, dim=2) @ m).transpose(0, 1)


class Twin(nn.Module):
    """``gpurnn.seq2seq.EncoderDecoder`` in torch's layers; arguments and names of parameters are its."""

    def __init__(
        self, source_size, target_size, hidden, *, embedding=None, layers=1, cell="lstm", score="general", dropout=0.0,
        tied=False,
    ):  # fmt: skip
        super().__init__()
        H, L, E = hidden, layers, embedding or hidden
        self.kinds = ("h", "c") if cell == "lstm" else ("h",)
        self.source_embedding, self.target_embedding = nn.Embedding(source_size, E), nn.Embedding(target_size, E)
        between = dropout if L > 1 else 0.0
        self.encoder = CELLS[cell](E, H // 2, L, bidirectional=True, dropout=between)
        for kind in self.kinds:
            setattr(self, f"bridge_{kind}", nn.Linear(L * H, L * H))
        self.decoder = CELLS[cell](E, H, L, dropout=between)
        self.attention = TorchAttention(H, H, score)
        self.combine = nn.Linear(2 * H, E if tied else H, bias=False)
        self.output = nn.Linear(E if tied else H, target_size)
        self.dropout = nn.Dropout(dropout)
        with torch.no_grad():
            for layer in (self.source_embedding, self.target_embedding):
                layer.weight.uniform_(-0.1, 0.1)
            for name, parameter in [*self.encoder.named_parameters(), *self.decoder.named_parameters()]:
                if cell == "lstm" and name.startswith("bias"):  # gates i f g o
                    n = len(parameter) // 4
                    parameter[n : 2 * n] = 1.0 if name.startswith("bias_ih") else 0.0
            if tied:
                self.output.weight = self.target_embedding.weight
                self.output.bias.zero_()

    def forward(self, source, target, source_lengths):
        """source (T, B), target (U, B), lengths (B,) on the host, each at least 1 -> logits (U, B, V)."""
        T, B = source.shape
        x = self.dropout(self.source_embedding(source))
        packed = nn.utils.rnn.pack_padded_sequence(x, source_lengths, enforce_sorted=False)
        packed, final = self.encoder(packed)
        memory, _ = nn.utils.rnn.pad_packed_sequence(packed, total_length=T)
        state = []
        for kind, part in zip(self.kinds, final if len(self.kinds) == 2 else (final,), strict=True):
            y = torch.tanh(getattr(self, f"bridge_{kind}")(part.transpose(0, 1).reshape(B, -1)))
            state.append(y.reshape(B, self.decoder.num_layers, -1).transpose(0, 1).contiguous())
        state = tuple(state) if len(state) == 2 else state[0]
        h, _ = self.decoder(self.dropout(self.target_embedding(target)), state)
        valid = torch.arange(T)[:, None] < source_lengths
        y = torch.tanh(self.combine(torch.cat([self.attention(h, memory, valid), h], dim=2)))
        return self.output(self.dropout(y))

    def weights(self):
        """The parameters as NumPy arrays under gpurnn's names."""
        shared = self.output.weight is self.target_embedding.weight
        return {
            name: value.numpy() for name, value in self.state_dict().items() if not (shared and name == "output.weight")
        }
