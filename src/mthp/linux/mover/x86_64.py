"""The mover on x86-64; the stub is ``stub_x86_64.S`` beside this file, assembled."""

from __future__ import annotations

import errno
import struct
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray

from mthp.linux.mover.machine import (
    ERESTART_RESTARTBLOCK,
    ERESTARTNOHAND,
    ERESTARTNOINTR,
    ERESTARTSYS,
    Machine,
    Registers,
)

CODE = bytes.fromhex(
    """
    e93601000066662e0f1f840000000000b80e000000bf02000000488d7548ba0000000041ba080000000f058b4d0083f9020f839300000083
    f900754448ff83980000004883bb9800000064736948c783a00000000000000048c783a8000000404b4c00b80f01000031ff31f6488d93a0
    0000004531d241b8080000000f05ebab48c783a00000000000000048c783a8000000400d0300b80f01000031ff31f6488d93a00000004531
    d241b8080000000f05e975ffffffb800000000b903000000f00fb14d00e961ffffff488da300010000ff73109d488b6308b80e000000bf02
    000000488db390000000ba0000000041ba080000000f05488b4318488b4b28488b5330488b7338488b7b40488b6b484c8b43504c8b4b584c
    8b53604c8b5b684c8b63704c8b6b784c8bb3800000004c8bbb88000000ffa3b0000000b800000000b901000000f00fb14d000f85dbfeffff
    4531e44c8dad800000004c3b65080f83ae010000b8e4000000bf01000000498d75400f0549f74510020000007421b81c000000498b7d0049
    8b7508ba170000000f05498945184885c00f855401000049f7451001000000744fb81c000000498b7d00498b7508ba160000000f05498945
    184885c00f8529010000498b7500498b4d0848ba157c4a7fb979379e4889d0483306480fafc248c1c01d4883c6084883e90875eb49894528
    4c8b75104c897520498b450048894528498b45084889453048c745380000000048c7454000000000b810000000488b7d18be05aa28c0488d
    55200f0549894518b8e4000000bf01000000498d75500f05488b4d404883f9007e3649894d20498b7d004c89f648c1e903fcf348a5b8e400
    0000bf01000000498d75600f05b81c0000004c89f7498b7520ba040000000f0549837d18f0752c49837d3800752549c7453801000000b81c
    000000498b7d00498b7508ba170000000f054885c00f843dffffff49f7451001000000742e498b7500498b4d0848ba157c4a7fb979379e48
    89d0483306480fafc248c1c01d4883c6084883e90875eb49894530b8e4000000bf01000000498d75700f0549ffc44981c580000000e948fe
    ffffc745000200000048c783a00000000000000048c783a800000080f0fa02b80f01000031ff31f6488d93a00000004531d241b808000000
    0f05e9dcfcffff
    """
)

NO_SYSCALL = (1 << 64) - 1
"""In ``orig_rax``: not in a system call, so nothing is there to be restarted."""

USER_CS = 0x33
"""Code segment of a thread that runs 64-bit code (__USER_CS)."""

NR_RESTART_SYSCALL = 219

EINTR_CALLS = frozenset(
    {
        232,  # epoll_wait
        281,  # epoll_pwait
        441,  # epoll_pwait2
        128,  # rt_sigtimedwait, and so sigwaitinfo
        65,  # semop
        220,  # semtimedop
        208,  # io_getevents
        333,  # io_pgetevents
        0,  # read, and those below: of a socket with SO_RCVTIMEO or SO_SNDTIMEO
        1,  # write
        19,  # readv
        20,  # writev
        40,  # sendfile
        42,  # connect
        43,  # accept
        288,  # accept4
        44,  # sendto
        45,  # recvfrom
        46,  # sendmsg
        47,  # recvmsg
        299,  # recvmmsg
        307,  # sendmmsg
        275,  # splice
        327,  # preadv2
        328,  # pwritev2
    }
)
"""System calls that a stop makes return EINTR, where signal(7) has them restarted or not interrupted."""

_SYSCALL = b"\x0f\x05"
REGISTERS = (
    *("r15", "r14", "r13", "r12", "rbp", "rbx", "r11", "r10", "r9", "r8", "rax", "rcx", "rdx", "rsi", "rdi"),
    *("orig_rax", "rip", "cs", "eflags", "rsp", "ss", "fs_base", "gs_base", "ds", "es", "fs", "gs"),
)
"""``struct user_regs_struct`` of arch/x86/include/uapi/asm/ptrace.h."""

COLUMN = {name: column for column, name in enumerate(REGISTERS)}
_RIP, _RAX, _ORIG_RAX, _EFLAGS = COLUMN["rip"], COLUMN["rax"], COLUMN["orig_rax"], COLUMN["eflags"]
_RBX, _RBP, _CS = COLUMN["rbx"], COLUMN["rbp"], COLUMN["cs"]
_CLEARED_FLAGS = 0x100 | 0x400 | 0x40000
"""TF, DF and AC of the flags register: single step, string direction, alignment check."""

