"""Heads in torch: a layer of torch for each of them. It needs torch, so that it is imported only where that runs."""

import torch


class Heads(torch.nn.Module):
    """The layer of a case, whose parameters go in and out with gpurnn's names and an axis for the heads."""

    def __init__(self, case):
        super().__init__()
        kind, size = getattr(torch.nn, case.cell.upper()), case.H // case.heads
        self.heads = torch.nn.ModuleList([kind(case.I, size) for _ in range(case.heads)])

    def load_state_dict(self, weights, *arguments, **options):
        """Take (N, ...) parameters."""
        for n, head in enumerate(self.heads):
            head.load_state_dict({name: value[n] for name, value in weights.items()})

    def gradients(self):
        """Name -> the gradient (N, ...)."""
        heads = [dict(head.named_parameters()) for head in self.heads]
        return {name: torch.stack([head[name].grad for head in heads]) for name in heads[0]}

    def forward(self, x):
        return torch.cat([head(x)[0] for head in self.heads], -1), None
