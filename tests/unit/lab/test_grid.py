"""Grids: the settings of valid ones, and the errors of others."""

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
        ("", "policies is missing"),
        ('policies = ["nobody"]', "unknown policy 'nobody'"),
        ('policies = ["rfc"]\nmax_pte_none = [1]', "grid.toml:2: max_pte_none is an unknown key"),
        ('policies = ["rfc"]\nmax_ptes_none = ["many"]', "is not a whole number"),
        ('policies = ["rfc"]\nmax_ptes_none = [true]', "is not a whole number"),
        ('policies = ["rfc"]\nmax_ptes_none = [-1]', "-1 is out of range"),
        ('policies = ["rfc"]\nscans = 0', "1 to 1000"),
        ('policies = ["rfc"]\nsteps = "some"', "last, all"),
        ('policies = ["rfc"]\ninclude_file = 1', "true or false"),
        ("policies = [7]", "policies: 7 is not a text"),
        ('policies = ["rfc"]\nprocessor = "abacus"', "unknown processor 'abacus'"),
    ],
)
def test_what_makes_no_sense_is_refused_with_the_files_name(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(UsageError) as caught:
        read_grid(grid_file(tmp_path, text))
    assert words in f"{caught.value.message} {caught.value.help}"
    assert "grid.toml" in caught.value.message


def test_a_grid_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="No such file"):
        read_grid(tmp_path / "nothing.toml")
