"""The service manager: the systemd unit, its installation, and notifications to it.

The unit has only the rights that it needs, each with its reason. It cannot be put into a namespace of processes or
users, nor be denied ptrace or debugging system calls, because it reads and changes other processes.
"""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from mthp.errors import MthpError, NotPermittedError
from mthp.files import write_whole

NAME = "mthp.service"
DIRECTORY = Path("/etc/systemd/system")
LOGS = Path("/var/log/mthp")
"""LogsDirectory of the unit."""

CAPABILITIES = {
    "CAP_SYS_PTRACE": "read other users' processes, stop their threads and move pages in them",
    "CAP_SYS_ADMIN": "see page frame numbers, and with them the orders of folios",
    "CAP_SYS_NICE": "MADV_COLLAPSE in other processes, and short pauses (SCHED_FIFO while threads are stopped)",
    "CAP_DAC_OVERRIDE": "open pagemap and mem of processes of other users",
    "CAP_NET_ADMIN": "receive the kernel's events of new processes (before Linux 6.6); without it /proc is listed",
}
"""The capabilities of the unit, and the purpose of each."""


NOTIFY_RELOAD = 253
"""Release of systemd that brought Type=notify-reload, with which a reload lasts until the rules were read again."""


def systemd_release() -> int:
    """Return the release of this machine's systemd; `NOTIFY_RELOAD` if it is unknown."""
    try:
        done = subprocess.run(["systemctl", "--version"], capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return NOTIFY_RELOAD
    found = re.match(r"systemd ([0-9]{1,6})", done.stdout)
    return int(found[1]) if found else NOTIFY_RELOAD


def unit_text(
    arguments: list[str],
    events: Path | None = None,
    metrics: tuple[str, int] | None = None,
    program: Sequence[str] = (sys.executable, "-m", "mthp"),
    systemd: int = NOTIFY_RELOAD,
) -> str:
    """Return the unit that runs ``mthp daemon`` with `arguments`.

    Args:
        events: file of the event log, in a writable directory.
        metrics: (host, port) of the metrics page; the unit blocks other machines if it is a loopback address.
        program: command line that starts mthp.
        systemd: release for which the unit is written.
    """
    # systemd ignores a line with an unknown type, and then also READY=1 and reloads.
    kind = "Type=notify-reload" if systemd >= NOTIFY_RELOAD else "Type=notify\nExecReload=/bin/kill -HUP $MAINPID"
    command = shlex.join([*program, "daemon", *arguments])
    reasons = "\n".join(f"#   {name}: {reason}" for name, reason in CAPABILITIES.items())
    capabilities = " ".join(CAPABILITIES)
    local = metrics is None or metrics[0] == "localhost" or metrics[0] == "::1" or metrics[0].startswith("127.")
    network = "IPAddressDeny=any\nIPAddressAllow=localhost" if local else "# Other machines may read the metrics page."
    writable = "" if events is None or events.is_relative_to(LOGS) else f"ReadWritePaths={events.parent}\n"
    return _UNIT.format(
        kind=kind, command=command, reasons=reasons, capabilities=capabilities, writable=writable, network=network
    )


_UNIT = """\
[Unit]
Description=khugepaged in user space: collapses the memory of chosen processes to large folios
Documentation=man:mthp-daemon(1)
ConditionPathIsDirectory=/sys/kernel/mm/transparent_hugepage

[Service]
{kind}
NotifyAccess=main
ExecStart={command}
SyslogIdentifier=mthp
Restart=on-failure
WatchdogSec=120
TimeoutStopSec=30
OOMScoreAdjust=500
MemoryMax=512M
LimitNOFILE=524288

# The journal of switches and the lock are here; the next run puts back the switches of a killed one.
RuntimeDirectory=mthp
RuntimeDirectoryMode=0755
RuntimeDirectoryPreserve=yes
LogsDirectory=mthp

# What it needs:
{reasons}
CapabilityBoundingSet={capabilities}
NoNewPrivileges=yes

# What it does not need. It writes below /sys/kernel (switches, tunables and an instance of DAMON, all journaled; folios
# are split through debugfs) and to the memory of processes, so /sys stays writable; it looks into all processes, so
# /proc and PIDs stay visible. It enters another cgroup namespace only from that of a container, where paths of the host
# are hidden: not from a unit, so that setns(2) stays forbidden.
ProtectSystem=strict
{writable}ProtectHome=read-only
PrivateTmp=yes
PrivateDevices=yes
ProtectClock=yes
ProtectHostname=yes
ProtectKernelLogs=yes
ProtectKernelModules=yes
ProtectControlGroups=yes
RestrictNamespaces=yes
RestrictRealtime=no
RestrictSUIDSGID=yes
LockPersonality=yes
RestrictAddressFamilies=AF_UNIX AF_INET AF_INET6 AF_NETLINK
SystemCallArchitectures=native
SystemCallFilter=@system-service @debug process_madvise process_mrelease pidfd_open pidfd_getfd userfaultfd kcmp
SystemCallErrorNumber=EPERM
UMask=0027
{network}

[Install]
WantedBy=multi-user.target
"""


def install(text: str, directory: Path = DIRECTORY) -> Path:
    """Write the unit `text`, in place of an older one or of the link that masks it, and return its path.

    Raises:
        NotPermittedError: this process may not write to the directory.
        MthpError: there is no such directory, or the file cannot be written.
    """
    path = directory / NAME
    if not directory.is_dir():
        raise MthpError(f"directory {directory} does not exist", help="this machine seems to have no systemd")
    if not os.access(directory, os.W_OK):
        raise NotPermittedError(f"{path} cannot be written", help="run as root")
    write_whole(path, text.encode(), overwrite=True)
    return path


class Notifier:
    """Notifies the service manager, if there is one, as sd_notify(3) does: a datagram of assignments to its socket.

    Args:
        environment: environment of the process, with ``NOTIFY_SOCKET`` and ``WATCHDOG_USEC``.

    Attributes:
        watchdog: seconds between two signs of life, half of the manager's limit; None without a watchdog.
    """

    def __init__(self, environment: dict[str, str] | None = None) -> None:
        values = dict(os.environ) if environment is None else environment
        self._address = values.get("NOTIFY_SOCKET", "")
        usec = values.get("WATCHDOG_USEC", "")
        # A child inherits the variables, and the watchdog means its parent (sd_watchdog_enabled(3)).
        mine = values.get("WATCHDOG_PID", str(os.getpid())) == str(os.getpid())
        allowed = re.fullmatch("[0-9]{1,18}", usec)
        self.watchdog = int(usec) / 2e6 if allowed and mine and self._address else None

    def send(self, *assignments: str) -> None:
        """Send assignments such as ``READY=1`` (sd_notify(3)); never fails."""
        if not self._address:
            return
        # A name that begins with @ is in the abstract namespace (unix(7)).
        address = "\0" + self._address[1:] if self._address.startswith("@") else self._address
        with (
            contextlib.suppress(OSError),
            socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock,
        ):
            # A manager that does not read must not stop the daemon.
            sock.setblocking(False)
            sock.sendto("\n".join(assignments).encode(), address)
