"""The library's verbs on real processes: this one, a buffer of it, and another."""

from __future__ import annotations

import json
import mmap
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import mthp
from e2e.helpers import Actor, memory_of, unused_pid
from mthp.errors import TargetVanishedError, UsageError
from mthp.results import ScanResult
from targets import PAGE_SIZE, PMD_SIZE
from thp_switches import ThpSwitches

pytestmark = pytest.mark.live
thp = pytest.mark.requires("root", "thp", "4k-pages", "pagemap_scan")

PAGES = PMD_SIZE // PAGE_SIZE


@pytest.fixture
def base_pages(thp_switches: ThpSwitches) -> None:
    """Memory that is faulted in is not huge, not even where NumPy advises it."""
    thp_switches.set("enabled", "never")


def address_of(array: Any) -> int:
    return int(array.__array_interface__["data"][0])


def huge_within(start: int, size: int) -> int:
    """Bytes mapped by PMD entries in the mappings of this process that touch these addresses."""
    found = 0
    counts = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        words = line.split()
        if not words[0].endswith(":"):
            low, _, high = words[0].partition("-")
            counts = int(low, 16) < start + size and start < int(high, 16)
        elif counts and words[0] in {"AnonHugePages:", "ShmemPmdMapped:", "FilePmdMapped:"}:
            found += int(words[1]) << 10
    return found


def whole_ranges(start: int, size: int) -> int:
    return max(0, (start + size) // PMD_SIZE - -(-start // PMD_SIZE))


def check_collapsed(report: Any, start: int, size: int, huge_before: int) -> None:
    count = whole_ranges(start, size)
    assert count > 0
    assert (report.ranges.made, report.complete) == (count, True)
    assert huge_within(start, size) - huge_before == count * PMD_SIZE
    # Of all whole pages of the buffer.
    pages = (start + size) // PAGE_SIZE - -(-start // PAGE_SIZE)
    assert report.coverage == count * PMD_SIZE / (pages * PAGE_SIZE)


def mapped(size: int) -> NDArray[np.uint8]:
    """Map fresh memory, unlike the heap's: uint8, shape (size,)."""
    return np.frombuffer(mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS), np.uint8)


@thp
def test_a_numpy_array(base_pages: None) -> None:
    # The allocator makes a mapping for each allocation above 32 MiB.
    array = np.arange(4 * PMD_SIZE, dtype=np.float64)
    before = huge_within(address_of(array), array.nbytes)
    report = mthp.collapse_buffer(array)
    check_collapsed(report, address_of(array), array.nbytes, before)
    assert (array == np.arange(array.size)).all()
    again = mthp.collapse_buffer(array)
    assert again.ranges.made == 0
    assert again.complete


@thp
@pytest.mark.parametrize("kind", ["transposed", "read-only", "row"])
def test_views_of_an_array(base_pages: None, kind: str) -> None:
    array = mapped(12 * PMD_SIZE).reshape(3, -1)
    array[:] = 1
    views = {"transposed": array.T, "read-only": array.view(), "row": array[1]}
    view = views[kind]
    view.flags.writeable = kind != "read-only"
    before = huge_within(address_of(view), view.nbytes)
    report = mthp.collapse_buffer(view)
    check_collapsed(report, address_of(view), view.nbytes, before)
    if kind == "row":
        # No more than the row asked for.
        assert report.ranges.made <= 4
    assert array.all()


