"""The model of ``gpurnn train translate`` written with torch, and trained alike: what the comparison is with.

  gpurnn train translate train.tsv --valid-file valid.tsv --out runs/fra
  gpurnn evaluate runs/fra test.tsv
  python -m bench.translation runs/fra test.tsv --seed 2

The second model takes its settings and files from the run of the first: same batches, sizes, losses, optimiser, rates,
choice of the best epoch, and initial values of the same distributions; only the random draws are torch's own. Its
parameters have gpurnn's names, so that they load into gpurnn's model, and one code decodes both.
"""

import json
import math
import time
from dataclasses import replace
from pathlib import Path

import click
import torch
from torch import nn

from gpurnn.recurrent import LAYERS


class TorchAttention(nn.Module):
    """``gpurnn.Attention`` in torch's operations."""

    def __init__(self, query_size, memory_size, score, scale):
        super().__init__()
        self.scale = scale
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
        return (torch.softmax(scores * self.scale, dim=2) @ m).transpose(0, 1)


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
        layer = getattr(nn, LAYERS[cell].__name__)
        self.encoder = layer(E, H // 2, L, bidirectional=True, dropout=between)
        for kind in self.kinds:
            setattr(self, f"bridge_{kind}", nn.Linear(L * H, L * H))
        self.decoder = layer(E, H, L, dropout=between)
        self.attention = TorchAttention(H, H, score, H**-0.5)
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


def train(twin, settings, data, say=print):
    """Train as ``gpurnn.fit`` does with these ``TranslateSettings`` and ``Data``; the best weights, by the
    accuracy on the validation pairs, are in ``twin`` afterwards. Returns a record for each epoch."""
    adam = torch.optim.Adam(twin.parameters(), lr=settings.lr)
    total, low = settings.epochs * len(data.train), settings.lr / 20
    loss_of = nn.CrossEntropyLoss(label_smoothing=settings.label_smoothing)
    records, best, started = [], None, time.perf_counter()
    for epoch in range(settings.epochs):
        twin.train()
        losses = weights = 0.0
        for index in range(len(data.train)):
            batch = data.train.batch(epoch, index)
            share = (1 + math.cos(math.pi * (epoch * len(data.train) + index) / total)) / 2
            adam.param_groups[0]["lr"] = share * settings.lr + (1 - share) * low
            logits, targets = _logits(twin, batch)
            loss = loss_of(logits, targets)
            adam.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(twin.parameters(), settings.clip)
            adam.step()
            losses, weights = losses + loss.item() * batch.weight, weights + batch.weight
        seconds = time.perf_counter() - started
        twin.eval()
        right = count = 0
        with torch.no_grad():
            for index in range(len(data.valid)):
                logits, targets = _logits(twin, data.valid.batch(0, index))
                right, count = right + int((logits.argmax(dim=1) == targets).sum()), count + len(targets)
        records.append({"epoch": epoch + 1, "train_loss": losses / weights, "validation_accuracy": right / count})
        records[-1]["seconds"] = round(seconds, 1)
        say(json.dumps(records[-1]))
        if best is None or right > best[0]:
            best = right, {name: value.clone() for name, value in twin.state_dict().items()}
    twin.load_state_dict(best[1])
    return records


def _logits(twin, batch):
    """Logits (N, V) and targets (N,) of the steps that count."""
    arrays = (*batch.inputs, batch.targets, *batch.lengths)
    source, target, targets, source_lengths, target_lengths = map(torch.from_numpy, arrays)
    valid = torch.arange(len(targets))[:, None] < target_lengths
    return twin(source, target, source_lengths)[valid], targets[valid]


@click.command()
@click.argument("run", type=click.Path(exists=True, file_okay=False))
@click.argument("test", type=click.Path(exists=True, dir_okay=False))
@click.option("--seed", type=int, help="Of torch and of the batches  [default: the run's]")
def main(run, test, seed):
    """Train the torch model as the translation RUN was trained; print how good it is on the pairs in TEST, as JSON."""
    from gpurnn.tasks.run import get_task
    from gpurnn.tasks.trained import Trained, read_run

    settings, document = read_run(run, "translate")
    task = get_task("translate")
    if seed is not None:
        settings = replace(settings, seed=seed)
    refused = [name for name in ("sampling", "weight_decay", "warmup") if getattr(settings, name)]
    if refused or (settings.optimizer, settings.schedule, settings.accumulate) != ("adam", "cosine", 1):
        raise click.UsageError("the torch model is trained by Adam with the cosine schedule and teacher forcing only")
    data = task.read(document["files"], settings, document["facts"])
    if data.valid is None:
        raise click.UsageError("the run has no validation pairs, by which the best epoch is chosen")
    torch.manual_seed(settings.seed)
    twin = Twin(
        len(data.facts["source"]) + 4, len(data.facts["target"]) + 4, settings.hidden, embedding=settings.embedding,
        layers=settings.layers, cell=settings.cell, score=settings.attention, dropout=settings.dropout,
        tied=settings.tied,
    )  # fmt: skip
    records = train(twin, settings, data, lambda line: click.echo(line, err=True))
    model = task.build(settings, data.facts, "cpu").eval()
    model.load_state_dict(twin.weights())
    result, _ = task.evaluate(Trained(Path(run), task, settings, data.facts, model), [test])
    result |= {"seed": settings.seed, "seconds": records[-1]["seconds"], "torch": torch.__version__}
    click.echo(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
