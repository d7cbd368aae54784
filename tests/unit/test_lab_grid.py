"""Grids: what they come to, and what is wrong with others."""

from __future__ import annotations

from pathlib import Path

import pytest

from mthp.errors import UsageError
from mthp.lab.grid import read_grid


def grid_file(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "grid.toml"
    path.write_text(text)
    return path


def test_every_combination_is_a_setting(tmp_path: Path) -> None:
    text = 'policies = ["rfc", "mainline"]\nmax_ptes_none = [0, 64, 511]\norders = ["all", "64K,2M"]\nscans = "all"\n'
    grid = read_grid(grid_file(tmp_path, text))
    settings = grid.settings()
    assert len(settings) == 2 * 3 * 2
    assert len({(one.policy, one.max_ptes_none, one.orders) for one in settings}) == 12
    assert grid.scans is None
    assert {one.orders for one in settings} == {None, "64K,2M"}


def test_what_is_left_out_is_the_machines_own(tmp_path: Path) -> None:
    [setting] = read_grid(grid_file(tmp_path, 'policies = "mainline"')).settings()
    assert setting.max_ptes_none is None
    assert setting.orders is None


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("policies = [", "not TOML"),
        ("", "no policies are named"),
        ('policies = ["nobody"]', "unknown policy 'nobody'"),
        ('policies = ["rfc"]\nmax_pte_none = [1]', "unknown key 'max_pte_none'"),
        ('policies = ["rfc"]\nmax_ptes_none = ["many"]', "must be a whole number"),
        ('policies = ["rfc"]\nmax_ptes_none = [true]', "must be a whole number"),
        ('policies = ["rfc"]\nmax_ptes_none = [-1]', "below 0"),
        ('policies = ["rfc"]\nscans = 0', "from 1 to 1000"),
        ('policies = ["rfc"]\nsteps = "some"', "must be 'last' or 'all'"),
        ('policies = ["rfc"]\ninclude_file = 1', "true or false"),
        ("policies = [7]", "must be text"),
    ],
)
def test_what_makes_no_sense_is_refused_with_the_files_name(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(UsageError) as caught:
        read_grid(grid_file(tmp_path, text))
    assert words in caught.value.message
    assert "grid.toml" in caught.value.message


def test_a_grid_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="No such file"):
        read_grid(tmp_path / "nothing.toml")
