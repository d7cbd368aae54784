"""Fixtures of all tests: requirements of live tests, and the machine's THP switches.

A test that needs more than every machine has is marked ``@pytest.mark.requires("root", "thp", ...)``; the words are the
keys of `_REQUIREMENTS`. On other machines it is skipped with the reason. With ``MTHP_REQUIRE_LIVE=1`` in the
environment such a skip is a failure.

A test that depends on the THP switches takes the fixture ``thp_switches``, the only one that changes them. It holds the
lock of the mover's journal, so that another test session or a mover of the system does not change them meanwhile. It
writes the values to a file before it changes any, so that the next session puts them back after a killed one.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import functools
import mmap
import os
import signal
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

import pytest

from e2e.helpers import Actor
from mthp.daemon.ipc import LOCK_NAME
from mthp.errors import MthpError
from mthp.linux.journal.store import default_root
from mthp.linux.mover.arch import MACHINES
from mthp.linux.pagemap import Pagemap, can_see_pfns
from mthp.linux.process import Process
from thp_switches import THP_ROOT, ThpSwitches, windows_kept_out
from waiting import until

# Commands that print to a pipe follow COLUMNS; the tests want the layout that scripts get. readline, which pytest
# imports, sets it without os.environ (rl_change_environment), so it must be unset there, too.
os.environ.pop("COLUMNS", None)
os.unsetenv("COLUMNS")

_STATE = Path(tempfile.gettempdir()) / f"mthp-tests-switches-{os.getuid()}.json"
_REQUIRE_LIVE = "MTHP_REQUIRE_LIVE"
_PATIENCE = 600.0
"""Seconds to wait for another test session."""

_SWAP_BYTES = 32 << 20


def _has_scan() -> bool:
    with Process("self") as process:
        pagemap = Pagemap(process)
        pagemap.close()
        return pagemap.can_scan


def _can_advise(advice: int) -> bool:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    with mmap.mmap(-1, 2 * mmap.PAGESIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as memory:
        view = ctypes.c_char.from_buffer(memory)
        failed = libc.madvise(ctypes.addressof(view), mmap.PAGESIZE, advice)
        del view
    return not failed


def _can_write(path: Path) -> bool:
    return os.access(path, os.W_OK)


def _is_root() -> bool:
    """Return whether this is the root of the machine. Root of another user namespace has not all rights."""
    return os.geteuid() == 0 and Path("/proc/self/uid_map").read_text().split() == ["0", "0", "4294967295"]


_REQUIREMENTS: dict[str, tuple[Callable[[], bool], str]] = {
    "root": (_is_root, "needs root"),
    "pfns": (can_see_pfns, "needs page frame numbers (CAP_SYS_ADMIN)"),
    "thp": (lambda: _can_write(THP_ROOT / "enabled"), "needs THP with switches that may be changed"),
    "mthp": (
        lambda: _can_write(THP_ROOT / f"hugepages-{4 * mmap.PAGESIZE >> 10}kB/enabled"),
        "needs per-size THP switches (Linux 6.8)",
    ),
    "mover": (lambda: os.uname().machine in MACHINES, "needs a machine that the mover has code for"),
    "4k-pages": (lambda: mmap.PAGESIZE == 4096, "needs base pages of 4 KiB"),
    "pagemap_scan": (_has_scan, "needs PAGEMAP_SCAN (Linux 6.7)"),
    "guard": (lambda: _can_advise(102), "needs MADV_GUARD_INSTALL (Linux 6.13)"),
    "ns_last_pid": (lambda: _can_write(Path("/proc/sys/kernel/ns_last_pid")), "needs ns_last_pid to choose PIDs"),
}


_RIGHTS = {"root", "pfns", "thp", "mthp"}
"""What MTHP_REQUIRE_LIVE demands. The rest depends on the kernel's version, its configuration and the processor."""