@thp
def test_an_mmap(base_pages: None) -> None:
    size = 4 * PMD_SIZE
    with mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as memory:
        memory.write(bytes(range(256)) * (size // 256))
        start = address_of(np.frombuffer(memory, np.uint8))
        before = huge_within(start, size)
        check_collapsed(mthp.collapse_buffer(memory), start, size, before)
        assert memory[:] == bytes(range(256)) * (size // 256)


@thp
def test_an_mmap_of_shared_memory(base_pages: None) -> None:
    size = 4 * PMD_SIZE
    fd = os.memfd_create("mthp-test")
    try:
        os.truncate(fd, size + PMD_SIZE)
        # Files collapse only where offset and address lie alike in a PMD range. The kernel chooses the address, and
        # if nothing happens in between it chooses the same again.
        with mmap.mmap(fd, size) as probe:
            offset = address_of(np.frombuffer(probe, np.uint8)) % PMD_SIZE
        with mmap.mmap(fd, size, offset=offset) as memory:
            memory.write(bytes(range(256)) * (size // 256))
            start = address_of(np.frombuffer(memory, np.uint8))
            before = huge_within(start, size)
            report = mthp.collapse_buffer(memory)
            if report.ranges.failed_by_result:
                pytest.skip(f"this kernel does not collapse shared memory: {report.ranges.failed_by_result}")
            check_collapsed(report, start, size, before)
            assert memory[:] == bytes(range(256)) * (size // 256)
    finally:
        os.close(fd)


@thp
def test_an_array_that_was_hardly_written(base_pages: None) -> None:
    array = mapped(4 * PMD_SIZE)
    array[-address_of(array) % PMD_SIZE + 5] = 7
    report = mthp.collapse_buffer(array)
    assert report.ranges.made == 1
    assert report.filled_bytes == PMD_SIZE - PAGE_SIZE
    assert array.sum() == 7


@thp
def test_options_bound_the_collapse_of_a_buffer(base_pages: None) -> None:
    array = mapped(4 * PMD_SIZE)
    array[:] = 1
    before = huge_within(address_of(array), array.nbytes)
    report = mthp.collapse_buffer(array, dry_run=True)
    assert report.dry_run
    assert huge_within(address_of(array), array.nbytes) == before
    assert len(report.plan.folios) == whole_ranges(address_of(array), array.nbytes)


def test_a_buffer_without_a_whole_range_has_nothing_to_collapse() -> None:
    for buffer in (b"", b"abc", bytearray(PAGE_SIZE), np.zeros(0), np.zeros(()), memoryview(b"abc")):
        report = mthp.collapse_buffer(buffer)
        assert (report.done_nothing, report.complete) == (True, False)
        assert report.ranges.made == len(report.plan.ranges) == 0


COLLAPSE_SELF = """
import json, sys
import numpy as np
import mthp
from e2e.helpers import memory_of
import os
array = np.arange(1 << 20)
before = memory_of(os.getpid())
report = mthp.collapse("self", orders="2M")
after = memory_of(os.getpid())
print(json.dumps([
    report.ranges.made, report.collapsed_bytes, after.anon_huge - before.anon_huge, report.complete,
    bool((array == np.arange(1 << 20)).all()),
]))
"""


@thp
def test_a_process_collapses_itself(base_pages: None) -> None:
    done = subprocess.run(
        [sys.executable, "-c", COLLAPSE_SELF],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[1]), *sys.path])},
        capture_output=True,
        text=True,
        check=True,
    )
    collapsed, size, growth, complete, intact = json.loads(done.stdout)
    assert collapsed >= 3
    assert growth == size
    assert complete
    assert intact


@thp
def test_inspect_plan_and_collapse_another_process(base_pages: None, actor: Actor) -> None:
    address = actor.map(3 * PMD_SIZE)
    actor.fill(address, 2 * PAGES)
    within = (address, address + 3 * PMD_SIZE)
    census = mthp.inspect(actor.pid)
    (vma,) = [vma for vma in census.vmas if vma.vma.start == address]
    assert vma.pages.by_order() == {0: 2 * PAGES}
    plan = mthp.plan(str(actor.pid), within=within)
    assert plan.folios.address.tolist() == [address, address + PMD_SIZE]
    assert plan.ranges_by_result == {ScanResult.SUCCEED: 2}
    report = mthp.collapse(actor.pid, within=within, max_bloat=0)
    assert (report.ranges.made, report.filled_bytes, report.complete) == (2, 0, True)
    assert memory_of(actor.pid, *within).anon_huge == 2 * PMD_SIZE
    (vma,) = [vma for vma in mthp.inspect(actor.pid).vmas if vma.vma.start == address]
    assert vma.pages.by_order() == {9: 2 * PAGES}
    assert vma.pages.state("pmd_mapped") == 2 * PAGES
    assert actor.damaged(address, 2 * PAGES) == 0


VERBS = """
import mthp.engine.policy, mthp.engine.planning
import mthp
from mthp.engine import policy
from mthp.api import collapse
assert mthp.collapse is collapse
assert all(callable(getattr(mthp, name)) for name in mthp.__all__ if name not in ("__version__", "sim"))
assert policy.Policy is mthp.Policy
"""


def test_verbs_are_functions_whatever_was_imported_before() -> None:
    subprocess.run([sys.executable, "-c", VERBS], check=True)


def test_options_that_do_not_exist() -> None:
    with pytest.raises(UsageError, match="max_ptes"):
        mthp.plan("self", max_ptes=5)
    with pytest.raises(UsageError, match="speed"):
        mthp.collapse("self", speed=5)
    with pytest.raises(UsageError, match="rate"):
        mthp.collapse_buffer(bytearray(5), rate=0)


def test_targets_that_do_not_exist() -> None:
    for verb in (mthp.inspect, mthp.plan, mthp.collapse):
        with pytest.raises(TargetVanishedError):
            verb(unused_pid())
        with pytest.raises(UsageError):
            verb("no-such-file")
