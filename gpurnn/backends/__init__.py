"""Backends: where and how arrays are computed. switch.py chooses one; cpu/ and cuda/ hold what two of them add.

``gpurnn.backends`` is also a public function. It hides this package as an attribute of ``gpurnn``, not as a name to
import from: ``from gpurnn.backends import get_backend`` works.
"""

from .switch import array_ops, backends, empty_cache, get_backend, use_backend

__all__ = ["array_ops", "backends", "empty_cache", "get_backend", "use_backend"]
