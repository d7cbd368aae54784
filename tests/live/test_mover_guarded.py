"""Move own memory while other threads use it: every byte right, the requested folios, and one mapping stays one.

A test that could hang (on a guard that stays) runs in a process of its own, with a time limit.
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import shutil
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from early_imports import import_all
from mover_targets import compiled, pages_by_order
from mthp.errors import NotPermittedError, UnsupportedError
from mthp.linux import abi
from mthp.linux.journal.switches import SwitchJournal
from mthp.linux.live import open_live
from mthp.linux.mover import guarded, mover
from mthp.linux.mover.guarded import CODE, OwnMover
from mthp.linux.mover.refuse.block import refuse_blocks
from mthp.linux.mover.refuse.pinned import HELD
from mthp.results import BlockOutcome, ScanResult
from own_memory import collapse_own
from targets import PAGE_SIZE, map_aligned
from targets import madvise as advise
from thp_switches import ThpSwitches, words_per_size
from waiting import PATIENCE, until, wait_for

pytestmark = [
    pytest.mark.live,
    pytest.mark.requires("root", "pfns", "mthp", "4k-pages"),
    pytest.mark.skipif(platform.machine() != "x86_64", reason="the code is for x86-64"),
]

SOURCE = Path(guarded.__file__).with_name("guarded_x86_64.S")
K64 = 64 << 10
NOBODY = 65534


@pytest.fixture
def journal(thp_switches: ThpSwitches, tmp_path: Path) -> SwitchJournal:
    """A journal, with all sizes off."""
    thp_switches.only()
    return SwitchJournal(tmp_path / "mthp")


@pytest.fixture
def memory(journal: SwitchJournal) -> Iterator[Callable[[int], int]]:
    """Maps memory of small pages, alone, filled with a pattern."""
    maps = []

    def make(size: int) -> int:
        address = map_aligned(size, 0)
        maps.append((address, size))
        words(address, size)[:] = pattern(size)
        return address

    yield make
    libc = ctypes.CDLL(None)
    for address, size in maps:
        libc.munmap(ctypes.c_void_p(address), ctypes.c_size_t(size))


@pytest.fixture(scope="module")
def hammer() -> ctypes.CDLL:
    """The threads of mover_hammer.c."""
    loaded = ctypes.CDLL(str(compiled("mover_hammer.so")))
    loaded.hammer_start.restype = ctypes.c_void_p
    loaded.hammer_start.argtypes = (ctypes.c_void_p, ctypes.c_uint64, ctypes.c_uint64)
    loaded.hammer_stop.restype = ctypes.c_uint64
    loaded.hammer_stop.argtypes = (ctypes.c_void_p, ctypes.POINTER(ctypes.c_uint64))
    return loaded


def words(address: int, size: int) -> np.ndarray[tuple[int], np.dtype[np.uint64]]:
    """Return the memory as an array of uint64."""
    return np.frombuffer(memoryview((ctypes.c_char * size).from_address(address)).cast("B"), np.uint64)


def pattern(size: int) -> np.ndarray[tuple[int], np.dtype[np.uint64]]:
    return np.arange(size // 8, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(7)


def intact(address: int, size: int) -> bool:
    return bool((words(address, size) == pattern(size)).all())


def mappings(address: int, size: int) -> list[tuple[int, int]]:
    with open_live("self") as space:
        return [(vma.start, vma.end) for vma in space.vmas() if vma.start < address + size and vma.end > address]


def results(outcomes: list[BlockOutcome]) -> Counter[ScanResult]:
    return Counter(outcome.result for outcome in outcomes)


@pytest.mark.skipif(not (shutil.which("as") and shutil.which("objcopy")), reason="needs binutils")
def test_the_code_is_its_source_assembled(tmp_path: Path) -> None:
    subprocess.run(["as", "--64", "-o", tmp_path / "code.o", SOURCE], check=True)
    subprocess.run(["objcopy", "-O", "binary", "-j", ".text", tmp_path / "code.o", tmp_path / "code"], check=True)
    assert (tmp_path / "code").read_bytes() == CODE


@pytest.mark.parametrize("with_guard", [True, False])
@pytest.mark.parametrize("order", [2, 3, 4, 7, 8, 9])
def test_every_order(memory: Callable[[int], int], journal: SwitchJournal, order: int, with_guard: bool) -> None:
    size = 8 << 20
    address = memory(size)
    assert pages_by_order("self", address, size) == {0: size // PAGE_SIZE}
    switches = words_per_size()
    outcomes = collapse_own(address, size, order, guarded=with_guard, journal=journal)
    assert results(outcomes) == {ScanResult.SUCCEED: size // (PAGE_SIZE << order)}
    assert [outcome.address for outcome in outcomes] == list(range(address, address + size, PAGE_SIZE << order))
    assert {(outcome.copied, outcome.filled) for outcome in outcomes} == {(1 << order, 0)}
    assert pages_by_order("self", address, size) == {order: size // PAGE_SIZE}
    assert intact(address, size)
    assert mappings(address, size) == [(address, address + size)]
    assert words_per_size() == switches
    # It can still be used as before.
    words(address, size)[:] = 3
    assert int(words(address, size).sum()) == 3 * size // 8


def test_one_order_after_the_other(memory: Callable[[int], int], journal: SwitchJournal) -> None:
    size = 4 << 20
    address = memory(size)
    for order in (2, 5, 9):
        collapse_own(address, size, order, journal=journal)
        assert pages_by_order("self", address, size) == {order: size // PAGE_SIZE}
    assert results(collapse_own(address, size, 5, journal=journal)) == {ScanResult.PTE_MAPPED_HUGEPAGE: 32}
    assert pages_by_order("self", address, size) == {9: size // PAGE_SIZE}
    assert intact(address, size)


@pytest.mark.slow
@pytest.mark.parametrize("order", [2, 4, 9])
def test_under_threads_that_write_and_check(
    memory: Callable[[int], int], journal: SwitchJournal, hammer: ctypes.CDLL, order: int
) -> None:
    size = 8 << 20
    address = memory(size)
    count = size // (PAGE_SIZE << order)
    running = hammer.hammer_start(address, size, 4)
    tally: Counter[ScanResult] = Counter()
    seen = []
    rounds = ctypes.c_uint64()
    try:
        for _ in range(3):
            tally += results(collapse_own(address, size, order, journal=journal))
            seen.append(pages_by_order("self", address, size))
            # Small pages again: write a byte of each.
            make_small(address, size, order)
    finally:
        errors = hammer.hammer_stop(running, ctypes.byref(rounds))
    assert errors == 0
    assert rounds.value > 0
    assert tally[ScanResult.SUCCEED] >= count
    assert max(counts[order] for counts in seen) >= 0.9 * size / PAGE_SIZE
    assert mappings(address, size) == [(address, address + size)]


def make_small(address: int, size: int, order: int) -> None:
    """Split folios by telling the kernel that one page of each is cold, and paging none out."""
    for block in range(address, address + size, PAGE_SIZE << order):
        advise(block, PAGE_SIZE, 20)


def test_the_control_without_a_guard_of_any_kind_goes_wrong(
    memory: Callable[[int], int], journal: SwitchJournal, hammer: ctypes.CDLL
) -> None:
    """The hammer finds lost writes if the same is done without waiting: take away, copy, put back."""
    size = 1 << 20
    address = memory(size)
    libc = ctypes.CDLL(None)
    libc.mremap.restype = ctypes.c_void_p
    rounds = ctypes.c_uint64()

    def goes_wrong() -> bool:
        running = hammer.hammer_start(address, size, 4)
        for block in [*range(address, address + size, K64)] * 20:
            away = libc.mremap(
                ctypes.c_void_p(block), ctypes.c_size_t(K64), ctypes.c_size_t(K64), 5, ctypes.c_void_p(0)
            )
            ctypes.memmove(block, away, K64)
            libc.munmap(ctypes.c_void_p(away), ctypes.c_size_t(K64))
        return bool(hammer.hammer_stop(running, ctypes.byref(rounds)) > 0)

    # With one processor, it takes a switch of threads in the middle.
    assert wait_for(goes_wrong)


PYTHON_THREADS = """
import os, sys, tempfile, threading, time
from pathlib import Path
sys.path.insert(0, {tests!r})
from targets import map_aligned
from own_memory import collapse_own
from mthp.linux.journal.switches import SwitchJournal
import ctypes
sys.setswitchinterval(0.0005)
size = 4 << 20
address = map_aligned(size, 0)
view = memoryview((ctypes.c_char * size).from_address(address)).cast("B")
for at in range(0, size, 512):
    view[at : at + 8] = at.to_bytes(8, "little")
