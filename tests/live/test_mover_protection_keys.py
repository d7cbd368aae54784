"""Threads that their protection keys bar from ordinary memory, where our code and data would lie."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from mover_targets import belongings, open_window, program
from mthp.linux.mover.arch.x86_64 import has_protection_keys
from mthp.linux.mover.tracee import CannotStopError
from mthp.linux.process import Process

pytestmark = [
    pytest.mark.live,
    pytest.mark.requires("root", "mthp", "mover"),
    pytest.mark.skipif(os.uname().machine != "x86_64", reason="it is machine code"),
    pytest.mark.skipif(not has_protection_keys(), reason="this processor has no protection keys"),
]

BARRED = """
import ctypes, threading, time
libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.restype = ctypes.c_void_p
libc.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, *(ctypes.c_int,) * 3, ctypes.c_long)
at = libc.mmap(None, 4096, 7, 0x22, -1, 0)
# mov eax, 3; xor ecx, ecx; xor edx, edx; wrpkru; jmp to itself: it touches no memory any more
ctypes.memmove(at, bytes.fromhex("b80300000031c931d20f01efebfe"), 14)
threading.Thread(target=ctypes.CFUNCTYPE(None)(at), daemon=True).start()
time.sleep(0.5)
print("ready", flush=True)
time.sleep(600)
"""


def test_a_thread_without_access_to_ordinary_memory_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    # The kernel writes to a thread's rseq area with the thread's own rights, and ends it if it cannot.
    monkeypatch.setenv("GLIBC_TUNABLES", "glibc.pthread.rseq=0")
    with program(BARRED) as (pid, _), Process(pid) as process:
        before = belongings(pid)
        with pytest.raises(CannotStopError, match="protection keys"):
            open_window(process)
        assert belongings(pid) == before
        assert Path(f"/proc/{pid}/status").exists()
