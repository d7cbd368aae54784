"""Each refusal on a process of that kind: the kernel shows the facts that the checks expect.

A target is a small Python program that makes itself so through ctypes, says "ready" and waits.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from early_imports import import_all
from mover_targets import PREAMBLE, READY, SQPOLL, TRACER, program
from mthp.budget import Amount
from mthp.errors import TargetVanishedError
from mthp.linux.live import LiveAddressSpace, open_live
from mthp.linux.mover.refuse import process as process_refusals
from mthp.linux.mover.refuse import sharing
from mthp.linux.mover.refuse.block import BlockRefusal, SpecialRanges, refuse_blocks, special_ranges
from mthp.linux.mover.refuse.process import refuse_process
from mthp.means import THREAD_STOP_NS, USUAL_MEANS, WINDOW_FACTOR, Means
from mthp.movechecks import Refusal, refuse_vma
from targets import PAGE_SIZE, PMD_SIZE, Puppet, threads_of
from waiting import until

pytestmark = [
    pytest.mark.live,
    pytest.mark.requires("root", "mover", "mthp"),
]

PTRACE_SEIZE = 0x4206
NOBODY = 65534
NO_RIGHTS = {"not_permitted"}

SECCOMP = """
def guard():
    filter_calls()
    time.sleep(600)
thread(guard)
"""
IO_URING = "ring = call(425, 4, ctypes.create_string_buffer(120))"
# Root may pin without limit, and since Linux 7.2 VmPin does not count that.
PINNED = f"""
os.setresuid({NOBODY}, {NOBODY}, {NOBODY})
{IO_URING}
buffer = memory(16)
ctypes.memset(buffer, 1, 16 * PAGE)
call(427, ring, 0, ctypes.create_string_buffer(struct.pack("QQ", buffer, 16 * PAGE)), 1)
"""
AIO = "call(IO_SETUP, 8, ctypes.create_string_buffer(8))"
VFORK = "thread(clone, 0x4100 | 17)"
SHARER = "clone(0x100 | 17)"
STUCK = """
fd = call(USERFAULTFD, 0o2000000)
libc.ioctl(fd, ctypes.c_ulong(0xC018AA3F), ctypes.create_string_buffer(struct.pack("3Q", 0xAA, 0, 0)))
hole = memory(1)
libc.ioctl(fd, ctypes.c_ulong(0xC020AA00), ctypes.create_string_buffer(struct.pack("4Q", hole, PAGE, 1, 0)))
def look():
    to = ctypes.create_string_buffer(8)
    local = ctypes.create_string_buffer(struct.pack("QQ", ctypes.addressof(to), 8))
    remote = ctypes.create_string_buffer(struct.pack("QQ", hole, 8))
    libc.process_vm_readv(os.getpid(), ctypes.byref(local), 1, ctypes.byref(remote), 1, 0)
thread(look)
"""
OWN_FILES = """
def apart():
    assert libc.unshare(0x400) == 0
    os.open("/dev/kvm", os.O_RDWR)
    time.sleep(600)
thread(apart)
"""


@contextlib.contextmanager
def target(code: str = "") -> Iterator[LiveAddressSpace]:
    """A process that ran `code`, and its address space."""
    with program(PREAMBLE + code + READY) as (pid, _):
        try:
            with open_live(pid) as space:
                yield space
        finally:
            # A child from clone(2) does not hear of its parent's death.
            for child in children_of(pid):
                os.kill(child, signal.SIGKILL)


def children_of(pid: int) -> list[int]:
    """Processes that `pid` started, with clone(2) too."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            if int(path.read_text().rpartition(")")[2].split()[1]) == pid:
                found.append(int(path.parent.name))
    return found


def refusals(space: LiveAddressSpace) -> dict[str, Refusal]:
    found = refuse_process(space.process, space.geometry)
    keys = [refusal.key for refusal in found]
    assert len(set(keys)) == len(keys)
    assert all(refusal.reason for refusal in found)
    return {refusal.key: refusal for refusal in found}


def comes_to_be(space: LiveAddressSpace, keys: set[str]) -> None:
    """Wait until these are the refusals, because the threads of the target need time to start."""
    until(lambda: set(refusals(space)) == keys, lambda: f"{keys}: {set(refusals(space))}")


