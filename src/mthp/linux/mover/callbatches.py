"""Make many system calls at once.

A window costs mostly system calls, a dozen for every thread. Each takes the kernel one or two microseconds, and Python
as much again to make it. So the calls are prepared as rows of a table of numbers, and a few instructions of machine
code make them (``calls_x86_64.S``, ``calls_aarch64.S``; assembled below). The tables do not change from one window to
the next and are kept. Where this process may not have executable memory, the C library makes the rows one by one,
which takes longer and has the same result.
"""

from __future__ import annotations

import ctypes
import functools
import mmap
import os
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

CODE = {
    "x86_64": bytes.fromhex(
        "5341544889fb4989f4eb25488b03488b7b08488b7310488b53184c8b5320"
        "4c8b43284c8b4b300f05488943384883c3404983ec0173d5415c5bc3"
    ),
    "aarch64": bytes.fromhex(
        "e90300aaea0301aa4a0100b4280140a9210941a9231142a9251940f9010000d4201d00f9290101914a0500f101ffff54c0035fd6"
    ),
}
"""The two sources, assembled; a test compares them with this."""

WORDS = 8
"""64-bit words of a row: the call's number, six arguments, and its result."""

PROT_EXEC = 4

_RESULT = 7
# PyDLL and PYFUNCTYPE hold the interpreter's lock: no call here blocks, and another Python thread that ran in between
# would lengthen the time for which the target is stopped.
_libc = ctypes.PyDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long
_libc.syscall.argtypes = (ctypes.c_long,) * 7
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, *(ctypes.c_int,) * 3, ctypes.c_long)
_libc.mprotect.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
_libc.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)


class Calls:
    """System calls that are made together, any number of times.

    Attributes:
        table: number, six arguments and result of each call: uint64, shape (rows, 8).
        results: results of the calls, errors as negative numbers: int64, shape (rows,).
    """

    def __init__(self, rows: int) -> None:
        self.table = np.zeros((rows, WORDS), np.uint64)
        self.results: NDArray[np.int64] = self.table.view(np.int64)[:, _RESULT]
        self._run = _runner()
        self._address: int = self.table.__array_interface__["data"][0]

    def run(self, first: int = 0, count: int | None = None) -> None:
        """Make all calls, or `count` of them from row `first` on."""
        self._run(self._address + 8 * WORDS * first, len(self.table) - first if count is None else count)

    def run_each(self, first: int, count: int, after: Callable[[], None]) -> None:
        """Make `count` calls from row `first` on one by one, and call `after` after each."""
        for row in range(first, first + count):
            self._run(self._address + 8 * WORDS * row, 1)
            after()


@functools.cache
def _runner() -> Callable[[int, int], None]:
    """Return the function that makes the calls of a number of rows from an address on."""
    address = executable(CODE.get(os.uname().machine, b""))
    return ctypes.PYFUNCTYPE(None, ctypes.c_long, ctypes.c_long)(address) if address else one_by_one


def executable(code: bytes) -> int:
    """Return the address of a callable copy of `code`; 0 if `code` is empty or memory cannot be executed."""
    if not code:
        return 0
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    address = _libc.mmap(None, len(code), mmap.PROT_READ | mmap.PROT_WRITE, flags, -1, 0)
    if address in (None, ctypes.c_void_p(-1).value):
        return 0
    ctypes.memmove(address, code, len(code))
    if _libc.mprotect(address, len(code), mmap.PROT_READ | PROT_EXEC):
        _libc.munmap(address, len(code))
        return 0
    return int(address)


def one_by_one(address: int, rows: int) -> None:
    """Make the calls of `rows` rows through the C library."""
    table = (ctypes.c_int64 * WORDS * rows).from_address(address)
    for row in table:
        result = _libc.syscall(*row[:_RESULT])
        row[_RESULT] = -ctypes.get_errno() if result == -1 else result
