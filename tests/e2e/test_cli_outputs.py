"""``-o`` of every command: exactly the name that was given, whatever is planted there, and nothing on a full disk."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from e2e.helpers import mthp, mthp_here
from fakes import FakeSpace, page_runs
from mthp.ptes import Pte
from mthp.vma import Vma

pytest.importorskip("pyarrow")
pytest.importorskip("jinja2")
pytest.importorskip("joblib")

BASE = 0x7F00_0000_0000
COMMANDS = {
    "snapshot": ["snapshot", "self"],
    "record": ["record", "self", "--for", "10ms"],
    "trace": ["record", "--from-trace", "inputs/trace"],
    "report": ["report", "inputs/one.parquet"],
    "simulate": ["simulate", "inputs/scenario.toml"],
    "sweep": ["sweep", "snapshots", "--grid", "inputs/grid.toml", "--jobs", "1"],
}


@pytest.fixture
def inputs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the directory with the inputs of the commands, which is the working directory."""
    from mthp.snapshot import record

    monkeypatch.chdir(tmp_path)
    (tmp_path / "inputs").mkdir()
    (tmp_path / "snapshots").mkdir()
    space = FakeSpace([(Vma(BASE, BASE + (2 << 20), "rw-p"), *page_runs((512, Pte.PRESENT, 0)))])
    record(space, tmp_path / "inputs" / "one.parquet")
    record(space, tmp_path / "snapshots" / "one.parquet")
    (tmp_path / "inputs" / "trace").write_text(" L 04222ff8,16\n S 04425010,8\n")
    (tmp_path / "inputs" / "grid.toml").write_text('policies = ["mainline"]')
    (tmp_path / "inputs" / "scenario.toml").write_text(
        'duration = "1s"\n[machine]\nmemory = "64M"\n[[process]]\nworkload = "redis"\nmemory = "8M"\n'
    )
    return tmp_path


@pytest.mark.parametrize("name", COMMANDS)
def test_a_planted_link_is_not_followed(inputs: Path, name: str) -> None:
    precious, link = inputs / "precious", inputs / "shared" / "out"
    precious.write_text("precious")
    link.parent.mkdir()
    link.symlink_to(precious)
    done = mthp_here(*COMMANDS[name], "-o", link)
    assert (done.returncode, done.stdout) == (2, "")
    assert f"{link} exists already" in done.stderr
    done = mthp(*COMMANDS[name], "-o", link, "--force")
    assert done.returncode == 0, done.stderr
    assert precious.read_text() == "precious"
    assert not link.is_symlink()
    assert [path.name for path in link.parent.iterdir()] == ["out"]
    # A link to nothing is not followed either.
    link.unlink()
    link.symlink_to(inputs / "nowhere")
    assert mthp_here(*COMMANDS[name], "-o", link).returncode == 2
    assert not (inputs / "nowhere").exists()


@pytest.mark.parametrize("name", COMMANDS)
@pytest.mark.parametrize("force", [[], ["--force"]])
def test_a_pipe_is_refused(inputs: Path, name: str, force: list[str]) -> None:
    os.mkfifo(inputs / "pipe")
    done = mthp_here(*COMMANDS[name], "-o", inputs / "pipe", *force)
    assert (done.returncode, done.stdout) == (2, "")
    assert "not a regular file" in done.stderr


@pytest.fixture(params=[("size=4k", 1, "No space left"), ("ro", 2, "Read-only file system")], ids=["full", "read-only"])
def disk(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[Path, int, str]]:
    """A file system that takes no file: where it is mounted, the exit code and the error."""
    options, code, words = request.param
    directory = tmp_path / "disk"
    directory.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", options, "mthp-test", str(directory)]
    mounted = subprocess.run(command, check=False, capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"tmpfs cannot be mounted here: {mounted.stderr.strip()}")
    try:
        yield directory, code, words
    finally:
        subprocess.run(["umount", str(directory)], check=True)


@pytest.mark.requires("root")
@pytest.mark.parametrize("name", ["snapshot", "record", "report", "simulate"])
def test_a_disk_that_takes_no_file_is_left_without_one(inputs: Path, disk: tuple[Path, int, str], name: str) -> None:
    directory, code, words = disk
    done = mthp(*COMMANDS[name], "-o", directory / "out")
    assert (done.returncode, done.stdout) == (code, "")
    assert words in done.stderr
    assert list(directory.iterdir()) == []
