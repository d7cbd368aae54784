"""The kernel lab's apt: it gives up an archive that does not answer, and tries one again that is being written."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from vm.apt import Apt, LabError, Source, UnreachableError

ANSWERS = """#!/bin/sh
echo called >>"$CALLS"
lists=$(dirname "$APT_CONFIG")/lists
"""


@pytest.fixture
def calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where each call of the ``apt-get`` in the same directory leaves a line."""
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("CALLS", str(tmp_path / "calls"))
    return tmp_path / "calls"


def apt_of(directory: Path) -> Apt:
    return Apt("amd64", ["suite"], directory / "root", Source("file:/nonexistent", ""), pauses=(0, 0, 0))


def script(calls: Path, text: str) -> None:
    program = calls.with_name("apt-get")
    program.write_text(ANSWERS + text)
    program.chmod(program.stat().st_mode | stat.S_IXUSR)


def test_an_archive_that_does_not_answer_is_asked_once(calls: Path, tmp_path: Path) -> None:
    script(calls, "echo no answer >&2; exit 100")
    with pytest.raises(UnreachableError, match="no answer"):
        apt_of(tmp_path).refresh()
    assert len(calls.read_text().split()) == 1


def test_one_without_lists_is_asked_again(calls: Path, tmp_path: Path) -> None:
    script(calls, "touch $lists/suite_InRelease; [ $(wc -l <$CALLS) -lt 3 ] || touch $lists/suite_Packages.lz4")
    machine = apt_of(tmp_path)
    machine.refresh()
    machine.refresh()
    assert len(calls.read_text().split()) == 3


def test_and_given_up_in_the_end(calls: Path, tmp_path: Path) -> None:
    script(calls, "touch $lists/suite_InRelease; echo hash sum mismatch >&2; exit 100")
    with pytest.raises(LabError, match="no package lists can be had: hash sum mismatch"):
        apt_of(tmp_path).refresh()
    assert len(calls.read_text().split()) == 3
