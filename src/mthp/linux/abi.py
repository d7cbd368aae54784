"""The numbers of the kernel's interface to programs, each with the name in its header.

Only those that this package uses are here. The source of each group is above it. All of them are the same on every
architecture that has THP, except the numbers of system calls that are listed by machine.
"""

from __future__ import annotations

import ctypes
import errno
import os
import struct

import numpy as np
from numpy.typing import NDArray

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

KPF_LRU = 1 << 5
KPF_SLAB = 1 << 7
KPF_BUDDY = 1 << 10
KPF_ANON = 1 << 12
KPF_SWAPBACKED = 1 << 14
KPF_COMPOUND_HEAD = 1 << 15
KPF_COMPOUND_TAIL = 1 << 16
KPF_HUGE = 1 << 17
KPF_NOPAGE = 1 << 20
KPF_KSM = 1 << 21
KPF_THP = 1 << 22
KPF_ZERO_PAGE = 1 << 24
KPF_PGTABLE = 1 << 26

# --- /proc/PID/stat: include/linux/sched.h ---------------------------------------------------------------------------

PF_KTHREAD = 0x00200000

# --- madvise(2): include/uapi/asm-generic/mman-common.h --------------------------------------------------------------

MADV_COLD = 20
MADV_COLLAPSE = 25

# --- system calls without a wrapper in older C libraries: include/uapi/asm-generic/unistd.h --------------------------

NR_PROCESS_MADVISE = 440
"""``process_madvise``, Linux 5.10. Numbers from 424 on are the same on all architectures but alpha."""

# --- setns(2): include/uapi/linux/sched.h, include/linux/proc_ns.h ---------------------------------------------------

CLONE_NEWCGROUP = 0x02000000

CGROUP_INIT_INO = 0xEFFFFFFB
"""The inode of the first cgroup namespace."""

# --- kcmp(2): include/uapi/linux/kcmp.h ------------------------------------------------------------------------------

KCMP_VM = 1
KCMP_FILES = 2

NR_KCMP = {"x86_64": 312, "aarch64": 272}
"""``kcmp`` in each architecture's ``asm/unistd.h``."""

# --- perf_event_open(2): include/uapi/linux/perf_event.h -------------------------------------------------------------

NR_PERF_EVENT_OPEN = {"x86_64": 298, "aarch64": 241, "ppc64le": 319, "riscv64": 241, "s390x": 331}
"""``perf_event_open`` in each architecture's ``asm/unistd.h``."""

PERF_RECORD_LOST = 2
PERF_RECORD_SAMPLE = 9

_PERF_ATTR = "=IIQQQQQIIQ"
"""``struct perf_event_attr`` of its first version: type, size, config, sample_period, sample_type, read_format, flags,
wakeup_events, bp_type, bp_addr."""

_PERF_TYPE_TRACEPOINT = 2
_PERF_SAMPLE_TIME_RAW = 1 << 2 | 1 << 10
_PERF_FLAG_FD_CLOEXEC = 8

_UNEQUAL = 3
"""Result for two threads of which one is gone: the kernel's value for "not equal, in no order"."""


class IoVec(ctypes.Structure):
    """``struct iovec`` of ``<sys/uio.h>``."""

    _fields_ = (("iov_base", ctypes.c_void_p), ("iov_len", ctypes.c_size_t))


_libc = ctypes.CDLL(None, use_errno=True)
_libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
_libc.syscall.restype = ctypes.c_long

# Holds the interpreter's lock: the call does not block, and a switch to another thread would lengthen a window.
_locked_libc = ctypes.PyDLL(None, use_errno=True)
_locked_libc.process_vm_readv.restype = ctypes.c_ssize_t
_locked_libc.process_vm_readv.argtypes = (ctypes.c_int, *(ctypes.c_void_p, ctypes.c_ulong) * 2, ctypes.c_ulong)
_MOST_VECTORS = os.sysconf("SC_IOV_MAX")


