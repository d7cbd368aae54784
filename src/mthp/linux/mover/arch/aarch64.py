"""The mover on aarch64; the stub is ``stub_aarch64.S`` beside this file, assembled.

Differences from x86-64, as far as the kernel shows them (do_signal, arch/arm64/kernel/signal.c):

- When a thread stops, the kernel has already rewound it to its interrupted system call, and has forgotten the call: the
  registers are whole without its help. So no code is needed to leave a call or to restart one without a tracer.
  Relative timeouts of the worker, and of threads that restore themselves, start again. Signals and the worker's call
  have a module of their own (:mod:`~mthp.linux.mover.reentry`); threads that restore themselves have no such help.
- For the same reason an EINTR that only the stop caused is not repaired.
"""

from __future__ import annotations

from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray

from mthp.linux.mover import ptrace
from mthp.linux.mover.arch.architecture import Architecture, Registers

CODE = bytes.fromhex(
    """
    290080d2894702f9400080d261230191020080d2030180d2e81080d2010000d469ffdf883f090071a205005469030035895742f9290100b4
    17c489d269e3039129fddfc83f0500f1200800543f2003d5f70600f141ffff548a3b42f94a0500918a3b02f95f9101f1e2020054096889d2
    8909a0f282e311915f2400a9000080d2010080d2030080d2040180d2280980d2010000d4e3ffff1709a881d26900a0f282e311915f2400a9
    000080d2010080d2030080d2040180d2280980d2010000d4d8ffff176a00805269ff5f88a9faff356aff0b88abffff35d2ffff17895742f9
    891900b5290080d2894b02f989830991200500ad220d01ad241502ad261d03ad282504ad2a2d05ad2c3506ad2e3d07ad304508ad324d09ad
    34550aad365d0bad38650cad3a6d0dad3c750ead3e7d0fad2a443bd58a5b02b90a443bd58a5f02b99f030091681180d2010000d42a008052
    69ff5f8869f6ff356aff0b88abffff35600b40f9614f40f9820080d2281d80d2290080d2692b00f9010000d4c010f8b7200080d20001a0f2
    482380d2490080d2692b00f9010000d4e00ff8b7600f00f9e14795d20103b8f262830191a80380d2690080d2692b00f9010000d4c00ef8b7
    600f40f9014095d20104b8f262e30191a80380d2890080d2692b00f9010000d4a00df8b7130080d274030491690740f97f0209eb220d0054
    200080d281020191280e80d2010000d4970a40f9f7000836800640a9e20280d2281d80d2010000d4800e00f9a00a00b597020036800640a9
    c20280d2281d80d2010000d4800e00f9c00900b5892a40a9ab828fd24be9aff22b37cff2ebc6f3f2ec030baa2d8540f88c010dca8c7d0b9b
    8c8dcc934a2100f161ffff548c1600f9750b40f9892a40a9752702a96a7f03a97f2300f9600f40f9a14095d20105b8f262830091a80380d2
    010000d4800e00f9200080d281420191280e80d2010000d4762340f9df0200f18d020054961200f9890240f9ea0315aaeb0316aa4c35c1a8
    4e3dc1a82c3581a82e3d81a86b8100f161ffff54200080d281820191280e80d2010000d4e00315aae10316aa820080d2281d80d2010000d4
    890e40f93f4100b141010054891e40f9090100b5290080d2891e00f9800640a9e20280d2281d80d2010000d4e0f9ffb4d7010036892a40a9
    ab828fd24be9aff22b37cff2ebc6f3f2ec030baa2d8540f88c010dca8c7d0b9b8c8dcc934a2100f161ffff548c1a00f9200080d281c20191
    280e80d2010000d4730600919402029197ffff17602f00f9600f40f96000f8b7280780d2010000d44900805269ff9f88930c80d217c489d2
    69e3039129fddfc83f0900f1200200543f2003d5f70600f141ffff54092494d2e900a0f282e311915f2400a9000080d2010080d2030080d2
    040180d2280980d2010000d4730600f1a1fdff5407ffff17706340f900021fd6745b40f9755f40f9160080d29f021ceb00090054894642f9
    8a4a42f93f010aeb61080054804e42f961630391280e80d2010000d4e00700b569ab4da90b4099d24b73a7f229290b9b8c5242f98c0000b5
    29050091895202f9060000140b109ed24b5fa0f28c010b8b3f010ceb28060054600c809281c212910201a0d2030080d2080780d2010000d4
    2005f8b7f70300aa610b40f9022080d2e80780d2010000d4f80300aae00317aa280780d2010000d41f0b00f1cb030054690b40f92a014039
    5fc90171400300542b01188b6b0500d16b0500d17f0109eba90200546a0140395fe1017161ffff540c0080d26a1d40385f290071e0000054
    4d7d0653ad0d0d0b4a0d00124a010d0b4c110c8bf8ffff17695340f99f0109ebc3000054695740f99f0109eb620000547f6700f9d6060091
    94821391b50600f1a1f6ff54696740f929050091696700f96a6b40f94a050091df0200f14a019f9a6a6b00f95f0d00f1c2f4ff546a7f40f9
    5f0900f160f4ff543f4106f102dbff54096889d28909a0f282e311915f2400a9000080d2010080d2030080d2040180d2280980d2010000d4
    98ffff17
    """
)

