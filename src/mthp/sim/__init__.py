"""A machine in memory: physical frames, address spaces, and the collapse path with everything that can fail in it.

It is deterministic: the same calls give the same frames, counters and events on any machine
(:mod:`~mthp.sim.state` sums them up). The parts, from the bottom up:

- :mod:`~mthp.sim.frames`: frames and folios, the buddy allocator, the batch in front of the LRU lists, swap, cgroups;
- :mod:`~mthp.sim.mm`: address spaces as columns; :mod:`~mthp.sim.page_tables`: who maps what;
- :mod:`~mthp.sim.allocation`: where folios come from when memory is short or fragmented;
- :mod:`~mthp.sim.address_space`: what programs do, by accesses and by system calls;
- :mod:`~mthp.sim.collapse`: what khugepaged and MADV_COLLAPSE see and do;
- :mod:`~mthp.sim.clock`: simulated time; :mod:`~mthp.sim.sysfs`: the files of sysfs and ``/proc``;
- :mod:`~mthp.sim.golden`: recorded cases of real kernels, replayed on all of this.

:class:`~mthp.sim.machine.Machine` ties them together.
"""

from mthp.sim.machine import Machine
from mthp.sim.space import SimSpace

__all__ = ["Machine", "SimSpace"]
