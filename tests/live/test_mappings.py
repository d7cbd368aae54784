"""Random system calls in a process of this kernel and in a simulated one: the same results, and the same mappings.

Which neighbours merge decides which PMD ranges one mapping covers, and so what may be collapsed. MTHP_TEST_PROGRAMS is
the number of random programs.
"""

from __future__ import annotations

import json
import os
import random
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

import mapping_calls
from mthp.sim import Machine
from mthp.sim.address_space.mremap import Remap
from mthp.sim.mm import Mm

pytestmark = pytest.mark.live

PROGRAMS = int(os.environ.get("MTHP_TEST_PROGRAMS", "20"))
BASE, PAGES, CALLS = 1 << 36, 16, 60
PAGE = os.sysconf("SC_PAGESIZE")
NAMES = ["map"] * 3 + ["write"] * 3 + ["mprotect", "mremap"] * 2 + ["munmap", "madvise", "read", "fork"]

# Before 7.0 what DONTUNMAP leaves may merge with what it moved, which the simulated machine does not do.
RELEASE = tuple(map(int, re.findall("[0-9]+", os.uname().release)[:2]))

Call = list[Any]


class Simulated:
    """The simulated process, which answers as :mod:`mapping_calls` does."""

    def __init__(self) -> None:
        self._machine = Machine()
        self._mm: Mm = self._machine.create_mm()

    @property
    def mappings(self) -> list[Call]:
        ends = [(vma.start - BASE, vma.end - BASE, vma.permissions) for vma in self._mm.vmas]
        return [[first // PAGE, last // PAGE, permissions] for first, last, permissions in ends]

    def answer(self, name: str, first: int, last: int, *more: Any) -> list[Any]:
        machine, mm, start, end = self._machine, self._mm, BASE + first * PAGE, BASE + last * PAGE
        result = 0
        if name == "map":
            machine.map(mm, start, end)
        elif name == "munmap":
            result = -machine.munmap(mm, start, end)
        elif name == "mprotect":
            result = -machine.mprotect(mm, start, end, more[0])
        elif name == "madvise":
            result = -machine.madvise(mm, start, end, more[0])
        elif name == "mremap":
            flags = Remap.MAYMOVE | Remap.FIXED | (Remap.DONTUNMAP if more[1] else Remap.NONE)
            result = min(0, machine.mremap(mm, start, end, end - start, flags, BASE + more[0] * PAGE))
        elif name == "write":
            machine.write(mm, start, 1)
        elif name == "read":
            machine.read(mm, start)
        else:
            self._mm = machine.fork(mm)
        return [result, self.mappings]


@contextmanager
def a_process() -> Iterator[subprocess.Popen[str]]:
    """A process of this kernel."""
    command = [sys.executable, "-S", "-E", str(Path(mapping_calls.__file__)), str(BASE), str(PAGES)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            assert process.stdin is not None
            process.stdin.close()


def random_call(rng: random.Random, mappings: list[Call]) -> Call | None:
    """Return a call that no signal ends; None if chance chose another."""
    name, first = rng.choice(NAMES), rng.randrange(PAGES)
    last = rng.randint(first + 1, PAGES)
    permissions = {page: each[2] for each in mappings for page in range(each[0], each[1])}
    if name in ("read", "write"):
        allowed = [page for page, each in permissions.items() if name == "read" or "w" in each]
        return [name, page := rng.choice(allowed), page + 1] if allowed else None
    if name == "map":
        return None if permissions.keys() & range(first, last) else [name, first, last]
    if name == "mprotect":
        return [name, first, last, rng.choice(["r--", "rw-", "rw-"])]
    if name == "madvise":
        return [name, first, last, rng.choice(list(mapping_calls.ADVICE))]
    if name == "mremap":
        leave = rng.random() < 0.3 and RELEASE >= (7, 0)
        return [name, first, last, rng.randrange(PAGES - (last - first) + 1), leave]
    return [name, first, last]


@pytest.mark.skipif(RELEASE < (6, 17), reason="Linux before 6.17 moves and merges mappings in another way")
@pytest.mark.parametrize("seed", range(PROGRAMS))
def test_mappings_are_as_in_the_kernel(seed: int) -> None:
    rng, simulated = random.Random(seed), Simulated()
    made: list[Call] = []
    with a_process() as process:
        assert process.stdin is not None
        assert process.stdout is not None
        while len(made) < CALLS:
            call = random_call(rng, simulated.mappings)
            if call is None:
                continue
            made.append(call)
            process.stdin.write(json.dumps(call) + "\n")
            process.stdin.flush()
            assert simulated.answer(*call) == json.loads(process.stdout.readline()), json.dumps(made)
