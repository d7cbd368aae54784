"""Commands on one target: they treat the name of a process as its PID, and close what they open."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from fakes import FakeSpace
from mthp.cli import main
from mthp.engine.select import PlanOptions
from mthp.snapshot import SnapshotSpace, record
from report_spaces import mixed
from waiting import until

pytestmark = pytest.mark.skipif(not Path("/proc/self/pagemap").exists(), reason="needs the pagemap of a process")


@pytest.fixture
def sleeper(tmp_path: Path) -> Iterator[tuple[int, str]]:
    """A process with a name of its own: its PID and its name as a target."""
    sleep = shutil.which("sleep")
    assert sleep is not None
    name = f"mthp-{os.getpid()}"
    # The kernel names a process after the path that it executes, not after the file behind a link.
    (tmp_path / name).symlink_to(sleep)
    with subprocess.Popen([tmp_path / name, "1000"]) as process:
        until(lambda: Path(f"/proc/{process.pid}/comm").read_text().strip() == name, lambda: name)
        yield process.pid, f"comm:{name}"
        process.kill()


def test_a_report_on_a_name_is_one_on_its_process(sleeper: tuple[int, str], tmp_path: Path) -> None:
    pytest.importorskip("jinja2")
    pid, name = sleeper
    out = tmp_path / "out.html"
    assert main(["report", name, "-o", str(out), "--with-arguments"]) == 0
    text = out.read_text("utf-8")
    assert f"mthp collapse {pid} --max-bloat 5%" in text
    assert "1000" in text


def test_the_state_afterwards_is_a_file_and_no_process(
    sleeper: tuple[int, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("jinja2")
    pid, name = sleeper
    for target in (str(pid), name):
        assert main(["report", target, "--after", target, "-o", str(tmp_path / "out.html")]) == 2
        assert "--after takes a snapshot" in capsys.readouterr().err


def test_a_report_closes_the_state_afterwards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("jinja2")
    closed: list[str] = []
    close = SnapshotSpace.close

    def noted(space: SnapshotSpace) -> None:
        closed.append(Path(space.info.path).name)
        close(space)

    monkeypatch.setattr(SnapshotSpace, "close", noted)
    for name in ("before.mthp", "after.mthp"):
        record(FakeSpace([mixed(1 << 32, 2, 0.6)]), tmp_path / name)
    paths = [str(tmp_path / name) for name in ("before.mthp", "after.mthp", "out.html")]
    assert main(["report", paths[0], "--after", paths[1], "-o", paths[2]]) == 0
    assert sorted(closed) == ["after.mthp", "before.mthp"]


def test_top_on_a_name_reads_its_process_again_and_may_collapse_it(sleeper: tuple[int, str]) -> None:
    pytest.importorskip("textual")
    from mthp.cli.top_command import view_of

    pid, name = sleeper
    by_pid, by_name = (view_of(target, PlanOptions(), 0.1) for target in (str(pid), name))
    try:
        assert by_name.title == by_pid.title
        for view in (by_pid, by_name):
            assert view.source._live
            with view.opened(0) as space:
                assert space.process.pid == pid
    finally:
        by_pid.source.close()
        by_name.source.close()
