"""The systemd unit, and notifications to the service manager."""

from __future__ import annotations

import shutil
import socket
import subprocess
from pathlib import Path

import pytest

from mthp.daemon.systemd import CAPABILITIES, Notifier, install, systemd_release, unit_text


def test_a_service_manager_is_told(tmp_path: Path) -> None:
    path = str(tmp_path / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind(path)
        notifier = Notifier({"NOTIFY_SOCKET": path, "WATCHDOG_USEC": "3000000"})
        assert notifier.watchdog == 1.5
        notifier.send("READY=1", "STATUS=fine")
        notifier.send("WATCHDOG=1")
        notifier.send("STOPPING=1")
        assert [sock.recv(100).split(b"\n")[0] for _ in range(3)] == [b"READY=1", b"WATCHDOG=1", b"STOPPING=1"]


def test_without_a_manager_or_for_another_process_there_is_nothing_to_tell() -> None:
    assert Notifier({}).watchdog is None
    Notifier({}).send("READY=1")
    assert Notifier({"NOTIFY_SOCKET": "@x", "WATCHDOG_USEC": "1", "WATCHDOG_PID": "1"}).watchdog is None
    Notifier({"NOTIFY_SOCKET": "/nowhere/at/all"}).send("READY=1")


def test_the_unit_names_every_right_with_its_reason(tmp_path: Path) -> None:
    path = install(unit_text(["--config", "/etc/mthp/my rules.toml"]), tmp_path)
    text = path.read_text()
    assert "'/etc/mthp/my rules.toml'" in text
    for name, reason in CAPABILITIES.items():
        assert f"#   {name}: {reason}" in text
        assert name in next(line for line in text.splitlines() if line.startswith("CapabilityBoundingSet="))
    for line in ("Type=notify-reload", "RuntimeDirectoryPreserve=yes", "NoNewPrivileges=yes"):
        assert line in text.splitlines()


def test_a_unit_has_the_type_that_its_systemd_knows() -> None:
    old = unit_text(["--all"], systemd=252).splitlines()
    assert "Type=notify" in old
    assert "ExecReload=/bin/kill -HUP $MAINPID" in old
    new = unit_text(["--all"], systemd=253)
    assert "Type=notify-reload" in new.splitlines()
    assert "ExecReload" not in new


def test_the_unit_lets_the_daemon_reach_what_its_options_name() -> None:
    plain = unit_text(["--all"])
    assert "ReadWritePaths" not in plain
    assert "IPAddressDeny=any" in plain.splitlines()
    assert unit_text(["--all"], Path("/var/log/mthp/events.jsonl"), ("127.0.0.1", 1)) == plain
    assert "ReadWritePaths=/srv/log" in unit_text(["--all"], Path("/srv/log/events.jsonl")).splitlines()
    assert "IPAddressDeny" not in unit_text(["--all"], metrics=("0.0.0.0", 9464))


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="needs systemd-analyze")
def test_systemd_understands_the_unit_and_finds_it_hardened(tmp_path: Path) -> None:
    unit = tmp_path / "mthp.service"
    unit.write_text(unit_text(["--all"], systemd=systemd_release()))
    done = subprocess.run(
        ["systemd-analyze", "security", "--offline=true", "--no-pager", str(unit)],
        capture_output=True,
        encoding="utf-8",
        check=False,
    )
    if "Overall exposure" not in done.stdout:
        pytest.skip(f"systemd-analyze cannot rate units here: {done.stderr.strip()[:200]}")
    assert done.stderr == ""
    verified = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", str(unit)], capture_output=True, text=True, check=False
    )
    assert (verified.returncode, verified.stderr) == (0, "")
    level = float(done.stdout.rsplit("mthp.service: ", 1)[1].split()[0])
    assert level < 5.0


@pytest.mark.parametrize("usec", ["9" * 5000, "x", "-1", "", "1e9"])
def test_a_watchdog_that_makes_no_sense_is_none(usec: str) -> None:
    assert Notifier({"NOTIFY_SOCKET": "/nowhere", "WATCHDOG_USEC": usec}).watchdog is None
