""":mod:`mthp.linux` on difficult processes: ended, ending, of another user, sparse, or without memory."""

from __future__ import annotations

import errno
import json
import os
import re
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from mthp.eligibility import eligibility
from mthp.errors import NotPermittedError, TargetVanishedError, UnsupportedError, UsageError
from mthp.linux import abi, procfs
from mthp.linux.live import SPARSE_BYTES, LiveAddressSpace, open_live
from mthp.linux.process import Process
from mthp.ptes import ORDER_NONE, ORDER_UNKNOWN, Pte
from mthp.results import ScanResult
from mthp.vma import VmaKind
from pids import successor_of
from targets import MADV_HUGEPAGE, MADV_NOHUGEPAGE, PAGE_SIZE, PMD_SIZE, Puppet
from thp_switches import ThpSwitches
from waiting import until

pytestmark = pytest.mark.live

TIB = 1 << 40
NOBODY = 65534


@pytest.mark.parametrize("scan", [True, False])
def test_a_target_that_exits_is_gone_at_the_next_look(puppet: Puppet, scan: bool) -> None:
    address = puppet.map(PMD_SIZE)
    puppet.write(address)
    with open_live(puppet.pid) as space:
        space._pagemap.can_scan &= scan  # without PAGEMAP_SCAN as on Linux before 6.7
        segments = [(address, address + PMD_SIZE)]
        assert space.read(segments).has(Pte.PRESENT).any()
        puppet.kill()
        for look in (
            lambda: space.read(segments),
            space.vmas,
            lambda: space.with_nodes([]),
            lambda: space.populated([(address, address + TIB)], PMD_SIZE),
            lambda: space.collapse(address, space.geometry.pmd_order),
            lambda: space.thp_disabled,
        ):
            with pytest.raises(TargetVanishedError, match=f"process {puppet.pid} .* is gone"):
                look()


def test_a_zombie_is_gone_too_for_who_held_it_before(puppet: Puppet) -> None:
    address = puppet.map(PMD_SIZE)
    with open_live(puppet.pid) as space:
        puppet.kill_unwaited()
        with pytest.raises(TargetVanishedError):
            space.read([(address, address + PMD_SIZE)])
        with pytest.raises(TargetVanishedError):
            space.vmas()


def test_a_target_that_exits_while_it_is_read() -> None:
    for delay in (0.0, 0.002, 0.01):
        with Puppet() as puppet:
            address = puppet.map(64 * PMD_SIZE, advice=MADV_NOHUGEPAGE)
            puppet.write(address, 2048, 16)
            with open_live(puppet.pid) as space:
                killer = threading.Timer(delay, puppet.kill)
                killer.start()
                with pytest.raises(TargetVanishedError):
                    read_for_ever(space)
                killer.join()


def test_a_process_without_namespaces_is_as_good_as_gone() -> None:
    """Between exit_task_namespaces() and its end a process has files that cannot be opened any more."""
    exits = {"x86_64": 60, "aarch64": 93}[os.uname().machine]
    code = (
        "import ctypes, sys, threading, time\nthreading.Thread(target=time.sleep, args=(600,)).start()\n"
        f"sys.stdin.readline()\nctypes.CDLL(None).syscall({exits}, 0)\n"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, text=True) as program:
        try:
            process = Process(program.pid)
            assert program.stdin is not None
            program.stdin.write("\n")
            program.stdin.flush()
            until(lambda: b") Z " in process.read("stat"), "the end of its first thread")
            with pytest.raises(OSError, match="Invalid argument"):
                Path(f"/proc/{program.pid}/mountinfo").read_bytes()
            with pytest.raises(TargetVanishedError):
                process.read("mountinfo")
            process.close()
        finally:
            program.kill()


@pytest.mark.requires("root")
def test_a_proc_of_another_namespace_is_not_believed() -> None:
    """Its numbers are those of other processes than the ones that system calls would stop."""
    code = "from mthp.linux.process import Process; Process('self')"
    done = subprocess.run(
        ["unshare", "--pid", "--fork", sys.executable, "-c", code], capture_output=True, text=True, check=False
    )
    if "unshare failed" in done.stderr:
        pytest.skip(f"needs PID namespaces: {done.stderr}")
    assert "UnsupportedError: /proc shows the processes of another PID namespace" in done.stderr


