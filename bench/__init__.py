"""The benchmark of gpurnn, installed as ``gpurnn.bench``: ``gpurnn bench``, or ``python -m bench`` in a checkout.

``cases``: what is measured. ``rivals``: against whom. ``run``: how, and the JSON that comes of it. ``report``: tables,
comparison, plots. ``cpu_rnn`` is its forerunner, from which the README's figures come.
"""
