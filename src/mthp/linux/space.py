"""What works on a process's memory needs of its address space, beyond the seam."""

from __future__ import annotations

import abc

import numpy as np
from numpy.typing import NDArray

from mthp.addrspace import AddressSpace
from mthp.linux.process import Process
from mthp.linux.sysfs import ThpSysfs
from mthp.ptes import PteColumns


class ProcessSpace(AddressSpace):
    """The address space of a process of this machine.

    Attributes:
        process: the process.
        sysfs: the THP directory of the machine.
    """

    process: Process
    sysfs: ThpSysfs

    @abc.abstractmethod
    def mapcounts(self, columns: PteColumns) -> NDArray[np.int64]:
        """Return how often each page is mapped, by all processes together: int64, shape (pages,), 0 if not present.

        Raises:
            NotPermittedError: page frames cannot be seen with these rights.
        """
