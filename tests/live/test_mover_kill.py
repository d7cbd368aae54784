"""Killing the mover at every step, and at random moments: the target lives, whole, and nothing is left in it."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from mover_targets import LEFT_SECONDS, Writers, belongings
from mthp.linux.mover.steps import Step
from waiting import wait_for

pytestmark = [pytest.mark.live, pytest.mark.slow, pytest.mark.requires("root", "mthp", "mover")]

TRACER = Path(__file__).parents[1] / "mover_tracer.py"
THREADS = 4
MEGABYTES = 4
KILLS = int(os.environ.get("MTHP_TEST_KILLS", "80"))
"""How many there are in all; the issue's thousand are for a machine that has the time."""

PER_THREAD = {Step.PARKED_UNMASKED, Step.PARKED, Step.UNPARKED, Step.RELEASED}
SIGNALS = ("KILL", "KILL", "HUP", "STOP")
"""What ends a mover at a random moment: a kill, a closed terminal, or a suspension that ends in a kill."""


class Victim:
    """A target, and the tracer that is killed repeatedly."""

    def __init__(self, directory: Path) -> None:
        self.target = Writers(directory, THREADS, MEGABYTES, "s")
        self._before = belongings(self.target.pid)
        arguments = [str(number) for number in (self.target.pid, self.target.base, self.target.size)]
        self._tracer = subprocess.Popen(
            [sys.executable, str(TRACER), *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def kill(self, command: str) -> None:
        """Have the tracer be killed as `command` says."""
        assert self._tracer.stdin is not None
        assert self._tracer.stdout is not None
        self._tracer.stdin.write(command + "\n")
        self._tracer.stdin.flush()
        assert self._tracer.stdout.readline() in ("-9\n", "-1\n"), f"the tracer was not killed at {command}"

    def fate(self) -> str:
        """Return ``"intact"``, ``"dead"``, or the difference."""
        try:
            survives = self.target.survives()
        except AssertionError as error:
            return str(error)
        if self.target.errors:
            return f"{self.target.errors} errors"
        if not survives:
            return "dead"
        if not wait_for(lambda: belongings(self.target.pid) == self._before, LEFT_SECONDS):
            return f"left behind: {belongings(self.target.pid)} instead of {self._before}"
        return f"signals blocked: {self.blocked_signals():#x}" if self.blocked_signals() else "intact"

    def blocked_signals(self) -> int:
        """Return the signals that a thread of the target blocks, without that of a running handler."""
        blocked = 0
        for status in Path(f"/proc/{self.target.pid}/task").glob("*/status"):
            mask = next(line for line in status.read_text().splitlines() if line.startswith("SigBlk:"))
            blocked |= int(mask.split()[1], 16)
        return blocked & ~(1 << signal.SIGALRM - 1)

    def close(self) -> None:
        """End both."""
        for stream in (self._tracer.stdin, self._tracer.stdout):
            if stream is not None:
                stream.close()
        self._tracer.wait()
        self.target.__exit__(None, None, None)


def _commands() -> list[tuple[str, Step | None]]:
    """What to do: every step at several of its occurrences, and random moments for the rest."""
    chosen: list[tuple[str, Step | None]] = []
    for step in Step:
        counts = range(1, 2 * THREADS + 1) if step in PER_THREAD else (1, 2, 3, 7)
        chosen += [(f"step {step.name} {count}", step) for count in counts]
    while len(chosen) < KILLS:
        chosen.append((f"random {random.randrange(150_000)} {random.choice(SIGNALS)}", None))
    return chosen


def test_a_killed_mover_leaves_the_target_whole(tmp_path: Path, only_blocks: None) -> None:
    fates: Counter[str] = Counter()
    wrong: list[str] = []
    victim = Victim(tmp_path)
    commands = _commands()
    random.shuffle(commands)
    try:
        for number, (command, step) in enumerate(commands):
            victim.kill(command)
            fate = victim.fate()
            fates[f"{fate} at {step.name if step else 'a random moment'}"] += 1
            if fate != "intact":
                wrong.append(f"{command}: {fate}")
            if fate != "intact" or number % 25 == 24:
                if fate == "intact" and victim.target.finish():
                    wrong.append(f"after {command}: errors in the final check")
                victim.close()
                victim = Victim(tmp_path)
        assert victim.target.finish() == 0
    finally:
        victim.close()
    print(dict(fates))
    assert wrong == []
