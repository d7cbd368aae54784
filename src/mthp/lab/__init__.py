"""The comparison of policies: what each would make of a target, at what price, scan by scan.

:mod:`~mthp.lab.figures` defines every figure, :mod:`~mthp.lab.evaluate` computes them, :mod:`~mthp.lab.compare` puts
policies side by side, and :mod:`~mthp.lab.sweep` does so for many targets. :mod:`~mthp.lab.tlb` is a model of
processors' TLBs, and :mod:`~mthp.lab.replay` replays a trace of accesses on it with the memory that each policy makes.
"""
