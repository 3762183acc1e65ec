"""The benchmark of gpurnn, installed as ``gpurnn.bench``: ``gpurnn bench``, or ``python -m bench`` in a checkout.

``cases``: what is measured. ``rivals``: against whom. ``judge``: whether a result is right. ``run``: how, and the JSON
that comes of it. ``machine``: versions and clocks. ``probe``: what a dependent step costs on a GPU. ``ceilings``: what
the machine reaches at best, and the floors that follow. ``results_file``, ``report``, ``plots``: what came out.
``on_gpu``, ``gpu_*``: all that a GPU rented by the minute is asked. ``doubles``: rivals for the benchmark's own tests.
"""
