"""``mthp collapse`` below the PMD size on a real kernel: folios as planned, contents intact, each failure's reason."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from e2e.helpers import MTHP, Actor, mthp, mthp_here, mthp_json, mthp_json_here
from memory_cgroups import memory_cgroup
from mover_targets import GEOMETRY, Writers, mappings, pages_by_order
from mthp.linux.live import open_live
from targets import PAGE_SIZE, PMD_ORDER, PMD_SIZE, STRICT, is_strict
from thp_switches import words_per_size
from waiting import FACTOR, PATIENCE, until

pytestmark = [
    pytest.mark.usefixtures("thp_switches"),
    pytest.mark.live,
    pytest.mark.requires("root", "mthp", "mover", "pagemap_scan"),
]

PAUSE, LONG_PAUSE = f"{round(5 * FACTOR)}ms", f"{round(20 * FACTOR)}ms"
PAGES = PMD_SIZE // PAGE_SIZE
MOVE, BOTH = ("--mechanism", "move"), ("--mechanism", "madvise,move")
SIXTY_FOUR = ("--orders", "64K", "--max-ptes-none", "0", *MOVE)


def check_accounts(report: dict[str, Any]) -> None:
    """Every planned folio is somewhere, and every reason adds up."""
    for order, tally in report["folios"].items():
        failed = sum(tally["failed"].values())
        assert failed == sum(each["folios"] for each in tally["reasons"])
        assert all(each["reason"] for each in tally["reasons"])
        counts = tally["made"] + tally["unchanged"] + failed + tally["over_budget"] + tally["not_tried"]
        assert counts == tally["planned"] == report["plan"]["folios_by_order"][order]


def reasons(report: dict[str, Any]) -> set[str]:
    return {each["reason"] for tally in report["folios"].values() for each in tally["reasons"]}


def test_one_collapse_makes_every_size(actor: Actor) -> None:
    """A PMD range, and runs of 256, 16 and 4 pages in ranges that are not full."""
    address = actor.map(4 * PMD_SIZE)
    actor.fill(address, PAGES)
    actor.fill(address + PMD_SIZE, 256)
    actor.fill(address + 2 * PMD_SIZE, 16)
    actor.fill(address + 3 * PMD_SIZE, 4)
    before, words = mappings(actor.pid), words_per_size()
    # Room to breathe: how long a pause is depends on the machine that the test shares.
    done = mthp("collapse", actor.pid, "--max-ptes-none", 0, *BOTH, "--verify", "--max-pause", LONG_PAUSE, "--json")
    report = json.loads(done.stdout)
    assert (done.returncode, report["complete"]) in {(0, True), (1, False)}
    check_accounts(report)
    assert pages_by_order(actor.pid, address, 4 * PMD_SIZE) == {
        PMD_ORDER: PAGES,
        8: 256,
        4: 16,
        2: 4,
        -1: 3 * PAGES - 276,
    }
    for offset, pages in ((0, PAGES), (1, 256), (2, 16), (3, 4)):
        assert actor.damaged(address + offset * PMD_SIZE, pages) == 0
    assert mappings(actor.pid) == before
    assert words_per_size() == words
    assert report["mechanism_by_order"][str(PMD_ORDER)] == "madvise"
    assert report["mechanism_by_order"]["4"] == "move"
    assert report["verified"]
    assert report["moved_bytes"] >= (256 + 16 + 4) * PAGE_SIZE
    windows = report["pauses"]
    assert 0 < windows["p50_seconds"] <= windows["p99_seconds"] <= windows["max_seconds"]
    assert report["moved_blocks"] >= windows["count"] >= 3
    # The warning is printed before the work, once.
    assert done.stderr.count("UFFDIO_MOVE") == 1
    again = mthp_json("collapse", actor.pid, "--max-ptes-none", 0, *BOTH, code=done.returncode)
    assert again["plan"]["folios_by_order"].get("8", 0) <= report["plan"]["folios_by_order"]["8"] - 1


def test_the_table_says_the_same(actor: Actor) -> None:
    address = actor.map(PMD_SIZE)
    actor.fill(address, 64)
    done = mthp_here("collapse", actor.pid, "--orders", "order=4", "--max-ptes-none", 0, "--mechanism", "move")
    line = next(line.split() for line in done.stdout.splitlines() if line.startswith(GEOMETRY.label(4)))
    assert line[1] == "made"
    assert int(line[2]) >= 4
    assert "folios each: p50" in done.stdout
    assert pages_by_order(actor.pid, address, 64 * PAGE_SIZE) == {4: 64}


def test_a_dry_run_says_which_mechanism_each_size_needs(actor: Actor) -> None:
    address = actor.map(2 * PMD_SIZE)
    actor.fill(address, PAGES + 64)
    before = pages_by_order(actor.pid, address, 2 * PMD_SIZE)
    report = mthp_json_here("collapse", actor.pid, "--max-ptes-none", 0, *BOTH, "--dry-run")
    assert report["mechanism_by_order"][str(PMD_ORDER)] == "madvise"
    assert report["mechanism_by_order"]["6"] == "move"
    assert report["move_refusals"] == []
    assert report["pauses"]["count"] == 0
    only_call = mthp_json_here("collapse", actor.pid, "--max-ptes-none", 0, "--dry-run", "--mechanism", "madvise")
    assert only_call["mechanism_by_order"]["6"] is None
    actor.tell("set_thp_disable", 0)
    assert pages_by_order(actor.pid, address, 2 * PMD_SIZE) == before
    text = mthp_here("collapse", actor.pid, "--max-ptes-none", 0, *BOTH, "--dry-run").stdout
    assert "stopped repeatedly" in text


def test_by_default_nothing_is_injected_and_the_price_is_named(actor: Actor) -> None:
    """The PMD range is made and the smaller sizes are not, so the command fails."""
    address = actor.map(2 * PMD_SIZE)
    actor.fill(address, PAGES + 64)
    with open_live(actor.pid) as space:
        if space.drives_khugepaged(4):
            pytest.skip("the kernel's khugepaged makes these sizes")
    before = mappings(actor.pid)
    done = mthp_here("collapse", actor.pid, "--max-ptes-none", 0, "--json")
    report = json.loads(done.stdout)
    assert (done.returncode, report["complete"]) == (1, False)
    assert report["folios"] == {}
    assert report["pauses"]["count"] == 0
    assert report["needs_move_folios"]["6"] >= 1
    assert "1 ms" in report["move_price"]
    assert "injected" not in done.stderr
    assert mappings(actor.pid) == before
    assert pages_by_order(actor.pid, address, 2 * PMD_SIZE) == {PMD_ORDER: PAGES, 0: 64, -1: PAGES - 64}
    text = mthp_here("collapse", actor.pid, "--max-ptes-none", 0).stdout
    assert "--mechanism move" in text
    assert "injects code" in text


def test_holes_are_filled_when_that_is_wanted(actor: Actor) -> None:
    address = actor.map(PMD_SIZE)
    actor.fill(address, 32, 8)
    options = ("--orders", "order=4", "--mechanism", "move")
    without = mthp_json_here("collapse", actor.pid, *options, code=1)
    check_accounts(without)
    assert without["folios"]["4"]["failed"]["EXCEED_NONE_PTE"] >= 16
    assert without["bloat_bytes"] == 0
    assert "--fill" in mthp_here("collapse", actor.pid, *options).stdout
    assert pages_by_order(actor.pid, address, PMD_SIZE)[0] == 32
    report = json.loads(mthp_here("collapse", actor.pid, *options, "--fill", "--max-bloat", "none", "--json").stdout)
    check_accounts(report)
    assert pages_by_order(actor.pid, address, PMD_SIZE) == {4: 256, -1: PAGES - 256}
    assert report["bloat_bytes"] >= 16 * 14 * PAGE_SIZE
    assert actor.damaged(address, 32, 8) == 0
    assert actor.unwritten(address + PAGE_SIZE, 7) == 7


def test_a_budget_holds_for_what_moving_fills(actor: Actor) -> None:
    address = actor.map(PMD_SIZE)
    actor.fill(address, 64)
    actor.fill(address + 64 * PAGE_SIZE, 15)
    actor.fill(address + 80 * PAGE_SIZE, 32, 8)
    options = ("--orders", "order=4", "--mechanism", "move", "--fill")
    report = json.loads(mthp_here("collapse", actor.pid, *options, "--max-bloat", f"{PAGE_SIZE}B", "--json").stdout)
    check_accounts(report)
    assert report["bloat_bytes"] <= PAGE_SIZE
    assert report["folios"]["4"]["over_budget"] >= 16
    assert pages_by_order(actor.pid, address, 64 * PAGE_SIZE) == {4: 64}


@pytest.mark.slow
@pytest.mark.parametrize(("flags", "least"), [("ts", 200), ("fts", 1)])
def test_under_threads_that_write_and_take_signals(tmp_path: Path, flags: str, least: int) -> None:
    """With f the target forks all the time, and pages that a child shares at that moment are left alone."""
    made = 0
    with Writers(tmp_path, 6, 16, flags) as target:
        for _ in range(200):
            words = ("--orders", "order=4", "--max-ptes-none", 0, *MOVE, "--max-pause", PAUSE, "--json")
            report = json.loads(mthp("collapse", target.pid, *words).stdout)
            check_accounts(report)
            made += report["folios"]["4"]["made"] if report["folios"] else 0
            if made >= least:
                break
        assert made >= least, report["folios"]
        assert target.errors == 0
        vmas = [line for line in mappings(target.pid) if line.startswith(f"{target.base:x}-")]
        assert vmas == [f"{target.base:x}-{target.base + target.size:x} rw-p"]
        assert target.finish() == 0


def test_a_refusal_is_the_reason_of_all(tmp_path: Path) -> None:
    """seccomp in strict mode, set by a thread of the target itself."""
    code = "import mmap; m = mmap.mmap(-1, 64 << 20, flags=0x22); m.write(b'x' * (64 << 20))\n" + STRICT
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as target:
        until(lambda: is_strict(target.pid), "seccomp")
        try:
            report = mthp_json_here("collapse", target.pid, "--orders", "order=4", "--max-ptes-none", 0, *MOVE, code=1)
            check_accounts(report)
            assert report["folios"]["4"]["made"] == 0
            assert any("seccomp" in reason for reason in reasons(report))
            dry = mthp_json_here(
                "collapse", target.pid, "--orders", "order=4", "--max-ptes-none", 0, *MOVE, "--dry-run"
            )
            assert any("seccomp" in reason for reason in dry["move_refusals"])
            assert target.poll() is None
        finally:
            target.kill()


def started(pid: int, *options: object) -> subprocess.Popen[str]:
    """A collapse that takes some seconds, once something was moved."""
    arguments = [
        "collapse",
        str(pid),
        "--orders",
        "order=4",
        "--max-ptes-none",
        "0",
        *MOVE,
        "--json",
        *map(str, options),
    ]
    return subprocess.Popen([*MTHP, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def has_folios(target: Writers) -> bool:
    return pages_by_order(target.pid, target.base, target.size).get(4, 0) > 0


def outcome_of(running: subprocess.Popen[str]) -> tuple[int, dict[str, Any]]:
    out, err = running.communicate(timeout=PATIENCE)
    assert "Traceback" not in err, err
    report = json.loads(out)
    check_accounts(report)
    return running.returncode, report


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_interrupted_in_the_middle(tmp_path: Path, number: signal.Signals) -> None:
    with Writers(tmp_path, 3, 32) as target:
        before, words = mappings(target.pid), words_per_size()
        running = started(target.pid, "--rate", "8M")
        until(lambda: has_folios(target), "something is moved")
        running.send_signal(number)
        code, report = outcome_of(running)
        assert (code, report["interrupted"]) == (128 + number, True)
        tally = report["folios"]["4"]
        assert tally["made"] > 0
        assert tally["not_tried"] > 0
        assert mappings(target.pid) == before
        assert words_per_size() == words
        assert target.progresses()
        assert target.finish() == 0


@pytest.mark.slow
@pytest.mark.parametrize("step", [1, 2, 30])
def test_suspended_in_the_middle(tmp_path: Path, step: int) -> None:
    """Ctrl-Z stops mthp once the target runs and switches are put back; SIGCONT continues it."""
    with Writers(tmp_path, 3, 4) as target:
        words = words_per_size()
        running = suspended(target.pid, step)
        try:
            assert target.progresses()
            assert words_per_size() == words
        finally:
            running.send_signal(signal.SIGCONT)
        outcome_of(running)
        assert target.finish() == 0


def suspended(pid: int, step: int) -> subprocess.Popen[str]:
    """Return a collapse that is stopped at a chosen step of the mover."""
    arguments = ["collapse", str(pid), "--orders", "order=4", "--max-ptes-none", "0", *MOVE, "--json"]
    for _ in range(20):
        running = subprocess.Popen(
            [sys.executable, str(Path(__file__).parents[1] / "faulty_mthp.py"), *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "MTHP_TEST_DIE": f"suspend:{step}"},
            process_group=0,
        )
        _, status = os.waitpid(running.pid, os.WUNTRACED)
        if os.WIFSTOPPED(status):
            return running
        # On a busy machine the target may not stop in time, so that it does not come so far.
        running.communicate()
    pytest.fail(f"it never came to step {step}")


@pytest.mark.slow
def test_two_at_once(tmp_path: Path) -> None:
    """Run one of them, or both in turn: the one that finds the target traced reports it, and nothing breaks."""
    with Writers(tmp_path, 3, 16) as target:
        words = words_per_size()
        both = [started(target.pid, "--max-pause", PAUSE) for _ in range(2)]
        reports = [outcome_of(running)[1] for running in both]
        assert sum(report["folios"]["4"]["made"] for report in reports) > 0
        said = reasons(reports[0]) | reasons(reports[1])
        assert not any("Errno" in reason for reason in said)
        assert words_per_size() == words
        assert target.errors == 0
        # The next run makes a block that each of them reached while the other traced the target.
        outcome_of(started(target.pid, "--max-pause", PAUSE))
        assert pages_by_order(target.pid, target.base, target.size) == {4: target.size // PAGE_SIZE}
        assert target.finish() == 0


@pytest.mark.requires("4k-pages")
def test_little_memory_left_in_its_cgroup(actor: Actor) -> None:
    """A refill that is over the limit would end the target, so it is not begun."""
    with memory_cgroup() as cgroup:
        cgroup.enter(actor.pid)
        cgroup.limit(40 << 20)
        address = actor.map(4 * PMD_SIZE)
        actor.fill(address, 4 * PAGES)
        report = mthp_json_here("collapse", actor.pid, *SIXTY_FOUR, code=1)
        assert f"of 40M are left in {cgroup.directory}" in report["room"]
        assert report["folios"]["4"]["made"] == 0
        assert report["folios"]["4"]["over_reserve"] >= 128
        assert pages_by_order(actor.pid, address, 4 * PMD_SIZE) == {0: 4 * PAGES}
        assert actor.damaged(address, 4 * PAGES) == 0
        cgroup.limit(1 << 30)
        report = json.loads(mthp_here("collapse", actor.pid, *SIXTY_FOUR, "--json").stdout)
        assert report["folios"]["4"]["made"] >= 128
        assert actor.damaged(address, 4 * PAGES) == 0
        actor.kill()


@pytest.mark.requires("4k-pages")
def test_a_process_without_rights_needs_none() -> None:
    """Its userfaultfd sees faults of user mode only, which vm.unprivileged_userfaultfd does not forbid."""
    with Actor(as_nobody=True) as actor:
        address = actor.map(PMD_SIZE)
        actor.fill(address, PAGES)
        report = json.loads(mthp_here("collapse", actor.pid, *SIXTY_FOUR, "--verify", "--json").stdout)
        assert report["folios"]["4"]["made"] >= 32
        assert pages_by_order(actor.pid, address, PMD_SIZE) == {4: PAGES}
        assert actor.damaged(address, PAGES) == 0
