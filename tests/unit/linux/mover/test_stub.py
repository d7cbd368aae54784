"""The injected code and its layout."""

from __future__ import annotations

import platform
import re
import shutil
import subprocess
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from mthp.errors import UnsupportedError
from mthp.linux.mover import callbatches, stub
from mthp.linux.mover.arch import MACHINES, aarch64, architecture, by_name, x86_64
from mthp.linux.mover.arch.aarch64 import Aarch64
from mthp.linux.mover.arch.x86_64 import COLUMN, NO_SYSCALL, X8664
from mthp.linux.mover.ptrace import ALL_SIGNALS
from mthp.linux.probes import UFFD_API, UFFDIO_API

SOURCES = Path(x86_64.__file__).parent
LAYOUT = stub.Layout(0x7F00_0000_0000, 70, 32, 2 << 20, X8664(), 4096)


def assembled(source: Path, name: str, directory: Path) -> bytes:
    """Return the text section of an assembler file for the machine `name`; skips the test where no tool can make it."""
    prefixes = (f"{name.replace('_', '-')}-linux-gnu-", f"{name}-linux-gnu-", "")
    for prefix in prefixes:
        # The C compiler knows macros of the preprocessor, which the assembler does not; without any, that will do.
        tools = [shutil.which(prefix + tool) for tool in ("gcc", "as", "objcopy")]
        compiler, assembler, objcopy = tools
        tool = compiler or assembler
        if not tool or not objcopy:
            continue
        if not prefix and platform.machine() != name:
            continue
        subprocess.run([tool, "-c", "-o", directory / "code.o", source], check=True)
        subprocess.run([objcopy, "-O", "binary", "-j", ".text", directory / "code.o", directory / "code"], check=True)
        return (directory / "code").read_bytes()
    pytest.skip(f"needs an assembler for {name} (Debian: binutils-{name.replace('_', '-')}-linux-gnu)")


@pytest.mark.parametrize("name", MACHINES)
def test_the_bytes_are_the_source_assembled(tmp_path: Path, name: str) -> None:
    assert assembled(SOURCES / f"stub_{name}.S", name, tmp_path) == by_name(name).code


@pytest.mark.parametrize("name", MACHINES)
def test_the_boot_code_is_its_source_assembled(tmp_path: Path, name: str) -> None:
    """After the code there is data, which is zero in the source."""
    code, made = by_name(name).boot, assembled(SOURCES / f"boot_{name}.S", name, tmp_path)
    assert made.startswith(code)
    assert not any(made[len(code) :])
    assert len(made) + 8 <= by_name(name).slot_bytes


@pytest.mark.parametrize("name", callbatches.CODE)
def test_the_bytes_of_the_calls_are_their_source_assembled(tmp_path: Path, name: str) -> None:
    assert assembled(Path(callbatches.__file__).with_name(f"calls_{name}.S"), name, tmp_path) == callbatches.CODE[name]


def _defines(name: str = "x86_64") -> dict[str, int]:
    source = (SOURCES / f"stub_{name}.S").read_text()
    found = re.findall(r"^#define\s+(\w+)\s+(0x[0-9a-f]+|\d+)\b", source, re.MULTILINE)
    return {name: int(value, 0) for name, value in found}


@pytest.mark.parametrize("name", MACHINES)
def test_source_and_layout_agree(name: str) -> None:
    defines = _defines(name)
    fields = stub.OPERATION.fields
    assert fields is not None
    for field in stub.OPERATION.names or ():
        assert defines[f"OP_{field.upper()}"] == fields[field][1], field
    assert defines["OP_SIZE"] == stub.OPERATION.itemsize
    assert defines["OPS"] == stub.HEADER_BYTES
    assert defines["C_SIZE"] == by_name(name).context_bytes
    assert defines["PREPARED"] == stub.PREPARED_OFFSET
    assert defines["C_HERE"] == 8 * by_name(name).keeper_word
    stages = [defines[name] for name in ("EMPTY", "CREATE", "HANDSHAKE", "ARM")]
    assert stages == [stub.EMPTY, stub.CREATE, stub.HANDSHAKE, stub.ARM]
    assert [defines[name] for name in ("SETUP", "GO", "DONE", "ABORT")] == [stub.SETUP, stub.GO, stub.DONE, stub.ABORT]
    assert (defines["FLAG_VERIFY"], defines["FLAG_FILL"]) == (stub.FLAG_VERIFY, stub.FLAG_FILL)


