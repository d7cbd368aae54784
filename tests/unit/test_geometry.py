"""Orders, sizes and the ways people write them, for every geometry."""

from __future__ import annotations

import pytest

from mthp.errors import UsageError
from mthp.geometry import (
    GEOMETRIES,
    X86_64,
    Geometry,
    geometry_for_ptes,
    geometry_named,
)

KIB = 1 << 10
MIB = 1 << 20

EVERY = pytest.mark.parametrize("geometry", GEOMETRIES.values(), ids=GEOMETRIES)


@pytest.mark.parametrize(
    ("name", "page_size", "ptes", "pmd_order", "pmd_size"),
    [
        ("x86-64", 4 * KIB, 512, 9, 2 * MIB),
        ("arm64-4k", 4 * KIB, 512, 9, 2 * MIB),
        ("riscv64", 4 * KIB, 512, 9, 2 * MIB),
        ("arm64-16k", 16 * KIB, 2048, 11, 32 * MIB),
        ("arm64-64k", 64 * KIB, 8192, 13, 512 * MIB),
        ("ppc64-64k", 64 * KIB, 32, 5, 2 * MIB),
        ("ppc64-4k", 4 * KIB, 512, 9, 2 * MIB),
        ("s390x", 4 * KIB, 256, 8, 1 * MIB),
    ],
)
def test_the_machines_that_have_thp(name: str, page_size: int, ptes: int, pmd_order: int, pmd_size: int) -> None:
    geometry = geometry_named(name)
    assert geometry.page_size == page_size
    assert geometry.ptes_per_pmd == ptes
    assert geometry.pmd_order == pmd_order
    assert geometry.pmd_size == pmd_size
    assert geometry.anon_orders == tuple(range(2, pmd_order + 1))


def test_an_unknown_name_is_answered_with_the_known_ones() -> None:
    with pytest.raises(UsageError, match="'vax'") as caught:
        geometry_named("vax")
    assert all(name in caught.value.help for name in GEOMETRIES)


@pytest.mark.parametrize(
    "text", ["64K", "64k", "64kB", "64KB", "64KiB", "64 KiB", " 64K ", "65536", "order=4", "order = 4"]
)
def test_one_size_in_all_its_spellings(text: str) -> None:
    assert X86_64.parse_order(text) == 4


def test_the_same_size_is_another_order_elsewhere() -> None:
    assert geometry_named("arm64-16k").parse_order("64K") == 2
    assert geometry_named("arm64-16k").parse_order("32M") == 11
    assert geometry_named("arm64-64k").parse_order("512M") == 13
    assert geometry_named("s390x").parse_order("1M") == 8


def test_an_int_is_an_order() -> None:
    assert X86_64.parse_order(9) == 9


@pytest.mark.parametrize("text", ["4K", "8K", "4M", "63K", "48K", "0", "1", "order=1", "order=10", "order=0"])
def test_sizes_that_no_folio_has(text: str) -> None:
    with pytest.raises(UsageError) as caught:
        X86_64.parse_order(text)
    assert "16K" in caught.value.help
    assert "2M" in caught.value.help


@pytest.mark.parametrize("text", ["", "big", "64X", "-64K", "order=", "order=-1", "64K2M", "0x10000", "1e6"])
def test_what_is_not_a_size(text: str) -> None:
    with pytest.raises(UsageError):
        X86_64.parse_order(text)


@pytest.mark.parametrize("order", [-1, 0, 1, 10, 64])
def test_orders_that_do_not_exist(order: int) -> None:
    with pytest.raises(UsageError, match=str(order)):
        X86_64.check_order(order)


def test_lists_of_sizes() -> None:
    assert X86_64.parse_orders("2M,16K, 64K,order=4") == (2, 4, 9)
    assert X86_64.parse_orders("all") == X86_64.anon_orders
    assert X86_64.parse_orders([9, "16K", 9]) == (2, 9)
    assert X86_64.parse_orders(range(2, 10)) == X86_64.anon_orders


@pytest.mark.parametrize("text", ["", " , ", []])
def test_an_empty_list_is_refused(text: str | list[int]) -> None:
    with pytest.raises(UsageError, match="no order"):
        X86_64.parse_orders(text)


@EVERY
def test_every_order_survives_being_written_and_read(geometry: Geometry) -> None:
    for order in geometry.anon_orders:
        assert geometry.size_of(order) == geometry.page_size * 2**order
        assert geometry.parse_order(geometry.label(order)) == order
        assert geometry.parse_order(geometry.sysfs_name(order).removeprefix("hugepages-")) == order


def test_names_of_sysfs_directories() -> None:
    assert X86_64.sysfs_name(9) == "hugepages-2048kB"
    assert X86_64.sysfs_name(2) == "hugepages-16kB"
    assert geometry_named("arm64-64k").sysfs_name(13) == "hugepages-524288kB"


@pytest.mark.parametrize("ptes", sorted({geometry.ptes_per_pmd for geometry in GEOMETRIES.values()}))
def test_a_preset_is_found_by_its_ptes(ptes: int) -> None:
    assert geometry_for_ptes(ptes) in GEOMETRIES.values()
    assert geometry_for_ptes(ptes).ptes_per_pmd == ptes


def test_geometries_that_no_machine_has() -> None:
    assert geometry_for_ptes(512) is X86_64
    assert geometry_for_ptes(16).pmd_order == 4
    assert geometry_for_ptes(4).anon_orders == (2,)


@pytest.mark.parametrize("ptes", [-4, 0, 1, 2, 3, 511, 513, 1 << 17])
def test_counts_of_ptes_that_cannot_be(ptes: int) -> None:
    with pytest.raises(UsageError):
        geometry_for_ptes(ptes)


@pytest.mark.parametrize(("page_size", "pmd_order"), [(0, 9), (256, 9), (5000, 9), (4096, 1), (4096, 17), (4096, -3)])
def test_geometries_that_cannot_be(page_size: int, pmd_order: int) -> None:
    with pytest.raises(UsageError):
        Geometry("odd", page_size, pmd_order)
