"""Notifications to a service manager: sd_notify(3), a datagram of assignments to the socket that it names."""

from __future__ import annotations

import contextlib
import os
import re
import socket
import time


class Notifier:
    """Notifies the service manager, if there is one.

    Args:
        environment: environment of the process, with ``NOTIFY_SOCKET`` and ``WATCHDOG_USEC``.

    Attributes:
        watchdog: seconds between two signs of life, half of the manager's limit; None without a watchdog.
    """

    def __init__(self, environment: dict[str, str] | None = None) -> None:
        values = dict(os.environ) if environment is None else environment
        self._address = values.get("NOTIFY_SOCKET", "")
        usec = values.get("WATCHDOG_USEC", "")
        mine = values.get("WATCHDOG_PID", str(os.getpid())) == str(os.getpid())
        allowed = re.fullmatch("[0-9]{1,18}", usec)
        self.watchdog = int(usec) / 2e6 if allowed and mine and self._address else None

    def ready(self, status: str) -> None:
        """Notify that the daemon works."""
        self._tell("READY=1", f"STATUS={status}")

    def reloading(self) -> None:
        """Notify that the rules are being read again; :meth:`ready` follows."""
        self._tell("RELOADING=1", f"MONOTONIC_USEC={time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000}")

    def stopping(self) -> None:
        """Notify that the daemon is about to end."""
        self._tell("STOPPING=1")

    def alive(self, status: str) -> None:
        """Send a sign of life."""
        self._tell("WATCHDOG=1", f"STATUS={status}")

    def _tell(self, *assignments: str) -> None:
        if not self._address:
            return
        # A name that begins with @ is in the abstract namespace (unix(7)).
        address = "\0" + self._address[1:] if self._address.startswith("@") else self._address
        with (
            contextlib.suppress(OSError),
            socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock,
        ):
            sock.setblocking(False)
            sock.sendto("\n".join(assignments).encode(), address)