def test_a_header_holds_each_number_where_the_stub_looks() -> None:
    defines = _defines()
    packed = stub.pack_header(LAYOUT, 0x77777, stub.operations_for([0x10000], [65536], stub.FLAG_VERIFY))

    def word(offset: int) -> int:
        return int.from_bytes(packed[offset : offset + 8], "little")

    assert word(defines["STATE"]) == stub.SETUP
    assert word(defines["COUNT"]) == 1
    assert word(defines["SCRATCH"]) == LAYOUT.scratch
    assert word(defines["UFFD"]) == stub.NO_FD
    assert word(defines["ALL_SIGNALS"]) == ALL_SIGNALS
    assert (word(defines["PREPARED"]), word(defines["ERROR"])) == (stub.NO_STAGE, 0)
    assert word(defines["API"]) == UFFD_API
    assert (word(defines["REGISTER"]), word(defines["REGISTER"] + 8)) == (LAYOUT.scratch, LAYOUT.scratch_size)
    assert word(defines["SCRATCH_SIZE"]) == LAYOUT.scratch_size
    assert (word(defines["BASE"]), word(defines["CODE_END"])) == (LAYOUT.base, LAYOUT.header)
    assert (word(defines["CONTEXTS"]), word(defines["THREADS"])) == (LAYOUT.contexts, LAYOUT.threads)
    assert (word(defines["UNMAP"]), word(defines["PASSES"]), word(defines["GOOD"])) == (0x77777, 0, 0)
    assert word(defines["OPS"] + defines["OP_ADDRESS"]) == 0x10000
    assert word(defines["OPS"] + defines["OP_LENGTH"]) == 65536
    assert word(defines["OPS"] + defines["OP_FLAGS"]) == stub.FLAG_VERIFY
    assert word(defines["OPS"] + defines["OP_ERROR"]) == stub.NOT_TRIED


def registers_of(**values: int) -> NDArray[np.uint64]:
    """General registers of one thread."""
    registers = np.zeros((1, X8664.words), np.uint64)
    for name, value in values.items():
        registers[0, COLUMN[name]] = value % (1 << 64)
    return registers


def test_a_context_holds_each_register_where_the_stub_looks() -> None:
    defines = _defines()
    names = ["rip", "rsp", "rax", "rbx", "rcx", "rdx", "rsi", "rdi", "rbp", *(f"r{n}" for n in range(8, 16))]
    values = {name: 1000 + number for number, name in enumerate(names)}
    home = registers_of(**values, eflags=0x246, orig_rax=NO_SYSCALL)
    homes = np.concatenate([registers_of(), home])
    packed = LAYOUT.pack_contexts(homes, np.array([1, 0xABCD], np.uint64), [77, 4194303], keeper=1)
    assert len(packed) == 2 * X8664.context_bytes
    second = packed[X8664.context_bytes :]

    def word(name: str) -> int:
        offset = defines[f"C_{name}"]
        return int.from_bytes(second[offset : offset + 8], "little")

    assert [word(name.upper()) for name in names] == [1000 + number for number in range(len(names))]
    assert (word("FLAGS"), word("MASK"), word("TICKS"), word("NAP")) == (0x246, 0xABCD, 0, 0)
    assert word("TRAMPOLINE") == LAYOUT.trampoline(1)
    assert (word("HERE"), word("LEFT"), word("USED"), word("KEEPER")) == (0, 0, 0, 1)
    assert word("CLOCK") == time.pthread_getcpuclockid(threading.get_ident()) % (1 << 64) - 8 * (
        4194303 - threading.get_native_id()
    )
    path = second[defines["C_PATH"] : defines["C_PATH"] + 48]
    assert path.rstrip(b"\0") == b"/proc/self/task/4194303/syscall"
    assert path.endswith(b"\0")


@given(
    threads=st.integers(1, 5000),
    operations=st.integers(1, 1024),
    name=st.sampled_from(list(MACHINES)),
    page_size=st.sampled_from([4096, 16384, 65536]),
)
def test_the_parts_of_the_mapping_do_not_overlap(threads: int, operations: int, name: str, page_size: int) -> None:
    layout = stub.Layout(1 << 40, threads, operations, 2 << 20, by_name(name), page_size)
    assert layout.trampoline(threads - 1) + layout.machine.trampoline_bytes <= layout.header
    assert layout.trampoline(0) - layout.base >= len(layout.machine.code)
    assert layout.header + stub.HEADER_BYTES + operations * stub.OPERATION.itemsize == layout.context(0)
    assert layout.context(threads) <= layout.scratch
    assert layout.scratch + layout.scratch_size == layout.base + layout.size
    assert all(part % page_size == 0 for part in (layout.header, layout.scratch))


