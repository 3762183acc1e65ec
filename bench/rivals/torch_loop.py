"""Any cell in torch without gpurnn: a module with a Python loop over timesteps, as is, under ``torch.compile``, or, of
the cells that Haste has, as TorchScript."""

from .gpurnn import first_draws
from .prepared import threads
from .torch import layer_call, results_of, torch_prepared


def torch_loop_rival(mode="eager"):
    """mode: "eager"; "compile": the whole loop under ``torch.compile``; "script": Haste's equations, compiled by
    ``torch.jit``, as Haste's own fall-back is."""

    def prepare(case, weights, x, y):
        import torch

        if mode == "script":
            from .torch_haste import HasteLoop as Loop
        else:
            from .torch_module import Loop

        torch.set_num_threads(threads())
        loop = Loop(case, weights)
        call = torch.compile(loop) if mode == "compile" else loop
        x, y = torch.from_numpy(x), torch.from_numpy(y)
        now = {"draws": loop.draw}

        def drawing(x):
            return (call(x, now["draws"]()),)

        run = layer_call(case, loop, drawing, x, y, same_memory=False)

        def results():
            """With gpurnn's masks, as no other draws have the same numbers."""
            given = [
                [([torch.from_numpy(mask) for mask in masks], None if weight is None else torch.from_numpy(weight))
                 for masks, weight in directions]
                for directions in first_draws(case)
            ]  # fmt: skip
            now["draws"] = lambda: given
            try:
                return results_of(case, loop, run)
            finally:
                now["draws"] = loop.draw

        return torch_prepared("cpu", run, results)

    return prepare
