"""The machine code that moves blocks of its own process, and what it works with; the essay is in `guarded`.

The code is ``guarded_x86_64.S`` beside this file. It is called through ctypes, which gives the interpreter's lock away
for the time of the call, with signals held back in this thread and forks in all.
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
from collections.abc import Callable, Iterator

import numpy as np
from numpy.typing import NDArray

from mthp.closing import Closing
from mthp.errors import MthpError, NotPermittedError, UnsupportedError
from mthp.linux.interruptions import interruptions_held_back
from mthp.linux.mover.outcome import LostBytesError
from mthp.linux.probes import (
    NR_USERFAULTFD,
    PROT_NONE,
    UFFD_API,
    UFFD_FEATURE_MOVE,
    UFFD_USER_MODE_ONLY,
    UFFDIO_API,
    UFFDIO_API_ARG,
)

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

UFFDIO_REGISTER = 0xC020AA00
UFFDIO_REGISTER_MODE_MISSING = 1
"""include/uapi/linux/userfaultfd.h."""

MADV_POPULATE_WRITE = 23
MAP_NORESERVE = 0x4000
PROT_EXEC = 4
"""include/uapi/asm-generic/mman-common.h."""

ARGUMENTS_BYTES = 192
OPERATION = np.dtype([("block", "=u8"), ("length", "=u8"), ("error", "=i8"), ("stage", "=u8")])
"""The layout that the code works on; see its first lines."""

ALL_DONE, PLACE_LOST, BLOCK_LOST = range(3)
"""What the code returns."""

BLOCKS_PER_CALL = 256
"""So many are moved between two moments at which a signal is heard and a fork may go ahead."""

_Int64s = NDArray[np.int64]

_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, *(ctypes.c_int,) * 3, ctypes.c_long)
_libc.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
_libc.mprotect.argtypes = _libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)

_no_fork = threading.Lock()


class OwnMover(Closing):
    """The code, its scratch memory and its userfaultfd. A context manager.

    Args:
        size: of a block in bytes.
        guarded: whether faults in the kernel are to wait too.
    """

    def __init__(self, size: int, *, guarded: bool) -> None:
        if os.uname().machine != "x86_64":
            raise UnsupportedError(
                f"on {os.uname().machine} this process cannot move its own memory", help="x86_64; or the PMD order"
            )
        self.size = size
        self._memory = _Memory(ARGUMENTS_BYTES + BLOCKS_PER_CALL * OPERATION.itemsize)
        self._fd = self._away = self._place = -1
        try:
            self._fd = _userfaultfd(guarded=guarded)
            self._away = _map(size, mmap.PROT_READ | mmap.PROT_WRITE)
            self._place = _reserve(size)
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
            An errno for each, 0 for success: int64, shape (blocks,).

        Raises:
            LostBytesError: a block could not be put back; its bytes are kept and whoever touches it waits.
        """
        if fill:
            for address in addresses.tolist():
                _libc.madvise(address, self.size, MADV_POPULATE_WRITE)
        errors = self._move(addresses)
        # Pages that a child was forked from, and that has exited, are ours alone again only when they are written.
        again = np.flatnonzero((errors == errno.EBUSY) | (errors == errno.EAGAIN))
        for address in addresses[again].tolist():
            _libc.madvise(address, self.size, MADV_POPULATE_WRITE)
        if len(again):
            errors[again] = self._move(addresses[again])
        return errors

    def _move(self, addresses: _Int64s) -> _Int64s:
        operations = np.frombuffer(self._memory.view(ARGUMENTS_BYTES, len(addresses) * OPERATION.itemsize), OPERATION)
        operations["block"], operations["length"] = addresses, self.size
        words = np.frombuffer(self._memory.view(0, 40), np.uint64)
        words[:] = len(addresses), self._fd, self._away, self._place, self._memory.address + ARGUMENTS_BYTES
        while words[0]:
            with interruptions_held_back():
                with _undisturbed():
                    answer = _function()(self._memory.address)
                # Before anything else may happen, these are no longer ours to give back.
                if answer == PLACE_LOST:
                    self._place = -1
                if answer == BLOCK_LOST:
                    # To close the userfaultfd would wake those who wait, to find an empty page.
                    kept, self._fd, self._away = self._away, -1, -1
            if answer == BLOCK_LOST:
                lost = int(operations["block"][len(addresses) - int(words[0])])
                raise LostBytesError(f"the block at {lost:#x} could not be put back; its bytes are at {kept:#x}")
            if answer == PLACE_LOST:
                words[3] = self._place = _reserve(self.size)
        errors: _Int64s = -operations["error"].copy()
        # mremap(2) gives -1 to -4095 for errors like all others, but an address that was not asked for is none.
        errors[(errors < 0) | (errors > 4095)] = errno.EFAULT
        return errors

    def close(self) -> None:
        """Give back what is ours. Closing twice does nothing."""
        for address in (self._away, self._place):
            if address >= 0:
                _libc.munmap(address, self.size)
        if self._fd >= 0:
            os.close(self._fd)
        self._fd = self._away = self._place = -1
        self._memory.close()