@pytest.mark.parametrize("name", MACHINES)
def test_what_is_executed_begins_with_the_code(name: str) -> None:
    layout = stub.Layout(1 << 40, 3, 8, 2 << 20, by_name(name), 4096)
    assert layout.executable.startswith(layout.machine.code)
    assert len(layout.executable) <= layout.code_size


def test_a_machine_without_a_stub_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="riscv64"):
        by_name("riscv64")


def test_a_trampoline_refers_to_its_own_context() -> None:
    defines = _defines()
    for index in (0, 1, LAYOUT.threads - 1):
        at = LAYOUT.trampoline(index)
        code = LAYOUT.executable[at - LAYOUT.base :][: X8664.trampoline_bytes]
        for end, register in ((7, "RBX"), (14, "RSP"), (20, "RIP")):
            target = at + end + int.from_bytes(code[end - 4 : end], "little", signed=True)
            assert target == LAYOUT.context(index) + defines[f"C_{register}"]


@pytest.mark.parametrize(
    ("call", "result", "expected"),
    [
        (35, -architecture.ERESTART_RESTARTBLOCK, (x86_64.NR_RESTART_SYSCALL, -2)),
        (0, -architecture.ERESTARTSYS, (0, -2)),
        (34, -architecture.ERESTARTNOHAND, (34, -2)),
        (56, -architecture.ERESTARTNOINTR, (56, -2)),
        (0, 5, (5, 0)),
        (0, -4, (-4, 0)),
        (-1, -architecture.ERESTARTSYS, (-architecture.ERESTARTSYS, 0)),
    ],
)
def test_a_thread_that_restores_itself_restarts_its_call(call: int, result: int, expected: tuple[int, int]) -> None:
    registers = np.concatenate([registers_of(rip=7), registers_of(rip=0x1000, rax=result, orig_rax=call)])
    own = x86_64.alone(registers)
    assert (own[1, COLUMN["rax"]], own[1, COLUMN["rip"]]) == (expected[0] % (1 << 64), 0x1000 + expected[1])
    assert registers[1, COLUMN["rip"]] == 0x1000
    assert registers[1, COLUMN["rax"]] == result % (1 << 64)
    assert own[0, COLUMN["rip"]] == 7


def test_only_an_eintr_of_a_listed_call_is_made_good() -> None:
    eintr = -4
    rows = [
        registers_of(orig_rax=232, rax=eintr),
        registers_of(orig_rax=232, rax=0),
        registers_of(orig_rax=34, rax=eintr),
        registers_of(orig_rax=-1, rax=eintr),
    ]
    registers = np.concatenate(rows)
    assert X8664().repair(registers).tolist() == [True, False, False, False]
    assert registers[:, COLUMN["rax"]].astype(np.int64).tolist() == [-architecture.ERESTARTNOHAND, 0, eintr, eintr]


def test_a_parked_thread_keeps_its_stack_and_runs_plainly() -> None:
    flags = 0x246 | 0x100 | 0x400 | 0x40000
    home = registers_of(rip=1, rsp=0x7FFE_0000, rbx=2, eflags=flags, orig_rax=0, cs=0x33)
    homes = np.repeat(home, 6, axis=0)
    for row in (5, 3):
        parked = LAYOUT.parked(homes)[row]
        register = dict(zip(COLUMN, parked.tolist(), strict=True))
        assert register["rip"] == LAYOUT.base
        assert (register["rsp"], register["cs"]) == (0x7FFE_0000, 0x33)
        assert (register["rbx"], register["rbp"]) == (LAYOUT.context(row), LAYOUT.header)
        assert register["eflags"] == 0x246
        assert register["orig_rax"] == NO_SYSCALL
    assert homes[5, COLUMN["rip"]] == 1
    assert UFFDIO_API == 0xC0000000 | 24 << 16 | 0xAA << 8 | 0x3F


# --- aarch64 ----------------------------------------------------------------------------------------------------------

PROGRAM = Path(__file__).parents[3] / "programs/mover_stub_aarch64.c"


