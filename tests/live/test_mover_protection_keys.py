"""Threads that their protection keys bar from ordinary memory, where our code and data would lie."""

from __future__ import annotations

import os

import pytest

from mover_targets import PREAMBLE, READY, is_refused, program
from mthp.linux.mover.arch.x86_64 import has_protection_keys

pytestmark = [
    pytest.mark.live,
    pytest.mark.requires("root", "mthp", "mover"),
    pytest.mark.skipif(os.uname().machine != "x86_64", reason="it is machine code"),
    pytest.mark.skipif(not has_protection_keys(), reason="this processor has no protection keys"),
]

BARRED = """
at = libc.mmap(None, 4096, 7, 0x22, -1, 0)
# mov eax, 3; xor ecx, ecx; xor edx, edx; wrpkru; jmp to itself: it touches no memory any more
ctypes.memmove(at, bytes.fromhex("b80300000031c931d20f01efebfe"), 14)
thread(ctypes.CFUNCTYPE(None)(at))
time.sleep(0.5)
"""


def test_a_thread_without_access_to_ordinary_memory_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    # The kernel writes to a thread's rseq area with the thread's own rights, and ends it if it cannot.
    monkeypatch.setenv("GLIBC_TUNABLES", "glibc.pthread.rseq=0")
    with program(PREAMBLE + BARRED + READY) as (pid, _):
        is_refused(pid, "protection keys")
