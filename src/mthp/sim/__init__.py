"""A machine in memory: physical frames, address spaces, and the collapse path with everything that can fail in it.

It is deterministic: the same calls give the same frames, counters and events on any machine
(:mod:`~mthp.sim.state` sums them up). The parts, from the bottom up:

- frames and folios (:mod:`~mthp.sim.memory`), given out by a buddy allocator (:mod:`~mthp.sim.buddy`) whose free memory
  can be fragmented to order (:mod:`~mthp.sim.fragment`); swap (:mod:`~mthp.sim.swap`); the per-CPU batch in front of
  the LRU lists (:mod:`~mthp.sim.lru`);
- address spaces (:mod:`~mthp.sim.mm`), and who maps what (:mod:`~mthp.sim.rmap`, :mod:`~mthp.sim.mappings`);
- memory that is short: :mod:`~mthp.sim.alloc`, :mod:`~mthp.sim.reclaim`, :mod:`~mthp.sim.compact`,
  :mod:`~mthp.sim.split`, :mod:`~mthp.sim.migrate`;
- what programs do: accesses (:mod:`~mthp.sim.access`; many at once: :mod:`~mthp.sim.touch`) and system calls
  (:mod:`~mthp.sim.calls`);
- what khugepaged sees (:mod:`~mthp.sim.scan`) and does (:mod:`~mthp.sim.collapse`);
- simulated time (:mod:`~mthp.sim.clock`), and the files of sysfs and ``/proc`` (:mod:`~mthp.sim.sysfs`).

:class:`~mthp.sim.machine.Machine` ties them together.
"""

from mthp.sim.machine import Machine
from mthp.sim.space import SimSpace

__all__ = ["Machine", "SimSpace"]
