"""A process that makes system calls on a few pages at a fixed address, and prints its mappings there after each.

    python mapping_calls.py ADDRESS PAGES

A call is one line of JSON on standard input, its pages counted from ADDRESS; an answer is its result (0, or the
negative of an error number), and the mappings as [first page, last page, permissions]. After "fork" the child answers.
"""

from __future__ import annotations

import ctypes
import json
import os
import sys
from typing import Any

PROTECTIONS = {"r--": 1, "rw-": 3}
ADVICE = {"HUGEPAGE": 14, "NOHUGEPAGE": 15}
MAP_PRIVATE_ANONYMOUS_FIXED_NOREPLACE = 0x100022
MAYMOVE_FIXED, DONTUNMAP = 3, 4

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = _libc.mremap.restype = ctypes.c_long
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
_libc.mremap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t, ctypes.c_int, ctypes.c_void_p]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_libc.mprotect.argtypes = _libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


def call(name: str, address: int, size: int, *more: Any) -> int:
    """Make one call, and return its result."""
    result = 0
    if name == "map":
        result = _libc.mmap(address, size, PROTECTIONS["rw-"], MAP_PRIVATE_ANONYMOUS_FIXED_NOREPLACE, -1, 0)
    elif name == "munmap":
        result = _libc.munmap(address, size)
    elif name == "mprotect":
        result = _libc.mprotect(address, size, PROTECTIONS[more[0]])
    elif name == "madvise":
        result = _libc.madvise(address, size, ADVICE[more[0]])
    elif name == "mremap":
        to, leave = more
        result = _libc.mremap(address, size, size, MAYMOVE_FIXED | (DONTUNMAP if leave else 0), to)
    elif name == "write":
        ctypes.memset(address, 1, 1)
    elif name == "read":
        ctypes.string_at(address, 1)
    elif child := os.fork():
        os.waitpid(child, 0)
        os._exit(0)
    return 0 if result >= 0 else -ctypes.get_errno()


def mappings(base: int, pages: int, page: int) -> list[list[Any]]:
    """Return the mappings between two addresses."""
    found: list[list[Any]] = []
    with open("/proc/self/maps") as file:
        for line in file:
            bounds, permissions, *_ = line.split()
            first, last = (int(text, 16) for text in bounds.split("-"))
            if first < base + pages * page and last > base:
                found.append([(first - base) // page, (last - base) // page, permissions])
    return found


def main() -> None:
    base, pages, page = int(sys.argv[1]), int(sys.argv[2]), os.sysconf("SC_PAGESIZE")
    for line in sys.stdin:
        name, first, last, *more = json.loads(line)
        if name == "mremap":
            more[0] = base + more[0] * page
        result = call(name, base + first * page, (last - first) * page, *more)
        print(json.dumps([result, mappings(base, pages, page)]), flush=True)


if __name__ == "__main__":
    main()
