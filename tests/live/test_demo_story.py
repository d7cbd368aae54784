"""The demo on small workloads: its figures are right, and it reports missing rights and memory."""

from __future__ import annotations

import pytest

from mthp.demo import story
from mthp.errors import NotPermittedError, UnsupportedError

SIZE = 48 << 20


def silent(done: int, total: int, what: str) -> None:
    assert done <= total or total == 0, what


def told() -> story.Story:
    return story.tell(SIZE, 0.05, silent)


@pytest.mark.slow
@pytest.mark.requires("root", "thp", "pfns", "pagemap_scan")
@pytest.mark.usefixtures("thp_switches")
def test_both_have_large_folios_and_the_mthps_are_the_cheaper_ones() -> None:
    seen = told()
    before, mthps, huge, trimmed = seen.chapters
    assert before.coverage == before.added_bytes == 0
    assert mthps.coverage > 0.8
    # No kernel reaches the part of a PMD range at each end of each mapping.
    assert huge.coverage > 0.8
    assert mthps.added_bytes < huge.added_bytes / 4
    assert trimmed.added_bytes < huge.added_bytes
    assert trimmed.coverage < huge.coverage
    assert set(seen.mechanisms) <= set(range(seen.order, seen.geometry.pmd_order + 1))
    for chapter in seen.chapters:
        assert chapter.waits is not None
        assert chapter.waits.count > 0
        assert chapter.speed is not None
    assert mthps.speedup == pytest.approx(mthps.speed.median / before.speed.median)  # type: ignore[union-attr]
    assert seen.intact


@pytest.mark.slow
@pytest.mark.requires("thp")
@pytest.mark.usefixtures("thp_switches")
def test_without_the_right_to_advise_others_the_workload_collapses_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **options: object) -> None:
        raise NotPermittedError("no CAP_SYS_NICE")

    monkeypatch.setattr(story, "collapse_space", refuse)
    seen = told()
    assert [chapter.name for chapter in seen.chapters][:2] == ["before", "huge pages"]
    assert seen.chapters[1].coverage > 0.5
    assert any("collapsed itself" in reason for reason in seen.undone)
    assert seen.intact
    assert not seen.complete


def test_without_memory_there_is_no_story(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **options: object) -> int:
        raise UnsupportedError("too little memory", help="free some")

    monkeypatch.setattr(story, "fit_size", refuse)
    with pytest.raises(UnsupportedError, match="too little"):
        told()
