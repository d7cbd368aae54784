"""Releases of the kernel differ: a case is replayed by the rules of the one that it was recorded on."""

from __future__ import annotations

from typing import Any

import pytest

from mthp.errors import UsageError
from mthp.sim.golden.conformance import replay_case

N = 512


def _case(kernel: str, after: int, before: list[list[Any]], **more: Any) -> dict[str, Any]:
    return {
        "id": "t", "kernel": kernel, "trigger": "khugepaged", "orders_enabled": [4, 9], "max_ptes_none": 0,
        "max_ptes_swap": 64, "max_ptes_shared": 256, "before": before, "after": [[after, N]], **more,
    }  # fmt: skip


@pytest.mark.parametrize(("kernel", "order"), [("6.18.15", 9), ("7.0.13", 9), ("7.1.13", 0), ("7.3.4", 0)])
def test_clean_lazyfree_pages_stop_khugepaged_since_linux_7_1(kernel: str, order: int) -> None:
    before = [["anon", N - 8], ["lazyfree", 8]]
    case = _case(kernel, order, before, before_flags=[["r", N - 8], ["lr", 8]])
    assert replay_case(case).mismatches == ()


@pytest.mark.parametrize(("kernel", "order"), [("7.1.13", 0), ("7.2.13", 4)])
def test_orders_below_pmd_order_are_collapsed_to_since_linux_7_2(kernel: str, order: int) -> None:
    case = _case(kernel, order, [["anon", N - 16], ["none", 16]])
    case["after"] = [[order, N - 16], ["none", 16]]
    assert replay_case(case).mismatches == ()


@pytest.mark.parametrize(("kernel", "counted"), [("7.1.13", {}), ("7.2.13", {"hugepages-2048kB/collapse_alloc": 1})])
def test_the_counters_per_size_came_with_it(kernel: str, counted: dict[str, int]) -> None:
    stats = {"full_scans": 1, "pages_collapsed": 1, "thp_collapse_alloc": 1, "hugepages-2048kB/nr_anon": 1}
    case = _case(kernel, 9, [["anon", N]], passes=[{"stats": stats | counted}])
    assert replay_case(case).mismatches == ()


def test_a_kernel_that_is_no_release_is_refused() -> None:
    with pytest.raises(UsageError, match="kernel: 'newest' cannot be"):
        replay_case(_case("newest", 9, [["anon", N]]))
