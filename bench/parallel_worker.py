"""What ``gpurnn bench parallel`` starts with mpirun: ``python -m bench.parallel_worker SPEC``, a JSON text."""

from __future__ import annotations

import json
import os
import statistics
import sys
import time

import numpy as np

SIZES = (1 << 8, 1 << 14, 1 << 18, 1 << 20, 1 << 22)  # numbers of float32 in the sums that measure the link


def run(spec):
    """The results of one process: process 0 prints them as JSON."""
    if spec["rival"] == "torch":
        return _torch(spec)
    from gpurnn.train import parallel

    with parallel.init("none" if spec["apart"] else "auto") as group:
        found = _ours(spec, group)
        found["link"] = _link(group) if group.size > 1 and spec["link"] else None
        if parallel.find_place().rank == 0:
            print(json.dumps(found))


def _ours(spec, group):
    """Seconds of each update, and of those the ones in ``Members.reduce``: the sum, the exchange, and waiting."""
    import gpurnn
    from gpurnn.train import members

    V, H, L, B, T = (spec[name] for name in ("vocabulary", "hidden", "layers", "batch", "steps"))
    shared = {"backend": "cpu", "seed": 1}
    model = gpurnn.Sequential(
        gpurnn.Embedding(V, H, **shared), gpurnn.LSTM(H, H, L, **shared), gpurnn.Linear(H, V, **shared)
    )
    ids = np.random.default_rng(0).integers(0, V, B * T * spec["updates"] + 1)
    ends, inside = [], []
    reduce = members.Members.reduce

    def timed(self, *arguments):
        start = time.perf_counter()
        result = reduce(self, *arguments)
        inside.append(time.perf_counter() - start)
        return result

    class Clock:
        def on_update(self, record, training):
            ends.append(time.perf_counter())

    members.Members.reduce = timed
    start = time.perf_counter()
    gpurnn.fit(
        model, gpurnn.cross_entropy, gpurnn.TextBatches(ids, B, T), optimizer="adam", epochs=1, clip_norm=1.0,
        progress=False, callbacks=[Clock()] if group.is_first else [], group=group,
    )  # fmt: skip
    if not group.is_first:
        return {}
    updates = np.diff([start, *ends])[spec["warmups"] :]
    return _summary(updates, inside[spec["warmups"] :], model.flat_grads.nbytes)


def _summary(updates, inside, size):
    return {
        "update": statistics.median(updates), "quick": _quick(updates),
        "reduce": statistics.median(inside or [0]), "updates": len(updates), "bytes": size,
    }  # fmt: skip


def _quick(seconds):
    """The mean of the quickest quarter, which says most of a machine that is shared."""
    return statistics.mean(sorted(seconds)[: max(1, len(seconds) // 4)])


def _link(group):
    """What the link costs: seconds of sums of several sizes, and of one message among many."""
    rows = []
    for count in SIZES:
        array = np.zeros(count, np.float32)
        times = []
        for _ in range(30 if count < 1 << 20 else 10):
            group.gather(b"")
            start = time.perf_counter()
            group.add(array)
            times.append(time.perf_counter() - start)
        rows.append([array.nbytes, _quick(times)])
    empty, other = np.empty(8, np.uint8), (group.rank + 1) % group.size
    several = []
    for _ in range(20):
        group.gather(b"")
        start = time.perf_counter()
        requests = [group.world.Irecv(np.empty(8, np.uint8), (group.rank - 1) % group.size, 999) for _ in range(100)]
        requests += [group.world.Isend(empty, other, 999) for _ in range(100)]
        group.wait(requests, "messages")
        several.append((time.perf_counter() - start) / 100)
    return {"sums": rows, "message": _quick(several)}


def _torch(spec):
    """The same model and updates in torch, with DistributedDataParallel over gloo."""
    import torch
    import torch.distributed as dist
    from torch import nn

    from gpurnn.train.parallel import find_place

    place = find_place()
    torch.set_num_threads(1)
    V, H, L, B, T = (spec[name] for name in ("vocabulary", "hidden", "layers", "batch", "steps"))

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding, self.lstm, self.linear = nn.Embedding(V, H), nn.LSTM(H, H, L), nn.Linear(H, V)

        def forward(self, x):
            return self.linear(self.lstm(self.embedding(x))[0])

    torch.manual_seed(1)
    model = Model()
    if place.size > 1:
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(spec["port"])}
        dist.init_process_group("gloo", rank=place.rank, world_size=place.size)
        model = nn.parallel.DistributedDataParallel(model)
    adam, mine, ends = torch.optim.Adam(model.parameters()), B // place.size, [time.perf_counter()]
    ids = torch.from_numpy(np.random.default_rng(place.rank).integers(0, V, (spec["updates"], T + 1, mine)))
    for one in ids:
        loss = nn.functional.cross_entropy(model(one[:-1]).reshape(-1, V), one[1:].reshape(-1))
        adam.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        adam.step()
        ends.append(time.perf_counter())
    size = 4 * sum(parameter.numel() for parameter in model.parameters())
    if place.size > 1:
        dist.destroy_process_group()
    if place.rank == 0:
        print(json.dumps(_summary(np.diff(ends)[spec["warmups"] :], [], size)))


if __name__ == "__main__":
    run(json.loads(sys.argv[1]))
