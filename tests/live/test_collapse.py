"""``mthp collapse`` on a real kernel: its report agrees with smaps, and the target keeps its contents."""

from __future__ import annotations

import json
import signal
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from e2e.helpers import MTHP, Actor, Memory, memory_of, mthp_here, mthp_json_here
from targets import MADV_NOHUGEPAGE, PAGE_SIZE, PMD_ORDER, PMD_SIZE
from thp_switches import ThpSwitches
from waiting import PATIENCE, until

pytestmark = [
    pytest.mark.live,
    pytest.mark.requires("root", "thp"),
    pytest.mark.usefixtures("thp_switches"),
]

PAGES = PMD_SIZE // PAGE_SIZE
FULL, SOME, EMPTY = 4, (300, 200, 1), 2
"""The layout: PMD ranges that are full, pages in those that are not, and ranges without any."""


@dataclass(frozen=True)
class Layout:
    """Memory of an actor: its address, and the bytes with contents."""

    actor: Actor
    address: int

    @classmethod
    def of(cls, actor: Actor) -> Layout:
        address = actor.map((FULL + len(SOME) + EMPTY) * PMD_SIZE)
        actor.fill(address, FULL * PAGES)
        for index, pages in enumerate(SOME, FULL):
            actor.fill(address + index * PMD_SIZE, pages)
        # Ten zero pages in the first range that is not full.
        actor.tell("read", address + FULL * PMD_SIZE + 400 * PAGE_SIZE, 10, 1)
        return cls(actor, address)

    @property
    def memory(self) -> Memory:
        return memory_of(self.actor.pid, self.address, self.address + (FULL + len(SOME) + EMPTY) * PMD_SIZE)

    def check_contents(self) -> None:
        assert self.actor.damaged(self.address, FULL * PAGES) == 0
        for index, pages in enumerate(SOME, FULL):
            start = self.address + index * PMD_SIZE
            assert self.actor.damaged(start, pages) == 0
            assert self.actor.unwritten(start + pages * PAGE_SIZE, PAGES - pages) == PAGES - pages


PLANNED = ("--orders", f"order={PMD_ORDER}", "--max-ptes-none", PAGES - 1)


def options(*more: object) -> list[object]:
    return [*PLANNED, "--max-bloat", "none", *more]


