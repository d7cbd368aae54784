"""Comparing policies: what each would make of a target, at what price, scan by scan.

:mod:`~mthp.lab.metrics` says what every figure is, :mod:`~mthp.lab.evaluate` makes them, :mod:`~mthp.lab.compare` puts
policies side by side, :mod:`~mthp.lab.sweep` does so for many targets, :mod:`~mthp.lab.tlb` counts TLB misses.
"""