@pytest.fixture(scope="module")
def stub_runner(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The command that runs the stub for aarch64, on such a machine or in an emulator of its programs."""
    directory = tmp_path_factory.mktemp("aarch64")
    here = platform.machine() == "aarch64"
    compiler = shutil.which("cc" if here else "aarch64-linux-gnu-gcc")
    emulator = None if here else shutil.which("qemu-aarch64")
    if compiler is None or not (here or emulator):
        pytest.skip("needs aarch64, or gcc-aarch64-linux-gnu, libc6-dev-arm64-cross and qemu-user (Debian)")
    options = ["-O1", "-static", "-pthread", "-o", str(directory / "program")]
    done = subprocess.run([compiler, *options, str(PROGRAM)], check=False, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"cannot build programs for aarch64: {done.stderr[-200:]}")
    (directory / "code").write_bytes(aarch64.CODE)
    return [*([emulator] if emulator else []), str(directory / "program"), str(directory / "code")]


@pytest.mark.parametrize("what", ["park", "abandon", "work"])
def test_the_stub_for_aarch64_runs(stub_runner: list[str], what: str) -> None:
    """It parks threads, which restore every register by themselves, and moves blocks; see the program."""
    done = subprocess.run([*stub_runner, what], check=False, capture_output=True, text=True, timeout=60)
    assert (done.stdout, done.returncode) == ("right\n", 0)


def test_an_aarch64_context_is_a_signal_frame() -> None:
    defines = _defines("aarch64")
    layout = stub.Layout(1 << 40, 3, 8, 2 << 20, Aarch64(), 16384)
    homes = np.arange(2 * Aarch64.words, dtype=np.uint64).reshape(2, Aarch64.words)
    packed = layout.pack_contexts(homes, np.array([5, 6], np.uint64), [1, 2], keeper=0)
    second = np.frombuffer(packed[Aarch64.context_bytes :], np.uint64)
    assert second[defines["C_MASK"] // 8] == 6
    assert second[defines["C_REGS"] // 8 :][: Aarch64.words].tolist() == homes[1].tolist()
    assert (defines["C_SP"], defines["C_PC"]) == (defines["C_REGS"] + 31 * 8, defines["C_REGS"] + 32 * 8)
    assert second[defines["C_FPSIMD"] // 8] == 0x46508001 | 528 << 32
    assert (second[defines["C_END"] // 8], second[defines["C_TICKS"] // 8]) == (0, 0)
    assert defines["C_END"] == defines["C_FPSIMD"] + 528
    assert layout.context(0) % 16 == 0


def test_a_parked_aarch64_thread() -> None:
    layout = stub.Layout(1 << 40, 4, 8, 2 << 20, Aarch64(), 65536)
    homes = np.full((4, Aarch64.words), 3 << 10 | 1 << 31, np.uint64)
    parked = layout.parked(homes)
    assert (parked[:, Aarch64.pc] == layout.base).all()
    assert parked[:, 28].tolist() == [layout.context(row) for row in range(4)]
    assert (parked[:, 27] == layout.header).all()
    assert (parked[:, 33] == 1 << 31).all()
    assert (parked[:, Aarch64.sp] == homes[:, Aarch64.sp]).all()
    homes[:, 33] = [0, 0x10, 0, 0x8000_0000]
    assert Aarch64().foreign(homes).tolist() == [False, True, False, False]


def test_an_aarch64_thread_that_has_just_branched_makes_calls_for_us() -> None:
    """BTYPE wants a landing pad, which a system call instruction is not."""
    registers = np.full((1, Aarch64.words), 1 << 31 | 3 << 10, np.uint64)
    Aarch64().leave_call(registers)
    assert int(registers[0, 33]) == 1 << 31


def test_a_thread_that_is_barred_from_ordinary_memory_is_seen() -> None:
    state = np.zeros(512, np.uint64)
    for offset in (832, 2432, 2688):
        state.view(np.uint32)[offset // 4] = 0b01
        assert not x86_64.bars_key_0(state, offset), "not present: the initial value, which bars nothing"
    state[64] = 1 << 9
    assert all(x86_64.bars_key_0(state, offset) for offset in (832, 2432, 2688))
    for rights, barred in ((0x55555554, False), (0x55555556, True), (0, False)):
        state.view(np.uint32)[2688 // 4] = rights
        assert x86_64.bars_key_0(state, 2688) is barred
