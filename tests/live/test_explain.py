"""Causes for which memory is not in large folios, each staged: a sentence of `mthp explain` has to name it."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from e2e.helpers import mthp_here, mthp_json_here
from mover_targets import program
from mthp.engine.explain import Explanation, explain_space
from mthp.linux import kernel_scans
from mthp.linux.kernel_scans import watch_scans
from mthp.linux.processspace import ProcessSpace
from mthp.targets import open_target
from targets import PAGE_SIZE, PMD_SIZE, Puppet
from thp_switches import ThpSwitches

pytestmark = [pytest.mark.live, pytest.mark.requires("root", "thp", "4k-pages", "pagemap_scan")]

N = PMD_SIZE // PAGE_SIZE
MADV_HUGEPAGE, MADV_NOHUGEPAGE, MADV_PAGEOUT, MADV_COLLAPSE = 14, 15, 21, 25


@pytest.fixture
def small(puppet: Puppet, thp_switches: ThpSwitches) -> int:
    """The address of a PMD range of base pages in the puppet, full; the machine is as a kernel begins."""
    thp_switches.default()
    address = puppet.map(PMD_SIZE)
    puppet.write(address, N)
    return address


def explained(pid: int, address: int | None = None) -> Explanation:
    with open_target(pid) as space:
        return explain_space(space, address)


def stopped(pid: int, address: int | None = None) -> dict[str, str]:
    """What stops each maker of folios."""
    found: dict[str, str] = {}
    for each in explained(pid, address).refusals:
        found[each.maker] = f"{found.get(each.maker, '')}; {each.reason}"
    return found


def test_no_advice_while_only_advised_memory_is_enabled(puppet: Puppet, small: int) -> None:
    found = stopped(puppet.pid, small)
    assert "without MADV_HUGEPAGE (enabled is 'madvise')" in found["khugepaged"]
    assert found.keys() == {"khugepaged"}


def test_switches_off(puppet: Puppet, small: int, thp_switches: ThpSwitches) -> None:
    puppet.tell("madvise", small, PMD_SIZE, MADV_HUGEPAGE)
    thp_switches.set("enabled", "never")
    assert "enabled is 'never'" in stopped(puppet.pid, small)["khugepaged"]


def test_memory_that_nothing_stops(puppet: Puppet, small: int, thp_switches: ThpSwitches) -> None:
    # With THP off the kernel does not tell khugepaged of it (khugepaged_enter_vma(), mm/khugepaged.c), which would make
    # the first memory that it knows huge at once.
    thp_switches.set("enabled", "never")
    puppet.tell("madvise", small, PMD_SIZE, MADV_HUGEPAGE)
    thp_switches.set("enabled", "madvise")
    explanation = explained(puppet.pid, small)
    assert not explanation.refusals
    assert [each.reason for each in explanation.prospects if not each.folios] == []


def test_a_process_that_is_huge_already(puppet: Puppet, small: int) -> None:
    start = puppet.map(32 * PMD_SIZE)
    puppet.tell("madvise", start, 32 * PMD_SIZE, MADV_HUGEPAGE)
    puppet.write(start, 32 * N)
    puppet.tell("mlock", small, PMD_SIZE, 0)
    puppet.tell("madvise", small, PMD_SIZE, MADV_NOHUGEPAGE)
    told = explained(puppet.pid).prospects
    assert {each.reason.partition(":")[0] for each in told if not each.folios} <= {"PMD_MAPPED"}


def test_locked(puppet: Puppet, small: int) -> None:
    puppet.tell("mlock", small, PMD_SIZE, 0)
    assert "locked (mlock)" in stopped(puppet.pid, small)["move"]


def test_madv_nohugepage(puppet: Puppet, small: int) -> None:
    puppet.tell("madvise", small, PMD_SIZE, MADV_NOHUGEPAGE)
    found = stopped(puppet.pid, small)
    assert all("MADV_NOHUGEPAGE is set" in found[maker] for maker in ("khugepaged", "madvise", "move"))


def test_thp_switched_off_for_the_process(puppet: Puppet, small: int) -> None:
    puppet.tell("set_thp_disable", 1, 0)
    assert "PR_SET_THP_DISABLE" in stopped(puppet.pid, small)["madvise"]
    assert "PR_SET_THP_DISABLE" in " ".join(explained(puppet.pid).sentences)


def test_a_mapping_that_is_too_small(puppet: Puppet) -> None:
    address = puppet.map(PMD_SIZE // 2)
    puppet.write(address, N // 2)
    found = stopped(puppet.pid, address)
    assert all("smaller than 2M" in found[maker] for maker in ("khugepaged", "madvise"))


def test_the_end_of_a_mapping(puppet: Puppet) -> None:
    address = puppet.map(PMD_SIZE + PMD_SIZE // 2)
    puppet.write(address, 1)
    assert "at the end of the mapping" in stopped(puppet.pid, address + PMD_SIZE)["madvise"]


def test_too_many_holes(puppet: Puppet, thp_switches: ThpSwitches) -> None:
    thp_switches.default()
    thp_switches.set("khugepaged/max_ptes_none", "100")
    address = puppet.map(PMD_SIZE)
    puppet.write(address, N // 2, 2)
    puppet.tell("madvise", address, PMD_SIZE, MADV_HUGEPAGE)
    assert "max_ptes_none allows (max_ptes_none is 100)" in stopped(puppet.pid, address)["khugepaged"]


def test_shared_by_a_fork(puppet: Puppet, small: int) -> None:
    puppet.tell("madvise", small, PMD_SIZE, MADV_HUGEPAGE)
    puppet.tell("fork")
    assert "pages shared with another process" in stopped(puppet.pid, small)["khugepaged"]
    assert f"{N} shared with another process" in " ".join(explained(puppet.pid, small).memory)


@pytest.mark.usefixtures("swap_space")
def test_swapped_out(puppet: Puppet, small: int) -> None:
    puppet.tell("madvise", small, PMD_SIZE, MADV_HUGEPAGE)
    puppet.drain_lru_batches()
    puppet.tell("madvise", small, PMD_SIZE, MADV_PAGEOUT)
    assert "more swapped-out pages than max_ptes_swap allows" in stopped(puppet.pid, small)["khugepaged"]


PROGRAM = """
import ctypes, mmap, struct, sys
libc = ctypes.CDLL(None, use_errno=True)
memory = mmap.mmap(-1, 3 * {pmd}, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
at = ctypes.addressof(ctypes.c_char.from_buffer(memory))
start = -(-at // {pmd}) * {pmd}
for page in range(start, start + {pmd}, 2 * {page}):
    ctypes.memset(page, 1, 1)
"""

USERFAULTFD = """
import fcntl
fd = libc.syscall(ctypes.c_long(323), ctypes.c_long(1))
fcntl.ioctl(fd, 0xC018AA3F, struct.pack("=3Q", 0xAA, 0, 0))
fcntl.ioctl(fd, 0xC020AA00, struct.pack("=4Q", start, {pmd}, 1, 0))
"""

IO_URING = """
params = ctypes.create_string_buffer(120)
ring = libc.syscall(ctypes.c_long(425), ctypes.c_long(4), params)
assert ring >= 0
vector = struct.pack("=2Q", start, {page})
assert libc.syscall(ctypes.c_long(427), ctypes.c_long(ring), ctypes.c_long(0), vector, ctypes.c_long(1)) == 0
"""


@pytest.fixture
def target(request: pytest.FixtureRequest, thp_switches: ThpSwitches) -> Iterator[tuple[int, int]]:
    """Start the process of the parameter, and return its PID and the address of its memory."""
    # No fault brings a huge page.
    thp_switches.default()
    code = (PROGRAM + request.param).format(pmd=PMD_SIZE, page=PAGE_SIZE)
    with program(f"{code}\nprint(start, flush=True)\nsys.stdin.read()") as (pid, said):
        if not said:
            pytest.skip("this machine does not allow it")
        yield pid, int(said)


@pytest.mark.parametrize("target", [USERFAULTFD], indirect=True)
def test_registered_with_userfaultfd(target: tuple[int, int]) -> None:
    found = stopped(*target)
    assert "registered with userfaultfd" in found["madvise"]
    assert "userfaultfd" in found["move"]


@pytest.mark.parametrize("target", [IO_URING], indirect=True)
def test_pinned(target: tuple[int, int]) -> None:
    found = stopped(*target)
    assert all("a page is pinned" in found[maker] for maker in ("khugepaged", "madvise", "move"))
    assert f"{target[1]:#x}" in found["move"]


def test_the_command_says_the_same_in_sentences_and_in_json(puppet: Puppet, small: int) -> None:
    said = mthp_here("explain", puppet.pid, f"{small:x}").stdout
    assert "Refusals:" in said
    assert "no daemon is running" in said
    assert mthp_json_here("explain", puppet.pid, hex(small))["refusals"][0]["mechanism"] == "khugepaged"
    assert mthp_here("explain", puppet.pid).returncode == 0
    assert mthp_here("explain", puppet.pid, "0x10").returncode == 2
    assert mthp_here("explain", puppet.pid, "heap").returncode == 2


MOUNT = "test -d /sys/kernel/tracing/events || mount -t tracefs nodev /sys/kernel/tracing"


@pytest.fixture
def tracing(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where tracefs is mounted: in a mount namespace of its own, so that the machine is left as it is."""
    command = ["unshare", "-m", "sh", "-c", f"({MOUNT}) && echo mounted && exec cat"]
    with subprocess.Popen(command, stdin=-1, stdout=-1) as holder:
        assert holder.stdout is not None
        if not holder.stdout.readline():
            pytest.skip("tracefs cannot be mounted")
        root = Path(f"/proc/{holder.pid}/root/sys/kernel/tracing")
        monkeypatch.setattr(kernel_scans, "tracefs", lambda: root)
        yield root
        holder.kill()


@pytest.fixture
def scanned(puppet: Puppet, thp_switches: ThpSwitches) -> tuple[int, int]:
    """Two PMD ranges that a busy khugepaged scans repeatedly, and leaves alone because of their holes."""
    thp_switches.default()
    for name, word in {"max_ptes_none": "100", "scan_sleep_millisecs": "100", "pages_to_scan": "2000000"}.items():
        thp_switches.set(f"khugepaged/{name}", word)
    start = puppet.map(2 * PMD_SIZE)
    for address in (start, start + PMD_SIZE):
        puppet.write(address, N // 2, 2)
    puppet.tell("madvise", start, 2 * PMD_SIZE, MADV_HUGEPAGE)
    return start, start + PMD_SIZE


def watched(pid: int, within: tuple[int, int] | None = None) -> str:
    """What khugepaged was seen doing, as soon as it has come by: it is slow where other processes have much memory."""
    told = ""
    with open_target(pid) as space:
        assert isinstance(space, ProcessSpace)
        for _ in range(60):
            told = " ".join(watch_scans(space, 1, within=within).sentences)
            if "khugepaged scanned" in told:
                break
    return told


@pytest.mark.usefixtures("tracing")
def test_what_khugepaged_does_is_seen_while_it_is_watched(puppet: Puppet, scanned: tuple[int, int]) -> None:
    told = watched(puppet.pid)
    assert "EXCEED_NONE_PTE" in told
    assert any(f"{address:#x}" in told for address in scanned)


@pytest.mark.usefixtures("tracing")
def test_watching_one_range_tells_of_no_other(puppet: Puppet, scanned: tuple[int, int]) -> None:
    told = watched(puppet.pid, (scanned[1], scanned[1] + PMD_SIZE))
    assert f"at {scanned[1]:#x}: left alone, EXCEED_NONE_PTE" in told
    assert f"{scanned[0]:#x}" not in told


@pytest.mark.usefixtures("tracing")
def test_a_collapse_that_the_process_asks_for_is_seen(puppet: Puppet, small: int) -> None:
    asked: list[int] = []

    def ask(_done: int, _total: int) -> None:
        if not asked:
            asked.append(small)
            puppet.tell("madvise", small, PMD_SIZE, MADV_COLLAPSE)

    with open_target(puppet.pid) as space:
        assert isinstance(space, ProcessSpace)
        told = watch_scans(space, 0.5, progress=ask).sentences
    assert any(f"({puppet.pid}) scanned once at {small:#x}: collapsed" in line for line in told)


@pytest.mark.slow
def test_the_command_watches(puppet: Puppet, small: int) -> None:
    mthp_command = f"{sys.executable} -m mthp explain {puppet.pid} {small:x} --watch 0.2s"
    command = ["unshare", "-m", "sh", "-c", f"{MOUNT}; {mthp_command}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    if "tracefs is not mounted" in done.stderr:
        pytest.skip("tracefs cannot be mounted")
    assert done.returncode == 0, done.stderr
    assert "of watching" in done.stdout


def test_watching_a_file_is_refused() -> None:
    pytest.importorskip("pyarrow")
    example = Path(__file__).parents[1] / "example.parquet"
    assert mthp_here("explain", example, "--watch", "1s").returncode == 2
