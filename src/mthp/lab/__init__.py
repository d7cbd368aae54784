"""Comparing policies: what each would make of a target, at what price, scan by scan.

:mod:`~mthp.lab.figures` says what every figure is, :mod:`~mthp.lab.evaluate` makes them, :mod:`~mthp.lab.compare` puts
policies side by side, :mod:`~mthp.lab.sweep` does so for many targets. :mod:`~mthp.lab.tlb` is a model of processors'
TLBs, and :mod:`~mthp.lab.replay` asks it what a trace of accesses costs with the memory that each policy makes.
"""
