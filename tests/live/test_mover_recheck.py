"""Checks after the stop: a target changes between check and stop, and each change is noticed.

A target executes lines of a program after it was checked and before it is stopped. No switch is set.
"""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from mover_targets import BLOCK, ORDER, PREAMBLE
from mthp.linux.live import LiveAddressSpace, open_live
from mthp.linux.mover.freeze import FrozenProcess
from mthp.linux.mover.outcome import Objection
from mthp.linux.mover.recheck import MAPPING_CHANGED, Before, Recheck, has_userfaultfd, zero_pages_of
from mthp.linux.mover.refuse.sharing import last_pid
from mthp.linux.mover.taskfiles import task_ids
from mthp.results import ScanResult

pytestmark = [
    pytest.mark.live,
    pytest.mark.requires("root", "pfns", "mover"),
]

OBEY = f"""
BLOCK = {BLOCK}
# A gap on each side keeps the mapping from being joined with others.
start = libc.mmap(None, 6 * {BLOCK}, 0, 0x22, -1, 0)
base = -(-start // {BLOCK}) * {BLOCK} + {BLOCK}
libc.mmap(base, 2 * {BLOCK}, 3, 0x32, -1, 0)
ctypes.memset(base, 1, 2 * {BLOCK})
libc.mprotect.argtypes = libc.munmap.argtypes = libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
children = []
print(base, flush=True)
while line := sys.stdin.readline():
    exec(line)
    print("done", flush=True)
for child in children:
    os.kill(child, 9)
"""


@contextlib.contextmanager
def obedient() -> Iterator[tuple[LiveAddressSpace, int, Callable[[str], None]]]:
    """A process that executes lines: its address space, a block in it, and its standard input."""
    with subprocess.Popen(
        [sys.executable, "-S", "-E", "-c", PREAMBLE + OBEY],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as child:
        assert child.stdin is not None
        assert child.stdout is not None

        def tell(line: str) -> None:
            assert child.stdin is not None
            assert child.stdout is not None
            child.stdin.write(line + "\n")
            child.stdin.flush()
            assert child.stdout.readline() == "done\n"

        try:
            base = int(child.stdout.readline())
            with open_live(child.pid) as space:
                yield space, base, tell
        finally:
            # It ends its children, and then itself.
            child.stdin.close()
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(10)
            child.kill()


def objection_after(change: str, *, fill: bool = False, second: bool = False) -> Objection | None:
    """Return the refusal of a block of a process that executes `change` between the check and the stop.

    The block is the first or the `second` of two in a mapping.
    """
    with obedient() as (space, base, tell):
        block = base + BLOCK if second else base
        process = space.process
        zero = zero_pages_of(space.read([(block, block + BLOCK)]))
        before = Before(space.vmas(), zero, last_pid(), has_userfaultfd(process), fill)
        if change:
            tell(change)

        return asked(space, block, before)


def asked(space: LiveAddressSpace, block: int, before: Before) -> Objection | None:
    """Return the refusal of a block once all threads are stopped."""

    def ask() -> Objection | None:
        frozen = FrozenProcess(space.process)
        recheck = Recheck(space.process, space.geometry)
        try:
            frozen.stop(dict.fromkeys(task_ids(space.process)))  # type: ignore[arg-type]
            (objection,) = recheck.objections(frozen, [(block, ORDER)], before)
            return objection
        finally:
            frozen.release()
            recheck.close()

    with ThreadPoolExecutor(1) as executor:
        return executor.submit(ask).result()


@pytest.mark.parametrize("change", ["", "memory(16)", "thread(time.sleep, 60)", "os.open('/dev/null', os.O_RDONLY)"])
def test_what_does_not_matter_is_no_objection(change: str) -> None:
    assert objection_after(change) is None


PINNED = (
    # Root may pin without limit, and since Linux 7.2 VmPin does not count that.
    "os.setresuid(65534, 65534, 65534);"
    "ring = call(425, 4, ctypes.create_string_buffer(120));"
    "call(427, ring, 0, ctypes.create_string_buffer(struct.pack('QQ', base + BLOCK, BLOCK)), 1)"
)


@pytest.mark.parametrize(
    ("change", "result", "reason"),
    [
        ("filter_calls()", ScanResult.FAIL, "seccomp"),
        ("assert libc.prctl(41, 1, 0, 0, 0) == 0", ScanResult.FAIL, "PR_SET_THP_DISABLE"),
        (PINNED, ScanResult.PAGE_COUNT, "VmPin"),
        ("children.append(clone(0x100 | 17))", ScanResult.FAIL, "CLONE_VM"),
        ("call(USERFAULTFD, 0o2000000)", ScanResult.VMA_CHECK, "userfaultfd"),
        ("call(SET_ROBUST_LIST, base + 128, 24)", ScanResult.PAGE_COUNT, "robust list"),
        ("children.append(os.fork() or time.sleep(600))", ScanResult.EXCEED_SHARED_PTE, "shared"),
        ("assert libc.madvise(base + PAGE, PAGE, 4) == 0", ScanResult.PTE_NON_PRESENT, "went away"),
        ("assert libc.munmap(base, PAGE, 0) == 0", ScanResult.VMA_CHECK, MAPPING_CHANGED.reason),
        ("assert libc.munmap(base + BLOCK, PAGE, 0) == 0", ScanResult.VMA_CHECK, MAPPING_CHANGED.reason),
        ("assert libc.mprotect(base, 2 * BLOCK, 1) == 0", ScanResult.VMA_CHECK, MAPPING_CHANGED.reason),
        ("assert libc.mmap(base, BLOCK, 3, 0x31, -1, 0) == base", ScanResult.VMA_CHECK, MAPPING_CHANGED.reason),
    ],
    ids=[
        "seccomp", "thp", "pinned", "clone_vm", "userfaultfd", "robust", "fork", "dontneed", "munmap", "shrunk",
        "mprotect", "mmap",
    ],
)  # fmt: skip
@pytest.mark.parametrize("fill", [False, True])
def test_a_change_meanwhile_is_noticed(change: str, result: ScanResult, reason: str, fill: bool) -> None:
    objection = objection_after(change, fill=fill)
    if fill and "madvise" in change:
        assert objection is None, "a hole is to be filled"
        return
    assert objection is not None
    assert objection.result is result
    assert reason in objection.reason


@pytest.mark.parametrize("second", [False, True])
def test_flags_of_a_part_of_the_mapping_that_change_show_in_its_extent(second: bool) -> None:
    at = "base + BLOCK" if second else "base"
    assert objection_after(f"assert libc.madvise({at}, BLOCK, 10) == 0", second=second) == MAPPING_CHANGED


def test_who_was_compared_once_is_not_compared_again() -> None:
    with obedient() as (space, base, _):
        process, then = space.process, last_pid()
        before = Before(space.vmas(), np.empty(0, np.uint64), then, has_userfaultfd(process), fill=False)
        with subprocess.Popen(["true"]) as other:
            pass
        assert asked(space, base, before) is None
        assert before.last_pid >= other.pid > then