def test_an_ordinary_process_is_not_refused() -> None:
    with target("thread(time.sleep, 600)") as space:
        comes_to_be(space, set())


@pytest.mark.parametrize(
    ("code", "keys"),
    [
        (SECCOMP, {"seccomp"}),
        (IO_URING, {"io_uring"}),
        (SQPOLL, {"io_uring", "io_uring_threads"}),
        (PINNED, {"io_uring", "pinned"}),
        (AIO, {"aio"}),
        (VFORK, {"vfork", "shared_vm"}),
        (SHARER, {"shared_vm"}),
        (STUCK, {"uninterruptible"}),
        ("libc.prctl(41, 1, 0, 0, 0)", {"thp_disabled"}),
        ("libc.personality(ctypes.c_ulong(8))", {"personality"}),
        ("libc.personality(ctypes.c_ulong(0x0400000))", {"personality"}),
        pytest.param(
            "os.open('/dev/kvm', os.O_RDWR)",
            {"device_kvm"},
            marks=pytest.mark.skipif(not os.access("/dev/kvm", os.R_OK | os.W_OK), reason="needs /dev/kvm"),
        ),
        pytest.param(
            OWN_FILES,
            {"device_kvm"},
            marks=pytest.mark.skipif(not os.access("/dev/kvm", os.R_OK | os.W_OK), reason="needs /dev/kvm"),
        ),
    ],
    ids=[
        "seccomp", "io_uring", "sqpoll", "pinned", "aio", "vfork", "clone_vm", "stuck", "thp", "linux32", "exec",
        "kvm", "own_files",
    ],
)  # fmt: skip
def test_a_process_that_is_so(code: str, keys: set[str]) -> None:
    with target(code) as space:
        comes_to_be(space, keys)


def test_addresses_without_random_are_no_reason() -> None:
    with target("libc.personality(ctypes.c_ulong(0x0040000))") as space:
        comes_to_be(space, set())


def test_the_sharer_is_named() -> None:
    with target(SHARER) as space:
        comes_to_be(space, {"shared_vm"})
        (child,) = children_of(space.process.pid)
        assert f"process {child} " in refusals(space)["shared_vm"].reason


def test_a_sharer_that_cannot_be_compared_is_known_by_its_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a kernel without kcmp(2), or if the other process belongs to another user."""
    monkeypatch.setattr(sharing, "kcmp", lambda *_: None)
    with target(SHARER) as space:
        until(lambda: "shared_vm_unknown" in refusals(space), "the process that shares the memory")


def test_a_forked_child_shares_no_memory() -> None:
    with target("if os.fork() == 0: time.sleep(600)") as space:
        comes_to_be(space, set())


def test_somebody_else_traces_it() -> None:
    with target() as space:
        with program(PREAMBLE + TRACER + READY, str(space.process.pid)) as (pid, _):
            assert str(pid) in refusals(space)["traced"].reason
        comes_to_be(space, set())


def test_that_we_trace_it_is_no_reason() -> None:
    """The checks are made again after the stop."""
    libc = ctypes.CDLL(None, use_errno=True)
    with target() as space:
        assert libc.ptrace(PTRACE_SEIZE, space.process.pid, None, None) == 0
        comes_to_be(space, set())


def test_itself_and_its_ancestors() -> None:
    with open_live("self") as space:
        assert "itself" in refusals(space)
    parent = os.getpid()

    def of_the_parent() -> set[str]:
        with open_live(parent) as space:
            return set(refusals(space))

    assert "ancestor" in in_child(of_the_parent)


def test_the_first_process_of_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without rights over it, only its number is checked."""
    with target() as space:
        monkeypatch.setattr(space.process, "pid", 1)
        target_of = process_refusals._Target(space.process, space.geometry, USUAL_MEANS)
        assert next(process_refusals._process(target_of)).key == "init"
        monkeypatch.undo()
        assert "init" not in refusals(space)


def test_a_frozen_process(frozen_cgroup: Callable[[int], None]) -> None:
    with target() as space:
        frozen_cgroup(space.process.pid)
        comes_to_be(space, {"frozen"})


