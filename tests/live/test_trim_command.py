"""`mthp trim` and `mthp.trim` on a process of its own, beside a thread that writes and checks."""

from __future__ import annotations

import pytest

import mthp
from e2e.helpers import mthp_json
from mthp.linux.live import open_live
from targets import MADV_COLLAPSE, PAGE_SIZE, PMD_ORDER, PMD_SIZE, Puppet
from thp_switches import ThpSwitches

pytestmark = [pytest.mark.live, pytest.mark.requires("root", "thp")]

USED, RANGES = 40, 16


@pytest.fixture(autouse=True)
def a_kernel_that_trims(thp_switches: ThpSwitches) -> None:
    thp_switches.set("enabled", "madvise")
    thp_switches.only()
    with open_live("self") as space:
        if not space.trims_by:
            pytest.skip("this kernel keeps pages of zeroes when it splits a folio")


def wasteful(puppet: Puppet) -> int:
    """Have the puppet map PMD folios of which few pages are used, and a full one."""
    address = puppet.map((RANGES + 1) * PMD_SIZE)
    for row in range(RANGES):
        puppet.write(address + row * PMD_SIZE, USED)
    puppet.write(address + RANGES * PMD_SIZE, PMD_SIZE // PAGE_SIZE)
    puppet.tell("madvise", address, (RANGES + 1) * PMD_SIZE, MADV_COLLAPSE)
    return address


@pytest.mark.slow
def test_the_command_gives_back_what_it_said() -> None:
    with Puppet() as puppet:
        wasteful(puppet)
        # Splits of the empty parts alone leave zeroes in 64 KiB blocks beside used pages.
        most, least = (RANGES * (PMD_SIZE - -(-USED * PAGE_SIZE // size) * size) for size in (PAGE_SIZE, 64 << 10))
        plan = mthp_json("trim", puppet.pid, "--dry-run", "--json")["plan"]
        assert plan["folios_by_order"] == {str(PMD_ORDER): RANGES}
        wasted = plan["zero_bytes"]
        assert least <= wasted <= most
        report = mthp_json("trim", puppet.pid, "--json")
        assert report["complete"]
        assert (report["trimmed"], report["given_back_bytes"]) == (RANGES, wasted)
        fallen = report["rss_before_bytes"] - report["rss_after_bytes"]
        assert abs(fallen - wasted) < wasted // 20
        # Full folios stay large, and a second run finds no work.
        again = mthp_json("trim", puppet.pid, "--json")
        assert (again["plan"]["folios_by_order"], again["given_back_bytes"]) == ({}, 0)


def test_the_library_trims_within_a_share() -> None:
    with Puppet() as puppet:
        wasteful(puppet)
        share = 1 - USED * PAGE_SIZE / PMD_SIZE
        assert mthp.trim(puppet.pid, zero=share + 0.01, dry_run=True).plan.folios == []
        report = mthp.trim(puppet.pid, zero=share - 0.01)
        assert (report.trimmed, report.complete) == (RANGES, True)