def test_a_process_whose_first_thread_has_exited_is_no_zombie() -> None:
    code = "import ctypes, threading, time; threading.Thread(target=time.sleep, args=(60,)).start()"
    with subprocess.Popen([sys.executable, "-c", code + "; ctypes.CDLL(None).pthread_exit(None)"]) as child:
        try:
            until(lambda: "\nState:\tZ" in Path(f"/proc/{child.pid}/status").read_text(), "its first thread to exit")
            with pytest.raises(UnsupportedError, match="first thread"):
                Process(child.pid)
        finally:
            child.kill()


def read_for_ever(space: LiveAddressSpace) -> None:
    while True:
        for vma in space.vmas():
            space.read([(vma.start, vma.end)])


@pytest.mark.requires("root", "ns_last_pid")
def test_a_reused_pid_is_never_touched() -> None:
    with Puppet() as first:
        address = first.map(PMD_SIZE)
        space = open_live(first.pid)
        first.kill()
        with successor_of(first.pid) as second:
            assert Process(second.pid).starttime >= space.process.starttime
            for look in (lambda: space.read([(address, address + PMD_SIZE)]), space.vmas, lambda: space.thp_disabled):
                with pytest.raises(TargetVanishedError):
                    look()
            with pytest.raises(TargetVanishedError):
                space.collapse(address, space.geometry.pmd_order)
        space.close()


@pytest.mark.requires("root")
def test_what_is_unmapped_meanwhile_reads_as_none(puppet: Puppet) -> None:
    address = puppet.map(2 * PMD_SIZE)
    puppet.write(address, 4)
    with open_live(puppet.pid) as space:
        puppet.tell("munmap", address, 2 * PMD_SIZE)
        columns = space.read([(address, address + 2 * PMD_SIZE)])
        assert not columns.state.any()
        assert (columns.folio_order == ORDER_NONE).all()
        outcome = space.collapse(address, space.geometry.pmd_order)
        assert outcome.result is ScanResult.VMA_NULL


@pytest.mark.requires("thp", "4k-pages")
def test_collapse_makes_one_huge_page(puppet: Puppet, thp_switches: ThpSwitches) -> None:
    # So that khugepaged, which MADV_HUGEPAGE may wake, does not come first.
    thp_switches.only()
    address = puppet.map(PMD_SIZE, advice=MADV_NOHUGEPAGE)
    with open_live(puppet.pid) as space:
        puppet.write(address, 300)
        order = space.geometry.pmd_order
        assert space.collapse(address, order).result is ScanResult.VMA_CHECK
        puppet.tell("madvise", address, PMD_SIZE, MADV_HUGEPAGE)
        outcome = space.collapse(address, order)
        assert (outcome.result, outcome.errno) == (ScanResult.SUCCEED, 0)
        assert outcome.elapsed_ns > 0
        assert {vma.start: size for vma, size in procfs.read_pmd_mapped(space.process)}[address] == PMD_SIZE
        with pytest.raises(UsageError, match="order 1 "):
            space.collapse(address, 1)
        with pytest.raises(UsageError, match="aligned"):
            space.collapse(address + PAGE_SIZE, order)


@pytest.mark.parametrize(
    ("answers", "result"),
    [([errno.EAGAIN, 0], ScanResult.PTE_NON_PRESENT), ([errno.EAGAIN] * 2, ScanResult.PAGE_COUNT)],
)
def test_what_is_to_be_tried_again_is_tried_once_more(
    puppet: Puppet, monkeypatch: pytest.MonkeyPatch, answers: list[int], result: ScanResult
) -> None:
    # The second call of the first case reports success without an effect.
    left = list(answers)
    monkeypatch.setattr(abi, "process_madvise", lambda *_: left.pop(0))
    with open_live(puppet.pid) as space:
        outcome = space.collapse(puppet.map(PMD_SIZE), space.geometry.pmd_order)
    assert (outcome.result, outcome.errno, left) == (result, answers[-1], [])


