"""The mover on aarch64; the stub is ``stub_aarch64.S`` beside this file, assembled.

What is different from x86-64, as far as the kernel shows it (arch/arm64/kernel/signal.c, do_signal):

- When a thread stops, the kernel has already rewound it to its interrupted system call, and has forgotten the call: the
  registers are whole without its help. So there is nothing to do to leave a call or to restart one alone. Relative
  timeouts of the worker, and of threads that restore themselves, start again. What a signal makes of the worker's call
  is a matter of its own (:mod:`~mthp.linux.mover.reentry`); to threads that restore themselves nobody sees in this way.
- For the same reason an EINTR that only the stop caused (epoll_wait(2), semop(2) and the others of
  :mod:`~mthp.linux.mover.x86_64`) cannot be told from one that a handler of the program caused, and the first argument
  of the call is gone from the registers. It is not made good: these calls return EINTR, as after SIGSTOP and SIGCONT.
- System calls throw away the parts of SVE registers beyond the vector registers, and rt_sigreturn(2), with which a
  thread restores itself, leaves the streaming mode of SME and wants a token on a guarded control stack; and on
  processors with permission overlays, some kernels set those at random if the frame says nothing of them. A thread in
  such a state is not given our code.
"""

from __future__ import annotations

from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray

from mthp.linux.mover import ptrace
from mthp.linux.mover.machine import Machine, Registers

CODE = bytes.fromhex(
    """
    470000141f2003d51f2003d51f2003d5400080d261230191020080d2030180d2e81080d2010000d469ffdf883f0900716204005429020035
    8a3b42f94a0500918a3b02f95f9101f1e2020054096889d28909a0f282e311915f2400a9000080d2010080d2030080d2040180d2280980d2
    010000d4edffff1709a881d26900a0f282e311915f2400a9000080d2010080d2030080d2040180d2280980d2010000d4e2ffff176a008052
    69ff5f88e9fbff356aff0b88abffff35dcffff1789830991200500ad220d01ad241502ad261d03ad282504ad2a2d05ad2c3506ad2e3d07ad
    304508ad324d09ad34550aad365d0bad38650cad3a6d0dad3c750ead3e7d0fad2a443bd58a5b02b90a443bd58a5f02b99f030091681180d2
    010000d42a00805269ff5f8829f8ff356aff0b88abffff35130080d274030291690740f97f0209eb020d0054200080d281020191280e80d2
    010000d4970a40f9f7000836800640a9e20280d2281d80d2010000d4800e00f9a00a00b597020036800640a9c20280d2281d80d2010000d4
    800e00f9c00900b5892a40a9ab828fd24be9aff22b37cff2ebc6f3f2ec030baa2d8540f88c010dca8c7d0b9b8c8dcc934a2100f161ffff54
    8c1600f9750b40f9892a40a9752702a96a7f03a97f2300f9600f40f9a14095d20105b8f262830091a80380d2010000d4800e00f9200080d2
    81420191280e80d2010000d4762340f9df0200f18d020054961200f9890240f9ea0315aaeb0316aa4c35c1a84e3dc1a82c3581a82e3d81a8
    6b8100f161ffff54200080d281820191280e80d2010000d4e00315aae10316aa820080d2281d80d2010000d4890e40f93f4100b141010054
    891e40f9090100b5290080d2891e00f9800640a9e20280d2281d80d2010000d4e0f9ffb4d7010036892a40a9ab828fd24be9aff22b37cff2
    ebc6f3f2ec030baa2d8540f88c010dca8c7d0b9b8c8dcc934a2100f161ffff548c1a00f9200080d281c20191280e80d2010000d473060091
    9402029197ffff174900805269ff9f8809109ed2495fa0f282e311915f2400a9000080d2010080d2030080d2040180d2280980d2010000d4
    46ffff17
    """
)

NT_ARM_SVE, NT_ARM_SSVE, NT_ARM_POE, NT_ARM_GCS = 0x405, 0x40B, 0x40F, 0x410
"""Register sets of include/uapi/linux/elf.h."""

SVE_PT_REGS_SVE = 1
"""In the flags of ``struct user_sve_header``: there is more than the vector registers."""

PR_SHADOW_STACK_ENABLE = 1

