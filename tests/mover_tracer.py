"""A process that moves blocks of a target until it is killed, by itself at a chosen step or by its parent.

Run as a program, it reads commands from standard input, one a line, carries each out in a forked child (so that nothing
is imported twice), and answers with the exit code of the child, -9 if it was killed:

``step NAME COUNT``   kill yourself when the step NAME comes for the COUNT-th time
``random MICROSECONDS SIGNAL``   be sent KILL, HUP, or STOP and then KILL that long after the first session is begun
"""

from __future__ import annotations

import mmap
import os
import random
import signal
import struct
import sys
import time
from collections.abc import Callable

from mthp.errors import MthpError
from mthp.linux.mover import steps
from mthp.linux.mover.session import MoverSession
from mthp.linux.mover.steps import Observer, Step
from mthp.linux.process import Process
from mthp.linux.sysfs import ThpSysfs

GEOMETRY = ThpSysfs().geometry()
ORDER = 4
BLOCKS = 64
STOPPED_SECONDS = (0.1, 0.1, 0.1, 4.0)
"""For how long a tracer is stopped before it is killed: longer than a worker that is done waits for it, and longer than
it waits for other threads, and cannot detect that they left."""


def killer(name: str, count: int) -> Observer:
    """An observer that kills this process when the step `name` comes for the `count`-th time."""
    left = count

    def observe(step: Step) -> None:
        nonlocal left
        if step is Step[name]:
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    return observe


def move_for_ever(pid: int, base: int, size: int, begun: Callable[[], None]) -> None:
    """Open and close sessions, with some windows in each; let `begun` know when it starts."""
    block = GEOMETRY.size_of(ORDER)
    everything = [(address, ORDER) for address in range(base, base + size, block)]
    begun()
    with Process(pid) as process:
        while True:
            # A busy machine may take its time to let threads come to a stop.
            session = MoverSession(process, GEOMETRY, max_pause_ns=5_000_000, duty=1.0, stop_timeout_ns=3_000_000_000)
            with session:
                for _ in range(10):
                    session.move(random.sample(everything, min(BLOCKS, len(everything))), verify=True)
                    # Neighbours are moved together, if nothing is to be verified.
                    session.move(everything[random.randrange(len(everything) // 2) :][:BLOCKS])


def _child(pid: int, base: int, size: int, words: list[str], begun: Callable[[], None]) -> None:
    steps.observe(killer(words[1], int(words[2])) if words[0] == "step" else killer(Step.STOPPED.name, 0))
    try:
        move_for_ever(pid, base, size, begun)
    except MthpError as error:
        print(error, file=sys.stderr)
        os._exit(3)
    finally:
        os._exit(4)


def main() -> None:
    """Carry out commands until the end of standard input."""
    pid, base, size = (int(word) for word in sys.argv[1:])
    shared = mmap.mmap(-1, mmap.PAGESIZE)
    for line in sys.stdin:
        words = line.split()
        struct.pack_into("=Q", shared, 0, 0)
        child = os.fork()
        if child == 0:
            random.seed(os.getpid())
            _child(pid, base, size, words, lambda: struct.pack_into("=Q", shared, 0, 1))
        if words[0] == "random":
            while not struct.unpack_from("=Q", shared)[0]:
                time.sleep(0.0001)
            time.sleep(int(words[1]) * 1e-6)
            os.kill(child, signal.Signals[f"SIG{words[2]}"])
            if words[2] == "STOP":
                time.sleep(random.choice(STOPPED_SECONDS))
                os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


if __name__ == "__main__":
    main()
