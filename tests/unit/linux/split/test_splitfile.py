"""The reason and the remedy if ``split_huge_pages`` cannot be opened."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from mthp.errors import NotPermittedError
from mthp.linux.split import file as splitfile


@pytest.fixture
def debugfs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory in place of debugfs's."""
    monkeypatch.setattr(splitfile, "SPLIT_FILE", tmp_path / "split_huge_pages")
    return tmp_path


def test_where_debugfs_was_unmounted_since_the_trial_it_says_how_to_mount_it(debugfs: Path) -> None:
    with pytest.raises(NotPermittedError) as raised:
        splitfile.opened()
    assert "not mounted" in raised.value.message
    assert "mount -t debugfs" in raised.value.help


def test_a_mounted_debugfs_without_the_file_is_the_kernels(debugfs: Path) -> None:
    (debugfs / "other").touch()
    with pytest.raises(NotPermittedError) as raised:
        splitfile.opened()
    assert "CONFIG_DEBUG_FS" in raised.value.help


def test_what_the_file_answers_is_returned(debugfs: Path) -> None:
    """A file that takes nothing any more, as after a lockdown."""
    splitfile.SPLIT_FILE.touch()
    with splitfile.SplitFile() as file:
        assert file.split(os.getpid(), 0, 4096, 2) == 0
        assert splitfile.SPLIT_FILE.read_text() == f"{os.getpid()},0x0,0x1000,2"
        assert file.split(os.getpid(), 0, 4096, 2, at=7) == 0
        assert splitfile.SPLIT_FILE.read_text().endswith("2,7")