BOOT = bytes.fromhex(
    """
    400080d2e12c0010020080d2030180d2e81080d2010000d41f2003d51f2003d5150080d2f32c001016320010680240a9610a41a9631242a9
    651a40f9010000d41ffc3fb12205005473e200917f0216ebe3feff54480300549b2a00581b0300b4290080d2697700f9183280d217c489d2
    69c3039129fddfc8c90100b53f2003d5f70600f161ffff54000080d2010080d202040010030080d2040180d2280980d2010000d4180700f1
    21feff54150000141c2800583028005800021fd6000080d2010080d2e2020010030080d2040180d2280980d2010000d4c90200103f010091
    681180d2010000d4f50300aaa92600107f0209eb40feff547f0216eb02feff54df2403d5332b0010162b0010c8ffff170000000000000000
    40420f0000000000000000000000000080f0fa0200000000
    """
)
"""The code of ``boot_aarch64.S``, assembled; a test compares the two."""

NT_ARM_SVE, NT_ARM_SSVE, NT_ARM_POE, NT_ARM_GCS = 0x405, 0x40B, 0x40F, 0x410
"""Register sets of include/uapi/linux/elf.h."""

SVE_PT_REGS_SVE = 1
"""In the flags of ``struct user_sve_header``: the set has more than the vector registers."""

PR_SHADOW_STACK_ENABLE = 1

_X0, _X8, _X27, _X28, _SP, _PC, _PSTATE = 0, 8, 27, 28, 31, 32, 33
_WORDS = 34
"""``struct user_pt_regs`` of arch/arm64/include/uapi/asm/ptrace.h: x0 to x30, sp, pc, pstate."""

_MODE = 0x1F
_NO_BRANCH_TYPE = np.uint64(~(3 << 10) & ((1 << 64) - 1))
"""All but PSTATE.BTYPE: the kind of the preceding branch, which is valid only at the target of that branch."""

_FPSIMD_MAGIC, _FPSIMD_BYTES = 0x46508001, 528
"""The head of ``struct fpsimd_context``."""

CONTEXT_BYTES = 1248
C_MASK, C_REGS, C_FPSIMD = 168, 312, 592
"""Offsets in a context; see the stub."""

C_KEEPER_WORDS = 1160
FRAME_BYTES = 1136
"""The part of a context that rt_sigreturn(2) reads."""

_NT_PRFPREG, _VECTOR_WORDS = 2, 66
"""``struct user_fpsimd_state``: 32 vector registers, fpsr and fpcr in one word, padding."""

