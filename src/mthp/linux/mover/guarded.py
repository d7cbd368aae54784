"""Move memory of this very process into folios of a wanted order, while its other threads go on using it.

No thread is stopped or traced. Instead a userfaultfd guards the memory: a thread that touches a page that is away
waits in its page fault, and goes on when the page is back. For each block, one after another:

1. Register the block with the userfaultfd (MISSING), which temporarily makes it a mapping of its own.
2. UFFDIO_MOVE takes its pages away into a scratch area. From here on a touch waits. The kernel refuses pinned and
   shared pages; then the pages already moved are moved back, and the block stays as it was.
3. mremap(MREMAP_DONTUNMAP) makes an empty twin of the block's mapping at another address, unknown to all other code.
   The block itself cannot be filled, because UFFDIO_COPY and UFFDIO_MOVE insert single pages, and an ordinary fault of
   this thread would wait for this thread.
4. Copying the bytes into the twin faults in one folio. The twin is a mapping of exactly the block's size, so a larger
   folio does not fit; a smaller one comes if memory is short. Its size must be enabled: a switch of the system, which
   has a journal (:mod:`~mthp.linux.journal`).
5. mremap puts the twin in the block's place, with its folio, in one step for all other threads. The kernel then merges
   it with its neighbours into one mapping, because it has their flags, their anon_vma and their offsets.
6. The waiting threads are woken, and find the page.

Machine code does these steps (``guarded_x86_64.S``, kept as bytes below). It touches nothing but registers, the stack
and memory made for it. C code must not fork without Python meanwhile; vfork and posix_spawn are harmless.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import functools
import mmap
import os
import signal
import struct
import threading
import time
from collections.abc import Callable, Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from mthp.closing import Closing
from mthp.errors import MthpError, NotPermittedError, UnsupportedError
from mthp.geometry import Geometry
from mthp.linux import abi
from mthp.linux.interruptions import interruptions_held_back
from mthp.linux.mover.callbatches import executable
from mthp.linux.mover.hold import Hold
from mthp.linux.mover.outcome import LostBytesError, reason_of_move, result_of_move
from mthp.linux.mover.recheck import Before
from mthp.linux.mover.refuse.block import SpecialRanges
from mthp.linux.probes import (
    NR_USERFAULTFD,
    PROT_NONE,
    UFFD_API,
    UFFD_FEATURE_MOVE,
    UFFD_USER_MODE_ONLY,
    UFFDIO_API,
    UFFDIO_API_ARG,
    UFFDIO_REGISTER,
    UFFDIO_REGISTER_MODE_MISSING,
)
from mthp.means import Means
from mthp.movechecks import Refusal
from mthp.ptes import Block
from mthp.results import BlockOutcome

CODE = bytes.fromhex(
    """
    535541544155415641574889fbfc31c048833b000f84cd0100004c8b63204d8b3c244d8b742408488b6b184c897b404c89734848c7435001
    00000048c74358000000004c89bb880000004c89b390000000be00aa20c0488d5340e8f201000049c74424180100000049894424104885c0
    0f8557010000488b7b104c89fe4c89f2e8a8010000be05aa28c0e8be010000488b8b8000000049c7442418020000004885c075694c89ff41
    ba070000004989e8e8a801000049c7442418030000004c89f14839e87547488b73104889ef4c89f148c1e903f348a54889ef41ba03000000
    4d89f8e87501000049c7442418040000004c89f14c39f8751449c74424100000000049c744241800000000eb6b498944241048894b2848c7
    433000000000488b4b30483b4b287d3fbe05aa28c0e8c000000074eabe03aa28c0e8b400000074de4883f8f47509b8180000000f05ebcf49
    8944241049c744241805000000b802000000e980000000be01aa1080488d9388000000e8d9000000be02aa1080488d9388000000e8c80000
    00b81c000000488b7b104c89f6ba040000000f05498b4424184883f80274267731b8090000004889ef4c89f631d241ba2240100049c7c0ff
    ffffff4531c90f054839e8750d488343202048ff0be934feffff488343202048ff0bb801000000415f415e415d415c5d5bc3488b4b30498d
    3c0f488b53284829ca56488b73104801cee81f0000005ee839000000488b8b800000004883f9007e0748014b3031c9c34883f8f5c348897b
    60488973684889537048c743780000000048c7838000000000000000c3488d5360b810000000488b7b080f05c3b8190000004c89f64c89f2
    0f05c3
    """
)
"""``guarded_x86_64.S``, assembled; a test compares the two."""

MADV_POPULATE_WRITE = 23
MAP_NORESERVE = 0x4000
"""include/uapi/asm-generic/mman-common.h and mman.h."""

ARGUMENTS_BYTES = 192
OPERATION = np.dtype([("block", "=u8"), ("length", "=u8"), ("error", "=i8"), ("stage", "=u8")])
"""The layout of an operation in the code's table; see the code's first lines."""

ALL_DONE, PLACE_LOST, BLOCK_LOST = range(3)
"""Results of the code."""

BLOCKS_PER_CALL = 256
"""Blocks moved in one call. Between two calls signals are handled and a fork may go ahead."""

TABLE_BYTES = ARGUMENTS_BYTES + BLOCKS_PER_CALL * OPERATION.itemsize
"""Size of the memory that only the code reads and writes while it runs, in bytes."""

_Int64s = NDArray[np.int64]

_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, *(ctypes.c_int,) * 3, ctypes.c_long)
_libc.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)

STACK_MARGIN = 64 << 10
"""Bytes that a thread may move its stack pointer between the check and the call."""

THREAD_MARGIN = 4096
"""Bytes between a thread's robust list and its rseq area at most: C libraries keep both in one structure."""

