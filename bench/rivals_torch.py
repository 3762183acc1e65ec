"""The rivals that are made with torch: its own layers, on a GPU those of cuDNN, and FlashRNN's kernels."""

from .rival import RATE, Prepared, threads


def _torch_prepared(device, run, results):
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


def _packed(layer, lengths):
    """A layer of torch over sequences of these lengths."""
    from torch.nn.utils import rnn

    def call(x):
        output, state = layer(rnn.pack_padded_sequence(x, lengths, enforce_sorted=False))
        return rnn.pad_packed_sequence(output, total_length=len(x))[0], state

    return call


def torch_rival(device, mode="eager"):
    """mode: "eager"; "compile": under ``torch.compile``; "graph": the whole run recorded as a CUDA graph."""

    def prepare(case, weights, x, y):
        import contextlib

        import torch

        torch.set_num_threads(threads())
        if device == "cuda":
            allowed = case.precision == "tf32"  # torch's own default for RNNs is tf32
            torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = allowed
        dtype = getattr(torch, case.dtype)

        class Model(torch.nn.Module):
            def __init__(self):
                super().__init__()
                D = 2 if case.bidirectional else 1
                self.embedding = torch.nn.Embedding(case.V, case.I)
                self.rnn = rnn
                self.linear = torch.nn.Linear(D * case.H, case.V)

            def forward(self, words):
                return (self.linear(self.rnn(self.embedding(words))[0]),)

        narrow = case.what == "step" and case.dtype in ("float16", "bfloat16")  # weights stay float32, as in gpurnn

        rnn = getattr(torch.nn, case.cell.upper())(case.I, case.H, case.L, bidirectional=case.bidirectional)
        layer = Model() if case.what == "step" else rnn
        given_weights = {name: torch.from_numpy(value) for name, value in weights.items()}
        layer.load_state_dict(given_weights)
        layer = layer.to(device, torch.float32 if narrow else dtype).train(case.what != "inference")
        call = torch.compile(layer) if mode == "compile" else layer
        call = _packed(call, case.lengths) if case.ragged else call
        given, wanted = torch.from_numpy(x).to(device), torch.from_numpy(y).to(device)
        keep = mode == "graph"  # a recorded run finds its gradients at the same addresses, zeroed
        adam = (
            torch.optim.Adam(layer.parameters(), lr=RATE, fused=True, capturable=keep) if case.what == "step" else None
        )
        if case.what != "step":
            given, wanted = given.to(dtype), wanted.to(dtype)
            given.requires_grad_(case.what == "train")

        def run():
            if case.what == "inference":
                with torch.inference_mode():
                    return {"output": call(given)[0]}
            if case.what == "forward":
                return {"output": call(given)[0]}
            layer.zero_grad(set_to_none=not keep)
            if case.what == "train":
                if keep and given.grad is not None:
                    given.grad.zero_()
                else:
                    given.grad = None
                output = call(given)[0]
                output.backward(wanted)
                return {"output": output, "dx": given.grad}
            with torch.autocast(device, dtype) if narrow else contextlib.nullcontext():
                logits = call(given)[0]
                loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), wanted.flatten())
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(layer.parameters(), 1.0)
            adam.step()
            return {"loss": loss, "norm": norm}

        def record(run):
            """The run as a CUDA graph: warmed up on a stream of its own, as torch asks for, then recorded once."""
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

        if mode == "graph":
            run = record(run)

        def results():
            layer.load_state_dict(given_weights)
            for state in adam.state.values() if adam else ():
                for tensor in state.values():
                    tensor.zero_()
            found = {name: value.detach().clone() for name, value in run().items()}
            if case.what in ("train", "step"):
                found |= {name: p.grad.clone() for name, p in layer.named_parameters() if "_hh" in name}
            if case.what == "step":  # the second loss shows whether the weights were changed rightly
                found["loss"] = torch.stack([found["loss"], run()["loss"].detach()])
            return {name: value.cpu().double().numpy() for name, value in found.items()}

        return _torch_prepared(device, run, results)

    return prepare


def flashrnn_rival(backend, device="cuda"):
    """FlashRNN's kernel with torch's input GEMM before it, one layer, one head; forward keeps what backward needs.

    Its gate orders: LSTM i f g o; GRU r z n in the input, n r z in the recurrent weights, bias n_h r z n_x.
    """

    def prepare(case, weights, x, y):
        import torch
        from flashrnn import flashrnn

        T, B, H, dtype = case.T, case.B, case.H, getattr(torch, case.dtype)
        torch.backends.cuda.matmul.allow_tf32 = case.precision == "tf32"
        W_ih, W_hh, b_ih, b_hh = (
            torch.from_numpy(weights[f"{name}_l0"]).to(device, dtype)
            for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
        )
        G = W_hh.shape[0] // H
        R, b_ih, b_hh = W_hh.view(G, 1, H, H), b_ih.view(G, 1, H), b_hh.view(G, 1, H)
        if case.cell == "gru":
            R = R[[2, 0, 1]]
            b = torch.stack([b_hh[2], b_ih[0] + b_hh[0], b_ih[1] + b_hh[1], b_ih[2]])
        else:
            b = b_ih + b_hh
        # its arrays are batch-major; x is given so, and no rival is charged for turning it
        given, wanted = (torch.from_numpy(array).to(device, dtype).transpose(0, 1).contiguous() for array in (x, y))
        leaves = [given, W_ih, R.contiguous(), b.contiguous()]
        given, W_ih, R, b = [leaf.detach().requires_grad_(case.what != "inference") for leaf in leaves]
        function = {"lstm": "lstm", "gru": "gru", "rnn": "elman"}[case.cell]

        def run():
            with torch.inference_mode(case.what == "inference"):
                Wx = torch.nn.functional.linear(given, W_ih).view(B, T, G, 1, H)
                states, _ = flashrnn(Wx, R, b, function=function, backend=backend, dtype=case.dtype)
                output = states[0].reshape(B, T, H)
            if case.what != "train":
                return {"output": output}
            for leaf in (given, W_ih, R, b):
                leaf.grad = None
            output.backward(wanted)
            return {"output": output, "dx": given.grad, "weight_hh_l0": R.grad, "bias": b.grad}

        def results():
            found = run()
            found |= {name: found[name].transpose(0, 1) for name in ("output", "dx") if name in found}
            if case.what == "train":
                if case.cell == "gru":
                    found["weight_hh_l0"] = found["weight_hh_l0"][[1, 2, 0]]
                    found["bias_hh_l0"] = found.pop("bias")[[1, 2, 0]]
                else:
                    found["bias_hh_l0"] = found.pop("bias")
                found["weight_hh_l0"] = found["weight_hh_l0"].reshape(G * H, H)
                found["bias_hh_l0"] = found["bias_hh_l0"].reshape(G * H)
            return {name: value.detach().cpu().double().numpy() for name, value in found.items()}

        return _torch_prepared(device, run, results)

    return prepare
