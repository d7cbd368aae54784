"""Linux's own test of khugepaged with mTHP, against the daemon. It is fetched; where it cannot be, this skips."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from daemons import RunningDaemon
from live import khugepaged_selftest as selftest
from thp_switches import ThpSwitches

pytestmark = [pytest.mark.live, pytest.mark.slow, pytest.mark.requires("root", "mthp", "4k-pages")]

ORDERS = os.environ.get("MTHP_SELFTEST_ORDERS", "4").split(",")
"""One by default, since each takes some seconds; ``2,3,4,5,6,7,8`` for all."""


@pytest.fixture(scope="module")
def built() -> None:
    try:
        selftest.build()
    except selftest.UnobtainableError as error:
        pytest.skip(f"the selftest of Linux {selftest.VERSION} cannot be had: {error}")


@pytest.fixture
def switches(thp_switches: ThpSwitches) -> None:
    """The test sets switches and tunables itself, and puts them back; this is for when it cannot."""
    thp_switches.only("2048kB", word="inherit")
    for name in ("enabled", "khugepaged/scan_sleep_millisecs", "khugepaged/alloc_sleep_millisecs"):
        text = (Path("/sys/kernel/mm/transparent_hugepage") / name).read_text().strip()
        thp_switches.set(name, text[text.index("[") + 1 : text.index("]")] if "[" in text else text)


@pytest.mark.usefixtures("built", "switches")
@pytest.mark.parametrize("order", ORDERS)
def test_the_daemon_passes_where_the_kernel_alone_fails(order: str, tmp_path: Path) -> None:
    alone = selftest.run("-c", order, "mthp_khugepaged:anon")
    if "collapse_full" in alone.passed:
        pytest.skip("this kernel's khugepaged makes mTHPs itself")
    assert {"collapse_full", "collapse_single_mthp"} <= set(alone.failed)
    with RunningDaemon(tmp_path / "run", *selftest.daemon_options()):
        *_, last = selftest.tries(order)
    if last.hasty:
        pytest.skip("the kernel's khugepaged goes round before the selftest begins to wait, each time")
    assert last.failed == (), last.text
    assert len(last.passed) == selftest.PARTS
