"""The machine's side, from directories that the test makes."""

from __future__ import annotations

from pathlib import Path

import pytest

from mthp.errors import UsageError
from mthp.geometry import GEOMETRIES, Geometry
from mthp.linux.sysfs import ThpSysfs

X86_64 = GEOMETRIES["x86-64"]


def make(root: Path, files: dict[str, str]) -> ThpSysfs:
    for name, text in files.items():
        path = root / "thp" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return ThpSysfs(root / "thp", root / "vmstat")


def test_a_kernel_with_per_size_switches(tmp_path: Path) -> None:
    sysfs = make(
        tmp_path,
        {
            "enabled": "always [madvise] never\n",
            "hpage_pmd_size": "2097152\n",
            "hugepages-2048kB/enabled": "always [inherit] madvise never\n",
            "hugepages-64kB/enabled": "[always] inherit madvise never\n",
            "hugepages-8kB/shmem_enabled": "always inherit [never]\n",
            "hugepages-64kB/stats/nr_anon": "7\n",
            "hugepages-64kB/stats/split": "0\n",
            "hugepages-8kB/stats/shmem_alloc": "3\n",
            "khugepaged/max_ptes_none": "255\n",
            "khugepaged/defrag": "0\n",
        },
    )
    (tmp_path / "vmstat").write_text("pgfault 12\nthp_fault_alloc 5\nthp_split_page 0\n")
    assert sysfs.exists
    geometry = sysfs.geometry(4096, "x86_64")
    assert geometry == X86_64
    assert dict(sysfs.switches(geometry).sizes) == {4: "always", 9: "inherit"}
    assert sysfs.switches(geometry).enabled == "madvise"
    assert sysfs.tunables(geometry).max_ptes_none == 255
    assert sysfs.tunables(geometry).max_ptes_swap == 64
    assert not sysfs.tunables(geometry).defrag
    assert sysfs.stats(geometry) == {1: {"shmem_alloc": 3}, 4: {"nr_anon": 7, "split": 0}}
    assert sysfs.vmstat() == {"thp_fault_alloc": 5, "thp_split_page": 0}
    assert sysfs.text("defrag") is None


def test_a_kernel_without_thp(tmp_path: Path) -> None:
    sysfs = ThpSysfs(tmp_path / "nothing", tmp_path / "nothing")
    assert not sysfs.exists
    assert sysfs.geometry(4096, "x86_64") == X86_64
    assert sysfs.switches(X86_64).enabled == "never"
    assert sysfs.switches(X86_64).orders(advised=True) == ()
    assert sysfs.stats(X86_64) == {}
    assert sysfs.vmstat() == {}


@pytest.mark.parametrize(
    ("machine", "page_size", "pmd_size", "expected"),
    [
        ("aarch64", 4096, 2 << 20, GEOMETRIES["arm64-4k"]),
        ("aarch64", 16384, 32 << 20, GEOMETRIES["arm64-16k"]),
        ("aarch64", 65536, 512 << 20, GEOMETRIES["arm64-64k"]),
        ("ppc64le", 65536, 2 << 20, GEOMETRIES["ppc64-64k"]),
        ("ppc64le", 65536, 16 << 20, Geometry("ppc64-64k", 65536, 8)),
        ("s390x", 4096, 1 << 20, GEOMETRIES["s390x"]),
        ("riscv64", 4096, 2 << 20, GEOMETRIES["riscv64"]),
        ("loongarch64", 16384, 32 << 20, Geometry("loongarch64", 16384, 11)),
    ],
)
def test_geometries(tmp_path: Path, machine: str, page_size: int, pmd_size: int, expected: Geometry) -> None:
    assert make(tmp_path, {"hpage_pmd_size": f"{pmd_size}\n"}).geometry(page_size, machine) == expected


def test_a_switch_nobody_knows_is_named(tmp_path: Path) -> None:
    sysfs = make(tmp_path, {"enabled": "[sometimes] never\n"})
    with pytest.raises(UsageError, match="sometimes"):
        sysfs.switches(X86_64)


def test_statistics_are_the_numbers_that_are_there(tmp_path: Path) -> None:
    for size, files in {"64": {"nr_anon": "3\n", "odd": "a word\n"}, "2048": {"nr_anon": "0\n"}, "16": {}}.items():
        stats = tmp_path / f"hugepages-{size}kB/stats"
        stats.mkdir(parents=True)
        for name, text in files.items():
            (stats / name).write_text(text)
    (tmp_path / "hugepages-64kB/stats/unreadable").mkdir()
    assert ThpSysfs(tmp_path).stats(X86_64) == {4: {"nr_anon": 3}, 9: {"nr_anon": 0}}
