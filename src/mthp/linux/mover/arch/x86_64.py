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
from mthp.linux.mover.arch.architecture import (
    ERESTART_RESTARTBLOCK,
    ERESTARTNOHAND,
    ERESTARTNOINTR,
    ERESTARTSYS,
    Architecture,
    Registers,
)
from mthp.linux.mover.callbatches import executable

CODE = bytes.fromhex(
    """
    48c783b800000001000000b80e000000bf02000000488d7548ba0000000041ba080000000f058b4d0083f9020f83b800000083f900756948
    83bbd800000000741b41be204e00004883bdf8000000010f841f010000f39041ffce75eb48ff83980000004883bb9800000064736948c783
    a00000000000000048c783a8000000404b4c00b80f01000031ff31f6488d93a00000004531d241b8080000000f05eb8648c783a000000000
    00000048c783a8000000400d0300b80f01000031ff31f6488d93a00000004531d241b8080000000f05e950ffffffb800000000b903000000
    f00fb14d00e93cffffff4883bbd8000000000f855f030000488da380010000ff73109d488b6308b80e000000bf02000000488db390000000
    ba0000000041ba080000000f05488b4318488b4b28488b5330488b7338488b7b40488b6b484c8b43504c8b4b584c8b53604c8b5b684c8b63
    704c8b6b784c8bb3800000004c8bbb8800000048c783c000000001000000ffa3b0000000b800000000b901000000f00fb14d000f859dfeff
    ffb81c000000488b7d10488bb598000000ba0400000048c74550010000000f054885c00f882d020000b843010000bf0100080048c7455002
    0000000f054885c00f881002000048894518b810000000488b7d18be3faa18c0488d556048c74550030000000f054885c00f88e7010000b8
    10000000488b7d18be00aa20c0488d557848c74550040000000f054885c00f88c20100004531e44c8dad000100004c3b65080f83b2010000
    b8e4000000bf01000000498d75400f0549f74510020000007421b81c000000498b7d00498b7508ba170000000f05498945184885c00f8554
    01000049f7451001000000744fb81c000000498b7d00498b7508ba160000000f05498945184885c00f8529010000498b7500498b4d0848ba
    157c4a7fb979379e4889d0483306480fafc248c1c01d4883c6084883e90875eb498945284c8b75104c897520498b450048894528498b4508
    4889453048c745380000000048c7454000000000b810000000488b7d18be05aa28c0488d55200f0549894518b8e4000000bf01000000498d
    75500f05488b4d404883f9007e3649894d20498b7d004c89f648c1e903fcf348a5b8e4000000bf01000000498d75600f05b81c0000004c89
    f7498b7520ba040000000f0549837d18f0752c49837d3800752549c7453801000000b81c000000498b7d00498b7508ba170000000f054885
    c00f843dffffff49f7451001000000742e498b7500498b4d0848ba157c4a7fb979379e4889d0483306480fafc248c1c01d4883c6084883e9
    0875eb49894530b8e4000000bf01000000498d75700f0549ffc44981c580000000e948feffff48894558488b7d184885ff7807b803000000
    0f05c745000200000041bc6400000041be204e00004883bdf8000000027442f39041ffce75ef48c783a00000000000000048c783a8000000
    20a10700b80f01000031ff31f6488d93a00000004531d241b8080000000f0541ffcc75b3e9d5fbffffffa5c00000004c8badb00000004c8b
    b5b80000004531ff4939dd0f8416010000498b85b8000000493b85c00000000f85ff000000b8e4000000498bbdc8000000488db5d8000000
    0f054885c00f85e4000000486985d800000000ca9a3b480385e0000000498b8dd00000004885c9750c48ffc0498985d0000000eb104881c1
    80f0fa024839c80f87aa000000b80101000048c7c79cffffff498db5e0000000ba000008000f054885c00f88840000004989c4b800000000
    4c89e7488b7510ba000100000f054989c1b8030000004c89e70f054983f9027c5b488b7510803e7274524a8d7c0eff48ffcf4839f7764580
    3f7875f331c048ffc70fb60f83f90a741689cac1ea068d14d283e10f01d148c1e0044801c8ebdf483b85a00000007217483b85a800000073
    0e48c785c80000000000000041ffc74981c58001000049ffce0f85d1feffff48ff85c800000048ff85d00000004585ff740b48c785d00000
    00000000004883bdd0000000030f838efeffff4883bdf8000000020f8480feffff4881bdc8000000900100000f8316fbffff48c783a00000
    000000000048c783a8000000404b4c00b80f01000031ff31f6488d93a00000004531d241b8080000000f05e93ffeffff
    """
)
"""``stub_x86_64.S``, assembled; a test compares the two."""