def in_child(function: Callable[[], set[str]], *, as_nobody: bool = False) -> set[str]:
    """Return the result of `function` in a child of this process, optionally without rights."""
    ours, theirs = os.pipe()
    import_all()
    pid = os.fork()
    if pid == 0:
        try:
            if as_nobody:
                os.setgroups([])
                os.setresgid(NOBODY, NOBODY, NOBODY)
                os.setresuid(NOBODY, NOBODY, NOBODY)
            os.write(theirs, " ".join(sorted(function())).encode())
            os._exit(0)
        finally:
            os._exit(1)
    os.close(theirs)
    with open(ours) as answers:
        answer = answers.read()
    assert os.waitpid(pid, 0)[1] == 0
    return set(answer.split())


@pytest.mark.parametrize(("code", "keys"), [("", NO_RIGHTS), (SECCOMP, {"seccomp", *NO_RIGHTS})])
def test_without_rights_over_it(code: str, keys: set[str]) -> None:
    """Facts that need no rights are reported nevertheless."""
    with target(code) as space:
        comes_to_be(space, keys - NO_RIGHTS)
        assert in_child(lambda: set(refusals(space)), as_nobody=True) == keys


def test_a_32_bit_process(tmp_path: Path) -> None:
    """Made by hand: it calls pause(2) for ever."""
    code = bytes.fromhex("b81d000000cd80ebf7")
    header = b"\x7fELF\x01\x01\x01" + bytes(9)
    header += b"".join(
        value.to_bytes(size, "little")
        for value, size in [
            *((2, 2), (3, 2), (1, 4), (0x08048054, 4), (52, 4), (0, 4), (0, 4), (52, 2), (32, 2), (1, 2)),
            *((0, 2), (0, 2), (0, 2)),
            *((1, 4), (0, 4), (0x08048000, 4), (0x08048000, 4), (84 + len(code), 4), (84 + len(code), 4), (5, 4)),
            (0x1000, 4),
        ]
    )
    program = tmp_path / "pauses"
    program.write_bytes(header + code)
    program.chmod(0o755)
    try:
        child = subprocess.Popen([program])
    except OSError as error:
        pytest.skip(f"this kernel runs no 32-bit programs: {error}")
    with child:
        try:
            # It waits in its one system call, or was killed for it.
            until(lambda: child.poll() is not None or threads_of(child.pid) == {child.pid: "S"}, "it to pause")
            if child.poll() is not None:
                pytest.skip("this kernel runs no 32-bit programs")
            with open_live(child.pid) as space:
                comes_to_be(space, {"not_64_bit", "personality"})
        finally:
            child.kill()


def test_low_memory() -> None:
    with target() as space:
        means = Means(reserve=Amount(size=1 << 60))
        assert "low_memory" in {refusal.key for refusal in refuse_process(space.process, space.geometry, means)}


def test_many_threads() -> None:
    """The reason has their cost in every window, and how to accept it."""
    with target("for _ in range(9): thread(time.sleep, 600)") as space:
        found = {why.key: why for why in refuse_process(space.process, space.geometry, Means(max_threads=9))}
        assert "10 threads" in found["threads"].reason
        assert "ms at a time" in found["threads"].reason
        assert "--max-threads 10" in found["threads"].remedy
        for means in (Means(), Means(max_threads=10), Means(max_pause=1e-3)):
            assert "threads" not in {why.key for why in refuse_process(space.process, space.geometry, means)}
        brief = Means(max_pause=9 * THREAD_STOP_NS / WINDOW_FACTOR / 1e9)
        assert "threads" in {why.key for why in refuse_process(space.process, space.geometry, brief)}


@pytest.mark.parametrize(
    ("answer", "key"),
    [
        ((1, 0), "userfaultfd_forbidden"),
        ((38, 0), "no_uffdio_move"),
        ((0, 0xFFFF), "no_uffdio_move"),
    ],
)
def test_a_kernel_that_cannot_move(monkeypatch: pytest.MonkeyPatch, answer: tuple[int, int], key: str) -> None:
    monkeypatch.setattr(process_refusals, "probe_userfaultfd", lambda: answer)
    with target() as space:
        assert set(refusals(space)) == {key}


def test_a_process_that_is_gone() -> None:
    with Puppet() as puppet, open_live(puppet.pid) as space:
        puppet.kill()
        with pytest.raises(TargetVanishedError):
            refuse_process(space.process, space.geometry)
        with pytest.raises(TargetVanishedError):
            special_ranges(space.process)


# --- Mappings and blocks ----------------------------------------------------------------------------------------------


