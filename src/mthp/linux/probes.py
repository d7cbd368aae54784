"""Try what the kernel does for these rights, instead of deriving it from versions.

Each trial calls the kernel and leaves nothing behind: memory is unmapped, file descriptors are closed, the one
child process is ended. Two of them rely on the checks that system calls make before they use their range.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os
import struct
import subprocess
import sys
from dataclasses import dataclass

from mthp.errors import MthpError
from mthp.geometry import Geometry
from mthp.linux import abi
from mthp.linux.pagemap import Pagemap, can_see_pfns
from mthp.linux.process import Process
from mthp.linux.split.file import LARGEST_TRIAL, SplitAbility, split_ability

PROT_NONE = 0
"""include/uapi/asm-generic/mman-common.h; Python's mmap module has the others."""

# --- userfaultfd(2): include/uapi/linux/userfaultfd.h ----------------------------------------------------------------

UFFD_USER_MODE_ONLY = 1
UFFD_API = 0xAA
UFFDIO_API = 0xC018AA3F
"""``_IOWR(0xAA, 0x3F, struct uffdio_api)``; this direction comes out the same on all architectures."""
UFFDIO_API_ARG = "=3Q"
"""``struct uffdio_api``: api, features, ioctls."""
UFFDIO_REGISTER = 0xC020AA00
UFFDIO_REGISTER_MODE_MISSING = 1
UFFD_FEATURE_MOVE = 1 << 16

NR_USERFAULTFD = {"x86_64": 323, "ppc64": 364, "ppc64le": 364, "s390x": 355, "aarch64": 282, "riscv64": 282}
"""``userfaultfd`` in each architecture's ``asm/unistd.h``, by name in ``uname -m``."""

_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long
_libc.mprotect.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)


@dataclass(frozen=True, slots=True)
class Probed:
    """Results of the trials; an errno is 0 for success, and None where the trial could not be made.

    Attributes:
        collapse_known: errno of MADV_COLLAPSE over nothing: EINVAL if the kernel does not know it.
        collapse: errno of MADV_COLLAPSE over memory of this process.
        process_madvise: errno of process_madvise(MADV_COLLAPSE) over nothing of a child.
        pfns: whether pagemap shows page frame numbers.
        pagemap_scan: whether the kernel has PAGEMAP_SCAN.
        userfaultfd: errno of making a userfaultfd for faults in user mode and requesting its features.
        userfaultfd_features: ``UFFD_FEATURE_*`` that the kernel has; 0 if it failed.
        split: the ability to split folios of this process.
    """

    collapse_known: int
    collapse: int | None
    process_madvise: int | None
    pfns: bool
    pagemap_scan: bool
    userfaultfd: int | None
    userfaultfd_features: int
    split: SplitAbility


def probe(geometry: Geometry) -> Probed:
    """Make all trials. Takes a few milliseconds, and twice the PMD size of address space."""
    # Over nothing, an unknown advice fails with EINVAL, and a known one succeeds (madvise_behavior_valid() comes before
    # the length in do_madvise(), mm/madvise.c).
    known = abi.madvise(0, 0, abi.MADV_COLLAPSE)
    tried = known == 0 and geometry.pmd_size <= LARGEST_TRIAL
    uffd_error, features = probe_userfaultfd()
    return Probed(
        collapse_known=known,
        collapse=probe_collapse(geometry) if tried else None,
        process_madvise=probe_process_madvise(),
        pfns=can_see_pfns(),
        pagemap_scan=probe_pagemap_scan(),
        userfaultfd=uffd_error,
        userfaultfd_features=features,
        split=split_ability(geometry),
    )


def probe_collapse(geometry: Geometry) -> int:
    """Collapse one PMD range of fresh memory with one page written, and release it; return 0, or errno."""
    try:
        memory = mmap.mmap(-1, 2 * geometry.pmd_size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError as error:
        return error.errno or errno.ENOMEM
    with memory:
        view = ctypes.c_char.from_buffer(memory)
        address = -(-ctypes.addressof(view) // geometry.pmd_size) * geometry.pmd_size
        # The mapping cannot be released while the view exists.
        del view
        # A collapse of huge memory would succeed without doing anything. So the page is touched while the rest of its
        # PMD range is inaccessible, and hence another mapping: no huge page fits, whatever the switches are.
        rest, size = address + geometry.page_size, geometry.pmd_size - geometry.page_size
        if _libc.mprotect(rest, size, PROT_NONE):
            return ctypes.get_errno()
        ctypes.memset(address, 1, 1)
        if _libc.mprotect(rest, size, mmap.PROT_READ | mmap.PROT_WRITE):
            return ctypes.get_errno()
        return abi.madvise(address, geometry.pmd_size, abi.MADV_COLLAPSE)


def probe_process_madvise() -> int | None:
    """Advise nothing to a child process.

    Returns:
        0, the errno of process_madvise(2) or pidfd_open(2), or None if no child could be started.
    """
    try:
        # It ends by itself, in case this process is killed right now.
        # Not this process: newer kernels let it advise its own memory without any rights.
        child = subprocess.Popen(
            [sys.executable, "-ISc", "import time; time.sleep(10)"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
    except OSError:
        return None
    with child:
        try:
            pidfd = os.pidfd_open(child.pid)
        except OSError as error:
            return error.errno
        else:
            try:
                # With nothing to advise the rights are checked nevertheless: EACCES without those to read the target,
                # EINVAL if this advice cannot be given to others, EPERM without CAP_SYS_NICE.
                return abi.process_madvise(pidfd, 0, 0, abi.MADV_COLLAPSE)
            finally:
                os.close(pidfd)
        finally:
            child.kill()


def probe_pagemap_scan() -> bool:
    """Return whether PAGEMAP_SCAN works on this process."""
    try:
        with Process("self") as process, Pagemap(process) as pagemap:
            return pagemap.can_scan
    except MthpError:
        # Without pidfds or pagemap it does not work either.
        return False


def probe_userfaultfd() -> tuple[int | None, int]:
    """Make a userfaultfd for faults in user mode only, which needs no rights, and return its features.

    Returns:
        (0 or errno, features). The errno is None on an architecture if its system call number is unknown here.
    """
    number = NR_USERFAULTFD.get(os.uname().machine)
    if number is None:
        return None, 0
    fd = _libc.syscall(ctypes.c_long(number), ctypes.c_long(os.O_CLOEXEC | UFFD_USER_MODE_ONLY))
    if fd < 0:
        return ctypes.get_errno(), 0
    try:
        answer = fcntl.ioctl(fd, UFFDIO_API, struct.pack(UFFDIO_API_ARG, UFFD_API, 0, 0))
    except OSError as error:
        return error.errno, 0
    finally:
        os.close(fd)
    _, features, _ = struct.unpack(UFFDIO_API_ARG, answer)
    return 0, features
