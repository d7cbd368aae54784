"""The demo's story, on a small workload and on the snapshot that comes with the package."""

from __future__ import annotations

import pytest

from mthp.demo import story
from mthp.engine.policy import BUILT_IN, OWN
from mthp.engine.space_plan import SpacePlan
from mthp.errors import NotPermittedError, UnsupportedError

SIZE = 64 << 20


def silent(what: str, done: int, total: int) -> None:
    assert done <= total or total == 0, what


def check_plans(plans: list[SpacePlan]) -> None:
    limits = {plan.tunables.max_ptes_none for plan in plans}
    assert sorted((plan.policy, plan.tunables.max_ptes_none) for plan in plans) == sorted(
        (name, limit) for name in BUILT_IN | OWN for limit in limits
    )
    for plan in plans:
        copied_and_filled = sum(count * plan.geometry.size_of(order) for order, count in plan.folios_by_order.items())
        assert plan.copied_bytes + plan.filled_bytes == copied_and_filled > 0


@pytest.mark.requires("root", "thp", "pfns", "pagemap_scan")
@pytest.mark.usefixtures("thp_switches")
def test_a_live_process_is_collapsed_and_keeps_its_data() -> None:
    told = story.tell(SIZE, 0.05, silent)
    assert told.notes == []
    check_plans(told.plans)
    assert told.before is not None
    assert told.after is not None
    assert told.deed is not None
    assert told.before.stats.anon_huge_bytes == 0
    assert told.before.census.anonymous.by_order().keys() == {0}
    # The kernel's own count, in the process's own smaps, against what the collapse says of itself.
    pmd_size = told.census.geometry.pmd_size
    assert told.after.stats.anon_huge_bytes == told.deed.collapsed_ranges * pmd_size > SIZE // 2
    assert told.after.stats.hole_bytes < told.before.stats.hole_bytes
    assert told.intact
    assert told.after.verification.rows > 1000
    assert told.speedup is not None
    assert told.speedup > 0


def test_changed_data_is_not_called_intact() -> None:
    told = story.tell(SIZE, 0.05, silent)
    if told.before is None:
        pytest.skip(f"no live process here: {told.notes}")
    before = told.before.verification
    changed = type(before)(before.rows, before.total, before.crc + 1, before.intact)
    told.before = type(told.before)(told.before.census, told.before.stats, told.before.speed, changed)
    assert not told.intact


@pytest.mark.requires("thp")
@pytest.mark.usefixtures("thp_switches")
def test_without_the_right_to_advise_others_the_workload_collapses_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **options: object) -> None:
        raise NotPermittedError("no CAP_SYS_NICE")

    monkeypatch.setattr(story, "collapse_space", refuse)
    told = story.tell(SIZE, 0.05, silent)
    assert told.deed is not None
    assert told.after is not None
    assert told.deed.by == "itself"
    assert told.after.stats.anon_huge_bytes > SIZE // 2
    assert any("collapsed itself" in note for note in told.notes)
    assert told.intact


def test_without_thp_the_story_is_told_of_the_snapshot(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("pyarrow")

    def refuse(_size: int) -> int:
        raise UnsupportedError("this kernel has no transparent huge pages", help="boot another")

    monkeypatch.setattr(story, "fit_size", refuse)
    told = story.tell(SIZE, 0.05, silent)
    assert "mthp-demo" in told.target
    check_plans(told.plans)
    assert (told.before, told.after, told.deed, told.speedup) == (None, None, None, None)
    assert told.census.anonymous.resident * told.census.geometry.page_size > 200 << 20
    assert any("no transparent huge pages" in note for note in told.notes)
    assert "boot another" in told.notes
