"""Targets by name, on real processes, control groups and namespaces."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from daemons import RunningDaemon
from mthp.linux.facts import FactsReader
from waiting import until

pytestmark = pytest.mark.live

ID = "3f2a" + "0" * 60
TOP = f"mthp-test-{os.getpid()}.slice"
INNER = f"{TOP}/kubepods-pod0a1b2c3d_1111_2222_3333_445566778899.slice/cri-containerd-{ID}.scope"


def hierarchy() -> Path:
    """Return where version 2 is mounted, or skip."""
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        if " - cgroup2 " in line and os.geteuid() == 0:
            return Path(line.split()[4])
    pytest.skip("needs root and the cgroup version 2 hierarchy")


@pytest.fixture
def group() -> Iterator[Path]:
    """A control group as a container has one."""
    top = hierarchy()
    directory = top / INNER
    directory.mkdir(parents=True)
    yield directory
    until(lambda: all(map(_removed, (directory, *directory.parents[:2]))), lambda: f"{directory} to be empty")


def _removed(path: Path) -> bool:
    with contextlib.suppress(OSError):
        path.rmdir()
    return not path.exists()


@contextlib.contextmanager
def sleeper(group: Path | None = None) -> Iterator[subprocess.Popen[bytes]]:
    """A process that does nothing, in a control group."""
    with subprocess.Popen(["sleep", "600"]) as process:
        try:
            if group is not None:
                (group / "cgroup.procs").write_text(str(process.pid))
            yield process
        finally:
            process.kill()


READ = "import sys; from mthp.linux.facts import FactsReader; r = FactsReader(); p = ('cgroup',);\
 print(r.read(int(sys.argv[1]), p).cgroup, r.read(int(sys.argv[2]), p).cgroup, r.hidden(p) or '-')"


@pytest.mark.parametrize("prefix", [(), ("unshare", "--cgroup")])
def test_paths_of_control_groups_are_absolute_in_a_cgroup_namespace(group: Path, prefix: tuple[str, ...]) -> None:
    with sleeper(group) as inside, sleeper() as outside:
        there = FactsReader().read(outside.pid, ("cgroup",))
        assert there is not None
        enter = f'echo $$ > {group}/cgroup.procs && exec "$@"'
        command = ["sh", "-c", enter, "sh", *prefix, sys.executable, "-c", READ, str(inside.pid), str(outside.pid)]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
        assert said == [f"/{INNER}", there.cgroup, "-"]


def test_rules_on_control_groups_hold_in_a_cgroup_namespace(group: Path, tmp_path: Path) -> None:
    with sleeper(group) as process:
        words = [f"container:{ID[:12]}", "unit:cri-containerd-*", f"cgroup:/{TOP}"]
        for number, word in enumerate(words):
            with RunningDaemon(tmp_path / str(number), word, prefix=("unshare", "--cgroup")) as daemon:
                until(lambda daemon=daemon: daemon.status()["targets"], lambda: "a target")  # type: ignore[misc]
                target = daemon.status()["targets"][0]
                assert (target["pid"], target["rule"]) == (process.pid, word)


def test_a_namespace_of_processes_of_its_own_says_that_paths_are_cut() -> None:
    hierarchy()
    command = ["unshare", "--cgroup", "--pid", "--fork", "--mount-proc", sys.executable, "-c", READ, "1", "1"]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "hostPID" in said
