"""The benchmark of gpurnn, installed as ``gpurnn.bench``: ``gpurnn bench``, or ``python -m bench`` in a checkout.

``cases``: what is measured. ``rivals``: against whom. ``run``: how, and the JSON that comes of it. ``machine``:
versions, ceilings, floors. ``probe``: what a dependent step costs on a GPU. ``report``, ``plots``: what came out.
``on_gpu``, ``gpu_*``: all that a GPU rented by the minute is asked.
"""