_LEFT_OUT = pytest.StashKey[int]()
"""How many slow tests --quick has left out."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--quick", action="store_true", help="leave slow tests out; a fifth of Hypothesis's examples")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_LEFT_OUT] = 0
    with contextlib.suppress(ImportError):
        # No test fails because of time. (The guests of the kernel lab have no Hypothesis.)
        from hypothesis import HealthCheck, settings

        count = 20 if config.getoption("--quick") else 100
        settings.register_profile(
            "mthp", None, max_examples=count, deadline=None, suppress_health_check=[HealthCheck.too_slow]
        )
        settings.load_profile("mthp")
    config.addinivalue_line("markers", "requires(*words): skip where the machine or the rights lack one of them")
    # A shell has its jobs in the background ignore Ctrl-C, and so would the processes that tests interrupt.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.hookimpl(wrapper=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> Iterator[None]:
    """Mark live tests, and leave slow tests out under --quick: those that `-m` has left of them."""
    for item in items:
        # In other directories `thp_switches` fails: the live part of `make test` does not collect them.
        room = item.path.parent.name
        if room == "live" or (room == "e2e" and "thp_switches" in getattr(item, "fixturenames", ())):
            item.add_marker("live")
    yield
    if not config.getoption("--quick"):
        return
    slow = [item for item in items if item.get_closest_marker("slow")]
    items[:] = [item for item in items if not item.get_closest_marker("slow")]
    config.hook.pytest_deselected(items=slow)
    config.stash[_LEFT_OUT] = len(slow)
    if hasattr(config, "workeroutput"):  # a process of pytest-xdist: the one that prints has collected nothing
        config.workeroutput["left_out"] = len(slow)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """Take the count of a process of pytest-xdist: each has collected all tests."""
    node.config.stash[_LEFT_OUT] = getattr(node, "workeroutput", {}).get("left_out", 0)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    if config.stash[_LEFT_OUT]:
        terminalreporter.write_line(f"{config.stash[_LEFT_OUT]} slow tests were left out: run `make test ALL=1`")


@functools.cache
def _daemon_kept_out() -> str | None:
    """Keep daemons of the system out until this process ends, or return why that cannot be: one is running.

    They would collapse and trim what live tests look at. Test sessions share the daemon's lock; the daemons that tests
    start have locks elsewhere.
    """
    try:
        directory = default_root()
        directory.mkdir(mode=0o755, exist_ok=True)
        fd = os.open(directory / LOCK_NAME, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    except (MthpError, OSError):
        return None  # where the lock cannot be, no daemon is
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = os.pread(fd, 64, 0).decode(errors="replace").strip()
        os.close(fd)
        return f"mthp daemon (process {holder}) would disturb live tests: stop it (systemctl stop mthp)"
    return None


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("live") and (reason := _daemon_kept_out()):
        if os.environ.get(_REQUIRE_LIVE) == "1":
            pytest.exit(reason, returncode=1)
        pytest.skip(reason)
    for mark in item.iter_markers("requires"):
        for word in mark.args:
            check, reason = _REQUIREMENTS[word]
            if not check():
                (skip_or_fail if word in _RIGHTS else pytest.skip)(reason)


def skip_or_fail(reason: str) -> NoReturn:
    """Skip the test at hand, or fail it where the environment says that this machine has everything."""
    if os.environ.get(_REQUIRE_LIVE) == "1":
        pytest.fail(f"{reason}, and {_REQUIRE_LIVE}=1 forbids to skip", pytrace=False)
    pytest.skip(reason)


@pytest.fixture
def thp_switches(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> Iterator[ThpSwitches]:
    """The machine's THP switches, for this test alone: at first as a kernel has them, put back afterwards.

    Movers of others are kept out with the lock of the journal of switches; those that the test itself starts have a
    journal elsewhere. Where switches may not be written they are what they are.
    """
    assert request.node.get_closest_marker("live"), "a test that changes switches must be marked live: it runs alone"
    if not _can_write(THP_ROOT / "enabled"):
        yield ThpSwitches(_STATE)
        return
    _STATE.touch()
    with windows_kept_out(_PATIENCE):
        switches = ThpSwitches(_STATE)
        switches.recover()
        monkeypatch.setenv("MTHP_RUN_DIR", str(tmp_path_factory.mktemp("run") / "mthp"))
        try:
            switches.default()
            yield switches
        finally:
            switches.restore()


@pytest.fixture
def actor() -> Iterator[Actor]:
    """A puppet that fills pages with a pattern, and looks for it."""
    with Actor() as actor:
        yield actor


@pytest.fixture
def frozen_cgroup() -> Iterator[Callable[[int], None]]:
    """Freezes a process by its cgroup (version 2). At the end it is thawed, and back in the cgroup where it was."""
    mounts = [Path(line.split()[1]) for line in Path("/proc/mounts").read_text().splitlines() if " cgroup2 " in line]
    if not mounts:
        pytest.skip("needs cgroups (version 2)")
    cgroup = mounts[0] / f"mthp-test-{os.getpid()}"
    try:
        cgroup.mkdir()
    except OSError as error:
        pytest.skip(f"needs a cgroup of its own: {error}")
    before: dict[int, str] = {}

    def freeze(pid: int) -> None:
        lines = Path(f"/proc/{pid}/cgroup").read_text().splitlines()
        before[pid] = next(line[4:] for line in lines if line.startswith("0::"))
        (cgroup / "cgroup.procs").write_text(str(pid))
        (cgroup / "cgroup.freeze").write_text("1")
        until(lambda: "frozen 1" in (cgroup / "cgroup.events").read_text(), "the process to be frozen")

    try:
        yield freeze
    finally:
        (cgroup / "cgroup.freeze").write_text("0")
        for pid, path in before.items():
            with contextlib.suppress(OSError):
                (mounts[0] / path.lstrip("/") / "cgroup.procs").write_text(str(pid))
        until(lambda: "populated 0" in (cgroup / "cgroup.events").read_text(), "the process to leave")
        cgroup.rmdir()


@pytest.fixture(scope="session")
def swap_space() -> Iterator[None]:
    """Swap: the machine's own, or a file for this test session."""
    if len(Path("/proc/swaps").read_text().splitlines()) > 1:
        yield
        return
    # Not in the temporary directory, which may be tmpfs, where swapon(2) does not work.
    file = Path("/var/tmp/mthp-tests-swap")
    file.unlink(missing_ok=True)
    try:
        fd = os.open(file, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600)
        os.write(fd, bytes(_SWAP_BYTES))
        os.close(fd)
        for command in ("mkswap", "swapon"):
            subprocess.run([command, file], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        file.unlink(missing_ok=True)
        pytest.skip(f"needs swap, and none can be added: {error}")
    try:
        yield
    finally:
        subprocess.run(["swapoff", file], check=True)
        file.unlink()
