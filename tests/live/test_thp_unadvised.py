"""PR_THP_DISABLE_EXCEPT_ADVISED on a real kernel: possible collapses, and no useless attempts."""

from __future__ import annotations

from pathlib import Path

import pytest

from daemons import RunningDaemon
from e2e.helpers import Actor, memory_of, mthp_json_here
from mthp.thp_unadvised import REASON
from targets import MADV_HUGEPAGE, PAGE_SIZE, PMD_ORDER, PMD_SIZE
from thp_switches import ThpSwitches
from waiting import until

pytestmark = [pytest.mark.live, pytest.mark.requires("root", "thp")]

PAGES_PER_PMD = PMD_SIZE // PAGE_SIZE
EXCEPT_ADVISED = 2
SIZE = 16 * PMD_SIZE


def unadvised(actor: Actor) -> int:
    """Return a process that may have THP only where it is advised, and full memory in it without advice."""
    try:
        actor.tell("set_thp_disable", 1, EXCEPT_ADVISED)
    except Exception as error:
        pytest.skip(f"PR_THP_DISABLE_EXCEPT_ADVISED: {error} (Linux 6.18)")
    address = actor.map(SIZE)
    actor.fill(address, SIZE // PMD_SIZE * PAGES_PER_PMD)
    assert "THP_enabled:\t1" in Path(f"/proc/{actor.pid}/status").read_text()
    return address


def test_the_kernels_call_is_not_affected(actor: Actor) -> None:
    address = unadvised(actor)
    mthp_json_here("collapse", actor.pid, "--mechanism", "madvise", "--orders", f"order={PMD_ORDER}")
    assert memory_of(actor.pid, address, address + SIZE).anon_huge == SIZE


@pytest.mark.requires("mover")
def test_moving_ends_with_the_first_batch(actor: Actor) -> None:
    address = unadvised(actor)
    report = mthp_json_here("collapse", actor.pid, "--mechanism", "move", "--orders", "64K", code=1)
    tally = report["folios"]["4"]
    assert report["moved_blocks"] < tally["planned"] // 4
    assert tally["made"] == 0
    assert {each["reason"] for each in tally["reasons"]} >= {REASON}
    assert actor.damaged(address, SIZE // PMD_SIZE * PAGES_PER_PMD) == 0


@pytest.mark.requires("mover")
def test_advised_memory_of_such_a_process_is_moved(actor: Actor, thp_switches: ThpSwitches) -> None:
    # Advice wakes khugepaged where its list is empty, and the memory would be huge pages before it could be moved.
    thp_switches.only()
    unadvised(actor)
    advised = actor.map(2 * PMD_SIZE)
    actor.fill(advised, 2 * PAGES_PER_PMD)
    actor.tell("madvise", advised, 2 * PMD_SIZE, MADV_HUGEPAGE)
    report = mthp_json_here("collapse", actor.pid, "--mechanism", "move", "--orders", "64K", code=1)
    assert report["folios"]["4"]["made"] == 2 * PMD_SIZE // (64 << 10)


@pytest.mark.slow
@pytest.mark.requires("mover")
def test_the_daemon_stops_it_for_one_batch_and_blames_no_machine(actor: Actor, tmp_path: Path) -> None:
    unadvised(actor)
    config = tmp_path / "rules.toml"
    config.write_text(
        f'[[rule]]\nname = "it"\nmatch.pid = {actor.pid}\nmechanism = "move"\norders = "64K"\npolicy = "mainline"\n'
    )
    with RunningDaemon(tmp_path / "run", "--config", str(config)) as daemon:
        until(lambda: REASON in ((daemon.target(actor.pid) or {}).get("reasons") or {}), "the reason in the status")
        stopped = daemon.status()["counters"]["pauses"]["count"]
        assert daemon.status()["orders_refused"] == []
        # New memory begins new passes; none of them stops the process.
        for _ in range(3):
            wait_for_a_pass_over_new_memory(daemon, actor)
        assert daemon.status()["counters"]["pauses"]["count"] == stopped
        assert daemon.collapsed(actor.pid) == 0


def wait_for_a_pass_over_new_memory(daemon: RunningDaemon, actor: Actor) -> None:
    begun = passes_of(daemon, actor)
    actor.fill(actor.map(2 * PMD_SIZE), 2 * PAGES_PER_PMD)
    until(lambda: passes_of(daemon, actor) > begun, "another pass")


def passes_of(daemon: RunningDaemon, actor: Actor) -> int:
    target = daemon.target(actor.pid)
    assert target is not None
    return int(target["passes"])