_X0, _X8, _X27, _X28, _SP, _PC, _PSTATE = 0, 8, 27, 28, 31, 32, 33
_WORDS = 34
"""``struct user_pt_regs`` of arch/arm64/include/uapi/asm/ptrace.h: x0 to x30, sp, pc, pstate."""

_MODE = 0x1F
_NO_BRANCH_TYPE = np.uint64(~(3 << 10) & ((1 << 64) - 1))
"""All but PSTATE.BTYPE: what kind of branch came before, which only the place that was branched to is to know of."""

_FPSIMD_MAGIC, _FPSIMD_BYTES = 0x46508001, 528
"""The head of ``struct fpsimd_context``."""

CONTEXT_BYTES = 1168
C_MASK, C_REGS, C_FPSIMD = 168, 312, 592
"""Offsets in a context; see the stub."""


class Aarch64(Machine):
    """aarch64. A thread restores itself with rt_sigreturn, so there are no trampolines."""

    name = "aarch64"
    words = _WORDS
    pc, sp, number, result = _PC, _SP, _X8, _X0
    arguments = (0, 1, 2, 3, 4, 5)
    syscall = b"\x01\x00\x00\xd4"
    alignment = 4
    forgets_calls = True
    calls = MappingProxyType(
        {
            "fcntl": 25,
            "close": 57,
            "waitid": 95,
            "ptrace": 117,
            "munmap": 215,
            "mmap": 222,
            "mprotect": 226,
            "madvise": 233,
            "userfaultfd": 282,
        }
    )
    """include/uapi/asm-generic/unistd.h."""

    red_zone = 0
    code = CODE
    entry_worker, entry_park = 0, 16
    context_bytes = CONTEXT_BYTES
    trampoline_bytes = 0

    def foreign(self, registers: Registers) -> NDArray[np.bool_]:
        """Any mode but that of 64-bit programs."""
        different: NDArray[np.bool_] = (registers[:, _PSTATE] & np.uint64(_MODE)) != 0
        return different

    def in_call(self, registers: Registers) -> NDArray[np.bool_]:
        """The kernel does not tell."""
        return np.zeros(len(registers), np.bool_)

    def repair(self, registers: Registers) -> NDArray[np.bool_]:
        """Cannot be done; see above."""
        return np.zeros(len(registers), np.bool_)

    def leave_call(self, registers: Registers) -> None:
        """The kernel has forgotten the call already; but a branch may just have been taken, and not to where we go."""
        registers[:, _PSTATE] &= _NO_BRANCH_TYPE

    def parked(self, homes: Registers, contexts: NDArray[np.uint64], entry: int, header: int) -> Registers:
        registers = homes.copy()
        registers[:, _PC], registers[:, _X28], registers[:, _X27] = entry, contexts, header
        registers[:, _PSTATE] &= _NO_BRANCH_TYPE
        return registers

    def pack_contexts(
        self, homes: Registers, masks: NDArray[np.uint64], trampolines: NDArray[np.uint64]
    ) -> NDArray[np.uint64]:
        del trampolines
        contexts = np.zeros((len(homes), CONTEXT_BYTES // 8), np.uint64)
        contexts[:, C_REGS // 8 : C_REGS // 8 + _WORDS] = homes
        contexts[:, C_MASK // 8] = masks
        contexts[:, C_FPSIMD // 8] = _FPSIMD_MAGIC | _FPSIMD_BYTES << 32
        return contexts

    def trampoline(self, at: int, context: int) -> bytes:
        del at, context
        return b""

    def refuse_extended(self, tids: list[int]) -> str:
        for tid in tids:
            for kind, what in ((NT_ARM_SVE, "SVE"), (NT_ARM_SSVE, "SME")):
                header = ptrace.get_register_set(tid, kind, 2)
                # size, max_size; vl, max_vl, flags: struct user_sve_header.
                if header is not None and int(header[1]) >> 32 & SVE_PT_REGS_SVE:
                    return f"thread {tid} is in the middle of {what} code, whose registers a system call would clear"
            shadow = ptrace.get_register_set(tid, NT_ARM_GCS, 1)
            if shadow is not None and int(shadow[0]) & PR_SHADOW_STACK_ENABLE:
                return f"thread {tid} has a guarded control stack, with which it cannot be put back after our death"
            if ptrace.get_register_set(tid, NT_ARM_POE, 1) is not None:
                return f"thread {tid} has permission overlays (POR_EL0), which it could not put back after our death"
        return ""