CONTEXT = (
    *("rip", "rsp", "eflags", "rax", "rbx", "rcx", "rdx", "rsi", "rdi", "rbp"),
    *(f"r{number}" for number in range(8, 16)),
    *("mask", "ticks", "nap_seconds", "nap_nanoseconds", "trampoline"),
)
"""The words of a context."""

_CONTEXT_BYTES = 256
_IN_CONTEXT = [COLUMN[name] for name in CONTEXT[:18]]


class X8664(Machine):
    """x86-64. A thread restores the last three registers (rbx, rsp, rip) from fixed addresses in its trampoline."""

    name = "x86_64"
    words = len(REGISTERS)
    pc, sp, number, result = _RIP, COLUMN["rsp"], _RAX, _RAX
    arguments = tuple(COLUMN[name] for name in ("rdi", "rsi", "rdx", "r10", "r8", "r9"))
    syscall = _SYSCALL
    alignment = 1
    forgets_calls = False
    calls = MappingProxyType(
        {
            "close": 3,
            "mmap": 9,
            "mprotect": 10,
            "munmap": 11,
            "madvise": 28,
            "fcntl": 72,
            "ptrace": 101,
            "waitid": 247,
            "userfaultfd": 323,
        }
    )
    """arch/x86/entry/syscalls/syscall_64.tbl."""

    red_zone = 128
    """System V ABI of x86-64, 3.2.2."""

    code = CODE
    entry_worker, entry_park = 0, 16
    context_bytes = _CONTEXT_BYTES
    trampoline_bytes = 32

    def foreign(self, registers: Registers) -> NDArray[np.bool_]:
        """Code that runs in another segment than the ordinary one is 32-bit code."""
        different: NDArray[np.bool_] = registers[:, _CS] != USER_CS
        return different

    def in_call(self, registers: Registers) -> NDArray[np.bool_]:
        called: NDArray[np.bool_] = registers[:, _ORIG_RAX].view(np.int64) >= 0
        return called

    def repair(self, registers: Registers) -> NDArray[np.bool_]:
        """-ERESTARTNOHAND in its place is EINTR again where a handler is to run, and restarts the call elsewhere."""
        changed: NDArray[np.bool_] = registers[:, _RAX] == _negative(errno.EINTR)
        for row in np.flatnonzero(changed).tolist():
            changed[row] = int(registers[row, _ORIG_RAX]) in EINTR_CALLS
        registers[changed, _RAX] = _negative(ERESTARTNOHAND)
        return changed

    def leave_call(self, registers: Registers) -> None:
        registers[:, _ORIG_RAX] = NO_SYSCALL

    def parked(self, homes: Registers, contexts: NDArray[np.uint64], entry: int, header: int) -> Registers:
        registers = homes.copy()
        registers[:, _RIP], registers[:, _RBX], registers[:, _RBP] = entry, contexts, header
        registers[:, _ORIG_RAX] = NO_SYSCALL
        registers[:, _EFLAGS] &= np.uint64(~_CLEARED_FLAGS & NO_SYSCALL)
        return registers

    def pack_contexts(
        self, homes: Registers, masks: NDArray[np.uint64], trampolines: NDArray[np.uint64]
    ) -> NDArray[np.uint64]:
        contexts = np.zeros((len(homes), _CONTEXT_BYTES // 8), np.uint64)
        contexts[:, : len(_IN_CONTEXT)] = alone(homes)[:, _IN_CONTEXT]
        contexts[:, CONTEXT.index("mask")], contexts[:, CONTEXT.index("trampoline")] = masks, trampolines
        return contexts

    def trampoline(self, at: int, context: int) -> bytes:
        def relative(name: str, end: int) -> bytes:
            return struct.pack("=i", context + 8 * CONTEXT.index(name) - (at + end))

        code = b"\x48\x8b\x1d" + relative("rbx", 7)  # mov rbx, [rip + ...]
        code += b"\x48\x8b\x25" + relative("rsp", 14)  # mov rsp, [rip + ...]
        code += b"\xff\x25" + relative("rip", 20)  # jmp [rip + ...]
        return code.ljust(self.trampoline_bytes, b"\xcc")


def alone(homes: Registers) -> Registers:
    """Registers with which threads go on that the kernel does not help any more to restart their system calls.

    What arch_do_signal_or_restart (arch/x86/kernel/signal.c) does to a thread that leaves an interrupted call without
    a handler to run, done beforehand.
    """
    registers = homes.copy()
    called = homes[:, _ORIG_RAX]
    result = -homes[:, _RAX].view(np.int64)
    inside = called.view(np.int64) >= 0
    on = inside & (result == ERESTART_RESTARTBLOCK)
    again = inside & ((result == ERESTARTSYS) | (result == ERESTARTNOINTR) | (result == ERESTARTNOHAND))
    registers[again, _RAX] = called[again]
    registers[on, _RAX] = NR_RESTART_SYSCALL
    registers[again | on, _RIP] -= np.uint64(len(_SYSCALL))
    return registers


def _negative(number: int) -> int:
    return (1 << 64) - number
