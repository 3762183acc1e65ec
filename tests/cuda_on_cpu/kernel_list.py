"""Every kernel of ``kernels/`` with the types it is compiled for. test_cuda_gate.py fails where one is missing."""

_REALS = ("float", "double")
STORAGES = ("float", "double", "__half", "__nv_bfloat16")
CELLS = ("RnnTanh", "RnnRelu", "LstmCell", "GruCell", "GruOriginal")


def _activations(real):
    """(function, derivative) as template arguments of activate.cu."""
    yield "tanh", f"dtanh<{real}>"  # tanh itself is the built-in function
    for name in ("sigmoid", "relu"):
        yield f"{name}<{real}>", f"d{name}<{real}>"


# .cu file -> name expressions
KERNELS = {
    "activate.cu": [
        expression
        for real in _REALS
        for function, derivative in _activations(real)
        for expression in (f"activate_forward<{real}, {function}>", f"activate_backward<{real}, {derivative}>")
    ],
    "step.cu": [
        *(
            f"step_{way}<{cell}, {storage}>"
            for cell in CELLS
            for storage in STORAGES
            for way in ("forward", "backward")
        ),
        *(f"step_{way}<GruOriginal, {storage}>" for storage in STORAGES for way in ("reset", "reset_backward")),
        *(f"step_{way}<{storage}>" for storage in STORAGES for way in ("project", "project_backward")),
    ],
    "bptt.cu": [
        *(f"sum_steps_partial<{storage}>" for storage in STORAGES),
        *(f"sum_steps_finish<{real}>" for real in _REALS),
    ],
    "embedding.cu": [
        *(f"embedding_chunks<{storage}>" for storage in STORAGES),
        *(f"embedding_borders<{real}>" for real in _REALS),
    ],
    "dropout.cu": ["keep_mask"],
    "optimise.cu": [
        *(
            f"{kernel}<{real}>"
            for kernel in ("sgd", "rmsprop", "adam", "norm_partial", "scale_grads")
            for real in _REALS
        ),
        "norm_finish",
    ],
}
