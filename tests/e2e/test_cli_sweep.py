"""sweep through the command line, in processes and on a real Dask cluster on the loopback."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from e2e.helpers import mthp, mthp_here, mthp_json
from waiting import PATIENCE, until

pytest.importorskip("pyarrow")
pytest.importorskip("joblib")

GRID = 'policies = ["rfc", "mainline", "no-creep"]\nmax_ptes_none = [0, 256]\nscans = "all"\n'


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("sweep")
    (root / "in").mkdir()
    (root / "grid.toml").write_text(GRID)
    for number in range(6):
        done = mthp("snapshot", "self", "-o", root / "in" / f"{number}.parquet")
        assert done.returncode == 0, done.stderr
    return root


@contextlib.contextmanager
def process(*arguments: object) -> Iterator[subprocess.Popen[bytes]]:
    command = [sys.executable, "-W", "ignore", "-m", *map(str, arguments)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as started:
        try:
            yield started
        finally:
            started.kill()


@contextlib.contextmanager
def cluster(directory: Path, workers: int = 2) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """A scheduler and its workers: the address, and the scheduler's process."""
    pytest.importorskip("distributed")
    file = directory / "scheduler.json"
    scheduler = ("distributed.cli.dask_scheduler", "--host", "127.0.0.1", "--port", 0, "--no-dashboard")
    worker = ("distributed.cli.dask_worker", "--nthreads", 1, "--no-dashboard", "--no-nanny", "--host", "127.0.0.1")
    with contextlib.ExitStack() as stack:
        started = stack.enter_context(process(*scheduler, "--scheduler-file", file))
        until(lambda: file.exists() and bool(file.read_text()), "the scheduler is there")
        for _ in range(workers):
            local = directory / "workers"
            stack.enter_context(process(*worker, "--scheduler-file", file, "--local-directory", local))
        yield json.loads(file.read_text())["address"], started


@pytest.mark.slow
def test_a_cluster_of_two_workers_gives_the_local_bytes(inputs: Path, tmp_path: Path) -> None:
    local = mthp_json("sweep", inputs / "in", "--grid", inputs / "grid.toml", "-o", tmp_path / "local", "--jobs", 2)
    assert (local["done"], local["settings"], local["failed"]) == (6, 6, {})
    with cluster(tmp_path) as (address, _):
        there = mthp_json(
            "sweep", inputs / "in", "--grid", inputs / "grid.toml", "-o", tmp_path / "dask", "--scheduler", address
        )
    assert there["rows"] == local["rows"] > 0
    assert (tmp_path / "dask").read_bytes() == (tmp_path / "local").read_bytes()


HAS_TASKS = """
import sys, time
import distributed
with distributed.Client(sys.argv[1]) as client:
    while not client.run_on_scheduler(lambda dask_scheduler: len(dask_scheduler.tasks)):
        time.sleep(0.02)
"""
"""Waits until a scheduler has tasks."""


@pytest.mark.slow
def test_a_scheduler_that_goes_away_is_told_and_what_is_done_is_kept(inputs: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    places = [str(inputs / "in"), "--grid", str(inputs / "grid.toml"), "-o", str(out)]
    command = [sys.executable, "-m", "mthp", "sweep", *places]
    with cluster(tmp_path, workers=0) as (address, scheduler):
        # Without workers the tasks wait at the scheduler until it is gone.
        with subprocess.Popen([*command, "--scheduler", address], stderr=subprocess.PIPE, text=True) as sweeping:
            until((tmp_path / "out.parts").exists, "the sweep has begun")
            subprocess.run([sys.executable, "-W", "ignore", "-c", HAS_TASKS, address], check=True, timeout=PATIENCE)
            running = sweeping.poll() is None
            scheduler.kill()
            _, err = sweeping.communicate(timeout=PATIENCE)
        assert running, err
    assert sweeping.returncode == 1, err
    assert f"the Dask scheduler at {address} went away" in err
    assert "run the same command again" in err
    assert "Traceback" not in err
    done = mthp("sweep", *places)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_no_scheduler_at_all(inputs: Path, tmp_path: Path) -> None:
    pytest.importorskip("distributed")
    done = mthp(
        "sweep", inputs / "in", "--grid", inputs / "grid.toml", "-o", tmp_path / "o", "--scheduler", "tcp://127.0.0.1:1"
    )
    assert done.returncode == 3, done.stderr
    assert "no Dask scheduler answers at tcp://127.0.0.1:1" in done.stderr


def test_a_bad_input_makes_exit_code_1_and_ends_nothing(inputs: Path, tmp_path: Path) -> None:
    directory = tmp_path / "in"
    directory.mkdir()
    (directory / "good.parquet").write_bytes((inputs / "in" / "0.parquet").read_bytes())
    (directory / "bad.parquet").write_bytes((inputs / "in" / "1.parquet").read_bytes()[:1000])
    done = mthp("sweep", directory, "--grid", inputs / "grid.toml", "-o", tmp_path / "out", "--jobs", 1)
    assert done.returncode == 1, done.stderr
    assert "bad.parquet" in done.stdout
    assert "1 of 2 inputs" in done.stdout
    assert (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["{tmp}/no", "--grid", "{grid}", "-o", "{tmp}/o"], "not a directory"),
        (["{in}", "--grid", "{tmp}/no", "-o", "{tmp}/o"], "No such file"),
        (["{in}", "--grid", "{grid}", "-o", "{tmp}/no/o"], "cannot be created"),
        (["{in}", "--grid", "{grid}", "-o", "{tmp}/o", "--jobs", "0"], "0 jobs are too few"),
        (["{in}", "--grid", "{grid}", "-o", "{tmp}/o", "--scheduler", "here"], "not the address of a scheduler"),
        (
            ["{in}", "--grid", "{grid}", "-o", "{tmp}/o", "--scheduler", "tcp://x:1", "--jobs", "2"],
            "exclude each other",
        ),
    ],
)
def test_bad_input_has_clear_words(inputs: Path, tmp_path: Path, arguments: list[str], words: str) -> None:
    places = {"{tmp}": str(tmp_path), "{in}": str(inputs / "in"), "{grid}": str(inputs / "grid.toml")}
    for mark, place in places.items():
        arguments = [argument.replace(mark, place) for argument in arguments]
    done = mthp_here("sweep", *arguments)
    assert done.returncode == 2, done.stderr
    assert words in done.stderr
