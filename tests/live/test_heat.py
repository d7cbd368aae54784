"""Heat of a process with known hot memory: by DAMON, idle pages and young bits. Nothing is left behind."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from e2e.helpers import mthp_json
from mover_targets import program
from mthp.abilities import heat_of
from mthp.errors import UnsupportedError
from mthp.heat import Heat, HeatRequest
from mthp.linux.heat import damon, idle_tracking
from mthp.linux.journal.instance import INSTANCE, NONE, kdamonds_of, read_instance, write_instance
from mthp.linux.journal.store import all_roots
from mthp.linux.live import open_live
from mthp.linux.sysfs import THP_ROOT
from targets import PMD_SIZE
from waiting import PATIENCE, until

pytestmark = [pytest.mark.live, pytest.mark.requires("root")]

RANGES, HOT = 32, (5, 6, 20)
KDAMONDS = kdamonds_of(THP_ROOT)
SECONDS = 3.0

_TARGET = """
import ctypes, mmap, sys
ranges, pmd, page = map(int, sys.argv[1:4])
hot = [int(word) for word in sys.argv[4].split(",")]
apart, advised = int(sys.argv[5]), int(sys.argv[6])
libc = ctypes.CDLL(None)
libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
libc.mprotect.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
memory = mmap.mmap(-1, (2 * ranges + 1) * pmd, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
first = -start % pmd
libc.madvise(start + first, 2 * ranges * pmd, 15)
step = 2 if apart else 1
for i in range(ranges):
    for at in range(first + i * step * pmd, first + (i * step + 1) * pmd, page):
        memory[at] = 1
    if apart:
        libc.mprotect(start + first + (2 * i + 1) * pmd, pmd, 0)
if advised:
    libc.madvise(start + first, 2 * ranges * pmd, 14)
print(start + first, flush=True)
places = [at for i in hot for at in range(first + i * step * pmd, first + (i * step + 1) * pmd, page)]
while True:
    for at in places:
        memory[at]
"""


@contextlib.contextmanager
def target(*, apart: bool = False, advised: bool = False) -> Iterator[tuple[int, int]]:
    """Start a process that reads its hot PMD ranges repeatedly, and return its PID and the address of its memory.

    Args:
        apart: each PMD range is a mapping of its own, with one between that is not accessible.
        advised: its memory has MADV_HUGEPAGE, once it is filled; MADV_NOHUGEPAGE otherwise.
    """
    page = os.sysconf("SC_PAGESIZE")
    arguments = [str(each) for each in (RANGES, PMD_SIZE, page, ",".join(map(str, HOT)), int(apart), int(advised))]
    with program(_TARGET, *arguments) as (pid, start):
        yield pid, int(start)


def hot_share(heat: Heat | None, start: int, step: int = 1) -> float:
    """Return the part of the accesses to the PMD ranges, as a source saw them, that goes to the hot ones."""
    assert heat is not None
    assert heat.seconds > 0
    assert heat.cpu_share < 0.5, "a bound of 5 %, on an emulated processor too"
    low = start + np.arange(RANGES, dtype=np.uint64) * np.uint64(step * PMD_SIZE)
    seen = heat.within(low, low + np.uint64(PMD_SIZE))
    return float(seen[list(HOT)].sum() / seen.sum())


@pytest.fixture
def free_damon() -> Iterator[None]:
    """DAMON without another user: modules that keep others out are off meanwhile."""
    turned_off = []
    for name in damon.EXCLUSIVE:
        enabled = Path(f"/sys/module/{name}/parameters/enabled")
        if enabled.exists() and enabled.read_text().strip() == "Y":
            enabled.write_text("N")
            turned_off.append(enabled)
    try:
        if (what := damon.lack(THP_ROOT.parent)[0]) != "":
            pytest.skip(what)
        yield
        assert (KDAMONDS / "nr_kdamonds").read_text().strip() == NONE
    finally:
        for enabled in turned_off:
            enabled.write_text("Y")


@pytest.mark.slow
@pytest.mark.usefixtures("free_damon")
@pytest.mark.parametrize("operations", ["fvaddr", "paddr"])
def test_damon_sees_what_is_hot(operations: str) -> None:
    with target() as (pid, start), open_live(pid) as space:
        try:
            heat = damon.Damon(operations=[operations]).measure(space, SECONDS, lambda: False)
        except UnsupportedError as error:
            pytest.skip(error.message)
        assert heat.source == f"damon ({operations})"
        assert hot_share(heat, start) > 0.8


@pytest.mark.slow
@pytest.mark.usefixtures("free_damon")
def test_a_plan_ranks_by_what_damon_saw() -> None:
    with target(advised=True) as (pid, _):
        plan = mthp_json("plan", pid, "--heat", f"damon:{SECONDS}s", "--json")
    assert plan["heat"]["source"].startswith("damon")
    # khugepaged may have made huge pages of a part by then.
    assert plan["heat_share"] > 0.1
    assert plan["heat"]["cpu_seconds"] > 0


@pytest.mark.usefixtures("free_damon")
def test_a_kdamond_ends_with_a_mthp_that_is_killed() -> None:
    with target() as (pid, _):
        command = [sys.executable, "-m", "mthp", "plan", str(pid), "--heat", "damon:60s"]
        with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
            until(lambda: _state() == "on", "a kdamond of ours")
            process.kill()
        until(lambda: (KDAMONDS / "nr_kdamonds").read_text().strip() == NONE, "the watcher")


@pytest.mark.usefixtures("free_damon")
def test_the_next_start_ends_what_no_watcher_did() -> None:
    code = (
        "import time\nfrom mthp.linux.journal.store import all_roots\n"
        "from mthp.linux.journal.switches import SwitchJournal\n"
        f"with SwitchJournal(all_roots()[1], watched=False).settings({{{INSTANCE!r}: '123456789'}}):\n"
        "    print('there', flush=True)\n    time.sleep(600)\n"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "there\n"
        process.kill()
    assert read_instance(KDAMONDS) == "123456789"
    done = subprocess.run([sys.executable, "-m", "mthp", "inspect", "self"], capture_output=True, text=True, check=True)
    assert "put back: damon" in done.stderr
    assert read_instance(KDAMONDS) == NONE


@pytest.mark.usefixtures("free_damon")
def test_an_instance_of_another_program_is_left_alone() -> None:
    (KDAMONDS / "nr_kdamonds").write_text("1")
    try:
        (KDAMONDS / "0/contexts/nr_contexts").write_text("1")
        (KDAMONDS / "0/contexts/0/targets/nr_targets").write_text("1")
        with open_live("self") as space, pytest.raises(UnsupportedError, match="another program"):
            heat_of(space, HeatRequest("damon", 1.0))
        assert (KDAMONDS / "0/contexts/0/targets/nr_targets").read_text().strip() == "1"
        assert not (all_roots()[1] / "switches.journal").exists() or (
            (all_roots()[1] / "switches.journal").read_bytes() == b""
        )
    finally:
        write_instance(KDAMONDS, NONE)


@pytest.mark.slow
def test_idle_pages_tell_what_is_hot() -> None:
    if (what := idle_tracking.lack(THP_ROOT.parent)[0]) != "":
        pytest.skip(what)
    with target() as (pid, start), open_live(pid) as space:
        assert hot_share(heat_of(space, HeatRequest("idle", SECONDS)), start) > 0.8


@pytest.mark.slow
def test_young_bits_tell_which_mappings_are_hot() -> None:
    with target(apart=True) as (pid, start), open_live(pid) as space:
        assert hot_share(heat_of(space, HeatRequest("young", SECONDS)), start, step=2) > 0.8


def test_a_measurement_ends_early_when_it_is_told_to() -> None:
    with target(apart=True) as (pid, _):
        command = [sys.executable, "-m", "mthp", "plan", str(pid), "--heat", "young:600s"]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
            until(lambda: Path(f"/proc/{process.pid}/stat").read_text().split()[2] == "S", "its first rest")
            time.sleep(1)
            process.send_signal(signal.SIGINT)
            # Less than the measurement was to take.
            process.communicate(timeout=PATIENCE)


def _state() -> str:
    try:
        return (KDAMONDS / "0/state").read_text().strip()
    except OSError:
        return ""
