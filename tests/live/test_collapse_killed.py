"""``mthp collapse`` dies at a numbered step: the target lives, whole, nothing is left in it or of the switches."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections import Counter
from functools import partial
from pathlib import Path

import pytest

from e2e.helpers import mthp_json
from mover_targets import GEOMETRY, Writers, belongings
from mthp.linux.mover.steps import Step
from thp_switches import words_per_size
from waiting import PATIENCE, until

pytestmark = [
    pytest.mark.usefixtures("thp_switches"),
    pytest.mark.live,
    pytest.mark.slow,
    pytest.mark.requires("root", "mthp", "mover", "pagemap_scan"),
]

FAULTY = [sys.executable, str(Path(__file__).parents[1] / "faulty_mthp.py")]
OPTIONS = [
    "--orders",
    "order=4",
    "--max-ptes-none",
    "0",
    "--mechanism",
    "move",
    "--max-pause",
    "60s",
    "--pause-share",
    "100%",
]
STRIDE = int(os.environ.get("MTHP_TEST_STRIDE", "16"))
"""Every so-many-th step; MTHP_TEST_STRIDE=1 takes them all."""


def collapse(pid: int, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*FAULTY, "collapse", str(pid), *OPTIONS],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=2 * PATIENCE,
    )


def _has(pid: int, what: object) -> bool:
    return belongings(pid) == what


def test_killed_at_numbered_steps(tmp_path: Path) -> None:
    words = words_per_size()

    def steps_of(target: Writers, **environment: str) -> tuple[int, list[str]]:
        """Exit code and steps of a collapse."""
        record = tmp_path / f"steps-{target.pid}"
        done = collapse(target.pid, MTHP_TEST_STEPS=str(record), **environment)
        assert done.returncode in (0, 1, -signal.SIGKILL), done.stderr
        return done.returncode, record.read_text().split()

    with Writers(tmp_path, 2, 4) as target:
        code, steps = steps_of(target)
        assert code >= 0
        assert target.finish() == 0
    assert {Step[name] for name in steps} == set(Step)
    killed: Counter[str] = Counter()
    for number in range(1, len(steps) + 1, STRIDE):
        when = ("before", "after")[number % 2]
        with Writers(tmp_path, 2, 4) as target:
            before = belongings(target.pid)
            code, steps = steps_of(target, MTHP_TEST_DIE=f"{when}:{number + (when == 'before')}")
            if code >= 0:
                # Not each takes as many steps as the first.
                assert len(steps) < number
                continue
            step = steps[-1]
            assert target.survives(), f"the target died when mthp was killed {when} step {number}, {step}"
            until(partial(_has, target.pid, before), "nothing of mthp to be left in the target")
            until(lambda: words_per_size() == words, "the watcher to put switches back")
            restored = mthp_json("doctor", "--restore")
            assert (restored["restored"], restored["removed"]) == ([], [])
            again = collapse(target.pid)
            assert again.returncode in (0, 1), again.stderr
            # Killed late, the first may have done all that there was to do.
            assert again.returncode == 0 or f"lie in folios of {GEOMETRY.label(4)} now" in again.stdout
            assert target.finish() == 0
            killed[step] += 1
    print(dict(killed))
    assert killed
