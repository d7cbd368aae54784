"""compare and record through the command line: text, JSON, and bad input."""

from __future__ import annotations

import contextlib
import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest

from e2e.helpers import mthp, mthp_here, mthp_json

pytest.importorskip("pyarrow")


@pytest.fixture(scope="module")
def recording(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("recording") / "r"
    done = mthp_json("record", "self", "-o", path, "--every", "100ms", "--for", "1s", "--cpu", "100%")
    assert done["steps"] >= 2
    assert done["end"] == "the duration was over"
    return path


def test_compare_of_a_live_process_has_a_verdict() -> None:
    answer = mthp_json(
        "compare", "self", "--policies", "mainline,no-creep", "--max-ptes-none", "0,256", "--scans", "all"
    )
    assert len(answer["settings"]) == 4
    assert set(answer["frontier"]) <= set(answer["settings"])
    assert "frontier of 2M coverage" in answer["verdict"][0]
    scans = max(row["scan"] for row in answer["rows"])
    assert len(answer["rows"]) == 4 * (scans + 1)
    assert answer["metrics"]["bloat_bytes"]["unit"] == "bytes"


@pytest.mark.slow
def test_compare_of_a_recording_at_its_steps(recording: Path) -> None:
    first = mthp("compare", recording, "--at", "0", "--policies", "mainline")
    assert first.returncode == 0, first.stderr
    assert "On the frontier" in first.stdout
    assert mthp_json("inspect", recording, "--at", "-1")["target"]
    assert mthp_json("plan", recording, "--at", "200ms")["policy"] == "mainline"


def test_a_recording_that_was_cut_off_says_so(recording: Path, tmp_path: Path) -> None:
    cut = tmp_path / "cut"
    whole = recording.read_bytes()
    cut.write_bytes(whole[: len(whole) - 500])
    done = mthp("inspect", cut)
    assert done.returncode == 0, done.stderr
    assert "was cut off" in done.stdout
    cut.write_bytes(whole[:5000])
    done = mthp("inspect", cut)
    assert done.returncode == 2
    assert "cut" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["compare", "self", "--policies", "nobody"], "unknown policy 'nobody'"),
        (["compare", "self", "--policies", ""], "no policy was given"),
        (["compare", "self", "--max-ptes-none", "many"], "not a list of numbers"),
        (["compare", "self", "--max-ptes-none", "512"], "not within 0 to 511"),
        (["compare", "self", "--scans", "0"], "neither a number"),
        (["compare", "self", "--covered", "3K"], "not a folio size"),
        (["compare", "self", "--processor", "z80"], "unknown processor 'z80'"),
        (["compare", "self", "--at", "1"], "a process has no step"),
        (["record", "-o", "{tmp}/r"], "no target was named"),
        (["record", "{tmp}", "-o", "{tmp}/r"], "is not a process"),
        (["record", "self", "-o", "{tmp}/r", "--every", "0s"], "--every: '0s' is not above 0"),
        (["record", "self", "-o", "{tmp}/r", "--for", "later"], "--for: 'later' is not a duration"),
        (["record", "self", "-o", "{tmp}/r", "--cpu", "200%"], "is more than 100%"),
        (["record", "self", "-o", "{tmp}/r", "--cpu", "0%"], "not above 0"),
        (["record", "self", "-o", "/nonexistent/r"], "cannot be created"),
        (["record", "self", "-o", "{tmp}/r", "--trace-format", "perf"], "needs --from-trace"),
        (["record", "self", "-o", "{tmp}/r", "--from-trace", "x"], "both a target"),
        (["record", "--from-trace", "/dev/null", "-o", "{tmp}/r"], "not a regular file"),
        (["record", "--from-trace", "{tmp}/text", "-o", "{tmp}/r"], "not a trace that mthp knows"),
    ],
)
def test_bad_input_has_clear_words(tmp_path: Path, arguments: list[str], words: str) -> None:
    (tmp_path / "text").write_text("nothing of that kind\n")
    done = mthp_here(*(argument.replace("{tmp}", str(tmp_path)) for argument in arguments))
    assert done.returncode == 2, done.stderr
    assert words in done.stderr
    assert not (tmp_path / "r").exists()


NAMED = r"""
import ctypes, sys
ctypes.CDLL(None).prctl(15, b"[/red]\x1b[5m", 0, 0, 0)
print("ready", flush=True)
sys.stdin.read()
"""


def test_a_name_that_looks_like_markup_is_text_on_a_terminal(tmp_path: Path) -> None:
    master, slave = pty.openpty()
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, "-c", NAMED], stdin=pipe, stdout=pipe) as target:
        assert target.stdout is not None
        target.stdout.readline()
        done = mthp("record", target.pid, "-o", tmp_path / "r", "--every", "50ms", "--for", "300ms", stderr=slave)
        target.terminate()
    os.close(slave)
    shown = b""
    # The writer is gone, so reading fails.
    with contextlib.suppress(OSError):
        while part := os.read(master, 1 << 16):
            shown += part
    os.close(master)
    assert done.returncode == 0, shown
    assert b"recording %d ([/red]" % target.pid in shown
    assert b"\x1b[5m" not in shown