_no_fork = threading.Lock()


class BlockGuard(Hold):
    """A hold on blocks of this process: threads that touch them wait.

    Args:
        guarded: whether other threads, also in system calls, may use the memory meanwhile; otherwise only the kernel.
    """

    waived = frozenset(("itself", "init", "ancestor", "traced", "threads", "vfork", "uninterruptible")) | {
        # A process in the same address space faults in it too, and waits for the guard like a thread.
        "shared_vm",
        "shared_vm_unknown",
    }
    """Refusals that apply only to processes stopped from outside."""

    def __init__(self, geometry: Geometry, *, guarded: bool = True) -> None:
        self._geometry = geometry
        self._guarded = guarded
        self._mover: OwnMover | None = None

    def admit(self, means: Means, refusals: Sequence[Refusal]) -> None:
        """Raise on any refusal of the process: the calling program has to be informed."""
        if means.verify:
            raise UnsupportedError(
                "own memory cannot be verified: other threads go on writing to it", help="leave --verify out"
            )
        for refusal in refusals:
            raise UnsupportedError(f"this process cannot move its own memory: {refusal.reason}", help=refusal.remedy)

    def too_large(self, order: int) -> range:
        """Return none: a larger folio does not fit into the twin."""
        return range(order, order)

    def around(self, special: SpecialRanges) -> SpecialRanges:
        """Return the memory that threads use without a fault that could wait, with a margin."""
        return SpecialRanges(
            # This covers the rseq area too, which only a tracer could ask the kernel for.
            robust_lists=tuple((start - THREAD_MARGIN, end + THREAD_MARGIN) for start, end in special.robust_lists),
            stacks=tuple((start - STACK_MARGIN, end + STACK_MARGIN) for start, end in special.stacks),
        )

    def ready(self, order: int) -> OwnMover:
        """Return the code and its userfaultfd, to be closed afterwards.

        Raises:
            UnsupportedError: this machine or kernel cannot do it; the message has the reason.
            NotPermittedError: the rights are not sufficient for the guard.
        """
        self._mover = OwnMover(self._geometry.size_of(order), guarded=self._guarded)
        return self._mover

    def windows(self, blocks: Sequence[Block], means: Means, _before: Before) -> Iterator[list[BlockOutcome]]:
        """Move as many blocks at a time as fit into one call. A block that could not be moved keeps its bytes."""
        assert self._mover is not None
        for start in range(0, len(blocks), BLOCKS_PER_CALL):
            part = blocks[start : start + BLOCKS_PER_CALL]
            begin = time.perf_counter_ns()
            errors = self._mover.move(np.array([address for address, _ in part], np.int64), fill=means.fill).tolist()
            elapsed = (time.perf_counter_ns() - begin) // len(part)
            yield [
                BlockOutcome(*block, result_of_move(error), reason_of_move(error), elapsed_ns=elapsed, errno=error)
                for block, error in zip(part, errors, strict=True)
            ]


