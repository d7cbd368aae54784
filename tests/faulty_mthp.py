"""The command line, as a build for tests: it kills itself at a numbered step of the mover.

The environment variable MTHP_TEST_DIE says where: ``after:7`` is when the seventh step of the run has just been done
(:mod:`mthp.linux.mover.steps`; steps that are done for every thread count once for each), ``before:7`` when it is about
to be, which is right after the sixth. With ``suspend:7`` it is stopped then as Ctrl-Z stops it. MTHP_TEST_STEPS names a
file that the steps are written to, one a line.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

from mthp.cli import main
from mthp.linux.mover import steps
from mthp.linux.mover.steps import Observer, Step

SUSPENDED_SECONDS = 0.05
"""Seconds to wait for a process to stop."""


def _observer() -> Observer:
    when, _, number = os.environ.get("MTHP_TEST_DIE", "after:0").partition(":")
    last = int(number) - (when == "before")
    record = os.environ.get("MTHP_TEST_STEPS")
    done = 0

    def observe(step: Step) -> None:
        nonlocal done
        done += 1
        if record:
            with Path(record).open("a") as file:
                file.write(step.name + "\n")
        if done == last:
            os.kill(os.getpid(), signal.SIGTSTP if when == "suspend" else signal.SIGKILL)
            time.sleep(SUSPENDED_SECONDS)

    return observe


if __name__ == "__main__":
    steps.observe(_observer())
    sys.exit(main(sys.argv[1:]))
