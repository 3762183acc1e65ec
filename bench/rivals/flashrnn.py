"""FlashRNN's kernels."""

from .torch import torch_prepared


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

        return torch_prepared(device, run, results)

    return prepare
