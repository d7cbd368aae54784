"""``mthp doctor`` as a person runs it: with rights, without, and where THP is missing."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
import numpy as np
import pytest
import rich

import mthp

# The fixture holds other sessions off the switches, which two runs are to find alike.
pytestmark = pytest.mark.usefixtures("thp_switches")

NOBODY = 65534
PACKAGES = {str(Path(module.__file__ or "").parents[1]) for module in (mthp, click, np, rich)}
MAIN = f"import sys; sys.path[:0] = {sorted(PACKAGES)!r}; from mthp.cli import main; sys.exit(main())"
DISABLE_THP = "import ctypes; assert ctypes.CDLL(None).prctl(41, 1, 0, 0, 0) == 0; "
"""prctl(PR_SET_THP_DISABLE), include/uapi/linux/prctl.h."""


def run(
    *arguments: str, prefix: Sequence[str] = (), python: str = sys.executable, before: str = "", user: int | None = None
) -> subprocess.CompletedProcess[str]:
    """Run ``mthp`` with `arguments`, by way of the command `prefix`, after the statements `before`."""
    return subprocess.run(
        [*prefix, python, "-I", "-c", before + MAIN, *arguments],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
        cwd="/",
        user=user,
        group=user,
        extra_groups=None if user is None else [],
    )


def examined(done: subprocess.CompletedProcess[str], code: int = 0) -> dict[str, dict[str, Any]]:
    """Return the findings of a run with --json, by key."""
    assert (done.returncode, done.stderr) == (code, "")
    data = json.loads(done.stdout)
    assert data["schema"] == "mthp.doctor/1"
    assert data["kernel"] == os.uname().release
    assert data["geometry"]["page_size"] == os.sysconf("SC_PAGESIZE")
    assert data["geometry"]["pmd_size"] == data["geometry"]["page_size"] << data["geometry"]["pmd_order"]
    return {finding["key"]: finding for finding in data["findings"]}


def python_for_nobody() -> str:
    """Return a Python of this version that a user without rights can start and that finds our packages."""
    name = f"python{sys.version_info.major}.{sys.version_info.minor}"
    for python in (sys.executable, shutil.which(name, path="/usr/bin:/usr/local/bin")):
        if python is None:
            continue
        try:
            if run("--version", python=python, user=NOBODY).returncode == 0:
                return python
        except PermissionError:
            continue
    return pytest.skip("no Python that another user can start")


def test_text_and_json_say_the_same() -> None:
    findings = examined(run("doctor", "--json"))
    text = run("doctor")
    assert (text.returncode, text.stderr) == (0, "")
    # A remedy has a line of its own, which may have any words.
    lines = [words for line in text.stdout.splitlines() if len(words := line.split()) > 2 and words[0] != "remedy:"]
    rows = {words[1]: words[0] for words in lines}
    assert {key: rows[key] for key in findings} == {key: finding["state"] for key, finding in findings.items()}


@pytest.mark.requires("root", "pfns", "thp")
def test_with_and_without_root() -> None:
    python = python_for_nobody()
    findings = examined(run("doctor", "--json", python=python, user=NOBODY))
    with_rights = examined(run("doctor", "--json", python=python))
    assert findings.keys() == with_rights.keys()

    for key, capability in (("pfns", "CAP_SYS_ADMIN"), ("process_madvise", "CAP_SYS_NICE")):
        assert (with_rights[key]["state"], findings[key]["state"]) == ("ok", "missing")
        assert capability in findings[key]["remedy"]
    assert (with_rights["kpageflags"]["state"], findings["kpageflags"]["state"]) == ("ok", "missing")
    assert "EPERM" in findings["process_madvise"]["what"]
    assert (with_rights["other_processes"]["state"], findings["other_processes"]["state"]) == ("ok", "limited")
    assert str(NOBODY) in findings["other_processes"]["what"]
    for key in ("thp", "sizes", "size_switches", "size_stats", "madv_collapse", "pagemap_scan", "khugepaged"):
        assert findings[key] == with_rights[key]


@pytest.mark.requires("root", "pfns", "thp")
@pytest.mark.skipif(shutil.which("setpriv") is None, reason="needs setpriv(1)")
def test_root_without_capabilities() -> None:
    bare = ["setpriv", "--bounding-set=-all", "--inh-caps=-all"]
    findings = examined(run("doctor", "--json", prefix=bare))
    assert {key: findings[key]["state"] for key in ("pfns", "process_madvise", "other_processes")} == {
        "pfns": "missing",
        "process_madvise": "missing",
        "other_processes": "limited",
    }
    # The file belongs to root, and its mode is all that guards it.
    assert findings["kpageflags"]["state"] == "ok"


@pytest.mark.requires("root", "pfns", "thp")
@pytest.mark.skipif(shutil.which("unshare") is None, reason="needs unshare(1)")
def test_root_of_a_user_namespace() -> None:
    inner = ["unshare", "--user", "--map-root-user"]
    if subprocess.run([*inner, "true"], check=False, capture_output=True).returncode:
        pytest.skip("user namespaces are not allowed here")
    findings = examined(run("doctor", "--json", prefix=inner))
    for key in ("pfns", "process_madvise"):
        assert findings[key]["state"] == "missing"
        assert "first user namespace" in findings[key]["remedy"]
    assert findings["other_processes"]["state"] == "ok"


@pytest.mark.requires("thp")
def test_thp_switched_off_for_the_process() -> None:
    findings = examined(run("doctor", "--json", before=DISABLE_THP))
    assert findings["thp"]["state"] == "limited"
    assert findings["madv_collapse"]["state"] == "limited"
    assert "EINVAL" in findings["madv_collapse"]["what"]
    assert "PR_SET_THP_DISABLE" in findings["madv_collapse"]["remedy"]


@pytest.mark.requires("root", "thp")
@pytest.mark.skipif(shutil.which("unshare") is None, reason="needs unshare(1)")
def test_a_kernel_without_thp() -> None:
    """An empty file system over its directory, in a mount namespace of our own, is what such a kernel looks like."""
    hidden = ["unshare", "--mount", "sh", "-c", 'mount -t tmpfs none /sys/kernel/mm && exec "$@"', "sh"]
    done = subprocess.run([*hidden, "true"], check=False, capture_output=True, text=True)
    if done.returncode:
        # In a chroot the root directory is not a mount point, and unshare(1) cannot make its mounts private.
        pytest.skip(f"needs a mount namespace: {done.stderr.strip()}")
    findings = examined(run("doctor", "--json", prefix=hidden), code=3)
    assert findings["thp"]["state"] == "missing"
    assert findings["thp"]["remedy"]
    assert run("doctor", prefix=hidden).returncode == 3
