"""Switches and tunables of the machine, as they change; and the one that is kept while the daemon runs."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from journal_owners import BEFORE, OUTER, Tunables
from mthp.daemon.kernel_settings import Keeping, SystemKnobs
from mthp.daemon.loop import Loop
from mthp.geometry import X86_64
from mthp.linux.journal.store import JOURNAL_NAME, LOCK_NAME
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


@dataclass(frozen=True)
class Kept:
    """A Keeping, and what it works with."""

    loop: Loop
    knobs: SystemKnobs
    keeping: Keeping
    said: list[str]

    def again(self) -> None:
        """Try again, as the loop does after a while."""
        (_, action) = self.loop._timers["keep"]
        action()


@contextmanager
def kept(tunables: Tunables, lock: Path | None = None) -> Iterator[Kept]:
    loop, said = Loop(), list[str]()
    journal = tunables.journal(watched=False)
    # Another's window is not waited for.
    journal._lock_timeout = 0.0
    knobs = SystemKnobs(ThpSysfs(tunables.thp), X86_64, *([lock] if lock else []))
    yield Kept(loop, knobs, Keeping(knobs, loop, said.append, journal), said)
    knobs.close()
    loop.close()


def complete(tunables: Tunables) -> None:
    """Write the files of all tunables: the daemon follows the present ones only if it knows every one of them."""
    (tunables.thp / "enabled").write_text("[always] madvise never\n")
    others = {"max_ptes_swap": 64, "max_ptes_shared": 256, "alloc_sleep_millisecs": 60000, "defrag": 1}
    for name, value in others.items():
        tunables.set(name, str(value))


def test_the_daemon_goes_on_by_what_was_there_before(tunables: Tunables) -> None:
    complete(tunables)
    with kept(tunables) as one:
        one.keeping.keep(0)
        one.knobs.refresh()
        assert (number(tunables), one.knobs.tunables.max_ptes_none) == ("0", 511)
        one.keeping.keep(64)
        one.knobs.refresh()
        assert (number(tunables), one.knobs.tunables.max_ptes_none) == ("64", 511)
        # The operator's choice holds from then on, and stays.
        tunables.set("max_ptes_none", "5")
        one.knobs.refresh()
        assert one.knobs.tunables.max_ptes_none == 5
        one.keeping.keep(None)
        one.keeping.close()
        assert number(tunables) == "5"
        assert any("changed since" in line for line in one.said)


@pytest.mark.parametrize("refreshed", [True, False])
def test_another_kept_number_leaves_the_value_from_before_the_first(tunables: Tunables, refreshed: bool) -> None:
    complete(tunables)
    with kept(tunables) as one:
        for value in (0, 64, 3):
            one.keeping.keep(value)
            assert one.said[-1].endswith(f"it was {BEFORE['max_ptes_none']}")
            if refreshed:
                one.knobs.refresh()
        (change,) = (json.loads(line) for line in (tunables.root / JOURNAL_NAME).read_text().splitlines())
        assert (change["was"], change["ours"]) == (BEFORE["max_ptes_none"], "3")
        # The other tunables are followed while this one is kept.
        tunables.set("max_ptes_swap", "7")
        one.knobs.refresh()
        assert one.knobs.tunables.max_ptes_none == int(BEFORE["max_ptes_none"])
        assert one.knobs.tunables.max_ptes_swap == 7
        one.keeping.close()
        assert tunables.values() == BEFORE


def test_a_second_try_reads_the_value_from_before(tunables: Tunables) -> None:
    with kept(tunables, tunables.root / LOCK_NAME) as one:
        with tunables.journal(watched=False).settings(OUTER):
            one.keeping.keep(7)
            one.keeping.keep(7)
            assert one.knobs.max_ptes_none == BEFORE["max_ptes_none"]
        one.keeping.keep(7)
        assert one.said[-1].endswith(f"it was {BEFORE['max_ptes_none']}")
        one.keeping.close()
        assert tunables.values() == BEFORE


def test_while_another_is_in_a_window_it_is_tried_again(tunables: Tunables) -> None:
    with kept(tunables) as one:
        with tunables.journal(watched=False).settings(OUTER):
            one.keeping.keep(7)
            one.keeping.keep(7)
        assert len(one.said) == 1
        one.again()
        assert number(tunables) == "7"
        one.keeping.close()
        assert tunables.values() == BEFORE


def test_what_could_not_be_kept_changes_nothing_and_is_not_tried_again_after_the_end(tunables: Tunables) -> None:
    with kept(tunables) as one:
        with tunables.journal(watched=False).settings(OUTER):
            # A number that the other's window sets.
            one.keeping.keep(7)
            one.knobs.refresh()
            assert str(one.knobs.tunables.max_ptes_none) == number(tunables)
            one.keeping.close()
        one.again()
        assert tunables.values() == BEFORE
