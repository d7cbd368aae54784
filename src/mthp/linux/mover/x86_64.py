"""The mover on x86-64; the stub is ``stub_x86_64.S`` beside this file, assembled."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import functools
import struct
from pathlib import Path
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray

from mthp.linux.mover import ptrace
from mthp.linux.mover.calls import executable
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
    e95a01000066662e0f1f84000000000048c783b800000001000000b80e000000bf02000000488d7548ba0000000041ba080000000f058b4d
    0083f9020f839300000083f900754448ff83980000004883bb9800000064736948c783a00000000000000048c783a8000000404b4c00b80f
    01000031ff31f6488d93a00000004531d241b8080000000f05ebab48c783a00000000000000048c783a8000000400d0300b80f01000031ff
    31f6488d93a00000004531d241b8080000000f05e975ffffffb800000000b903000000f00fb14d00e961ffffff4883bbd8000000000f8537
    030000488da380010000ff73109d488b6308b80e000000bf02000000488db390000000ba0000000041ba080000000f05488b4318488b4b28
    488b5330488b7338488b7b40488b6b484c8b43504c8b4b584c8b53604c8b5b684c8b63704c8b6b784c8bb3800000004c8bbb8800000048c7
    83c000000001000000ffa3b0000000b800000000b901000000f00fb14d000f85c2feffffb81c000000488b7d10488bb598000000ba040000
    0048c74550010000000f054885c00f882d020000b843010000bf0100080048c74550020000000f054885c00f881002000048894518b81000
    0000488b7d18be3faa18c0488d556048c74550030000000f054885c00f88e7010000b810000000488b7d18be00aa20c0488d557848c74550
    040000000f054885c00f88c20100004531e44c8dad000100004c3b65080f83b2010000b8e4000000bf01000000498d75400f0549f7451002
    0000007421b81c000000498b7d00498b7508ba170000000f05498945184885c00f855401000049f7451001000000744fb81c000000498b7d
    00498b7508ba160000000f05498945184885c00f8529010000498b7500498b4d0848ba157c4a7fb979379e4889d0483306480fafc248c1c0
    1d4883c6084883e90875eb498945284c8b75104c897520498b450048894528498b45084889453048c745380000000048c7454000000000b8
    10000000488b7d18be05aa28c0488d55200f0549894518b8e4000000bf01000000498d75500f05488b4d404883f9007e3649894d20498b7d
    004c89f648c1e903fcf348a5b8e4000000bf01000000498d75600f05b81c0000004c89f7498b7520ba040000000f0549837d18f0752c4983
    7d3800752549c7453801000000b81c000000498b7d00498b7508ba170000000f054885c00f843dffffff49f7451001000000742e498b7500
    498b4d0848ba157c4a7fb979379e4889d0483306480fafc248c1c01d4883c6084883e90875eb49894530b8e4000000bf01000000498d7570
    0f0549ffc44981c580000000e948feffff48894558488b7d184885ff7807b8030000000f05c745000200000048c783a00000000000000048
    c783a800000080f0fa02b80f01000031ff31f6488d93a00000004531d241b8080000000f05e91cfcffff4c8badb00000004c8bb5b8000000
    4531ff4939dd0f8407010000498b85b8000000493b85c00000000f85f0000000b8e4000000498bbdc8000000488db5d80000000f054885c0
    0f85d5000000486985d800000000ca9a3b480385e0000000498b8dd00000004885c9750c48ffc0498985d0000000eb104881c180f0fa0248
    39c80f879b000000b80101000048c7c79cffffff498db5e0000000ba000008000f054885c078794989c4b8000000004c89e7488b7510ba00
    0100000f054989c1b8030000004c89e70f054983f9027c50488b7510803e7274474a8d7c0eff48ffcf4839f7763a803f7875f331c048ffc7
    0fb60f83f90a741689cac1ea068d14d283e10f01d148c1e0044801c8ebdf483b85a0000000720c483b85a8000000730341ffc74981c58001
    000049ffce0f85e0feffff48ff85c800000048ff85d00000004585ff740b48c785d0000000000000004883bdd00000000373474881bdc800
    0000900100000f835ffbffff48c783a00000000000000048c783a8000000404b4c00b80f01000031ff31f6488d93a00000004531d241b808
    0000000f05e960feffffffa5c0000000
    """
)
"""``stub_x86_64.S``, assembled; a test compares the two."""

