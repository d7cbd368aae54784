"""The reason and the remedy if ``split_huge_pages`` cannot be opened."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from mthp.errors import NotPermittedError
from mthp.linux.split.file import SplitFile, opened

NAME = "split_huge_pages"


def test_where_debugfs_was_unmounted_since_the_trial_it_says_how_to_mount_it(tmp_path: Path) -> None:
    with pytest.raises(NotPermittedError) as raised:
        opened(tmp_path / NAME)
    assert "not mounted" in raised.value.message
    assert "mount -t debugfs" in raised.value.help


def test_a_mounted_debugfs_without_the_file_is_the_kernels(tmp_path: Path) -> None:
    (tmp_path / "other").touch()
    with pytest.raises(NotPermittedError) as raised:
        opened(tmp_path / NAME)
    assert "CONFIG_DEBUG_FS" in raised.value.help


def test_what_the_file_answers_is_returned(tmp_path: Path) -> None:
    """A file that takes nothing any more, as after a lockdown."""
    (tmp_path / NAME).touch()
    with SplitFile(tmp_path / NAME) as file:
        assert file.split(os.getpid(), 0, 4096, 2) == 0
        assert (tmp_path / NAME).read_text() == f"{os.getpid()},0x0,0x1000,2"
        assert file.split(os.getpid(), 0, 4096, 2, at=7) == 0
        assert (tmp_path / NAME).read_text().endswith("2,7")
