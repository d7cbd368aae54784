"""The soak: threads of many targets write, check and fork while the daemon works on them. Every byte must be right.

MTHP_TEST_SECONDS sets its duration: some seconds by default, 600 for the full soak. MTHP_TEST_TARGETS sets the number
of targets.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from daemons import RunningDaemon
from targets import threads_of
from thp_switches import ThpSwitches
from waiting import PATIENCE, until

pytestmark = [
    pytest.mark.live,
    pytest.mark.slow,
    pytest.mark.requires("root", "thp", "mthp", "pagemap_scan", "4k-pages"),
]

SECONDS = float(os.environ.get("MTHP_TEST_SECONDS", "5"))
TARGETS = int(os.environ.get("MTHP_TEST_TARGETS", "20"))
SIZE = 12 << 20
PROGRAM = Path(__file__).parent.parent / "daemon_soak_target.py"


def test_no_byte_is_wrong_no_target_dies_and_the_daemon_does_not_grow(
    thp_switches: ThpSwitches, tmp_path: Path
) -> None:
    thp_switches.only("16kB", "64kB", "512kB")
    command = [sys.executable, str(PROGRAM), str(SIZE)]
    targets = [
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(TARGETS)
    ]
    try:
        for target in targets:
            assert target.stdout is not None
            assert target.stdout.readline() == "ready\n"
        sizes = "|".join(str(target.pid) for target in targets)
        rules = tmp_path / "rules.toml"
        rules.write_text(
            f'[daemon]\ncpu = "60%"\n[tunables]\nscan_sleep_millisecs = 200\n'
            f'[defaults]\nmechanism = "madvise,move"\nmax_bloat = "none"\n'
            f"[[rule]]\nmatch = {{ pid = [{sizes.replace('|', ', ')}] }}\n"
        )
        with RunningDaemon(tmp_path / "run", "--config", str(rules)) as daemon:
            until(lambda: len(daemon.status()["targets"]) == TARGETS, "all targets")
            until(lambda: daemon.status()["counters"]["collapsed_bytes"] > 0, "the first collapse")
            # Modules and facts that each first pass loads do not count as growth.
            until(lambda: all(target["passes"] for target in daemon.status()["targets"]), "a pass over each")
            begun = time.monotonic()
            time.sleep(min(SECONDS / 4, 30))
            before = daemon.status()
            while time.monotonic() - begun < SECONDS:
                time.sleep(0.5)
                assert all(target.poll() is None for target in targets), "a target died"
            after = daemon.status()
            assert "Traceback" not in daemon.said
        for target in targets:
            assert set(threads_of(target.pid).values()) <= {"R", "S", "D"}
        done = [target.communicate(timeout=PATIENCE) for target in targets]
    finally:
        for target in targets:
            if target.poll() is None:
                target.kill()
                target.communicate()
    assert [target.returncode for target in targets] == [0] * TARGETS, [error for _, error in done]
    assert all(int(output.split()[0]) > 0 for output, _ in done)
    assert after["counters"]["collapsed_bytes"] > 0
    assert after["resident_memory_bytes"] - before["resident_memory_bytes"] < 8 << 20
    rounds, forks = (sum(int(output.split()[at]) for output, _ in done) for at in (0, 1))
    counters = after["counters"]
    print(
        f"{rounds} pages checked, {forks} forks, {counters['collapses']} folios made,"
        f" failed {counters['collapse_failures']}; pauses {counters['pauses']};"
        f" memory {before['resident_memory_bytes'] >> 20} to {after['resident_memory_bytes'] >> 20} MiB"
    )
