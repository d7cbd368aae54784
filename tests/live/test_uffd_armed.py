"""Memory that is registered with userfaultfd: no none PTE of it may be filled, in a plan or a collapse."""

from __future__ import annotations

import ctypes
import fcntl
import mmap
import os
import platform
import struct
from collections.abc import Iterator

import numpy as np
import pytest

import mthp
from mthp.linux.live import open_live
from mthp.linux.probes import UFFD_API, UFFD_USER_MODE_ONLY, UFFDIO_API, UFFDIO_API_ARG
from mthp.results import ScanResult
from targets import PAGE_SIZE, PMD_SIZE
from thp_switches import ThpSwitches

# include/uapi/linux/userfaultfd.h and asm/unistd_64.h
UFFDIO_REGISTER = 0xC020AA00
UFFDIO_REGISTER_MODE_MISSING = 1
NR_USERFAULTFD = 323

pytestmark = [
    pytest.mark.requires("root", "thp", "4k-pages", "pagemap_scan"),
    pytest.mark.skipif(platform.machine() != "x86_64", reason="the system call's number is that of x86-64"),
]


@pytest.fixture
def armed(thp_switches: ThpSwitches) -> Iterator[int]:
    """The address of two PMD ranges of base pages, registered for missing faults: one full, one not."""
    # No mapping here is advised, so neither faults nor the kernel's khugepaged make huge pages.
    thp_switches.set("enabled", "madvise")
    memory = mmap.mmap(-1, 3 * PMD_SIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    view = np.frombuffer(memory, np.uint8)
    start = -(-view.ctypes.data // PMD_SIZE) * PMD_SIZE
    view[start - view.ctypes.data :][: PMD_SIZE + PAGE_SIZE : PAGE_SIZE] = 1
    flags = os.O_CLOEXEC | UFFD_USER_MODE_ONLY
    fd = ctypes.CDLL(None).syscall(ctypes.c_long(NR_USERFAULTFD), ctypes.c_long(flags))
    assert fd >= 0
    fcntl.ioctl(fd, UFFDIO_API, struct.pack(UFFDIO_API_ARG, UFFD_API, 0, 0))
    fcntl.ioctl(fd, UFFDIO_REGISTER, struct.pack("=4Q", start, 2 * PMD_SIZE, UFFDIO_REGISTER_MODE_MISSING, 0))
    yield start
    os.close(fd)
    del view
    memory.close()


def test_the_plan_and_the_kernel_agree_on_armed_memory(armed: int) -> None:
    within = (armed, armed + 2 * PMD_SIZE)
    plan = mthp.plan("self", policy="pmd-only", within=within)
    assert plan.ranges.scan_result.tolist() == [ScanResult.SUCCEED, ScanResult.EXCEED_NONE_PTE]
    with open_live("self") as space:
        (vma,) = (vma for vma in space.vmas() if vma.start <= armed < vma.end)
        assert vma.uffd_armed
        order = space.geometry.pmd_order
        assert space.collapse(armed, order).result is ScanResult.SUCCEED
        assert space.collapse(armed + PMD_SIZE, order).result is ScanResult.EXCEED_NONE_PTE
