import math, numpy as np
from . import rng
from .module import Module
class Embedding(Module):
    def __init__(self, V, dim, backend=None, dtype="float32", seed=None):
        super().__init__(backend, dtype, seed)
        self._declare({"weight": rng.normal((V, dim), self.seed, 1, dtype=np.float64)})
    def __call__(self, x): return self.params["weight"][x]
    def forward(self, x):
        def b(dy):
            self.ops.accumulate_rows(self.grads["weight"], x.reshape(-1), dy.reshape(-1, dy.shape[-1]))
        return self(x), b
class Linear(Module):
    def __init__(self, I, O, backend=None, dtype="float32", seed=None):
        super().__init__(backend, dtype, seed)
        k = 1/math.sqrt(I)
        self._declare({"weight": rng.uniform((O, I), -k, k, self.seed, 1, dtype=np.float64), "bias": np.zeros(O)})
    def __call__(self, x): return x @ self.params["weight"].T + self.params["bias"]
    def forward(self, x):
        def b(dy):
            d2 = dy.reshape(-1, dy.shape[-1])
            self.grads["weight"][...] += d2.T @ x.reshape(-1, x.shape[-1])
            self.grads["bias"][...] += d2.sum(0)
            return dy @ self.params["weight"]
        return self(x), b
class Dropout(Module):
    def __init__(self, rate, variational=False, backend=None, dtype="float32", seed=None):
        super().__init__(backend, dtype, seed); self.rate = rate
    def __call__(self, x): return self.forward(x)[0]
    def forward(self, x):
        if not self.training: return x, lambda d: d
        m = rng.keep_mask(x.shape, self.rate, self.seed, self.key, self.calls, self.xp) / self.dtype.type(1 - self.rate)
        self.calls += 1
        return x * m.astype(x.dtype), lambda d: d * m.astype(d.dtype)
class Sequential(Module):
    stateful = True
    def __init__(self, layers):
        first = next(iter(layers.values()))
        super().__init__(first.ops.name, first.dtype, first.seed)
        self._adopt(layers)
    def __call__(self, x, state=None, lengths=None):
        for l in self.children.values():
            if l.stateful: x, state = l(x, state[0] if state else None, lengths)
            else: x = l(x)
        return x, (state,)
    def step(self, x, state=None):
        for l in self.children.values():
            if l.stateful: x, state = l.step(x, state[0] if state else None)
            else: x = l(x)
        return x, (state,)
    def forward(self, x, state=None, lengths=None):
        bs = []
        for l in self.children.values():
            if l.stateful: x, state, b = l.forward(x, state[0] if state else None, lengths); b = (lambda b: lambda d: b(d)[0])(b)
            else: x, b = l.forward(x)
            bs.append(b)
        def backward(d, dstate=None):
            for b in reversed(bs): d = b(d)
            return d, None
        return x, (state,), backward