def share_by_smaps(pid: int) -> float:
    """Return the share of the anonymous memory that PMD entries map, as the kernel says it."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]
    values = {line.split(":")[0]: int(line.split()[1]) for line in lines}
    return values["AnonHugePages"] / values["Anonymous"]


def accounted(report: dict[str, Any]) -> int:
    counts = [report[f"{name}_ranges"] for name in ("collapsed", "unchanged", "over_budget", "not_tried")]
    return sum([*counts, *report["failed_ranges"].values()])


def planned(report: dict[str, Any]) -> int:
    return int(report["plan"]["folios_by_order"].get(str(PMD_ORDER), 0))


def check_against_smaps(report: dict[str, Any], before: Memory, after: Memory) -> None:
    assert accounted(report) == planned(report)
    assert after.anon_huge - before.anon_huge == report["collapsed_bytes"]
    assert after.rss - before.rss == report["bloat_bytes"]
    assert report["copied_bytes"] == report["collapsed_bytes"] - report["bloat_bytes"]


def test_what_is_reported_is_what_smaps_says(actor: Actor) -> None:
    layout = Layout.of(actor)
    before = memory_of(actor.pid)
    assert layout.memory == Memory((FULL * PAGES + sum(SOME)) * PAGE_SIZE, 0, 0, 0)
    report = mthp_json_here("collapse", actor.pid, *options())
    check_against_smaps(report, before, memory_of(actor.pid))
    size = (FULL + len(SOME)) * PMD_SIZE
    assert layout.memory == Memory(size, size, 0, 0)
    assert report["collapsed_bytes"] >= size
    assert report["complete"]
    assert report["coverage"] == pytest.approx(share_by_smaps(actor.pid), abs=0.002)
    assert report["coverage"] == pytest.approx(report["plan"]["coverage_after"], abs=0.002)
    assert report["calls"]["count"] == report["collapsed_ranges"]
    assert 0 < report["calls"]["p50_seconds"] <= report["calls"]["p99_seconds"] <= report["calls"]["max_seconds"]
    layout.check_contents()

    again = mthp_json_here("collapse", actor.pid, *options())
    assert accounted(again) == planned(again) == again["collapsed_bytes"] == 0
    assert again["complete"]
    assert (again["nothing_left_to_do"], again["done_nothing"]) == (True, False)
    assert again["plan"]["already_bytes"] >= size
    assert again["coverage_before"] == pytest.approx(again["coverage"], abs=0.002)


def test_a_dry_run_changes_nothing(actor: Actor) -> None:
    layout = Layout.of(actor)
    before = memory_of(actor.pid)
    report = mthp_json_here("collapse", actor.pid, *options("--dry-run"))
    assert memory_of(actor.pid) == before
    assert report["dry_run"]
    assert report["collapsed_bytes"] == 0
    assert planned(report) >= FULL + len(SOME)
    plan = mthp_json_here("plan", actor.pid, *PLANNED)
    assert {key: plan[key] for key in report["plan"]} == report["plan"]
    layout.check_contents()


def test_a_budget_of_nothing_takes_what_is_full(actor: Actor) -> None:
    layout = Layout.of(actor)
    before = memory_of(actor.pid)
    report = mthp_json_here("collapse", actor.pid, *options("--max-bloat", 0), code=1)
    check_against_smaps(report, before, memory_of(actor.pid))
    assert report["bloat_bytes"] == 0
    assert report["over_budget_ranges"] >= len(SOME)
    assert layout.memory.anon_huge == FULL * PMD_SIZE
    layout.check_contents()


def test_a_budget_stops_before_it_is_overspent(actor: Actor) -> None:
    layout = Layout.of(actor)
    before = memory_of(actor.pid)
    room = (PAGES - SOME[0]) * PAGE_SIZE + (PAGES - SOME[1]) * PAGE_SIZE + before.rss // 100
    report = mthp_json_here("collapse", actor.pid, *options("--max-bloat", f"{room}B"), code=1)
    check_against_smaps(report, before, memory_of(actor.pid))
    assert report["bloat_bytes"] <= room
    assert report["over_budget_ranges"] >= 1
    layout.check_contents()


@pytest.mark.slow
def test_the_coverage_that_is_asked_for_decides_the_exit_code(actor: Actor) -> None:
    layout = Layout.of(actor)
    # Full ranges only: the plan is carried out, and the other ranges are unchanged.
    full_only = ["--orders", f"order={PMD_ORDER}", "--max-ptes-none", 0]
    report = mthp_json_here("collapse", actor.pid, *full_only, "--min-coverage", "99.9%", code=1)
    assert report["complete"]
    assert not report["min_coverage_reached"]
    assert report["min_coverage"] == 0.999
    assert layout.memory.anon_huge == FULL * PMD_SIZE
    low = mthp_json_here("collapse", actor.pid, *full_only, "--min-coverage", "5%")
    assert low["min_coverage_reached"]
    reached = mthp_json_here("collapse", actor.pid, *options())["coverage"]
    assert reached == pytest.approx(share_by_smaps(actor.pid), abs=0.002)
    wanted = f"{100 * reached - 0.5:.1f}%"
    high = mthp_json_here("collapse", actor.pid, *options("--min-coverage", wanted))
    assert high["min_coverage_reached"]
    predicted = mthp_json_here("collapse", actor.pid, *full_only, "--min-coverage", wanted, "--dry-run")
    assert predicted["min_coverage_reached"]


def test_who_said_no_is_left_alone(actor: Actor) -> None:
    spared = actor.map(2 * PMD_SIZE, advice=MADV_NOHUGEPAGE)
    actor.fill(spared, 2 * PAGES)
    Layout.of(actor)
    report = mthp_json_here("collapse", actor.pid, *options())
    assert memory_of(actor.pid, spared, spared + 2 * PMD_SIZE).anon_huge == 0
    assert any(
        "MADV_NOHUGEPAGE" in left["reason"] and left["bytes"] >= 2 * PMD_SIZE for left in report["plan"]["left_alone"]
    )
    assert actor.damaged(spared, 2 * PAGES) == 0


def test_a_process_that_said_no_is_left_alone(actor: Actor) -> None:
    layout = Layout.of(actor)
    actor.tell("set_thp_disable", 1)
    before = memory_of(actor.pid)
    report = mthp_json_here("collapse", actor.pid, *options(), code=1)
    assert memory_of(actor.pid) == before
    assert report["done_nothing"]
    assert planned(report) == report["collapsed_ranges"] == 0
    assert any("PR_SET_THP_DISABLE" in left["reason"] for left in report["plan"]["left_alone"])
    layout.check_contents()


def many(actor: Actor, count: int = 40) -> int:
    """Return some PMD ranges with a page at every fourth place, for a collapse that takes its time."""
    address = actor.map(count * PMD_SIZE)
    actor.fill(address, count * PAGES // 4, 4)
    return address


def slowly(actor: Actor, *more: object) -> subprocess.Popen[str]:
    """Return a collapse that would take some seconds, once it is under way."""
    before = memory_of(actor.pid).anon_huge
    arguments = map(str, options("--rate", "20M", "--json", *more))
    running = subprocess.Popen(
        [*MTHP, "collapse", str(actor.pid), *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    until(lambda: memory_of(actor.pid).anon_huge > before, "something is collapsed")
    return running


def outcome_of(running: subprocess.Popen[str]) -> tuple[int, dict[str, Any]]:
    out, err = running.communicate(timeout=PATIENCE)
    assert "Traceback" not in err, err
    report = json.loads(out)
    assert accounted(report) == planned(report)
    return running.returncode, report


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_interrupted_in_the_middle(actor: Actor, number: signal.Signals) -> None:
    address = many(actor)
    before = memory_of(actor.pid)
    running = slowly(actor)
    running.send_signal(number)
    code, report = outcome_of(running)
    assert code == 128 + number
    assert report["interrupted"]
    assert 0 < report["collapsed_ranges"] < planned(report)
    assert report["not_tried_ranges"] > 0
    check_against_smaps(report, before, memory_of(actor.pid))
    assert actor.damaged(address, 40 * PAGES // 4, 4) == 0


@pytest.mark.slow
def test_the_target_is_killed_in_the_middle(actor: Actor) -> None:
    many(actor)
    running = slowly(actor)
    actor.kill()
    code, report = outcome_of(running)
    assert code == 4
    assert report["vanished"]
    assert report["not_tried_ranges"] > 0


@pytest.mark.slow
def test_the_target_unmaps_in_the_middle(actor: Actor) -> None:
    address = many(actor, 20)
    running = slowly(actor)
    actor.tell("munmap", address + 10 * PMD_SIZE, 10 * PMD_SIZE)
    code, report = outcome_of(running)
    assert code == 1
    assert sum(report["failed_ranges"].values()) >= 5
    assert not report["vanished"]
    assert memory_of(actor.pid, address, address + 10 * PMD_SIZE).anon_huge == 10 * PMD_SIZE
    assert actor.damaged(address, 10 * PAGES // 4, 4) == 0


@pytest.mark.slow
def test_the_target_forks_in_the_middle(actor: Actor) -> None:
    address = many(actor, 20)
    running = slowly(actor)
    actor.tell("fork")
    code, report = outcome_of(running)
    failed = sum(report["failed_ranges"].values())
    assert code == (1 if failed else 0)
    # Only of memory that is not written meanwhile, because a write to shared memory splits the folio.
    assert memory_of(actor.pid, address, address + 20 * PMD_SIZE).anon_huge >= (20 - failed) * PMD_SIZE
    assert actor.damaged(address, 20 * PAGES // 4, 4) == 0


@pytest.mark.slow
def test_a_rate_is_kept(actor: Actor) -> None:
    many(actor, 10)
    report = mthp_json_here("collapse", actor.pid, *options("--rate", "20M"))
    # The first batch starts at once, and the budget of a tenth of a second is saved up.
    rate = 20 << 20
    assert report["elapsed_seconds"] >= (report["collapsed_bytes"] - PMD_SIZE) / rate - 0.1


@pytest.mark.slow
def test_shared_memory_when_it_is_wanted(actor: Actor) -> None:
    address = actor.map(3 * PMD_SIZE, shared=True)
    actor.fill(address, 2 * PAGES)
    area = (actor.pid, address, address + 3 * PMD_SIZE)
    # Its heap may happen to hold a PMD range, so that something is collapsed.
    without = json.loads(mthp_here("collapse", actor.pid, *options("--json")).stdout)
    assert memory_of(*area).shmem_huge == 0
    assert any("shared memory" in left["reason"] for left in without["plan"]["left_alone"])

    before = memory_of(actor.pid)
    done = mthp_here("collapse", actor.pid, *options("--include-file", "--json"))
    report = json.loads(done.stdout)
    if memory_of(*area).shmem_huge == 0:
        pytest.skip(f"this kernel does not collapse shared memory: {report['failed_ranges']}")
    after = memory_of(actor.pid)
    grown = [
        after.anon_huge - before.anon_huge,
        after.shmem_huge - before.shmem_huge,
        after.file_huge - before.file_huge,
    ]
    assert sum(grown) == report["collapsed_bytes"]
    assert memory_of(*area).shmem_huge == 2 * PMD_SIZE
    assert accounted(report) == planned(report)
    assert actor.damaged(address, 2 * PAGES) == 0


@pytest.mark.slow
@pytest.mark.requires("pagemap_scan")
def test_the_huge_zero_page_is_not_counted_as_covered(actor: Actor, thp_switches: ThpSwitches) -> None:
    address = actor.map(2 * PMD_SIZE)
    thp_switches.set("enabled", "always")
    actor.tell("read", address + PMD_SIZE, 1, 1)
    thp_switches.set("enabled", "madvise")
    actor.fill(address, PAGES)
    plan = mthp_json_here("plan", actor.pid, *PLANNED)
    assert plan["ranges_by_result"].get("PMD_MAPPED") == 1
    assert plan["coverage"] == 0.0
    report = mthp_json_here("collapse", actor.pid, *options())
    assert report["coverage"] == pytest.approx(share_by_smaps(actor.pid), abs=0.002)


def test_the_table_says_what_the_object_says(actor: Actor) -> None:
    Layout.of(actor)
    done = mthp_here("collapse", actor.pid, *options())
    assert (done.returncode, done.stderr) == (0, "")
    assert "\x1b" not in done.stdout
    collapsed = next(line.split() for line in done.stdout.splitlines() if line.startswith("collapsed"))
    assert int(collapsed[1]) * PMD_SIZE == memory_of(actor.pid).anon_huge
