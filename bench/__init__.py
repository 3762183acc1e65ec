"""The benchmark of gpurnn, installed as ``gpurnn.bench``.

``cpu_rnn`` times the NumPy backend against torch on the CPU. The benchmark to come will hold four modules and the
``gpurnn bench`` command over them: ``cases`` (what is measured: cell, sizes, dtype, forward or training), ``rivals``
(against whom), ``timing`` (how: calibrated loops, recorded warm-up, launch and device time apart) and ``report``
(table, JSON, plot). Every case checks its numbers against the reference before it is timed.
"""
