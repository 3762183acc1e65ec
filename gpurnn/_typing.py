"""Names for the annotations of public signatures; nothing here does anything at run time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeAlias

Array: TypeAlias = Any  # a NumPy or CuPy array; inputs may also be nested lists, or anything with DLPack
State: TypeAlias = Any  # an Array h, or a pair (h, c); of a stack what its layers take, None for zeros
Lengths: TypeAlias = "Sequence[int] | Array | None"  # (B,) integers; None: all sequences have T timesteps
Backward: TypeAlias = Callable[..., Any]  # what ``forward`` returns beside its results


class Backend(Protocol):
    """What of a backend's ``Ops`` is public; ``gpurnn.get_backend`` returns one."""

    xp: Any  # numpy or cupy
    name: str

    def asarray(self, value: Array, name: str = "array") -> Array: ...
    def to_numpy(self, array: Array) -> Array: ...
    def synchronize(self) -> None: ...
    def machine(self) -> dict[str, Any]: ...
    def empty_cache(self) -> None: ...
