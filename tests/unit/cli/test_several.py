"""Several targets of one command: what goes wrong with one is a line of its own, and only like is added up."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fakes import FakeSpace, page_runs
from mthp import cli
from mthp.cli.several import Failed, do_each
from mthp.errors import MthpError, TargetVanishedError, UsageError
from mthp.geometry import GEOMETRIES, X86_64, Geometry
from mthp.naming import ProcessFacts
from mthp.ptes import Pte
from mthp.targets import PID_MAX, Found, Targets, open_target
from mthp.vma import Vma

BASE = 1 << 40
OTHER = next(each for each in GEOMETRIES.values() if each.page_size != X86_64.page_size)


@pytest.fixture
def files(tmp_path: Path) -> list[str]:
    """Snapshots of machines with different page sizes."""
    pytest.importorskip("pyarrow")
    from mthp.snapshot import record

    def written(geometry: Geometry) -> str:
        pages = 2 * geometry.ptes_per_pmd
        vma = Vma(BASE, BASE + pages * geometry.page_size, "rw-p", "")
        path = tmp_path / f"{geometry.page_size}.parquet"
        record(FakeSpace([(vma, *page_runs((pages, Pte.PRESENT, 0)))], geometry=geometry), path)
        return str(path)

    return [written(geometry) for geometry in (X86_64, OTHER)]


@pytest.mark.parametrize("command", ["inspect", "plan"])
def test_pages_of_different_sizes_are_not_added_up(
    files: list[str], command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main([command, files[0], files[0]]) == 0
    assert cli.main([command, *files, "--json"]) == UsageError.exit_code
    assert X86_64.name in (said := capsys.readouterr().err)
    assert OTHER.name in said


def test_a_process_that_a_name_found_may_exit_meanwhile() -> None:
    def gone(found: Found) -> tuple[str, int]:
        raise TargetVanishedError(f"{found.label} is gone")

    by_name = Found(7, "7 (made)", ProcessFacts(7, 1, comm="made"))
    each = do_each(Targets((by_name,)), gone)
    assert each.code == 0
    assert isinstance(each.all[0], Failed)
    assert do_each(Targets((Found(7, "7 (made)"),)), gone).code == TargetVanishedError.exit_code


def test_the_exit_code_is_that_of_all_targets_or_1() -> None:
    def by_pid(found: Found) -> tuple[str, int]:
        return found.label, codes[str(found.target)]

    targets = Targets((Found(7, "7"), Found(8, "8")), (("unit:none.service", MthpError("fits no process")),))
    codes = {"7": 3, "8": 3}
    assert do_each(Targets(targets.found), by_pid).code == 3
    assert do_each(targets, by_pid).code == 1
    codes["8"] = 0
    assert do_each(Targets(targets.found), by_pid).code == 1
    assert [
        do_each(each, by_pid).counted for each in (targets, Targets(targets.found), Targets(targets.found[:1]))
    ] == [
        "2 of 3 targets",
        "2 targets",
        "1 target",
    ]
    rows = do_each(targets, by_pid).lines(lambda found, label: [label, "", ""], 3)
    assert rows == [["7", "", ""], ["8", "", ""], ["unit:none.service", "", "fits no process"]]


def test_a_table_tells_what_to_do_about_each_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    snapshot = pytest.importorskip("mthp.snapshot")
    file = str(tmp_path / "small.parquet")
    small = Vma(BASE, BASE + (1 << 20), "rw-p", "")
    snapshot.record(FakeSpace([(small, *page_runs((256, Pte.PRESENT, 0)))]), file)
    other = str(tmp_path / "other.parquet")
    snapshot.record(FakeSpace([(small, *page_runs((256, Pte.PRESENT, 0)))]), other)
    monkeypatch.setenv("COLUMNS", "400")
    for command in ("inspect", "plan"):
        assert cli.main([command, file, other, "unit:mthp-test-none", "--json"]) == 1
        total = json.loads(capsys.readouterr().out)
        total = total["anonymous"] if command == "inspect" else total["total"]
        assert total["out_of_reach_bytes"] == 2 << 20
        assert cli.main([command, file, other, str(PID_MAX)]) == 1
        said = capsys.readouterr().out
        assert "out of reach: 2M lie in no whole 2M range" in said
        with pytest.raises(TargetVanishedError) as gone:
            open_target(PID_MAX)
        assert f"note: {gone.value.help}" in said
        assert "service" not in said
