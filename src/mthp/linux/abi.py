"""The numbers that the kernel and a program agree on, each under the name that its header gives it.

Only what this package uses is here. The source of each group is named above it. All of them are the same on every
architecture that has THP.
"""

from __future__ import annotations

import ctypes
import errno

# --- /proc/PID/pagemap: fs/proc/task_mmu.c, Documentation/admin-guide/mm/pagemap.rst ---------------------------------

PM_ENTRY_BYTES = 8
PM_PFRAME_BITS = 55
PM_PFRAME_MASK = (1 << PM_PFRAME_BITS) - 1
PM_MMAP_EXCLUSIVE = 1 << 56
PM_UFFD_WP = 1 << 57
PM_GUARD_REGION = 1 << 58
PM_FILE = 1 << 61
PM_SWAP = 1 << 62
PM_PRESENT = 1 << 63

# --- ioctl(PAGEMAP_SCAN): include/uapi/linux/fs.h --------------------------------------------------------------------

PAGE_IS_PRESENT = 1 << 3
PAGE_IS_SWAPPED = 1 << 4
PAGE_IS_PFNZERO = 1 << 5
PAGE_IS_HUGE = 1 << 6

PM_SCAN_ARG = "=12Q"
"""``struct pm_scan_arg``: size, flags, start, end, walk_end, vec, vec_len, max_pages, category_inverted,
category_mask, category_anyof_mask, return_mask."""

PM_SCAN_ARG_SIZE = 96
PM_SCAN_ARG_WALK_END = 32
"""Offset of ``walk_end`` in bytes."""

PAGEMAP_SCAN = 0xC0606610
"""``_IOWR('f', 16, struct pm_scan_arg)``. The number is the same with the three direction bits of powerpc and mips."""

# --- /proc/kpageflags: include/uapi/linux/kernel-page-flags.h --------------------------------------------------------

KPF_ANON = 1 << 12
KPF_SWAPBACKED = 1 << 14
KPF_COMPOUND_HEAD = 1 << 15
KPF_COMPOUND_TAIL = 1 << 16
KPF_HUGE = 1 << 17
KPF_NOPAGE = 1 << 20
KPF_KSM = 1 << 21
KPF_ZERO_PAGE = 1 << 24

# --- /proc/PID/stat: include/linux/sched.h ---------------------------------------------------------------------------

PF_KTHREAD = 0x00200000

# --- madvise(2): include/uapi/asm-generic/mman-common.h --------------------------------------------------------------

MADV_COLD = 20
MADV_COLLAPSE = 25

# --- system calls without a wrapper in older C libraries: include/uapi/asm-generic/unistd.h --------------------------

NR_PROCESS_MADVISE = 440
"""``process_madvise``, Linux 5.10. Numbers from 424 on are the same on all architectures but alpha."""


class IoVec(ctypes.Structure):
    """``struct iovec`` of ``<sys/uio.h>``."""

    _fields_ = (("iov_base", ctypes.c_void_p), ("iov_len", ctypes.c_size_t))


_libc = ctypes.CDLL(None, use_errno=True)
_libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
_libc.syscall.restype = ctypes.c_long


def madvise(address: int, length: int, advice: int) -> int:
    """``madvise(2)`` on this process.

    Returns:
        0, or errno.
    """
    return ctypes.get_errno() if _libc.madvise(address, length, advice) else 0


def process_madvise(pidfd: int, address: int, length: int, advice: int) -> int:
    """``process_madvise(2)`` for one range of another process.

    Returns:
        0 if the whole range was advised, else errno. The call can also end early with success and fewer bytes than
        asked (man page, "Return value"); that comes back as EAGAIN, since the rest may be asked for again.
    """
    vector = IoVec(address, length)
    advised = _libc.syscall(
        ctypes.c_long(NR_PROCESS_MADVISE),
        ctypes.c_long(pidfd),
        ctypes.byref(vector),
        ctypes.c_size_t(1),
        ctypes.c_long(advice),
        ctypes.c_ulong(0),
    )
    if advised < 0:
        return ctypes.get_errno()
    return 0 if advised == length else errno.EAGAIN
