"""The address space of a process beyond the seam, for code that works on its memory."""

from __future__ import annotations

from mthp.addrspace import AddressSpace
from mthp.linux.process import Process
from mthp.linux.sysfs import ThpSysfs


class ProcessSpace(AddressSpace):
    """The address space of a process of this machine."""

    process: Process
    sysfs: ThpSysfs