BOOT = bytes.fromhex(
    """
    b80e000000bf02000000488d3567020000ba0000000041ba080000000f05eb004531ed4c8d256e020000498b0424498b7c2408498b742410
    498b5424184d8b5424204d8b4424284d8b4c24300f05483d01f0ffff0f832f0100004983c438488d05db0200004939c472c07766488b2d0d
    0200004885ed745a48c785e80000000100000041bf9001000041be204e00004883bdf000000000752cf39041ffce75efb80f01000031ff31
    f6488d150c0100004531d241b8080000000f0541ffcf75c9e9eb000000488b1dbc010000ff25be010000b80f01000031ff31f6488d15ea00
    00004531d241b8080000000f05488d25fc0000009d488b25ec000000b80e000000bf02000000488d3563010000ba0000000041ba08000000
    0f05488b05d7000000488b1dd8000000488b0dd9000000488b15da000000488b35db000000488b3ddc000000488b2ddd0000004c8b05de00
    00004c8b0ddf0000004c8b15e00000004c8b1de10000004c8b25e20000004c8b2de30000004c8b35e40000004c8b3de5000000ff25570000
    004989c5488d05050100004939c40f8436ffffff488d059d0100004939c40f8326ffffff0f1f40004c8d2589010000e96efeffff00000000
    0000000040420f0000000000000000000000000080f0fa02000000000f1f4000
    """
)
"""The code of ``boot_x86_64.S``, assembled; a test compares the two."""

NO_SYSCALL = (1 << 64) - 1
"""Value of ``orig_rax`` outside of system calls: nothing is to be restarted."""

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
"""System calls that return EINTR after a stop, although signal(7) has them restarted or not interrupted."""

_SYSCALL = b"\x0f\x05"
REGISTERS = (
    *("r15", "r14", "r13", "r12", "rbp", "rbx", "r11", "r10", "r9", "r8", "rax", "rcx", "rdx", "rsi", "rdi"),
    *("orig_rax", "rip", "cs", "eflags", "rsp", "ss", "fs_base", "gs_base", "ds", "es", "fs", "gs"),
)
"""``struct user_regs_struct`` of arch/x86/include/asm/user_64.h."""

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
"""The first words of a context; the keeper's words about a thread follow."""

_CONTEXT_BYTES = 384
NT_X86_XSTATE = 0x202
"""The register set of all XSAVE components (include/uapi/linux/elf.h)."""

_XSTATE_WORDS = 2048
"""Words for it: 16 KiB, of which AMX, the largest component, needs 11."""

_XSTATE_BV, _PKRU_COMPONENT, _PKRU_KEY_0 = 512, 9, 0b11
"""Offset of the components that are present; the number of PKRU; its bits that bar accesses and writes to key 0."""

_XSTATE_LEAF = 0x0D
_CPUID = bytes.fromhex("5389f889f10fa289d85bc3")
"""push rbx; mov eax, edi; mov ecx, esi; cpuid; mov eax, ebx; pop rbx; ret: returns the offset of an XSAVE component."""

_IN_CONTEXT = [COLUMN[name] for name in CONTEXT[:18]]