def flags_of(space: LiveAddressSpace, address: int) -> Refusal | None:
    return next(refuse_vma(vma) for vma in space.vmas() if vma.start <= address < vma.end)


def test_mappings() -> None:
    with Puppet() as puppet, open_live(puppet.pid) as space:
        plain = puppet.map(PMD_SIZE)
        assert flags_of(space, plain) is None
        for advice in (14, 10):
            assert flags_of(space, puppet.map(PMD_SIZE, advice=advice)) is None
        expected = {15: "vma_nohugepage", 16: "vma_dontdump", 18: "vma_wipeonfork"}
        for advice, key in expected.items():
            refusal = flags_of(space, puppet.map(PMD_SIZE, advice=advice))
            assert refusal is not None
            assert refusal.key == key
        shared = flags_of(space, puppet.map(PMD_SIZE, shared=True))
        assert shared is not None
        assert shared.key == "vma_not_private"
        puppet.tell("mprotect", plain, PMD_SIZE // 2, 1)
        read_only = flags_of(space, plain)
        assert read_only is not None
        assert read_only.key == "vma_not_read_write"
        assert {refusal.key for vma in space.vmas() if vma.name == "[stack]" and (refusal := refuse_vma(vma))} == {
            "vma_stack"
        }


@pytest.mark.requires("pfns", "guard")
def test_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """16 blocks of 16 pages, each with a fate of its own."""
    # Its advice is there to keep other folios away.
    monkeypatch.setattr("mthp.linux.mover.refuse.block.refuse_vma", lambda vma: None)
    size = 16 * PAGE_SIZE
    with Puppet() as puppet, open_live(puppet.pid) as space:
        start = puppet.map(16 * size, advice=15)
        puppet.write(start, 128)
        puppet.tell("read", start + 8 * size, 16, 1)
        puppet.tell("madvise", start + 2 * size + PAGE_SIZE, PAGE_SIZE, 102)
        puppet.tell("madvise", start + 3 * size + PAGE_SIZE, PAGE_SIZE, 4)
        puppet.tell("fork")
        for block in (0, 1, 3, 4):
            puppet.write(start + block * size, 16)
        puppet.write(start + 6 * size, 15)
        columns = space.read([(start, start + 16 * size)])
        addresses = start + np.arange(16, dtype=np.int64) * size
        verdict = refuse_blocks(
            columns,
            space.mapcounts(columns),
            addresses,
            np.full(16, 4, np.int8),
            vmas=space.vmas(),
            special=SpecialRanges(stacks=((start + size + 5, start + size + 6),)),
            page_size=PAGE_SIZE,
        )
    assert [BlockRefusal(code) for code in verdict.tolist()[:9]] == [
        BlockRefusal.NONE,
        BlockRefusal.SPECIAL,
        BlockRefusal.MARKER,
        BlockRefusal.NONE,
        BlockRefusal.NONE,
        BlockRefusal.SHARED,
        BlockRefusal.SHARED,
        BlockRefusal.SHARED,
        BlockRefusal.EMPTY,
    ]
    assert set(verdict.tolist()[9:]) == {BlockRefusal.EMPTY}


def test_special_ranges_of_a_sleeping_process() -> None:
    with Puppet() as puppet, open_live(puppet.pid) as space:
        puppet.tell("start_thread")
        until(lambda: len(special_ranges(space.process).stacks) == 2, "all threads to sleep")
        found = special_ranges(space.process)
        assert len(found.robust_lists) == len(found.stacks) == 2
        vmas = space.vmas()
        stack = next(vma for vma in vmas if vma.name == "[stack]")
        assert sum(stack.start <= start < end <= stack.end for start, end in found.stacks) == 1
        for start, end in found.ranges:
            assert any(vma.start <= start < end <= vma.end and vma.permissions == "rw-p" for vma in vmas)


def test_the_stack_of_a_thread_that_runs_is_not_known() -> None:
    with target("thread(time.sleep, 600)\nprint('ready', flush=True)\nwhile True: pass") as space:
        pid = space.process.pid
        until(lambda: len(special_ranges(space.process).stacks) == 1, "the one thread to run, the other to sleep")
        assert len(special_ranges(space.process).robust_lists) == 2
        os.kill(pid, signal.SIGSTOP)
        # Once it is stopped, the kernel shows it.
        until(lambda: len(special_ranges(space.process).stacks) == 2, "the stop")