_C_FPSR, _C_VREGS = 600, 608


class Aarch64(Architecture):
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
            "close": 57,
            "waitid": 95,
            "ptrace": 117,
            "getpid": 172,
            "munmap": 215,
            "mmap": 222,
            "mprotect": 226,
            "madvise": 233,
        }
    )
    """include/uapi/asm-generic/unistd.h."""

    red_zone = 0
    code = CODE
    boot = BOOT
    boot_entry, boot_begin, boot_unmap = 0, 32, 256
    boot_row, boot_error = 19, 21
    boot_rows = 0x5C0
    boot_stack = 560
    slot_bytes = 1728
    context_bytes = CONTEXT_BYTES
    keeper_word = C_KEEPER_WORDS // 8
    trampoline_bytes = 0

    def foreign(self, registers: Registers) -> NDArray[np.bool_]:
        """Return which threads are in any mode but that of 64-bit programs."""
        different: NDArray[np.bool_] = (registers[:, _PSTATE] & np.uint64(_MODE)) != 0
        return different

    def in_call(self, registers: Registers) -> NDArray[np.bool_]:
        """Return no thread, because the kernel does not show it."""
        return np.zeros(len(registers), np.bool_)

    def repair(self, registers: Registers) -> NDArray[np.bool_]:
        """Return no row: epoll_wait(2), semop(2) and others return EINTR, as after SIGSTOP and SIGCONT."""
        # It cannot be distinguished from an EINTR that a handler of the program caused, and the call's first argument
        # is gone from the registers.
        return np.zeros(len(registers), np.bool_)

    def leave_call(self, registers: Registers) -> None:
        """Clear the branch type, because a branch may just have been taken. The kernel has forgotten the call."""
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

    def pack_boot(
        self, tid: int, home: Registers, mask: int, stub: tuple[int, int, int], calls: NDArray[np.uint64]
    ) -> bytes:
        frame = self.pack_contexts(home, np.array([mask], np.uint64), np.zeros(1, np.uint64))[0, : FRAME_BYTES // 8]
        # The code cannot write to the padding that it runs in, as it writes to a context just before it is used.
        vectors = ptrace.get_register_set(tid, _NT_PRFPREG, _VECTOR_WORDS)
        if vectors is not None:
            frame[_C_VREGS // 8 : _C_VREGS // 8 + 64] = vectors[:64]
            frame[_C_FPSR // 8] = vectors[64]
        words = np.array([ptrace.ALL_SIGNALS, *stub], np.uint64)
        return BOOT + frame.tobytes() + words.tobytes() + calls.tobytes()

    def trampoline(self, at: int, context: int) -> bytes:
        del at, context
        return b""

    def refuse_extended(self, tids: list[int]) -> str:
        for tid in tids:
            for kind, what in ((NT_ARM_SVE, "SVE"), (NT_ARM_SSVE, "SME")):
                header = ptrace.get_register_set(tid, kind, 2)
                # size, max_size; vl, max_vl, flags: struct user_sve_header.
                # System calls discard what SVE registers hold beyond the vector registers, and rt_sigreturn(2) leaves
                # the streaming mode of SME.
                if header is not None and int(header[1]) >> 32 & SVE_PT_REGS_SVE:
                    return f"thread {tid} runs {what} code, and a system call would clear its registers"
            shadow = ptrace.get_register_set(tid, NT_ARM_GCS, 1)
            # rt_sigreturn(2) needs a token on the guarded control stack.
            if shadow is not None and int(shadow[0]) & PR_SHADOW_STACK_ENABLE:
                return f"thread {tid} has a guarded control stack, and could not be restored if mthp is killed"
            # Some kernels set them at random if the signal frame does not have them.
            if ptrace.get_register_set(tid, NT_ARM_POE, 1) is not None:
                return f"thread {tid} has permission overlays (POR_EL0), which could not be restored if mthp is killed"
        return ""
