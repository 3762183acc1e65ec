"""torch's own layers, on a GPU those of cuDNN."""

import contextlib

from .prepared import RATE, Prepared, is_judged, threads


def torch_prepared(device, run, results):
    """What is made with torch, with torch's clock where it runs on a GPU."""
    import torch

    def events(count):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(count):
            run()
        stop.record()
        stop.synchronize()
        return start.elapsed_time(stop) / 1e3

    if device == "cpu":
        return Prepared(run, results)
    return Prepared(run, results, torch.cuda.synchronize, events, torch.cuda.max_memory_reserved)


def torch_rival(device, mode="eager"):
    """mode: "eager"; "compile": under ``torch.compile``; "graph": the whole run recorded as a CUDA graph."""

    def prepare(case, weights, x, y):
        import torch

        torch.set_num_threads(threads())
        if device == "cuda":
            allowed = case.precision == "tf32"  # torch's own default for RNNs is tf32
            torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = allowed
        weights = {name: torch.from_numpy(value) for name, value in weights.items()}
        layer = _language_model(case) if case.what == "step" else _layer(case)
        layer.load_state_dict(weights)
        dtype = torch.float32 if _is_mixed(case) else getattr(torch, case.dtype)
        layer = layer.to(device, dtype).train(case.what != "inference")
        call = torch.compile(layer) if mode == "compile" else layer
        call = _packed(call, case.lengths) if case.ragged else call
        call = _in_pieces(call, case.reset, device) if case.resets else call
        x, y = torch.from_numpy(x).to(device), torch.from_numpy(y).to(device)
        same_memory = mode == "graph"  # a recorded run finds its gradients at the same addresses, zeroed
        if case.what == "step":
            adam = torch.optim.Adam(layer.parameters(), lr=RATE, fused=True, capturable=same_memory)
            run = _step(case, layer, call, x, y, adam, same_memory)
        else:
            adam, x, y = None, x.to(dtype), y.to(dtype)
            run = layer_call(case, layer, call, x, y, same_memory)
        run = _recorded(run) if mode == "graph" else run

        def results():
            layer.load_state_dict(weights)
            for state in adam.state.values() if adam else ():
                for tensor in state.values():
                    tensor.zero_()
            return results_of(case, layer, run)

        return torch_prepared(device, run, results)

    return prepare


def torch_cell_rival(case, weights, x, y):
    """torch's layer of a single step, where a case has one timestep. Every run goes on from the state before."""
    import torch

    torch.set_num_threads(threads())
    cell = getattr(torch.nn, f"{case.cell.upper()}Cell")(case.I, case.H).to(getattr(torch, case.dtype)).eval()
    cell.load_state_dict({name.removesuffix("_l0"): torch.from_numpy(value) for name, value in weights.items()})
    x, state = torch.from_numpy(x[0]).to(getattr(torch, case.dtype)), None

    def run():
        nonlocal state
        with torch.inference_mode():
            state = cell(x, state)
        return {"output": (state[0] if isinstance(state, tuple) else state)[None]}

    def results():
        nonlocal state
        state = None
        return {name: value.to(torch.float64).numpy() for name, value in run().items()}

    return Prepared(run, results)


def _layer(case):
    import torch

    if case.heads > 1:
        from .torch_heads import Heads

        return Heads(case)
    return getattr(torch.nn, case.cell.upper())(case.I, case.H, case.L, bidirectional=case.bidirectional)


def _language_model(case):
    """Embedding, layers and linear layer, by the names of gpurnn's model."""
    import torch

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            D = 2 if case.bidirectional else 1
            self.embedding = torch.nn.Embedding(case.V, case.I)
            self.rnn = _layer(case)
            self.linear = torch.nn.Linear(D * case.H, case.V)

        def forward(self, words):
            return (self.linear(self.rnn(self.embedding(words))[0]),)

    return Model()


def _is_mixed(case):
    """Whether the weights stay float32 beside 16-bit products, as gpurnn's do in a whole training step."""
    return case.what == "step" and case.dtype in ("float16", "bfloat16")


def _packed(layer, lengths):
    """A layer of torch over sequences of these lengths."""
    from torch.nn.utils import rnn

    def call(x):
        output, state = layer(rnn.pack_padded_sequence(x, lengths, enforce_sorted=False))
        return rnn.pad_packed_sequence(output, total_length=len(x))[0], state

    return call


def _in_pieces(layer, reset, device):
    """A layer of torch over each piece between two resets, as torch's users do: cut, padded, packed, put back."""
    import torch
    from torch.nn.utils import rnn

    T, B = len(reset), len(reset[0])
    pieces = []
    for b in range(B):
        borders = [0, *(t for t in range(1, T) if reset[t][b]), T]
        pieces += [(b, first, end) for first, end in zip(borders, borders[1:], strict=False)]
    lengths, longest = [end - first for _, first, end in pieces], max(end - first for _, first, end in pieces)
    take = torch.zeros((longest, len(pieces)), dtype=torch.long)
    back = torch.empty((T, B), dtype=torch.long)
    for n, (b, first, end) in enumerate(pieces):
        take[: end - first, n] = torch.arange(first, end) * B + b
        back[first:end, b] = torch.arange(end - first) * len(pieces) + n
    take, back = take.flatten().to(device), back.flatten().to(device)

    def call(x):
        rows = x.flatten(0, 1).index_select(0, take).view(longest, len(pieces), -1)
        packed = rnn.pack_padded_sequence(rows, lengths, enforce_sorted=False)
        output = rnn.pad_packed_sequence(layer(packed)[0], total_length=longest)[0]
        return output.flatten(0, 1).index_select(0, back).view(T, B, -1), None

    return call


def _step(case, layer, call, words, targets, adam, same_memory):
    """A whole training step, forward to Adam. same_memory: whether gradients stay where they are."""
    import torch

    def precision():
        if _is_mixed(case):
            return torch.autocast(words.device.type, getattr(torch, case.dtype))
        return contextlib.nullcontext()

    def run():
        layer.zero_grad(set_to_none=not same_memory)
        with precision():
            logits = call(words)[0]
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(layer.parameters(), 1.0)
        adam.step()
        return {"loss": loss, "norm": norm}

    return run


def layer_call(case, layer, call, x, doutput, same_memory):
    """A layer's call, forward alone, or forward and backward. same_memory: whether gradients stay where they are."""
    import torch

    x.requires_grad_(case.what == "train")

    def run():
        if case.what == "inference":
            with torch.inference_mode():
                return {"output": call(x)[0]}
        if case.what == "forward":
            return {"output": call(x)[0]}
        layer.zero_grad(set_to_none=not same_memory)
        if same_memory and x.grad is not None:
            x.grad.zero_()
        else:
            x.grad = None
        output = call(x)[0]
        output.backward(doutput)
        return {"output": output, "dx": x.grad}

    return run


def _recorded(run):
    """The run as a CUDA graph: warmed up on a stream of its own, as torch asks for, then recorded once."""
    import torch

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = run()

    def replay():
        graph.replay()
        return found

    return replay


def results_of(case, layer, run):
    """Name -> float64 array."""
    import torch

    found = {name: value.detach().clone() for name, value in run().items()}
    if case.what in ("train", "step"):
        gradients = layer.gradients() if case.heads > 1 else {name: p.grad for name, p in layer.named_parameters()}
        found |= {name: gradient.clone() for name, gradient in gradients.items() if is_judged(name)}
    if case.what == "step":  # the second loss shows whether the weights were changed rightly
        found["loss"] = torch.stack([found["loss"], run()["loss"].detach()])
    return {name: value.cpu().double().numpy() for name, value in found.items()}