def madvise(address: int, length: int, advice: int) -> int:
    """Call ``madvise(2)`` on this process; return 0, or errno."""
    return ctypes.get_errno() if _libc.madvise(address, length, advice) else 0


def process_madvise(pidfd: int, address: int, length: int, advice: int) -> int:
    """Call ``process_madvise(2)`` for one range of another process.

    Returns:
        0 if the whole range was advised, else errno. The call can also end early with success and fewer bytes than
        requested (man page, "Return value"); the result is then EAGAIN, because the rest may be requested again.
    """
    vector = IoVec(address, length)
    advised = _libc.syscall(
        # Every argument as a long: ctypes passes a Python int as a C int, and leaves half of the register open.
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


def enter_namespace(fd: int, kind: int) -> int:
    """Have only this thread enter the namespace that `fd` refers to, by setns(2); return 0, or errno.

    Args:
        kind: ``CLONE_NEW*``.
    """
    return ctypes.get_errno() if _libc.setns(fd, kind) else 0


def kcmp(one: int, other: int, kind: int) -> int | None:
    """Compare the resources `kind` of two threads, by kcmp(2).

    Args:
        one, other: TIDs.
        kind: ``KCMP_*``.

    Returns:
        0 if they share it, 1 to 3 if not or if one of them is gone, None without the rights or the kernel's support.
    """
    number = NR_KCMP.get(os.uname().machine)
    if number is None:
        return None
    words = map(ctypes.c_long, (number, one, other, kind, 0, 0))
    answer: int = _libc.syscall(*words)
    if answer >= 0:
        return answer
    # EPERM says nothing about the two: without the right to trace both, the kernel compares nothing (kcmp(2)).
    return _UNEQUAL if ctypes.get_errno() == errno.ESRCH else None


def perf_tracepoint(number: int, cpu: int) -> int | None:
    """Open a tracepoint on one processor, for all processes: each sample has its time and the record.

    Returns:
        A file descriptor, None if that processor is off.

    Raises:
        OSError: the kernel refuses it.
    """
    call = NR_PERF_EVENT_OPEN.get(os.uname().machine)
    if call is None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
    size = struct.calcsize(_PERF_ATTR)
    attr = struct.pack(_PERF_ATTR, _PERF_TYPE_TRACEPOINT, size, number, 1, _PERF_SAMPLE_TIME_RAW, 0, 0, 1, 0, 0)
    # PID -1 with a processor: the events of all processes there, which takes CAP_PERFMON (perf_event_open(2)).
    words = map(ctypes.c_long, (-1, cpu, -1, _PERF_FLAG_FD_CLOEXEC))
    fd: int = _libc.syscall(ctypes.c_long(call), attr, *words)
    if fd >= 0:
        return fd
    if (error := ctypes.get_errno()) == errno.ENODEV:
        return None
    raise OSError(error, os.strerror(error))


def read_words(pid: int, addresses: NDArray[np.uint64]) -> NDArray[np.uint64] | None:
    """Read the 64-bit words at `addresses` in the memory of `pid`, in one call of process_vm_readv(2).

    Returns:
        uint64, shape (addresses,); None if one of them is not mapped, or if the call is not available.
    """
    words = np.empty(len(addresses), np.uint64)
    here = IoVec()
    # struct iovec for each address.
    there = np.empty((len(addresses), 2), np.uint64)
    there[:, 0], there[:, 1] = addresses, words.itemsize
    for at in range(0, len(addresses), _MOST_VECTORS):
        part, theirs = words[at : at + _MOST_VECTORS], there[at : at + _MOST_VECTORS]
        here.iov_base, here.iov_len = part.__array_interface__["data"][0], part.nbytes
        done = _locked_libc.process_vm_readv(
            pid, ctypes.addressof(here), 1, theirs.__array_interface__["data"][0], len(theirs), 0
        )
        # The call stops at the first address that is not mapped, with what it has read until then
        # (process_vm_readv(2)).
        if done != part.nbytes:
            return None
    return words