class X8664(Architecture):
    """x86-64. A thread restores the last three registers (rbx, rsp, rip) from fixed addresses in its trampoline."""

    name = "x86_64"
    words = len(REGISTERS)
    pc, sp, number, result = _RIP, COLUMN["rsp"], _RAX, _RAX
    arguments = tuple(COLUMN[name] for name in ("rdi", "rsi", "rdx", "r10", "r8", "r9"))
    syscall = _SYSCALL
    alignment = 1
    forgets_calls = False
    eintr_calls = EINTR_CALLS
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
    boot = BOOT
    boot_entry, boot_begin, boot_unmap = 0, 32, 432
    boot_row, boot_error = COLUMN["r12"], COLUMN["r13"]
    boot_rows = 0x298
    boot_stack = 8 * CONTEXT.index("rsp")
    slot_bytes = 896
    context_bytes = _CONTEXT_BYTES
    keeper_word = len(CONTEXT)
    trampoline_bytes = 32

    def foreign(self, registers: Registers) -> NDArray[np.bool_]:
        """Return the threads with another code segment than the ordinary one: they run 32-bit code."""
        different: NDArray[np.bool_] = registers[:, _CS] != USER_CS
        return different

    def in_call(self, registers: Registers) -> NDArray[np.bool_]:
        called: NDArray[np.bool_] = registers[:, _ORIG_RAX].view(np.int64) >= 0
        return called

    def repair(self, registers: Registers) -> NDArray[np.bool_]:
        """Replace EINTR by -ERESTARTNOHAND: EINTR again where a handler is to run, otherwise the call is restarted."""
        changed: NDArray[np.bool_] = registers[:, _RAX] == _negative(errno.EINTR)
        for row in np.flatnonzero(changed).tolist():
            changed[row] = int(registers[row, _ORIG_RAX]) in self.eintr_calls
        registers[changed, _RAX] = _negative(ERESTARTNOHAND)
        return changed

    def leave_call(self, registers: Registers) -> None:
        registers[:, _ORIG_RAX] = NO_SYSCALL

    def parked(self, homes: Registers, contexts: NDArray[np.uint64], entry: int, header: int) -> Registers:
        registers = homes.copy()
        registers[:, _RIP], registers[:, _RBX], registers[:, _RBP] = entry, contexts, header
        # Otherwise the kernel may take the thread for one in an interrupted call, and move rip back to restart it.
        registers[:, _ORIG_RAX] = NO_SYSCALL
        # The stub copies upwards with string instructions, and must not trap after each instruction.
        registers[:, _EFLAGS] &= np.uint64(~_CLEARED_FLAGS & NO_SYSCALL)
        return registers

    def pack_contexts(
        self, homes: Registers, masks: NDArray[np.uint64], trampolines: NDArray[np.uint64]
    ) -> NDArray[np.uint64]:
        contexts = np.zeros((len(homes), _CONTEXT_BYTES // 8), np.uint64)
        contexts[:, : len(_IN_CONTEXT)] = alone(homes)[:, _IN_CONTEXT]
        contexts[:, CONTEXT.index("mask")], contexts[:, CONTEXT.index("trampoline")] = masks, trampolines
        return contexts

    def pack_boot(
        self, tid: int, home: Registers, mask: int, stub: tuple[int, int, int], calls: NDArray[np.uint64]
    ) -> bytes:
        del tid
        words = np.array([mask, ptrace.ALL_SIGNALS, *stub], np.uint64)
        return BOOT + alone(home)[0, _IN_CONTEXT].tobytes() + words.tobytes() + calls.tobytes()

    def refuse_extended(self, tids: list[int]) -> str:
        """Return why a thread may not use protection key 0, the stub's: its first access would kill it (pkeys(7))."""
        if not has_protection_keys():
            return ""
        offset = _pkru_offset()
        for tid in tids:
            state = ptrace.get_register_set(tid, NT_X86_XSTATE, _XSTATE_WORDS)
            if offset and state is not None and not bars_key_0(state, offset):
                continue
            return f"thread {tid} is barred from ordinary memory by its protection keys, or they cannot be read"
        return ""

    def trampoline(self, at: int, context: int) -> bytes:
        def relative(name: str, end: int) -> bytes:
            return struct.pack("=i", context + 8 * CONTEXT.index(name) - (at + end))

        # Relative to rip: by now all registers have the thread's own values but rbx, the context's address.
        code = b"\x48\x8b\x1d" + relative("rbx", 7)  # mov rbx, [rip + ...]
        code += b"\x48\x8b\x25" + relative("rsp", 14)  # mov rsp, [rip + ...]
        code += b"\xff\x25" + relative("rip", 20)  # jmp [rip + ...]
        return code.ljust(self.trampoline_bytes, b"\xcc")


def alone(homes: Registers) -> Registers:
    """Return registers with which threads go on without the kernel's help to restart their system calls.

    They are changed as arch_do_signal_or_restart (arch/x86/kernel/signal.c) changes those of a thread that leaves an
    interrupted call without a handler to run.
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
        offset: offset of PKRU in it, in bytes.
    """
    present = int(state[_XSTATE_BV // 8]) >> _PKRU_COMPONENT & 1
    # A component that is not present has its initial value, which bars nothing.
    return bool(present and int(state.view(np.uint32)[offset // 4]) & _PKRU_KEY_0)


@functools.cache
def has_protection_keys() -> bool:
    """Return whether mappings can have protection keys."""
    with contextlib.suppress(OSError):
        return b" ospke" in Path("/proc/cpuinfo").read_bytes()
    return False


@functools.cache
def _pkru_offset() -> int:
    """Return the offset of PKRU in the standard format of XSAVE, in bytes; 0 if it is unknown."""
    address = executable(_CPUID)
    function = ctypes.PYFUNCTYPE(ctypes.c_uint32, ctypes.c_uint32, ctypes.c_uint32)
    return function(address)(_XSTATE_LEAF, _PKRU_COMPONENT) if address else 0


def _negative(number: int) -> int:
    return (1 << 64) - number
