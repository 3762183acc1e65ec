"""Array code over arrays that carry a derivative along, for ``gpurnn.jvp`` and ``gpurnn.hvp``."""
