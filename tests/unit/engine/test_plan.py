"""Calls of ``mthp.plan_ranges``: arguments, results, and errors."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import mthp
from mthp.errors import UsageError
from mthp.geometry import GEOMETRIES, Geometry
from mthp.results import ScanResult

Plane = NDArray[np.bool_]

N = 512
FULL = np.ones((2, N), dtype=np.bool_)


def pages(*indices: int) -> Plane:
    """Return one range of 512 PTEs in which those of `indices` are set."""
    plane = np.zeros((1, N), dtype=np.bool_)
    plane[0, list(indices)] = True
    return plane


def test_the_example_of_the_design() -> None:
    plan = mthp.plan_ranges(FULL, policy="mainline", orders=range(2, 10), max_ptes_none=511)
    assert plan.orders.shape == (2, N)
    assert (plan.orders == 9).all()


def test_types_shapes_and_values_of_a_plan() -> None:
    plan = mthp.plan_ranges(FULL)
    attempts = plan.attempts
    assert plan.policy == "mainline"
    assert plan.geometry is GEOMETRIES["x86-64"]
    assert plan.orders.dtype == plan.scan_result.dtype == attempts.order.dtype == attempts.result.dtype == np.int8
    assert plan.copied.dtype == plan.filled.dtype == attempts.offset.dtype == np.int32
    assert attempts.range.dtype == np.int64
    assert plan.orders.shape == (2, N)
    assert plan.scan_result.tolist() == [ScanResult.SUCCEED] * 2
    assert plan.copied.tolist() == [N, N]
    assert plan.filled.tolist() == [0, 0]
    assert attempts.range.tolist() == [0, 1]
    assert attempts.offset.tolist() == [0, 0]
    assert attempts.order.tolist() == [9, 9]
    assert attempts.result.tolist() == [ScanResult.SUCCEED] * 2


@pytest.mark.parametrize("dtype", [np.bool_, np.uint8, np.int8, np.int64])
def test_a_page_is_whatever_is_not_zero(dtype: type[np.generic]) -> None:
    plan = mthp.plan_ranges((FULL * 2).astype(dtype), swap=np.zeros((2, N), dtype))
    assert (plan.orders == 9).all()


def test_lists_will_do() -> None:
    plan = mthp.plan_ranges([[1] * 16, [0] * 16])
    assert plan.orders.tolist() == [[4] * 16, [-1] * 16]


def test_arguments_are_left_as_they_were() -> None:
    planes: dict[str, Any] = {
        name: np.zeros((2, N), np.bool_) for name in ("zero", "swap", "shared", "lazyfree", "uffd")
    }
    planes["present"] = FULL.copy()
    planes["present"][0, 7] = False
    planes["folio_order"] = np.zeros((2, N), np.int8)
    before = {name: plane.copy() for name, plane in planes.items()}
    plan = mthp.plan_ranges(**planes)
    plan.orders[:] = 3
    assert all(np.array_equal(planes[name], before[name]) for name in planes)


@pytest.mark.parametrize("laid_out", [np.asarray, np.asfortranarray])
def test_any_layout_in_memory(laid_out: Callable[[Plane], Plane]) -> None:
    present = np.zeros((6, 1024), dtype=np.bool_)
    present[:, :600] = True
    view = present[::2, ::2]
    strided = mthp.plan_ranges(laid_out(view))
    assert np.array_equal(strided.orders, mthp.plan_ranges(np.ascontiguousarray(view)).orders)


def test_no_ranges_is_an_empty_plan() -> None:
    plan = mthp.plan_ranges(np.zeros((0, N), dtype=np.bool_))
    assert plan.orders.shape == (0, N)
    assert len(plan.scan_result) == len(plan.copied) == len(plan.filled) == len(plan.attempts.range) == 0


@pytest.mark.parametrize("policy", ["mainline", "per-order", "pmd-only", "rfc"])
def test_blocks_make_no_difference(policy: str) -> None:
    present = np.random.default_rng(1).random((23, 64)) < 0.97
    flags = np.arange(23) % 3 == 0
    whole = mthp.plan_ranges(present, policy=policy, uffd_armed=flags, pmd_mapped=~flags)
    parts = mthp.plan_ranges(present, policy=policy, uffd_armed=flags, pmd_mapped=~flags)
    parts.portion_ptes = 64 * 5
    for name in ("orders", "scan_result", "copied", "filled"):
        assert np.array_equal(getattr(whole, name), getattr(parts, name))
    for name in ("range", "offset", "order", "result"):
        assert np.array_equal(getattr(whole.attempts, name), getattr(parts.attempts, name))


@pytest.mark.parametrize("geometry", GEOMETRIES.values(), ids=GEOMETRIES)
def test_limits_default_to_those_of_the_geometry(geometry: Geometry) -> None:
    """A swap entry more than the default N/8, and the range is given up; none by default stop nothing."""
    n = geometry.ptes_per_pmd
    swap = np.zeros((3, n), dtype=np.bool_)
    swap[0, : n // 8] = True
    swap[1, : n // 8 + 1] = True
    present = ~swap
    present[2, 1:] = False
    plan = mthp.plan_ranges(present, swap=swap, geometry=geometry.name)
    assert plan.scan_result.tolist() == [ScanResult.SUCCEED, ScanResult.EXCEED_SWAP_PTE, ScanResult.SUCCEED]
    assert plan.filled.tolist() == [0, 0, n - 1]
    shared = np.zeros((2, n), dtype=np.bool_)
    shared[0, : n // 2] = True
    shared[1, : n // 2 + 1] = True
    plan = mthp.plan_ranges(np.ones((2, n), np.bool_), shared=shared, geometry=geometry)
    assert plan.scan_result.tolist() == [ScanResult.SUCCEED, ScanResult.EXCEED_SHARED_PTE]


def test_one_page_fills_a_whole_range_by_default_and_none_at_limit_zero() -> None:
    one = pages(5)
    assert mthp.plan_ranges(one).filled.tolist() == [N - 1]
    frugal = mthp.plan_ranges(one, max_ptes_none=0)
    assert frugal.filled.tolist() == [0]
    assert frugal.orders[0].tolist() == [-1] * 5 + [0] + [-1] * (N - 6)


def test_a_scalar_flag_goes_for_all_ranges() -> None:
    present = FULL.copy()
    present[:, 100] = False
    assert mthp.plan_ranges(present, orders=[9], uffd_armed=True).copied.tolist() == [0, 0]
    assert mthp.plan_ranges(present, orders=[9], uffd_armed=[True, False]).copied.tolist() == [0, N - 1]
    lazy = pages(0)
    assert mthp.plan_ranges(FULL[:1], lazyfree=lazy).scan_result.tolist() == [ScanResult.PAGE_LAZYFREE]
    assert mthp.plan_ranges(FULL[:1], lazyfree=lazy, droppable=True).scan_result.tolist() == [ScanResult.SUCCEED]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"present": FULL[0]}, "shape"),
        ({"present": FULL[None]}, "shape"),
        ({"present": np.ones((1, 500), np.bool_)}, "500"),
        ({"present": np.ones((1, 2), np.bool_)}, "2"),
        ({"present": np.ones((2, N))}, "float64"),
        ({"present": np.full((2, N), "x")}, "dtype"),
        ({"present": [[1] * 16, [1] * 15]}, "present"),
        ({"geometry": "ppc64-64k"}, "512"),
        ({"geometry": "vax"}, "vax"),
        ({"policy": "greedy"}, "greedy"),
        ({"trigger": "ksm"}, "ksm"),
        ({"max_ptes_none": 512}, "max_ptes_none 512"),
        ({"max_ptes_none": -1}, "max_ptes_none -1"),
        ({"max_ptes_swap": 512}, "max_ptes_swap 512"),
        ({"max_ptes_shared": 1 << 20}, "max_ptes_shared"),
        ({"orders": []}, "no order"),
        ({"orders": [1]}, "order 1"),
        ({"orders": [9, 10]}, "order 10"),
        ({"orders": "5K"}, "5K"),
        ({"mthp_min_order": 10}, "10"),
        ({"mthp_min_order": -1}, "-1"),
        ({"zero": FULL[:1]}, "zero"),
        ({"swap": np.zeros((2, 256), np.bool_)}, "swap"),
        ({"shared": np.zeros(N, np.bool_)}, "shared"),
        ({"folio_order": np.zeros((1, N), np.int8)}, "folio_order"),
        ({"folio_order": np.zeros((2, N))}, "folio_order"),
        ({"folio_order": np.full((2, N), 300)}, "folio_order"),
        ({"unreferenced": np.zeros((2, N), np.float32)}, "unreferenced"),
        ({"pmd_mapped": [True] * 3}, "pmd_mapped"),
        ({"uffd_armed": [True, False, True]}, "uffd_armed"),
        ({"droppable": FULL}, "droppable"),
        ({"swap": FULL}, "both present and swapped"),
    ],
)
def test_what_cannot_be_used_is_named(arguments: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError) as caught:
        mthp.plan_ranges(**{"present": FULL, **arguments})
    assert said in caught.value.message


def test_an_unknown_policy_is_answered_with_the_known_ones() -> None:
    with pytest.raises(UsageError) as caught:
        mthp.plan_ranges(FULL, policy="greedy")
    for name in ("mainline", "per-order", "pmd-only", "rfc"):
        assert name in caught.value.help


def test_one_contradiction_among_many_pages_is_found() -> None:
    with pytest.raises(UsageError, match="present and swap"):
        mthp.plan_ranges(pages(*range(1, 512)), swap=pages(0, 300))


def test_a_plan_needs_neither_kernel_nor_command_line() -> None:
    script = (
        "import sys, mthp\n"
        "mthp.plan_ranges([[1] * 16])\n"
        "sys.exit(bool({'mthp.linux', 'mthp.snapshot', 'mthp.cli', 'rich', 'click', 'pyarrow'} & set(sys.modules)))"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)


def test_a_zero_page_has_no_order_of_its_own_in_a_collapsed_run() -> None:
    zero, existing = np.zeros((1, 16), np.bool_), np.zeros((1, 16), np.int8)
    zero[0, 1], existing[0, 1] = True, 4
    plan = mthp.plan_ranges(np.ones((1, 16), np.bool_), zero=zero, folio_order=existing, orders=[2])
    assert plan.orders.tolist() == [[2] * 16]
    assert plan.filled.tolist() == [1]


def test_the_simulated_machine_is_reached_as_an_attribute() -> None:
    command = "import mthp; print(mthp.sim.Machine.__name__, callable(mthp.collapse), 'sim' in dir(mthp))"
    done = subprocess.run([sys.executable, "-c", command], capture_output=True, text=True, check=True)
    assert done.stdout == "Machine True True\n"
