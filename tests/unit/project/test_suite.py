"""How the test suite chooses its cases, and keeps a daemon of the system out."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from mthp.daemon.ipc import DaemonLock

ROOT = Path(__file__).parents[3]
LIVE = "tests/live/test_names.py"


def pytest(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-q", *arguments]
    environment = {name: word for name, word in os.environ.items() if not name.startswith("PYTEST_")} | environment
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


def test_quick_leaves_slow_cases_out_and_says_how_many() -> None:
    quick, every = (pytest("tests/vm", "--collect-only", *more).stdout for more in (["--quick"], []))
    assert "slow" not in every
    assert f"{every.count('::')} slow tests were left out: run `make test ALL=1`" in quick
    assert "::" not in quick


def test_live_tests_are_skipped_while_a_daemon_runs(tmp_path: Path) -> None:
    lock = DaemonLock(tmp_path)
    reason = f"mthp daemon (process {os.getpid()}) would disturb live tests"
    skipped = pytest(LIVE, MTHP_RUN_DIR=str(tmp_path), MTHP_REQUIRE_LIVE="0")
    assert skipped.returncode == 0
    assert "passed" not in skipped.stdout
    assert skipped.stdout.count(reason) == 1
    refused = pytest(LIVE, MTHP_RUN_DIR=str(tmp_path), MTHP_REQUIRE_LIVE="1")
    assert refused.returncode == 1
    assert reason in refused.stdout + refused.stderr
    lock.close()
