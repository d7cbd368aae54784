"""Switches and tunables of the machine, as they change; and the one that is kept while the daemon runs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from journal_owners import BEFORE, OUTER, Tunables
from mthp.daemon.kernel_settings import Keeping, SystemKnobs
from mthp.daemon.loop import Loop
from mthp.geometry import X86_64
from mthp.linux.journal.files import JOURNAL_NAME, LOCK_NAME
from mthp.linux.sysfs import ThpSysfs


@pytest.fixture
def sysfs(tmp_path: Path) -> Path:
    root = tmp_path / "thp"
    (root / "hugepages-64kB").mkdir(parents=True)
    (root / "khugepaged").mkdir()
    (root / "enabled").write_text("always [madvise] never\n")
    (root / "hugepages-64kB/enabled").write_text("always inherit madvise [never]\n")
    (root / "khugepaged/max_ptes_none").write_text("511\n")
    return root


def test_switches_and_tunables_are_followed_live(sysfs: Path) -> None:
    knobs = SystemKnobs(ThpSysfs(sysfs), X86_64)
    assert not knobs.refresh()
    (sysfs / "hugepages-64kB/enabled").write_text("[always] inherit madvise never\n")
    (sysfs / "khugepaged/max_ptes_none").write_text("7\n")
    version = knobs.version
    assert knobs.refresh()
    assert knobs.switches.orders(advised=False) == (4,)
    assert knobs.tunables.max_ptes_none == 7
    assert knobs.version == version + 1
    knobs.close()


def test_what_a_window_of_another_run_has_set_is_not_taken_for_a_choice(sysfs: Path, tmp_path: Path) -> None:
    fcntl = pytest.importorskip("fcntl")
    lock = tmp_path / "switches.lock"
    lock.touch()
    knobs = SystemKnobs(ThpSysfs(sysfs), X86_64, lock)
    with lock.open("r+") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        (sysfs / "hugepages-64kB/enabled").write_text("[always] inherit madvise never\n")
        assert not knobs.refresh()
        assert knobs.switches.orders(advised=False) == ()
        (sysfs / "hugepages-64kB/enabled").write_text("always inherit [madvise] never\n")
    assert knobs.refresh()
    assert knobs.switches.orders(advised=True) == (4,)
    knobs.close()


def test_words_of_a_newer_kernel_leave_what_was_known(sysfs: Path) -> None:
    knobs = SystemKnobs(ThpSysfs(sysfs), X86_64)
    (sysfs / "hugepages-64kB/enabled").write_text("always [sometimes] never\n")
    (sysfs / "khugepaged/max_ptes_none").write_text("100000\n")
    knobs.refresh()
    assert knobs.switches.sizes[4] == "never"
    assert knobs.tunables.max_ptes_none == 511
    knobs.close()


@pytest.fixture
def tunables(tmp_path: Path) -> Tunables:
    return Tunables(tmp_path)


def number(tunables: Tunables) -> str:
    return tunables.values()["max_ptes_none"]


def test_the_daemon_goes_on_by_what_was_there_before(tunables: Tunables) -> None:
    (tunables.thp / "enabled").write_text("[always] madvise never\n")
    for name, value in (
        ("max_ptes_swap", 64),
        ("max_ptes_shared", 256),
        ("alloc_sleep_millisecs", 60000),
        ("defrag", 1),
    ):
        tunables.set(name, str(value))
    said: list[str] = []
    loop = Loop()
    knobs = SystemKnobs(ThpSysfs(tunables.thp), X86_64)
    one = Keeping(knobs, loop, said.append, tunables.journal(watched=False))
    one.keep(0)
    knobs.refresh()
    assert (number(tunables), knobs.tunables.max_ptes_none) == ("0", 511)
    one.keep(64)
    knobs.refresh()
    assert (number(tunables), knobs.tunables.max_ptes_none) == ("64", 511)
    # The operator's choice holds from then on, and stays.
    tunables.set("max_ptes_none", "5")
    knobs.refresh()
    assert knobs.tunables.max_ptes_none == 5
    one.keep(None)
    one.close()
    assert number(tunables) == "5"
    assert any("changed since" in line for line in said)
    knobs.close()
    loop.close()


@pytest.mark.parametrize("refreshed", [True, False])
def test_another_kept_number_leaves_the_value_from_before_the_first(tunables: Tunables, refreshed: bool) -> None:
    loop, said = Loop(), list[str]()
    for name, value in (("max_ptes_swap", 64), ("max_ptes_shared", 256), ("alloc_sleep_millisecs", 1), ("defrag", 1)):
        tunables.set(name, str(value))
    (tunables.thp / "enabled").write_text("[always] madvise never\n")
    knobs = SystemKnobs(ThpSysfs(tunables.thp), X86_64)
    keeping = Keeping(knobs, loop, said.append, tunables.journal(watched=False))
    for kept in (0, 64, 3):
        keeping.keep(kept)
        assert said[-1].endswith(f"it was {BEFORE['max_ptes_none']}")
        if refreshed:
            knobs.refresh()
    (change,) = (json.loads(line) for line in (tunables.root / JOURNAL_NAME).read_text().splitlines())
    assert (change["was"], change["ours"]) == (BEFORE["max_ptes_none"], "3")
    # The other tunables are followed while this one is kept.
    tunables.set("max_ptes_swap", "7")
    knobs.refresh()
    assert (knobs.tunables.max_ptes_none, knobs.tunables.max_ptes_swap) == (int(BEFORE["max_ptes_none"]), 7)
    keeping.close()
    assert tunables.values() == BEFORE
    knobs.close()
    loop.close()


def test_a_second_try_reads_the_value_from_before(tunables: Tunables) -> None:
    loop, said = Loop(), list[str]()
    journal = tunables.journal(watched=False)
    journal._lock_timeout = 0.0
    knobs = SystemKnobs(ThpSysfs(tunables.thp), X86_64, tunables.root / LOCK_NAME)
    keeping = Keeping(knobs, loop, said.append, journal)
    with tunables.journal(watched=False).settings(OUTER):
        keeping.keep(7)
        keeping.keep(7)
        assert knobs.max_ptes_none == BEFORE["max_ptes_none"]
    keeping.keep(7)
    assert said[-1].endswith(f"it was {BEFORE['max_ptes_none']}")
    keeping.close()
    assert tunables.values() == BEFORE
    knobs.close()
    loop.close()


def test_while_another_is_in_a_window_it_is_tried_again(tunables: Tunables) -> None:
    loop, said = Loop(), list[str]()
    journal = tunables.journal(watched=False)
    journal._lock_timeout = 0.0
    knobs = SystemKnobs(ThpSysfs(tunables.thp), X86_64)
    one = Keeping(knobs, loop, said.append, journal)
    with tunables.journal(watched=False).settings(OUTER):
        one.keep(7)
        one.keep(7)
    assert len(said) == 1
    (_, again) = loop._timers["keep"]
    again()
    assert number(tunables) == "7"
    one.close()
    assert tunables.values() == BEFORE
    knobs.close()
    loop.close()


def test_what_could_not_be_kept_changes_nothing_and_is_not_tried_again_after_the_end(tunables: Tunables) -> None:
    loop, said = Loop(), list[str]()
    journal = tunables.journal(watched=False)
    journal._lock_timeout = 0.0
    knobs = SystemKnobs(ThpSysfs(tunables.thp), X86_64)
    one = Keeping(knobs, loop, said.append, journal)
    with tunables.journal(watched=False).settings(OUTER):
        # A number that the other's window sets.
        one.keep(7)
        knobs.refresh()
        assert str(knobs.tunables.max_ptes_none) == number(tunables)
        one.close()
    (_, again) = loop._timers["keep"]
    again()
    assert tunables.values() == BEFORE
    knobs.close()
    loop.close()
