"""A machine in memory: physical frames, address spaces, and the collapse path with everything that can fail in it.

It is deterministic: the same calls give the same frames, counters and events on any machine. The parts, from the
bottom up: frames and folios (:mod:`~mthp.sim.memory`) given out by a buddy allocator (:mod:`~mthp.sim.buddy`), swap
(:mod:`~mthp.sim.swap`), the per-CPU batch in front of the LRU lists (:mod:`~mthp.sim.lru`), address spaces
(:mod:`~mthp.sim.mm`), who maps what (:mod:`~mthp.sim.rmap`), faults (:mod:`~mthp.sim.faults`), what khugepaged sees
(:mod:`~mthp.sim.scan`) and does (:mod:`~mthp.sim.collapse`); :class:`~mthp.sim.machine.Machine` ties them together.
"""

from mthp.sim.machine import Machine
from mthp.sim.space import SimSpace

__all__ = ["Machine", "SimSpace"]
