"""``mthp top`` as a process, on a terminal and without one."""

from __future__ import annotations

import os
import pty
import select
import subprocess
import time

import pytest

from e2e.helpers import MTHP, mthp, unused_pid
from waiting import PATIENCE

pytest.importorskip("textual")


def test_without_a_terminal_it_says_what_to_use_instead() -> None:
    done = mthp("top")
    assert done.returncode == 3
    assert "mthp inspect" in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "code"), [([], 0), (["self"], 0), (["--policy", "best"], 2), (["--cpu", "0"], 2)]
)
def test_on_a_terminal_it_shows_itself_until_q(arguments: list[str], code: int) -> None:
    shown, status = on_terminal([*MTHP, "top", *arguments])
    assert status == code
    assert "Traceback" not in shown
    if not code:
        assert "could gain" in shown


def test_a_process_that_is_not_there() -> None:
    assert on_terminal([*MTHP, "top", str(unused_pid())])[1] == 4


def on_terminal(command: list[str]) -> tuple[str, int]:
    """Run a command on a new terminal, press q at the first table, and return its output and exit code."""
    leader, follower = pty.openpty()
    environment = os.environ | {"TERM": "xterm-256color", "COLUMNS": "110", "LINES": "32"}
    process = subprocess.Popen(command, stdin=follower, stdout=follower, stderr=follower, env=environment)
    os.close(follower)
    text, asked = b"", False
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        if select.select([leader], [], [], 0.2)[0]:
            try:
                part = os.read(leader, 1 << 16)
            except OSError:
                break
            if not part:
                break
            text += part
        if b"could gain" in text and not asked:
            os.write(leader, b"q")
            asked = True
        if process.poll() is not None:
            break
    else:
        process.kill()
    os.close(leader)
    return text.decode(errors="replace"), process.wait(timeout=PATIENCE)
