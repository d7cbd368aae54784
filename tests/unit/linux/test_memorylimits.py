"""The memory limits of a process, in trees of cgroups as different hosts and containers have them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest

from mthp.budget import MACHINE, MemoryBound, Room
from mthp.geometry import X86_64
from mthp.linux.cgroups import cgroup_mounts, is_frozen
from mthp.linux.memorylimits import cgroup_bounds, machine_bounds, memory_bounds
from mthp.linux.mover.refuse.process import low_memory

NO_LIMIT_OF_V1 = "9223372036854771712"


def write(root: Path, files: Mapping[str, object]) -> None:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{text}\n")


def mountinfo(root: Path, *mounts: tuple[str, str, str]) -> str:
    """Lines of mountinfo for (mount point, root in the hierarchy, controllers of version 1 or ``"2"``)."""
    lines = ["1 0 8:1 / / rw,relatime shared:1 - ext4 /dev/vda rw"]
    for point, inside, controllers in mounts:
        kind, options = ("cgroup2", "rw,nsdelegate") if controllers == "2" else ("cgroup", f"rw,{controllers}")
        lines.append(f"35 31 0:32 {inside} {root}/{point} rw,relatime shared:9 master:1 - {kind} {kind} {options}")
    return "\n".join(lines) + "\n"


def found(root: Path, membership: str, *mounts: tuple[str, str, str]) -> list[tuple[str, int, int]]:
    """(cgroup relative to `root`, limit, left) of each limit that holds."""
    bounds = cgroup_bounds(cgroup_mounts(mountinfo(root, *mounts)), membership)
    return [(str(Path(bound.name).relative_to(root)), bound.limit, bound.left) for bound in bounds]


def test_version_2_at_every_level(tmp_path: Path) -> None:
    write(
        tmp_path,
        {
            "a/memory.max": 1000,
            "a/memory.high": "max",
            "a/memory.current": 900,
            "a/b/memory.max": 500,
            "a/b/memory.high": 400,
            "a/b/memory.current": 100,
            "a/b/c/memory.max": "max",
            "a/b/c/memory.current": 50,
            "other/memory.max": 1,
            "other/memory.current": 1,
        },
    )
    levels = [("a/b", 500, 400), ("a/b", 400, 300), ("a", 1000, 100)]
    assert found(tmp_path, "0::/a/b/c\n", (".", "/", "2")) == levels
    assert found(tmp_path, "0::/elsewhere\n", (".", "/", "2")) == []
    assert found(tmp_path, "", (".", "/", "2")) == []


def test_version_1_with_version_2_beside_it(tmp_path: Path) -> None:
    write(
        tmp_path,
        {
            "memory/memory.limit_in_bytes": NO_LIMIT_OF_V1,
            "memory/memory.usage_in_bytes": 5000,
            "memory/x/memory.limit_in_bytes": 4096,
            "memory/x/memory.usage_in_bytes": 1024,
            "memory/x/memory.memsw.limit_in_bytes": 5000,
            "memory/x/memory.memsw.usage_in_bytes": 4000,
            "unified/y/cgroup.procs": "",
        },
    )
    mounts = (("unified", "/", "2"), ("memory", "/", "memory"), ("cpu", "/", "cpu,cpuacct"))
    membership = "4:memory:/x\n1:cpu,cpuacct:/z\n0::/y\n"
    assert found(tmp_path, membership, *mounts) == [("memory/x", 4096, 3072), ("memory/x", 5000, 1000)]


@pytest.mark.parametrize(
    ("path", "root", "seen"),
    [
        ("/docker/one", "/docker/one", ["memory"]),  # a container of version 1, its cgroup mounted as the root
        ("/docker/one/in", "/docker/one", ["memory/in", "memory"]),
        ("/docker/oneself", "/docker/one", ["memory"]),  # not inside, though it begins alike
        ("/docker/known-to-the-host-only", "/", ["memory"]),
        ("/", "/", ["memory"]),
        ("/../sibling", "/..", ["memory/sibling", "memory"]),  # a target outside of our cgroup namespace
        ("/../../x", "/", ["memory"]),  # a path cannot lead out of the mount
        ("/in (deleted)", "/", ["memory"]),
    ],
)
def test_containers_and_namespaces(tmp_path: Path, path: str, root: str, seen: list[str]) -> None:
    for group in ("memory", "memory/in", "memory/sibling", "."):
        write(tmp_path, {f"{group}/memory.limit_in_bytes": 9, f"{group}/memory.usage_in_bytes": 1})
    levels = found(tmp_path, f"4:cpu,memory:{path}\n0::/\n", ("memory", root, "cpu,memory"))
    assert [group for group, _, _ in levels] == seen


def test_of_two_mounts_the_one_that_shows_more_levels(tmp_path: Path) -> None:
    for group in ("whole", "whole/a", "part"):
        write(tmp_path, {f"{group}/memory.max": 9, f"{group}/memory.current": 1})
    levels = found(tmp_path, "0::/a\n", ("part", "/a", "2"), ("whole", "/", "2"))
    assert [group for group, _, _ in levels] == ["whole/a", "whole"]


def test_a_mount_point_with_a_space(tmp_path: Path) -> None:
    write(tmp_path, {"my cgroups/memory.max": 9, "my cgroups/memory.current": 1})
    assert found(tmp_path, "0::/\n", ("my\\040cgroups", "/", "2")) == [("my cgroups", 9, 8)]


@pytest.mark.parametrize(
    ("statistics", "left"),
    [
        ("", 100),
        ("anon 99\ninactive_file 50", 150),
        ("inactive_file 50\nfile_dirty 20\nfile_writeback 10", 120),
        ("inactive_file 50\nfile_dirty 70", 100),
        ("inactive_file 9\ntotal_inactive_file 50\ntotal_dirty 5", 145),
    ],
)
def test_clean_file_cache_makes_way(tmp_path: Path, statistics: str, left: int) -> None:
    write(tmp_path, {"memory.max": 1000, "memory.current": 900, "memory.stat": statistics})
    assert found(tmp_path, "0::/\n", (".", "/", "2")) == [(".", 1000, left)]


def test_what_cannot_be_read_is_no_limit(tmp_path: Path) -> None:
    write(tmp_path, {"memory.max": "what?", "memory.high": 5, "memory.current": ""})
    assert found(tmp_path, "0::/\n", (".", "/", "2")) == []


def test_memory_of_the_machine(tmp_path: Path) -> None:
    text = "MemTotal: 4096 kB\nMemAvailable:    1024 kB\n"
    assert machine_bounds(text) == [MemoryBound(MACHINE, 4096 << 10, 1024 << 10)]
    assert machine_bounds("MemTotal: 4096 kB\n") == []
    write(tmp_path, {"meminfo": text, "self/mountinfo": mountinfo(tmp_path, ("cg", "/", "2")), "cg/memory.max": 7})
    write(tmp_path, {"cg/memory.current": 3})
    assert [bound.left for bound in memory_bounds("0::/\n", tmp_path)] == [1024 << 10, 4]
    assert memory_bounds("0::/\n", tmp_path / "nothing") == []


def test_a_move_takes_a_second_set_of_pages() -> None:
    def room(left: int) -> Room:
        return Room(lambda: [MemoryBound("/sys/fs/cgroup/x", 400 << 20, left)])

    assert low_memory(room(68 << 20), X86_64) is None
    refusal = low_memory(room((68 << 20) - 1), X86_64)
    assert refusal is not None
    assert refusal.key == "low_memory"
    assert "/sys/fs/cgroup/x" in refusal.reason


@pytest.mark.parametrize(
    ("membership", "file", "word", "frozen"),
    [
        ("0::/a/b\n", "unified/a/b/cgroup.freeze", "1", True),
        ("0::/a/b\n", "unified/a/cgroup.freeze", "1", True),
        ("0::/a/b\n", "unified/a/b/cgroup.freeze", "0", False),
        ("0::/a/b\n", "unified/a/c/cgroup.freeze", "1", False),
        ("3:freezer:/a\n0::/\n", "freezer/a/freezer.state", "FROZEN", True),
        ("3:freezer:/a\n0::/\n", "freezer/a/freezer.state", "FREEZING", True),
        ("3:freezer:/a\n0::/\n", "freezer/a/freezer.state", "THAWED", False),
        ("3:memory:/a\n", "memory/a/freezer.state", "FROZEN", False),
    ],
)
def test_a_frozen_cgroup(tmp_path: Path, membership: str, file: str, word: str, frozen: bool) -> None:
    write(tmp_path, {file: word})
    mounts = mountinfo(tmp_path, ("unified", "/", "2"), ("freezer", "/", "freezer"), ("memory", "/", "memory"))
    assert is_frozen(cgroup_mounts(mounts), membership) == frozen
