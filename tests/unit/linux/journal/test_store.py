"""The journal's file: entries come and go in any place, and an interruption loses none that stays."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from mthp.linux.journal.store import Change, JournalFiles, boot_id


@pytest.fixture
def files(tmp_path: Path) -> Iterator[JournalFiles]:
    files = JournalFiles(tmp_path / "run", create=True)
    yield files
    files.close()


def entries(count: int) -> list[Change]:
    sizes = (16 << at for at in range(count))
    return [Change(f"hugepages-{size}kB/enabled", "never", "always", boot_id(), f"{size}:1:1") for size in sizes]


SOME = [chosen for count in range(5) for chosen in itertools.combinations(range(4), count)]


@pytest.mark.parametrize("chosen", SOME)
def test_any_entries_may_stay(files: JournalFiles, chosen: tuple[int, ...]) -> None:
    *before, new = entries(5)
    files.write(before)
    stay = [before[at] for at in chosen]
    files.write(stay)
    assert files.read() == stay
    assert files.empty == (not stay)
    files.write([*stay, new])
    assert files.read() == [*stay, new]
    files.write([])
    assert files.empty


@pytest.mark.parametrize("chosen", SOME)
def test_an_interruption_loses_no_entry_that_stays(
    files: JournalFiles, chosen: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    *before, new = entries(5)
    stay = [before[at] for at in chosen]
    # Whatever call comes last before the process ends.
    for calls in range(6):
        files.write([])
        files.write(before)
        left = iter(range(calls))

        def counted(name: str, left: Iterator[int] = left) -> None:
            function = getattr(os, name)

            def call(*arguments: object) -> object:
                if next(left, None) is None:
                    raise KeyboardInterrupt
                return function(*arguments)

            monkeypatch.setattr(os, name, call)

        for name in ("pwrite", "ftruncate", "fsync"):
            counted(name)
        try:
            files.write([*stay, new])
        except KeyboardInterrupt:
            pass
        finally:
            monkeypatch.undo()
        found = files.read()
        assert [each for each in found if each in stay] == stay
        assert all(each in (*before, new) for each in found)
