"""The machine's files accept and refuse the same values as the kernel's."""

from __future__ import annotations

import errno

import pytest

from mthp.errors import UsageError
from mthp.freememory import parse_free_memory
from mthp.geometry import GEOMETRIES, Geometry
from mthp.sim import Machine
from mthp.sim.address_space.access import Fault
from mthp.sim.sysfs import STATS, THP
from simcheck import check

START = 2 << 20


def refused(machine: Machine, path: str, text: str) -> int | None:
    """Return the error number of a write; None if it was accepted."""
    try:
        machine.sysfs.write(path, text)
    except OSError as error:
        return error.errno
    return None


def test_defaults_read_as_on_a_fresh_kernel() -> None:
    sysfs = Machine().sysfs
    assert sysfs.read("enabled") == "always [madvise] never\n"
    assert sysfs.read("defrag") == "always defer defer+madvise [madvise] never\n"
    assert sysfs.read("hugepages-2048kB/enabled") == "always [inherit] madvise never\n"
    assert sysfs.read("hugepages-64kB/enabled") == "always inherit madvise [never]\n"
    assert sysfs.read("hpage_pmd_size") == "2097152\n"
    assert sysfs.read("khugepaged/max_ptes_none") == "511\n"
    assert sysfs.read("khugepaged/pages_to_scan") == "4096\n"
    assert sysfs.read("use_zero_page") == sysfs.read("shrink_underused") == "1\n"


@pytest.mark.parametrize("geometry", GEOMETRIES.values(), ids=lambda geometry: geometry.name)
def test_there_is_a_directory_for_every_size(geometry: Geometry) -> None:
    paths = Machine(geometry, node_frames=[1]).sysfs.paths()
    for order in geometry.anon_orders:
        name = f"/sys/kernel/mm/transparent_hugepage/{geometry.sysfs_name(order)}"
        assert {f"{name}/enabled", *(f"{name}/stats/{stat}" for stat in STATS)} <= set(paths)
    assert sum(path.endswith("kB/enabled") for path in paths) == len(geometry.anon_orders)


@pytest.mark.parametrize(
    ("path", "text", "error"),
    [
        ("enabled", "always", None),
        ("enabled", "never\n", None),
        ("enabled", "inherit", errno.EINVAL),
        ("enabled", " always", errno.EINVAL),
        ("enabled", "", errno.EINVAL),
        ("hugepages-64kB/enabled", "inherit\n", None),
        ("hugepages-64kB/enabled", "[always]", errno.EINVAL),
        ("hugepages-8kB/enabled", "always", errno.ENOENT),
        ("hugepages-64kB/stats/nr_anon", "0", errno.EACCES),
        ("defrag", "defer+madvise", None),
        ("defrag", "1", errno.EINVAL),
        ("khugepaged/defrag", "0", None),
        ("khugepaged/defrag", "2", errno.EINVAL),
        ("khugepaged/max_ptes_none", "0", None),
        ("khugepaged/max_ptes_none", "+511\n", None),
        ("khugepaged/max_ptes_none", "512", errno.EINVAL),
        ("khugepaged/max_ptes_none", "-1", errno.EINVAL),
        ("khugepaged/max_ptes_none", "0x10", errno.EINVAL),
        ("khugepaged/max_ptes_none", "1 ", errno.EINVAL),
        ("khugepaged/max_ptes_none", "99999999999999999999", errno.ERANGE),
        ("khugepaged/pages_to_scan", "0", errno.EINVAL),
        ("khugepaged/pages_to_scan", "4294967295", None),
        ("khugepaged/pages_to_scan", "4294967296", errno.EINVAL),
        ("khugepaged/scan_sleep_millisecs", "0", None),
        ("khugepaged/full_scans", "0", errno.EACCES),
        ("use_zero_page", "yes", errno.EINVAL),
        ("hpage_pmd_size", "1", errno.EACCES),
    ],
)
def test_writes_are_taken_or_refused_as_by_the_kernel(path: str, text: str, error: int | None) -> None:
    machine = Machine()
    before = {name: machine.sysfs.read(name) for name in machine.sysfs.paths() if "split" not in name}
    assert refused(machine, path, text) == error
    after = {name: machine.sysfs.read(name) for name in machine.sysfs.paths() if "split" not in name}
    if error is not None:
        assert after == before
    else:
        chosen = text.strip().lstrip("+")
        now = after[f"{THP}{path}"]
        assert now == f"{chosen}\n" or f"[{chosen}]" in now.split()


