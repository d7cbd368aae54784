"""A running ``mthp daemon`` for live tests, with a lock and a socket of its own."""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import sys
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from mthp.daemon.ipc import SOCKET_NAME, ask
from mthp.errors import MthpError
from waiting import PATIENCE, until


class RunningDaemon:
    """The daemon as a process. A context manager: leaving it ends the daemon.

    Args:
        directory: for its lock, its socket and its output.
        arguments: of ``mthp daemon``.
        wait: wait until it answers.

    Attributes:
        process: the process.
    """

    def __init__(self, directory: Path, *arguments: str, wait: bool = True, prefix: tuple[str, ...] = ()) -> None:
        self._directory = directory
        self._output = directory / "daemon.err"
        directory.mkdir(exist_ok=True)
        command = [*prefix, sys.executable, "-m", "mthp", "daemon", "--run-dir", str(directory), *arguments]
        with self._output.open("ab") as output:
            # A process group of its own, as a shell makes one: SIGTSTP stops no process of an orphaned group.
            self.process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, process_group=0
            )
        if wait:
            until(self._answers, lambda: f"the daemon to answer: {self.said}")

    def _answers(self) -> bool:
        assert self.process.poll() is None, f"it ended: {self.said}"
        with contextlib.suppress(MthpError):
            return bool(ask(self.socket, "status"))
        return False

    @property
    def socket(self) -> Path:
        """Return the path of its socket."""
        return self._directory / SOCKET_NAME

    @property
    def said(self) -> str:
        """Return its output."""
        return self._output.read_text()

    def status(self) -> dict[str, Any]:
        """Return the JSON of ``mthp status``."""
        return ask(self.socket, "status")

    def target(self, pid: int) -> dict[str, Any] | None:
        """Return the status of one target."""
        return next((target for target in self.status()["targets"] if target["pid"] == pid), None)

    def collapsed(self, pid: int) -> int:
        """Bytes collapsed in one target."""
        target = self.target(pid)
        return int(target["collapsed_bytes"]) if target else 0

    def stop(self, number: int = signal.SIGTERM) -> None:
        """End it."""
        self.process.send_signal(number)
        self.process.wait(timeout=PATIENCE)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.process.poll() is None:
            self.stop()


def events_of(path: Path) -> list[dict[str, Any]]:
    """Return the whole lines of an event log."""
    return [json.loads(line) for line in path.read_text().splitlines() if line.startswith("{") and line.endswith("}")]
