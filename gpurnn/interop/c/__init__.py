"""Models as C: ``export_c`` writes a header that needs no library. See docs/c.md."""

from .export import export_c

__all__ = ["export_c"]