@pytest.mark.requires("pagemap_scan")
def test_a_sparse_terabyte_is_read_at_once(puppet: Puppet) -> None:
    address = puppet.map(TIB, advice=MADV_NOHUGEPAGE)
    touched = [0, PMD_SIZE - PAGE_SIZE, 5 * PMD_SIZE, TIB // 2 + 7 * PAGE_SIZE, TIB - PAGE_SIZE]
    for offset in touched:
        puppet.write(address + offset)
    whole = (address + 3 * PAGE_SIZE, address + TIB)
    with open_live(puppet.pid) as space:
        parts = space.populated([whole], PMD_SIZE)
        columns = space.read(parts)
    assert parts == [
        (whole[0], address + PMD_SIZE),
        (address + 5 * PMD_SIZE, address + 6 * PMD_SIZE),
        (address + TIB // 2, address + TIB // 2 + PMD_SIZE),
        (address + TIB - PMD_SIZE, address + TIB),
    ]
    # The first page touched lies before the segment.
    assert columns.has(Pte.PRESENT).sum() == len(touched) - 1


@pytest.mark.requires("pagemap_scan")
def test_many_runs_of_populated_memory_take_many_calls(puppet: Puppet) -> None:
    address = puppet.map(TIB, advice=MADV_NOHUGEPAGE)
    puppet.write(address, 20_000, 2)
    with open_live(puppet.pid) as space:
        parts = space.populated([(address, address + TIB)], PAGE_SIZE)
        assert parts == [(address + 2 * i * PAGE_SIZE, address + (2 * i + 1) * PAGE_SIZE) for i in range(20_000)]
        dense = [(address, address + SPARSE_BYTES // 2)]
        assert space.populated(dense, PMD_SIZE) == dense


def test_several_threads_may_ask_whether_it_is_alive() -> None:
    """A select.poll object refuses a second caller, so the process must not share one between threads."""
    with Process("self") as process, ThreadPoolExecutor(4) as pool:
        answers = pool.map(lambda _: [process.is_alive() for _ in range(2000)], range(4))
        assert all(all(answer) for answer in answers)


def test_reads_and_listings_may_run_in_threads(puppet: Puppet) -> None:
    address = puppet.map(16 * PMD_SIZE, advice=MADV_NOHUGEPAGE)
    puppet.write(address, 1000, 3)
    with open_live(puppet.pid) as space:
        expected = space.read([(address, address + 16 * PMD_SIZE)]).state.tolist()
        listed: list[list[tuple[int, int]]] = []
        lister = threading.Thread(
            target=lambda: listed.extend([(vma.start, vma.end) for vma in space.vmas()] for _ in range(20))
        )
        lister.start()
        for _ in range(20):
            assert space.read([(address, address + 16 * PMD_SIZE)]).state.tolist() == expected
        lister.join()
        assert all(listing == listed[0] for listing in listed)
        assert len(listed) == 20


UNPRIVILEGED = """
import json, os, sys
import numpy as np
from mthp.linux.live import open_live
from mthp.errors import MthpError
import targets
from early_imports import import_all

import_all()
zero_and_base = targets.map_aligned(targets.PMD_SIZE, 0)
targets.madvise(zero_and_base, targets.PMD_SIZE, targets.MADV_NOHUGEPAGE)
targets.write_pages(zero_and_base, 10, 1)
targets.read_pages(zero_and_base + 20 * targets.PAGE_SIZE, 5, 1)
huge = targets.map_aligned(targets.PMD_SIZE, 0)
targets.madvise(huge, targets.PMD_SIZE, targets.MADV_HUGEPAGE)
targets.write_pages(huge, 1, 1)
os.setgroups([])
os.setgid(65534)
os.setuid(65534)
pr_set_dumpable = 4
targets._libc.prctl(pr_set_dumpable, 1, 0, 0, 0)
with open_live("self") as space:
    columns = space.read([(zero_and_base, zero_and_base + targets.PMD_SIZE), (huge, huge + targets.PMD_SIZE)])
    answer = {
        "state": columns.state.tolist(),
        "order": columns.folio_order.tolist(),
        "pfn": columns.pfn is None,
        "missing": space.missing,
        "vmas": len(space.vmas()),
    }
try:
    open_live(int(sys.argv[1]))
except MthpError as error:
    answer["refused"] = [type(error).__name__, str(error), error.help]
print(json.dumps(answer))
"""


@pytest.mark.slow
@pytest.mark.requires("root", "thp", "4k-pages", "pagemap_scan")
def test_the_unprivileged_view(puppet: Puppet, thp_switches: ThpSwitches) -> None:
    done = subprocess.run(
        [sys.executable, "-c", UNPRIVILEGED, str(puppet.pid)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=True,
    )
    answer = json.loads(done.stdout)
    n = PMD_SIZE // PAGE_SIZE
    state, order = np.array(answer["state"]), np.array(answer["order"])
    assert answer["pfn"]
    assert any("CAP_SYS_ADMIN" in sentence for sentence in answer["missing"])
    assert answer["vmas"] > 2
    assert set(state[:10]) == {int(Pte.PRESENT)}
    assert set(order[:10]) == {ORDER_UNKNOWN}
    assert set(state[20:25]) == {int(Pte.PRESENT | Pte.ZERO)}
    assert set(state[25:n]) | set(state[10:20]) == {0}
    assert set(order[25:n]) == {ORDER_NONE}
    assert set(state[n:]) == {int(Pte.PRESENT | Pte.PMD_MAPPED)}
    assert set(order[n:]) == {9}
    kind, message, advice = answer["refused"]
    assert kind == NotPermittedError.__name__
    assert str(puppet.pid) in message
    assert "CAP_SYS_PTRACE" in advice


def test_this_process_is_a_target_like_any_other() -> None:
    with open_live("self") as space:
        assert space.process.is_self
        assert space.label.startswith(f"{os.getpid()} (")
        assert space.kernel == os.uname().release
        heap = next(vma for vma in space.vmas() if vma.name == "[heap]")
        assert heap.kind is VmaKind.ANON
        assert heap.has_anon_vma
        assert space.read([(heap.start, heap.end)]).has(Pte.PRESENT).any()


def test_a_process_that_switched_thp_off(puppet: Puppet) -> None:
    with open_live(puppet.pid) as space:
        assert not space.thp_disabled
        puppet.tell("set_thp_disable", 1)
        assert space.thp_disabled


def test_every_mapping_of_maps_is_listed_and_reads(puppet: Puppet) -> None:
    with open_live(puppet.pid) as space:
        vmas = space.vmas()
        lines = Path(f"/proc/{puppet.pid}/maps").read_text().splitlines()
        assert [f"{vma.start:x}-{vma.end:x} {vma.permissions}" for vma in vmas] == [
            re.sub(r"^0*([0-9a-f]+)-0*([0-9a-f]+) (\S+).*", r"\1-\2 \3", line) for line in lines
        ]
        segments = [(vma.start, vma.end) for vma in vmas]
        assert len(space.read(segments).state) == sum(vma.size for vma in vmas) // PAGE_SIZE


@pytest.mark.skipif(not Path("/proc/self/numa_maps").exists(), reason="a kernel without NUMA")
def test_the_pages_on_all_nodes_are_the_resident_ones(puppet: Puppet) -> None:
    address = puppet.map(PMD_SIZE, advice=MADV_NOHUGEPAGE)
    puppet.write(address, 7)
    with open_live(puppet.pid) as space:
        (vma,) = (vma for vma in space.with_nodes(space.vmas()) if vma.start <= address < vma.end)
        assert sum(pages for _, pages in vma.node_pages) == 7


@pytest.mark.requires("root", "thp", "4k-pages")
@pytest.mark.parametrize("word", ["always", "madvise", "never"])
def test_eligibility_is_what_the_kernel_says(puppet: Puppet, thp_switches: ThpSwitches, word: str) -> None:
    # With smaller sizes on, the kernel calls mappings eligible, too, that hold no whole PMD range.
    thp_switches.only(f"{PMD_SIZE >> 10}kB", word="inherit")
    thp_switches.set("enabled", word)
    advised = puppet.map(3 * PMD_SIZE, advice=MADV_HUGEPAGE)
    puppet.map(3 * PMD_SIZE)
    puppet.map(3 * PMD_SIZE, advice=MADV_NOHUGEPAGE)
    puppet.map(PMD_SIZE - PAGE_SIZE, advice=MADV_HUGEPAGE)
    puppet.write(advised)
    for pid in (puppet.pid, os.getpid()):
        with open_live(pid) as space:
            for vma, block in list(procfs.read_smaps(space.process)):
                if vma.kind in (VmaKind.FILE, VmaKind.SHMEM):
                    continue
                ours = eligibility(vma, space.geometry, space.switches, thp_disabled=space.thp_disabled)
                assert bool(ours) == procfs.number_in(block, b"\nTHPeligible:"), (vma, ours)