def test_what_is_written_takes_effect() -> None:
    machine = Machine()
    mm = machine.create_mm()
    machine.sysfs.write("hugepages-64kB/enabled", "always")
    machine.map(mm, START, 2 * START)
    assert machine.write(mm, START, 1) is Fault.DONE
    assert mm.anon_pages == 16
    assert machine.sysfs.read("hugepages-64kB/stats/nr_anon") == "1\n"
    assert machine.sysfs.read("hugepages-64kB/stats/anon_fault_alloc") == "1\n"
    machine.sysfs.write("use_zero_page", "0")
    machine.sysfs.write("enabled", "always")
    machine.map(mm, 2 * START, 3 * START)
    assert machine.read(mm, 2 * START) == (Fault.DONE, 0)
    assert mm.anon_pages == 16 + 512
    assert "thp_fault_alloc 1\n" in machine.sysfs.read("/proc/vmstat")


def test_a_file_that_is_not_there() -> None:
    with pytest.raises(FileNotFoundError):
        Machine().sysfs.read("/proc/cpuinfo")


def test_buddyinfo_has_a_line_for_every_node() -> None:
    machine = Machine(node_frames=[2048, 1024])
    assert machine.parts.memory.alloc(0) is not None
    assert machine.sysfs.read("/proc/buddyinfo") == (
        "Node 0, zone   Normal      1      1      1      1      1      1      1      1      1      1      1 \n"
        "Node 1, zone   Normal      0      0      0      0      0      0      0      0      0      0      1 \n"
    )


def test_pagetypeinfo_tells_blocks_with_pages_of_the_kernel_apart() -> None:
    machine = Machine(node_frames=[64 * 512], swap_slots=0)
    machine.fragment(0.5, seed=3)
    mm = machine.create_mm()
    machine.map(mm, START, 3 * START)
    machine.populate(mm, START, 2 * START)
    machine.sysfs.write("/proc/sys/vm/min_free_kbytes", "512")
    read = machine.sysfs.read
    memory = machine.parts.memory
    blocks = int(memory.unmovable.sum())
    assert f"Node 0, zone   Normal {blocks:12d} {64 - blocks:12d} \n" in read("/proc/pagetypeinfo")
    (zone,) = parse_free_memory(read("/proc/buddyinfo"), read("/proc/zoneinfo")).zones
    assert zone.blocks == tuple(memory.zones[0].free_counts())
    assert zone.kept == 512 // 4
    assert zone.spare == memory.free_frames - zone.kept
    assert zone.frames == (memory.zones[0].start, memory.zones[0].end)


@pytest.mark.parametrize(("index", "order"), [(0.0, 9), (0.3, 9), (0.9, 9), (1.0, 9), (0.5, 4), (1.0, 2)])
def test_fragmentation_is_what_was_asked_for_and_no_more(index: float, order: int) -> None:
    machine = Machine(node_frames=[64 * 512, 32 * 512])
    strewn = machine.fragment(index, order)
    for zone in machine.parts.memory.zones:
        blocks = zone.frames >> order
        assert index <= zone.unusable_index(order) <= index + 2 / blocks
    assert bool(strewn) is (index > 0)
    assert machine.fragment(index, order) == 0
    assert check(machine) == []


def test_the_seed_chooses_where() -> None:
    def holes(seed: int) -> list[tuple[int, int]]:
        machine = Machine(node_frames=[64 * 512])
        machine.fragment(0.5, seed=seed)
        return machine.parts.memory.zones[0].free_blocks()

    assert holes(1) == holes(1)
    assert holes(1) != holes(2)


@pytest.mark.parametrize(
    ("index", "order", "movable"), [(-0.1, 9, 0), (1.1, 9, 0), (0.5, 0, 0), (0.5, 11, 0), (0.5, 9, 2)]
)
def test_a_fragmentation_that_cannot_be_is_refused(index: float, order: int, movable: float) -> None:
    with pytest.raises(UsageError):
        Machine().fragment(index, order, movable=movable)
