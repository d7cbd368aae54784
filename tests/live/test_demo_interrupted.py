"""Ctrl-C at the beginning of each stage of the demo: it leaves no process, and no switch changed."""

from __future__ import annotations

import contextlib
import signal
import subprocess
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from e2e.helpers import MTHP
from thp_switches import THP_ROOT
from waiting import PATIENCE, wait_for

pytestmark = [
    pytest.mark.live,
    pytest.mark.slow,
    pytest.mark.requires("root", "thp"),
    pytest.mark.usefixtures("thp_switches"),
]

INTERRUPTED = 128 + signal.SIGINT
SETTINGS = ("**/enabled", "khugepaged/max_*", "khugepaged/*_millisecs", "khugepaged/pages_to_scan")


@contextlib.contextmanager
def demo() -> Iterator[subprocess.Popen[str]]:
    """A demo that prints each stage on standard error."""
    command = [*MTHP, "demo", "--size", "32M", "--seconds", "10ms"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, process_group=0)
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def stages() -> list[str]:
    """Return the stages of a whole demo, in order."""
    with demo() as process:
        return [line for line in process.communicate(timeout=PATIENCE)[1].splitlines() if line.endswith(" ...")]


def descendants(pid: int) -> set[int]:
    found: set[int] = set()
    with contextlib.suppress(OSError):
        for file in Path(f"/proc/{pid}/task").glob("*/children"):
            for child in map(int, file.read_text().split()):
                found |= {child} | descendants(child)
    return found


def _gone(pids: set[int]) -> bool:
    return not any(Path(f"/proc/{pid}").exists() for pid in pids)


def settings() -> dict[Path, str]:
    """Return the switches and tunables that a mechanism may change."""
    return {file: file.read_text() for pattern in SETTINGS for file in THP_ROOT.glob(pattern)}


def test_ctrl_c_at_each_stage_leaves_nothing() -> None:
    seen, before = stages(), settings()
    assert len(seen) > 8
    for stage in seen:
        with demo() as process:
            assert process.stderr is not None
            assert any(line.strip() == stage for line in process.stderr), f"{stage!r} was not begun"
            children = descendants(process.pid)
            process.send_signal(signal.SIGINT)
            _, said = process.communicate(timeout=PATIENCE)
        assert process.returncode == INTERRUPTED, (stage, said)
        assert "Traceback" not in said
        assert len(children) >= 2, stage
        assert wait_for(partial(_gone, children)), stage
        assert settings() == before, stage