class _Memory:
    """Memory that the code alone reads and writes while it runs."""

    def __init__(self, size: int) -> None:
        self._size = size
        self.address = _map(size, mmap.PROT_READ | mmap.PROT_WRITE)

    def view(self, offset: int, size: int) -> memoryview:
        """`size` bytes from byte `offset` on."""
        return memoryview((ctypes.c_char * size).from_address(self.address + offset)).cast("B")

    def close(self) -> None:
        """Give it back. Closing twice does nothing."""
        if self.address >= 0:
            _libc.munmap(self.address, self._size)
        self.address = -1


@contextlib.contextmanager
def _undisturbed() -> Iterator[None]:
    """Hold back signals in this thread, and forks in all."""
    with _no_fork:
        before = signal.pthread_sigmask(signal.SIG_BLOCK, ())
        try:
            signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
            yield
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)


@functools.cache
def _function() -> Callable[[int], int]:
    """The code in executable memory, as a function that runs without the interpreter's lock."""
    address = _map(len(CODE), mmap.PROT_READ | mmap.PROT_WRITE)
    ctypes.memmove(address, CODE, len(CODE))
    if _libc.mprotect(address, len(CODE), mmap.PROT_READ | PROT_EXEC):
        raise UnsupportedError(
            f"memory cannot be made executable: {os.strerror(ctypes.get_errno())}",
            help="a security module or prctl(PR_SET_MDWE) forbids it",
        )
    os.register_at_fork(before=_no_fork.acquire, after_in_parent=_no_fork.release, after_in_child=_no_fork.release)
    function: Callable[[int], int] = ctypes.CFUNCTYPE(ctypes.c_long, ctypes.c_void_p)(address)
    return function


def _userfaultfd(*, guarded: bool) -> int:
    """A userfaultfd of this process.

    Raises:
        NotPermittedError: it may not see faults in the kernel.
        UnsupportedError: the kernel cannot move pages.
    """
    flags = os.O_CLOEXEC | (0 if guarded else UFFD_USER_MODE_ONLY)
    fd = int(_libc.syscall(ctypes.c_long(NR_USERFAULTFD[os.uname().machine]), ctypes.c_long(flags)))
    if fd < 0:
        raise NotPermittedError(
            f"userfaultfd: {os.strerror(ctypes.get_errno())}",
            help="CAP_SYS_PTRACE, or vm.unprivileged_userfaultfd=1; or guarded=False, while nobody uses the memory",
        )
    try:
        fcntl.ioctl(fd, UFFDIO_API, struct.pack(UFFDIO_API_ARG, UFFD_API, UFFD_FEATURE_MOVE, 0))
    except OSError as error:
        os.close(fd)
        raise UnsupportedError(f"userfaultfd: {error.strerror}", help="Linux 6.8 or later") from error
    return fd


def _map(size: int, protection: int, flags: int = 0) -> int:
    """Map `size` bytes of private memory.

    Raises:
        MthpError: there is no room.
    """
    address = _libc.mmap(None, size, protection, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | flags, -1, 0)
    if address == ctypes.c_void_p(-1).value:
        raise MthpError(f"mmap: {os.strerror(ctypes.get_errno())}")
    return int(address)


def _reserve(size: int) -> int:
    """Reserve `size` bytes of addresses, naturally aligned."""
    start = _map(2 * size, PROT_NONE, MAP_NORESERVE)
    address = -(-start // size) * size
    for low, high in ((start, address), (address + size, start + 2 * size)):
        if low < high:
            _libc.munmap(low, high - low)
    return address
