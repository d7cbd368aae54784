"""Read and write the memory of another process, whether it is stopped or not."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from mthp.closing import Closing
from mthp.errors import MthpError, TargetVanishedError
from mthp.linux.abi import read_words
from mthp.linux.process import Process

Reader = Callable[[int, int], bytes]
"""Returns a number of bytes of the target's memory from an address on."""


class ProcessMemory(Closing):
    """The memory of a process, through /proc/PID/mem.

    Args:
        process: the process; the caller keeps it open and closes it.
    """

    def __init__(self, process: Process) -> None:
        self.process = process
        self._fd = -1

    @cached_property
    def _file(self) -> int:
        """Return the descriptor, opened at the first read or write: it refers to the program that runs then."""
        try:
            self._fd = os.open(f"/proc/{self.process.pid}/mem", os.O_RDWR | os.O_CLOEXEC)
        except OSError as error:
            self.process.fail(error, "its memory")
        return self._fd

    def read(self, address: int, size: int) -> bytes:
        """Return `size` bytes from `address` on.

        Raises:
            TargetVanishedError: the process is gone, or has a new memory since execve(2).
            MthpError: nothing is mapped there.
        """
        try:
            data = os.pread(self._file, size, address)
        except OSError as error:
            self.process.fail(error, f"its memory at {address:#x}")
        self._check(address, len(data), size)
        return data

    def read_words(self, addresses: NDArray[np.uint64]) -> NDArray[np.uint64]:
        """Return the 64-bit words at `addresses`: uint64, shape (addresses,)."""
        # One call for all; where process_vm_readv(2) is filtered, one read for each.
        words = read_words(self.process.pid, addresses)
        if words is not None:
            return words
        return np.array(
            [int.from_bytes(self.read(address, 8), sys.byteorder) for address in addresses.tolist()], np.uint64
        )

    def write(self, address: int, data: bytes) -> None:
        """Write `data`, also where the process itself may not write."""
        try:
            # With FOLL_FORCE (mem_rw, fs/proc/base.c), unless proc_mem.force_override is `never` (Linux 6.12).
            written = os.pwrite(self._file, data, address)
        except OSError as error:
            self.process.fail(error, f"its memory at {address:#x}")
        self._check(address, written, len(data))

    def _check(self, address: int, done: int, size: int) -> None:
        if not done and size:
            # The kernel transfers nothing once the address space is gone (mem_rw, fs/proc/base.c).
            raise TargetVanishedError(f"process {self.process.label} gave up its memory")
        if done != size:
            raise MthpError(f"process {self.process.label} has no memory at {address + done:#x}")

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
        self.__dict__.pop("_file", None)