class OwnMover(Closing):
    """The machine code, its scratch memory and its userfaultfd. A context manager.

    Args:
        guarded: whether faults in the kernel also wait.
    """

    def __init__(self, size: int, *, guarded: bool) -> None:
        if os.uname().machine != "x86_64":
            raise UnsupportedError(
                f"on {os.uname().machine} this process cannot move its own memory", help="x86_64; or the PMD order"
            )
        self.size = size
        self._fd = self._away = self._place = -1
        self._table = _map(TABLE_BYTES, mmap.PROT_READ | mmap.PROT_WRITE)
        try:
            self._fd = _userfaultfd(guarded=guarded)
            self._away = _map(size, mmap.PROT_READ | mmap.PROT_WRITE)
            self._place = _reserve(size)
            # UFFDIO_MOVE takes only a destination that is registered with its own userfaultfd (mm/userfaultfd.c).
            words = struct.pack("=4Q", self._away, size, UFFDIO_REGISTER_MODE_MISSING, 0)
            fcntl.ioctl(self._fd, UFFDIO_REGISTER, words)
        except (OSError, MthpError):
            self.close()
            raise

    def move(self, addresses: _Int64s, *, fill: bool = False) -> _Int64s:
        """Move the blocks at `addresses`, at most BLOCKS_PER_CALL.

        Args:
            fill: populate absent pages first.

        Returns:
            An errno for each block, 0 for success: int64, shape (blocks,).

        Raises:
            LostBytesError: a block could not be put back; its bytes are kept, and threads that touch it wait.
        """
        if fill:
            for address in addresses.tolist():
                abi.madvise(address, self.size, MADV_POPULATE_WRITE)
        errors = self._move(addresses)
        # Pages once shared with a child that has exited become exclusive only when they are written again.
        again = np.flatnonzero((errors == errno.EBUSY) | (errors == errno.EAGAIN))
        for address in addresses[again].tolist():
            abi.madvise(address, self.size, MADV_POPULATE_WRITE)
        if len(again):
            errors[again] = self._move(addresses[again])
        return errors

    def _move(self, addresses: _Int64s) -> _Int64s:
        table = memoryview((ctypes.c_char * TABLE_BYTES).from_address(self._table)).cast("B")
        operations = np.frombuffer(table, OPERATION, len(addresses), ARGUMENTS_BYTES)
        operations["block"], operations["length"] = addresses, self.size
        words = np.frombuffer(table, np.uint64, 5)
        words[:] = len(addresses), self._fd, self._away, self._place, self._table + ARGUMENTS_BYTES
        while words[0]:
            with interruptions_held_back():
                # Not in Python: this thread would wait for ever for one that waits for the block with the interpreter's
                # lock, which ctypes releases. And the block may hold the interpreter's objects, even its list.
                with _undisturbed():
                    answer = _function()(self._table)
                # Record at once that these must not be unmapped or closed any more.
                if answer == PLACE_LOST:
                    self._place = -1
                if answer == BLOCK_LOST:
                    # Closing the userfaultfd would wake the waiting threads, and they would find an empty page.
                    kept, self._fd, self._away = self._away, -1, -1
            if answer == BLOCK_LOST:
                lost = int(operations["block"][len(addresses) - int(words[0])])
                raise LostBytesError(f"the block at {lost:#x} could not be put back; its bytes are at {kept:#x}")
            if answer == PLACE_LOST:
                words[3] = self._place = _reserve(self.size)
        errors: _Int64s = -operations["error"].copy()
        # mremap(2) returns -1 to -4095 for errors as all calls do; any other wrong address is not an errno.
        errors[(errors < 0) | (errors > 4095)] = errno.EFAULT
        return errors

    def close(self) -> None:
        """Unmap the memory and close the userfaultfd. Closing twice does nothing."""
        for address, size in ((self._away, self.size), (self._place, self.size), (self._table, TABLE_BYTES)):
            if address >= 0:
                _libc.munmap(address, size)
        if self._fd >= 0:
            os.close(self._fd)
        self._fd = self._away = self._place = self._table = -1