BOOT = bytes.fromhex(
    """
    b80e000000bf02000000488d35cf010000ba0000000041ba080000000f05eb004c8d25c1010000498b0424498b7c2408498b742410498b54
    24184d8b5424204d8b4424284d8b4c24300f05483d01f0ffff0f83ac0000004983c438488d05660200004939c472c0488d25ea0000009d48
    8b25da000000b80e000000bf02000000488d3551010000ba0000000041ba080000000f05488b05c5000000488b1dc6000000488b0dc70000
    00488b15c8000000488b35c9000000488b3dca000000488b2dcb0000004c8b05cc0000004c8b0dcd0000004c8b15ce0000004c8b1dcf0000
    004c8b25d00000004c8b2dd10000004c8b35d20000004c8b3dd3000000ff2545000000488d05de0000004939c40f8454ffffff488d05ae01
    00004939c40f8344ffffff488d05660100004939c40f8334ffffff0f1f4400004c8d2551010000e9e3feffff0f1f4000
    """
)
"""The code of ``boot_x86_64.S``, assembled; a test compares the two."""

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
"""The first words of a context; what the keeper wants to know of a thread follows."""

_CONTEXT_BYTES = 384
NT_X86_XSTATE = 0x202
"""The register set with all that XSAVE saves (include/uapi/linux/elf.h)."""

_XSTATE_WORDS = 2048
"""Room for it: 16 KiB, of which AMX, the largest, needs 11."""

_XSTATE_BV, _PKRU_COMPONENT, _PKRU_KEY_0 = 512, 9, 0b11
"""Offset of the components that are present; the number of PKRU; its bits that bar accesses and writes to key 0."""

_XSTATE_LEAF = 0x0D
_CPUID = bytes.fromhex("5389f889f10fa289d85bc3")
"""push rbx; mov eax, edi; mov ecx, esi; cpuid; mov eax, ebx; pop rbx; ret: the offset of a component of XSAVE."""

_BOOT_ENTRY, _BOOT_BEGIN, _BOOT_UNMAP = 0, 32, 312
"""Offsets into :data:`BOOT`."""
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
            "getpid": 39,
            "ptrace": 101,
            "waitid": 247,
        }
    )
    """arch/x86/entry/syscalls/syscall_64.tbl."""

    red_zone = 128
    """System V ABI of x86-64, 3.2.2."""

    code = CODE
    entry_worker, entry_park = 0, 16
    boot = BOOT
    boot_entry, boot_begin, boot_unmap = _BOOT_ENTRY, _BOOT_BEGIN, _BOOT_UNMAP
    boot_stack = 8 * CONTEXT.index("rsp")
    slot_bytes = 768
    context_bytes = _CONTEXT_BYTES
    keeper_word = len(CONTEXT)
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

    def pack_boot(self, tid: int, home: Registers, mask: int, calls: NDArray[np.uint64]) -> bytes:
        del tid
        signals = np.array([mask, ptrace.ALL_SIGNALS], np.uint64)
        return BOOT + alone(home)[0, _IN_CONTEXT].tobytes() + signals.tobytes() + calls.tobytes()

    def refuse_extended(self, tids: list[int]) -> str:
        """Our memory has protection key 0: a thread barred from that would die of its first access (pkeys(7))."""
        if not has_protection_keys():
            return ""
        offset = _pkru_offset()
        for tid in tids:
            state = ptrace.get_register_set(tid, NT_X86_XSTATE, _XSTATE_WORDS)
            if offset and state is not None and not bars_key_0(state, offset):
                continue
            return f"thread {tid} is barred from ordinary memory by its protection keys, or that cannot be seen"
        return ""

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


def bars_key_0(state: NDArray[np.uint64], offset: int) -> bool:
    """Return whether a thread may not read or write memory with protection key 0.

    Args:
        state: its register set NT_X86_XSTATE in the standard format: uint64.
        offset: where PKRU is in it, in bytes.
    """
    present = int(state[_XSTATE_BV // 8]) >> _PKRU_COMPONENT & 1
    # A component that is not present has its initial value, with which nothing is barred.
    return bool(present and int(state.view(np.uint32)[offset // 4]) & _PKRU_KEY_0)


@functools.cache
def has_protection_keys() -> bool:
    """Return whether mappings can have protection keys."""
    with contextlib.suppress(OSError):
        return b" ospke" in Path("/proc/cpuinfo").read_bytes()
    return False


@functools.cache
def _pkru_offset() -> int:
    """Return where PKRU is in the standard format of XSAVE, in bytes; 0 if that cannot be found out."""
    address = executable(_CPUID)
    function = ctypes.PYFUNCTYPE(ctypes.c_uint32, ctypes.c_uint32, ctypes.c_uint32)
    return function(address)(_XSTATE_LEAF, _PKRU_COMPONENT) if address else 0


def _negative(number: int) -> int:
    return (1 << 64) - number