stop, wrong, rounds, calls = False, [], [0] * 3, 0

def with_the_lock(number):
    at = number * 512
    while not stop:
        at = (at + 7 * 512) % size
        if int.from_bytes(view[at : at + 8], "little") != at:
            wrong.append(at)
        view[at : at + 8] = at.to_bytes(8, "little")
        rounds[number] += 1

def in_system_calls():
    ours, theirs = os.pipe()
    at = 0
    while not stop:
        at = (at + 11 * 512) % size
        os.write(theirs, view[at : at + 8])
        if int.from_bytes(os.read(ours, 8), "little") != at:
            wrong.append(at)
        os.write(theirs, at.to_bytes(8, "little"))
        os.readv(ours, [view[at : at + 8]])
        rounds[2] += 1

threads = [threading.Thread(target=with_the_lock, args=(number,)) for number in (0, 1)]
threads += [threading.Thread(target=in_system_calls)]
for thread in threads:
    thread.start()
journal = SwitchJournal(Path(sys.argv[1]))
moved = 0
for order in (2, 4, 9):
    moved += sum(not outcome.reason for outcome in collapse_own(address, size, order, journal=journal))
while min(rounds) <= 10:
    time.sleep(0.001)
stop = True
for thread in threads:
    thread.join()
good = all(int.from_bytes(view[at : at + 8], "little") == at for at in range(0, size, 512))
print(len(wrong), good, moved)
"""


FIRST_PROCESS = """
import os, sys
from pathlib import Path
sys.path.insert(0, {tests!r})
import ctypes
from targets import map_aligned
from own_memory import collapse_own
from mthp.linux.journal.switches import SwitchJournal
address = map_aligned(1 << 20, 0)
ctypes.memset(address, 7, 1 << 20)
outcomes = collapse_own(address, 1 << 20, 4, journal=SwitchJournal(Path(sys.argv[1])))
print(os.getpid(), sum(not outcome.reason for outcome in outcomes))
"""


@pytest.mark.usefixtures("journal")
def test_the_first_process_of_a_container_may_collapse_itself(tmp_path: Path) -> None:
    inner = ("unshare", "--pid", "--fork", "--mount-proc")
    if shutil.which("unshare") is None or subprocess.run([*inner, "true"], check=False, capture_output=True).returncode:
        pytest.skip("needs PID namespaces")
    assert in_python(FIRST_PROCESS, tmp_path / "mthp", prefix=inner).split() == ["1", "16"]


def in_python(code: str, *arguments: object, limit: float = 2 * PATIENCE, prefix: tuple[str, ...] = ()) -> str:
    """Run a program in a new process, and return its output; TimeoutExpired if it hangs."""
    code = code.format(tests=str(Path(__file__).parents[1]))
    done = subprocess.run(
        [*prefix, sys.executable, "-c", code, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=limit,
        check=False,
        env=os.environ | {"NUMPY_MADVISE_HUGEPAGE": "0"},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
@pytest.mark.usefixtures("journal")
def test_threads_that_hold_the_interpreters_lock_while_they_wait(tmp_path: Path) -> None:
    """And others that use the memory in system calls. A mover in Python would wait for the lock for ever."""
    wrong, good, moved = in_python(PYTHON_THREADS, tmp_path / "mthp").split()
    assert (wrong, good) == ("0", "True")
    assert int(moved) == 256 + 64 + 2


def test_a_child_forked_meanwhile_sees_everything(memory: Callable[[int], int], journal: SwitchJournal) -> None:
    size = 4 << 20
    address = memory(size)
    outcomes: list[BlockOutcome] = []
    calls = 0

    def move() -> None:
        nonlocal calls
        for order in (2, 3, 4, 5, 6, 7, 8):
            outcomes.extend(collapse_own(address, size, order, journal=journal))
            calls += 1

    def fork_and_look() -> int:
        pid = os.fork()
        if pid == 0:
            os._exit(0 if intact(address, size) else 1)
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

    mover = threading.Thread(target=move)
    mover.start()
    codes = []
    while mover.is_alive():
        codes += [fork_and_look() for _ in range(3)]
        # Pages that a child shares are refused, so some calls run without a child.
        before = calls
        until(lambda before=before: calls > before + 1 or not mover.is_alive(), "two calls")  # type: ignore[misc]
    mover.join()
    assert set(codes) == {0}
    assert any(not outcome.reason for outcome in outcomes)
    assert intact(address, size)


def test_shared_after_a_fork_is_left_and_moved_once_the_child_is_gone(
    memory: Callable[[int], int], journal: SwitchJournal
) -> None:
    size = 1 << 20
    address = memory(size)
    ours, theirs = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(theirs)
        os.read(ours, 1)
        os._exit(0 if intact(address, size) else 1)
    try:
        outcomes = collapse_own(address, size, 4, journal=journal)
    finally:
        # It holds what this process holds, the lock of the switches too, until it is gone.
        os.close(theirs)
        _, status = os.waitpid(pid, 0)
        os.close(ours)
    assert status == 0
    assert results(outcomes) == {ScanResult.EXCEED_SHARED_PTE: 16}
    assert "mapped more than once" in outcomes[0].reason
    # Not exclusive until written: UFFDIO_MOVE says EBUSY at first.
    assert results(collapse_own(address, size, 4, journal=journal)) == {ScanResult.SUCCEED: 16}
    assert intact(address, size)


def test_what_is_refused_stays_as_it_is(memory: Callable[[int], int], journal: SwitchJournal) -> None:
    size = 1 << 20
    address = memory(size)
    advise(address + 2 * K64 + PAGE_SIZE, PAGE_SIZE, 4)
    outcomes = collapse_own(address, size, 4, journal=journal)
    assert [outcome.reason != "" for outcome in outcomes] == [block == 2 for block in range(16)]
    assert "absent" in outcomes[2].reason
    assert pages_by_order("self", address, size) == {4: 240, 0: 15, -1: 1}
    assert ctypes.CDLL(None).mlock(ctypes.c_void_p(address), ctypes.c_size_t(size)) == 0
    locked = collapse_own(address, size, 5, journal=journal)
    assert results(locked) == {ScanResult.VMA_CHECK: 8}
    assert all("mlock" in outcome.reason for outcome in locked)
    ctypes.CDLL(None).munlock(ctypes.c_void_p(address), ctypes.c_size_t(size))


def test_rolled_back_when_a_page_vanishes_after_the_check(
    memory: Callable[[int], int], journal: SwitchJournal, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A hole in the middle: the first half of the block is away by the time the kernel finds out, and comes back."""
    size = 1 << 20
    address = memory(size)
    check = refuse_blocks

    def checked_too_early(*arguments: object, **options: object) -> object:
        verdict = check(*arguments, **options)  # type: ignore[arg-type]
        advise(address + 3 * K64 + 8 * PAGE_SIZE, PAGE_SIZE, 4)
        return verdict

    monkeypatch.setattr(mover, "refuse_blocks", checked_too_early)
    # Advice 0 (MADV_NORMAL) does nothing, so the page stays away. Not an argument, because the number is the kernel's.
    monkeypatch.setattr(guarded, "MADV_POPULATE_WRITE", 0)
    outcomes = collapse_own(address, size, 4, journal=journal)
    assert [bool(outcome.errno) for outcome in outcomes] == [block == 3 for block in range(16)]
    hole = slice((3 * K64 + 8 * PAGE_SIZE) // 8, (3 * K64 + 9 * PAGE_SIZE) // 8)
    found, expected = words(address, size).copy(), pattern(size)
    assert not found[hole].any()
    expected[hole] = 0
    assert (found == expected).all()
    assert mappings(address, size) == [(address, address + size)]


def test_rolled_back_when_there_is_no_place_for_the_twin(
    memory: Callable[[int], int], hammer: ctypes.CDLL, journal: SwitchJournal
) -> None:
    """All of the block is away already when the kernel refuses; another place is found for the blocks that follow."""
    size = 1 << 20
    address = memory(size)
    blocks = np.arange(address, address + size, K64, dtype=np.int64)
    running = hammer.hammer_start(address, size, 2)
    rounds = ctypes.c_uint64()
    with journal.only(4), OwnMover(K64, guarded=True) as own:
        reserved = own._place
        # A mapping cannot be moved to where it is.
        own._place = int(blocks[0])
        errors = own.move(blocks)
        assert own._place not in (-1, reserved, address)
    ctypes.CDLL(None).munmap(ctypes.c_void_p(reserved), ctypes.c_size_t(K64))
    assert hammer.hammer_stop(running, ctypes.byref(rounds)) == 0
    assert errors.tolist() == [errno.EINVAL] + [0] * 15
    assert pages_by_order("self", address, size) == {0: 16, 4: 240}
    assert mappings(address, size) == [(address, address + size)]


def test_a_pinned_page_stays(memory: Callable[[int], int], journal: SwitchJournal) -> None:
    """Memory is registered with an io_uring, and its reads would go to the old page. Process and page are refused."""
    size = 1 << 20
    address = memory(size)
    libc = ctypes.CDLL(None, use_errno=True)
    libc.syscall.restype = ctypes.c_long
    ring = libc.syscall(ctypes.c_long(425), ctypes.c_long(4), ctypes.create_string_buffer(120))
    if ring < 0:
        pytest.skip("needs io_uring")
    try:
        vector = (ctypes.c_uint64 * 2)(address + K64, K64)
        assert libc.syscall(*map(ctypes.c_long, (427, ring, 0)), vector, ctypes.c_long(1)) == 0
        with pytest.raises(UnsupportedError, match=r"io_uring|pinned"):
            collapse_own(address, size, 4, journal=journal)
        with journal.only(4), OwnMover(K64, guarded=True) as own:
            errors = own.move(np.arange(address, address + size, K64, dtype=np.int64))
        assert [bool(error) for error in errors.tolist()] == [block == 1 for block in range(16)]
    finally:
        os.close(ring)
        # The kernel lets go of the pages a moment later.
        until(lambda: "VmPin:\t       0 kB" in Path("/proc/self/status").read_text(), "the pages to be let go")
    assert intact(address, size)
    assert pages_by_order("self", address, size) == {4: 240, 0: 16}


def test_a_large_folio_that_a_pipe_holds_is_left_alone(
    memory: Callable[[int], int], journal: SwitchJournal, thp_switches: ThpSwitches
) -> None:
    """Some kernels retry the move while it is pinned, and this thread could not unpin it."""
    address = memory(4 * K64)
    collapse_own(address, 4 * K64, 4, journal=journal)
    assert pages_by_order("self", address, 4 * K64) == {4: 64}
    read_end, write_end = os.pipe()
    try:
        vector = abi.IoVec(address, PAGE_SIZE)
        assert ctypes.CDLL(None).vmsplice(write_end, ctypes.byref(vector), ctypes.c_ulong(1), 0) == PAGE_SIZE
        outcomes = collapse_own(address, 4 * K64, 5, journal=journal)
        assert [(each.result, each.reason) for each in outcomes] == [
            (HELD.result, HELD.reason),
            (ScanResult.SUCCEED, ""),
        ]
        assert pages_by_order("self", address, 4 * K64) == {4: 16, 0: 16, 5: 32}
    finally:
        os.close(read_end)
        os.close(write_end)


def test_nothing_is_left(memory: Callable[[int], int], journal: SwitchJournal) -> None:
    address = memory(1 << 20)
    collapse_own(address, 1 << 20, 2, journal=journal)
    descriptors = len(list(Path("/proc/self/fd").iterdir()))
    size = int(Path("/proc/self/statm").read_text().split()[0])
    for _ in range(30):
        for order in (3, 4, 5):
            collapse_own(address, 1 << 20, order, journal=journal)
    assert len(list(Path("/proc/self/fd").iterdir())) == descriptors
    # A place for blocks that was left each time would come to 1680 pages; the interpreter may have taken some, too.
    assert int(Path("/proc/self/statm").read_text().split()[0]) - size < 1024


@pytest.mark.slow
def test_without_rights_for_the_guard(memory: Callable[[int], int], journal: SwitchJournal) -> None:
    if Path("/proc/sys/vm/unprivileged_userfaultfd").read_text().strip() == "1":
        pytest.skip("everybody may have a userfaultfd here")
    address = memory(1 << 20)
    import_all()
    pid = os.fork()
    if pid == 0:
        try:
            os.setresuid(NOBODY, NOBODY, NOBODY)
            with OwnMover(K64, guarded=False):
                pass
            with OwnMover(K64, guarded=True):
                os._exit(1)
        except NotPermittedError as error:
            os._exit(0 if "unprivileged_userfaultfd" in error.help else 2)
        finally:
            os._exit(3)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert intact(address, 1 << 20)


def test_another_machine(memory: Callable[[int], int], monkeypatch: pytest.MonkeyPatch) -> None:
    address = memory(1 << 20)
    uname = os.uname()
    monkeypatch.setattr(os, "uname", lambda: os.uname_result((*uname[:4], "riscv64")))
    with pytest.raises(UnsupportedError, match="riscv64"):
        collapse_own(address, 1 << 20, 4)
    with pytest.raises(UnsupportedError, match="riscv64"):
        OwnMover(K64, guarded=True)
