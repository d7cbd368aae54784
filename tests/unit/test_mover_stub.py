"""The injected code and its layout."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mthp.linux.mover import inject, stub, tracee
from mthp.linux.mover.ptrace import ALL_SIGNALS, NO_SYSCALL, Registers

SOURCE = Path(stub.__file__).with_name("stub_x86_64.S")
LAYOUT = stub.Layout(base=0x7F00_0000_0000, threads=70, operations=32, scratch_size=2 << 20)


def test_the_bytes_are_the_source_assembled(tmp_path: Path) -> None:
    compiler, objcopy = shutil.which("cc"), shutil.which("objcopy")
    if not compiler or not objcopy:
        pytest.skip("needs cc and objcopy")
    if subprocess.run([compiler, "-dumpmachine"], capture_output=True, check=True, text=True).stdout[:6] != "x86_64":
        pytest.skip("needs a compiler for x86-64")
    subprocess.run([compiler, "-c", "-o", tmp_path / "stub.o", SOURCE], check=True)
    subprocess.run([objcopy, "-O", "binary", "-j", ".text", tmp_path / "stub.o", tmp_path / "stub.bin"], check=True)
    assert (tmp_path / "stub.bin").read_bytes() == stub.CODE


def _defines() -> dict[str, int]:
    found = re.findall(r"^#define\s+(\w+)\s+(0x[0-9a-f]+|\d+)\b", SOURCE.read_text(), re.MULTILINE)
    return {name: int(value, 0) for name, value in found}


def test_source_and_layout_agree() -> None:
    defines = _defines()
    fields = stub.OPERATION.fields
    assert fields is not None
    for name in stub.OPERATION.names or ():
        assert defines[f"OP_{name.upper()}"] == fields[name][1], name
    assert defines["OP_SIZE"] == stub.OPERATION.itemsize
    assert defines["OPS"] == stub.HEADER_BYTES
    assert defines["C_SIZE"] == stub.CONTEXT_BYTES
    assert defines["NONCE"] == stub.NONCE_OFFSET
    assert [defines[name] for name in ("SETUP", "GO", "DONE", "ABORT")] == [stub.SETUP, stub.GO, stub.DONE, stub.ABORT]
    assert (defines["FLAG_VERIFY"], defines["FLAG_FILL"]) == (stub.FLAG_VERIFY, stub.FLAG_FILL)
    assert len(stub.CODE) <= stub.PAGE


def test_a_header_holds_each_number_where_the_stub_looks() -> None:
    defines = _defines()
    packed = stub.pack_header(LAYOUT, 17, 99, stub.operations_for([(0x10000, 65536)], stub.FLAG_VERIFY))

    def word(offset: int) -> int:
        return int.from_bytes(packed[offset : offset + 8], "little")

    assert word(defines["STATE"]) == stub.SETUP
    assert word(defines["COUNT"]) == 1
    assert word(defines["SCRATCH"]) == LAYOUT.scratch
    assert word(defines["UFFD"]) == 17
    assert word(defines["ALL_SIGNALS"]) == ALL_SIGNALS
    assert word(defines["NONCE"]) == 99
    assert word(defines["OPS"] + defines["OP_ADDRESS"]) == 0x10000
    assert word(defines["OPS"] + defines["OP_LENGTH"]) == 65536
    assert word(defines["OPS"] + defines["OP_FLAGS"]) == stub.FLAG_VERIFY
    assert word(defines["OPS"] + defines["OP_ERROR"]) == stub.NOT_TRIED


def test_a_context_holds_each_register_where_the_stub_looks() -> None:
    defines = _defines()
    registers = Registers()
    names = ["rip", "rsp", "rax", "rbx", "rcx", "rdx", "rsi", "rdi", "rbp", *(f"r{n}" for n in range(8, 16))]
    for number, name in enumerate(names):
        setattr(registers, name, 1000 + number)
    registers.eflags = 0x246
    registers.orig_rax = NO_SYSCALL
    packed = LAYOUT.pack_context(registers, 0xABCD, 3)
    assert len(packed) == stub.CONTEXT_BYTES

    def word(name: str) -> int:
        offset = defines[f"C_{name}"]
        return int.from_bytes(packed[offset : offset + 8], "little")

    assert [word(name.upper()) for name in names] == [1000 + number for number in range(len(names))]
    assert (word("FLAGS"), word("MASK"), word("TICKS"), word("NAP")) == (0x246, 0xABCD, 0, 0)
    assert word("TRAMPOLINE") == LAYOUT.trampoline(3)


@given(threads=st.integers(1, 5000), operations=st.integers(1, 1024))
def test_the_parts_of_the_mapping_do_not_overlap(threads: int, operations: int) -> None:
    layout = stub.Layout(1 << 40, threads, operations, 2 << 20)
    assert len(layout.executable()) <= layout.code_size
    assert layout.trampoline(threads - 1) + stub.TRAMPOLINE_BYTES <= layout.header
    assert layout.header + stub.HEADER_BYTES + operations * stub.OPERATION.itemsize == layout.context(0)
    assert layout.context(threads) <= layout.scratch
    assert layout.scratch + layout.scratch_size == layout.base + layout.size
    assert all(part % stub.PAGE == 0 for part in (layout.header, layout.scratch, layout.size))


def test_a_trampoline_refers_to_its_own_context() -> None:
    defines = _defines()
    for index in (0, 1, LAYOUT.threads - 1):
        at = LAYOUT.trampoline(index)
        code = LAYOUT.executable()[at - LAYOUT.base :][: stub.TRAMPOLINE_BYTES]
        for end, register in ((7, "RBX"), (14, "RSP"), (20, "RIP")):
            target = at + end + int.from_bytes(code[end - 4 : end], "little", signed=True)
            assert target == LAYOUT.context(index) + defines[f"C_{register}"]


@pytest.mark.parametrize(
    ("call", "result", "expected"),
    [
        (35, -tracee.ERESTART_RESTARTBLOCK, (tracee.NR_RESTART_SYSCALL, -2)),
        (0, -tracee.ERESTARTSYS, (0, -2)),
        (34, -tracee.ERESTARTNOHAND, (34, -2)),
        (56, -tracee.ERESTARTNOINTR, (56, -2)),
        (0, 5, (5, 0)),
        (0, -4, (-4, 0)),
        (-1, -tracee.ERESTARTSYS, (-tracee.ERESTARTSYS, 0)),
    ],
)
def test_a_thread_that_restores_itself_restarts_its_call(call: int, result: int, expected: tuple[int, int]) -> None:
    registers = Registers(rip=0x1000, rax=result % (1 << 64), orig_rax=call % (1 << 64))
    own = stub.alone(registers)
    assert (own.rax, own.rip) == (expected[0] % (1 << 64), 0x1000 + expected[1])
    assert (registers.rip, registers.rax) == (0x1000, result % (1 << 64))


def test_a_parked_thread_keeps_its_stack_and_runs_plainly() -> None:
    home = Registers(rip=1, rsp=0x7FFE_0000, rbx=2, eflags=0x246 | 0x100 | 0x400 | 0x40000, orig_rax=0, cs=0x33)
    parked = LAYOUT.park(home, 5, stub.ENTRY_PARK)
    assert parked.rip == LAYOUT.base + stub.ENTRY_PARK
    assert (parked.rsp, parked.cs) == (home.rsp, home.cs)
    assert (parked.rbx, parked.rbp) == (LAYOUT.context(5), LAYOUT.header)
    assert parked.eflags == 0x246
    assert parked.orig_rax == NO_SYSCALL
    assert LAYOUT.holds_code(parked.rip)
    assert not LAYOUT.holds_code(home.rip)
    assert inject.UFFDIO_API == 0xC0000000 | 24 << 16 | 0xAA << 8 | 0x3F