@contextlib.contextmanager
def _undisturbed() -> Iterator[None]:
    """Block signals in this thread, and forks in all threads."""
    with _no_fork:
        # Asked first: the call that blocks them may raise what a handler raises, and then returns no mask.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, ())
        try:
            # A handler in this thread could touch the block, and would wait for this very thread.
            signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
            yield
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)


@functools.cache
def _function() -> Callable[[int], int]:
    """Return the code in executable memory, as a function that runs without the interpreter's lock."""
    address = executable(CODE)
    if not address:
        raise UnsupportedError(
            f"memory cannot be made executable: {os.strerror(ctypes.get_errno())}",
            help="a security module or prctl(PR_SET_MDWE) forbids it",
        )
    # A child forked in the middle would find the block empty.
    os.register_at_fork(before=_no_fork.acquire, after_in_parent=_no_fork.release, after_in_child=_no_fork.release)
    function: Callable[[int], int] = ctypes.CFUNCTYPE(ctypes.c_long, ctypes.c_void_p)(address)
    return function


def _userfaultfd(*, guarded: bool) -> int:
    """Return a new userfaultfd of this process."""
    # The guard waits in faults of the kernel, too: without it a system call of another thread that uses the block fails
    # with EFAULT. It takes privilege (userfaultfd_syscall_allowed, fs/userfaultfd.c in 6.18).
    flags = os.O_CLOEXEC | (0 if guarded else UFFD_USER_MODE_ONLY)
    fd = int(_libc.syscall(ctypes.c_long(NR_USERFAULTFD[os.uname().machine]), ctypes.c_long(flags)))
    if fd < 0:
        raise NotPermittedError(
            f"userfaultfd: {os.strerror(ctypes.get_errno())}",
            help="CAP_SYS_PTRACE, or vm.unprivileged_userfaultfd=1; or guarded=False, while no thread uses the memory",
        )
    try:
        fcntl.ioctl(fd, UFFDIO_API, struct.pack(UFFDIO_API_ARG, UFFD_API, UFFD_FEATURE_MOVE, 0))
    except OSError as error:
        os.close(fd)
        raise UnsupportedError(f"userfaultfd: {error.strerror}", help="Linux 6.8 or later") from error
    return fd


def _map(size: int, protection: int, flags: int = 0) -> int:
    address = _libc.mmap(None, size, protection, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | flags, -1, 0)
    if address == ctypes.c_void_p(-1).value:
        raise MthpError(f"mmap: {os.strerror(ctypes.get_errno())}")
    return int(address)


def _reserve(size: int) -> int:
    """Reserve `size` bytes of addresses, naturally aligned."""
    # mmap aligns to pages only: of twice the size, the aligned part is kept.
    start = _map(2 * size, PROT_NONE, MAP_NORESERVE)
    address = -(-start // size) * size
    for low, high in ((start, address), (address + size, start + 2 * size)):
        if low < high:
            _libc.munmap(low, high - low)
    return address
