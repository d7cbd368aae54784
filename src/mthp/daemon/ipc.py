"""The daemon's socket, for ``mthp status``, ``pause`` and ``resume``, and the lock that allows one daemon at a time.

A client sends one JSON object in a line, ``{"command": "status"}``, and receives one as the answer; then it may send
the next. No client can delay the daemon or another client: one that sends too much, or reads no answer, is dropped.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import selectors
import socket
import stat
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mthp.bounded import parse_json
from mthp.errors import MthpError, NotPermittedError, UsageError

SOCKET_NAME = "daemon.sock"
MODE = 0o660

MAX_REQUEST = 4096
MAX_CLIENTS = 32
BACKLOG = 128
"""Clients in the queue of listen(2)."""

MAX_UNREAD = 16 << 20
"""Most bytes of answers that wait for one client."""

CLIENT_TIMEOUT = 5.0
"""Seconds to wait for the next part of an answer."""

ANSWER_TIMEOUT = 30.0
"""Seconds to wait for the whole answer."""

Answer = Callable[[dict[str, Any]], dict[str, Any]]


class ControlSocket:
    """Listens at the socket, and answers.

    Args:
        selector: selector of the main loop; the data of a registration is a function that is called with the events.

    Raises:
        UsageError: the socket is taken, or cannot be made.
    """

    def __init__(self, path: Path, selector: selectors.BaseSelector, answer: Answer) -> None:
        self._path, self._selector, self._answer = path, selector, answer
        # Ordered by the time of the last event, the oldest first.
        self._clients: dict[_Client, None] = {}
        self._socket = _bound(path)
        self._socket.setblocking(False)
        self._socket.listen(BACKLOG)
        selector.register(self._socket, selectors.EVENT_READ, self._accept)

    def _accept(self, _events: int) -> None:
        # The client has disconnected, or file descriptors have run out: the daemon goes on.
        with contextlib.suppress(OSError):
            connection, _ = self._socket.accept()
            if len(self._clients) >= MAX_CLIENTS:
                # The client that has been silent for longest.
                self._drop(next(iter(self._clients)))
            client = _Client(connection, self._answer)
            self._clients[client] = None
            self._selector.register(connection, selectors.EVENT_READ, lambda events: self._serve(client, events))

    def _serve(self, client: _Client, events: int) -> None:
        if client not in self._clients:
            # The client was dropped in the same round of the selector.
            return
        if not client.serve(events):
            self._drop(client)
            return
        # To the end of the order.
        self._clients.pop(client)
        self._clients[client] = None
        # A client that does not read its answer is not read from either.
        wanted = selectors.EVENT_WRITE if client.unread else selectors.EVENT_READ
        self._selector.modify(client.socket, wanted, lambda events: self._serve(client, events))

    def _drop(self, client: _Client) -> None:
        self._clients.pop(client)
        self._selector.unregister(client.socket)
        client.socket.close()

    def close(self) -> None:
        """Stop listening, and remove the socket's file."""
        for client in list(self._clients):
            self._drop(client)
        self._selector.unregister(self._socket)
        self._socket.close()
        self._path.unlink(missing_ok=True)


class _Client:
    """One connection."""

    def __init__(self, connection: socket.socket, answer: Answer) -> None:
        connection.setblocking(False)
        self.socket = connection
        self.unread = b""
        self._answer = answer
        self._asked = b""

    def serve(self, events: int) -> bool:
        """Read, answer and write without blocking. Return False if the client must be dropped."""
        try:
            if events & selectors.EVENT_READ:
                part = self.socket.recv(MAX_REQUEST)
                self._asked += part
                if not part or len(self._asked) > 2 * MAX_REQUEST:
                    return False
            # Only after the previous answer is sent, so that a client never has more than one answer in our memory.
            while self.unread or b"\n" in self._asked:
                if not self.unread:
                    line, _, self._asked = self._asked.partition(b"\n")
                    self.unread = json.dumps(_answered(line, self._answer)).encode() + b"\n"
                self.unread = self.unread[self.socket.send(self.unread) :]
        except BlockingIOError:
            pass
        except OSError:
            return False
        return len(self.unread) <= MAX_UNREAD and (b"\n" in self._asked or len(self._asked) <= MAX_REQUEST)


def _answered(line: bytes, answer: Answer) -> dict[str, Any]:
    try:
        request = parse_json(line)
    except UsageError:
        request = None
    if not isinstance(request, dict):
        return {"error": "a request is one JSON object in a line", "help": '{"command": "status"}'}
    try:
        return answer(request)
    except MthpError as error:
        return {"error": error.message, "help": error.help}
    except Exception as error:  # a failed request must not end the daemon
        return {"error": f"internal error: {error!r}", "help": ""}


def _bound(path: Path) -> socket.socket:
    """Return a socket bound to `path`, in place of the socket of a killed daemon but of no other file."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    try:
        _clear(path)
        # bind(2) creates the file with the right mode, so that there is no moment with a wider one.
        mask = os.umask(0o777 & ~MODE)
        try:
            sock.bind(str(path))
        finally:
            os.umask(mask)
    except (OSError, MthpError) as error:
        sock.close()
        if isinstance(error, MthpError):
            raise
        raise UsageError(
            f"socket {path}: {error.strerror or error}", help="use another directory with --run-dir"
        ) from error
    return sock


def _clear(path: Path) -> None:
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(mode):
        raise UsageError(f"{path} exists and is not a socket", help="remove it, or use another --run-dir")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        sock.settimeout(1.0)
        try:
            sock.connect(str(path))
        except OSError as error:
            # Refused: nothing listens, so the socket is that of a killed daemon.
            if error.errno != errno.ECONNREFUSED:
                raise
            path.unlink()
            return
    raise UsageError(
        f"socket {path} is in use by another process", help="`mthp status` shows whether it is a daemon of mthp"
    )


def _connect(sock: socket.socket, path: str, deadline: float) -> None:
    """Connect `sock`, and retry while the queue is full, because connect(2) of a local socket does not wait for it."""
    while True:
        try:
            sock.connect(path)
            return
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise TimeoutError from None
            time.sleep(0.01)


def ask(path: Path, command: str, **values: Any) -> dict[str, Any]:
    """Send `command` to the running daemon, and return its answer.

    Raises:
        MthpError: no daemon is running, it does not answer, or it refuses.
        NotPermittedError: this user may not use its socket.
    """
    try:
        text = _exchanged(path, json.dumps({"command": command} | values).encode() + b"\n")
    except PermissionError as error:
        raise NotPermittedError(
            f"not permitted to ask the daemon at {path}", help="run as root, or as a member of the socket's group"
        ) from error
    except TimeoutError:
        raise MthpError(f"the daemon at {path} does not answer", help="see its log: journalctl -u mthp") from None
    except OSError as error:
        raise MthpError(
            f"no daemon is running at {path}: {error.strerror}",
            help="start one: mthp daemon, or systemctl start mthp",
        ) from error
    try:
        answer = parse_json(text)
    except UsageError:
        raise MthpError(f"the daemon at {path} ended in the middle of its answer") from None
    if not isinstance(answer, dict):
        raise MthpError(f"the process that listens at {path} is not a daemon of mthp")
    if "error" in answer:
        raise MthpError(str(answer["error"]), help=str(answer.get("help", "")))
    return answer


def _exchanged(path: Path, request: bytes) -> bytes:
    """Send a request to the socket, and return the answer, or the part of it that came before the other end closed."""
    deadline = time.monotonic() + ANSWER_TIMEOUT
    answer = bytearray()
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        sock.settimeout(CLIENT_TIMEOUT)
        _connect(sock, str(path), deadline)
        sock.sendall(request)
        while not answer.endswith(b"\n") and (part := sock.recv(1 << 16)):
            answer += part
            if len(answer) > MAX_UNREAD or time.monotonic() > deadline:
                raise MthpError(
                    f"the answer of the process that listens at {path} does not end",
                    help="find the process with: ss -xlp",
                )
    return bytes(answer)


LOCK_NAME = "daemon.lock"


class DaemonLock:
    """A lock file that names its holder.

    It is held from the making of this object until :meth:`close`; the kernel releases it however the process ends.

    Args:
        directory: directory of the lock file; it is made if there is none.

    Raises:
        MthpError: another daemon holds it.
        NotPermittedError: the file cannot be made.
    """

    def __init__(self, directory: Path) -> None:
        path = directory / LOCK_NAME
        try:
            directory.mkdir(mode=0o755, parents=True, exist_ok=True)
            self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
        except OSError as error:
            raise NotPermittedError(
                f"{path}: {error.strerror}", help="run as root, or use a directory of your own with --run-dir"
            ) from error
        status = os.fstat(self._fd)
        if not stat.S_ISREG(status.st_mode) or status.st_nlink != 1:
            # The file is written to, and under another name it might belong to another user.
            os.close(self._fd)
            raise NotPermittedError(
                f"{path} is not a file with a single name", help="remove it, or use another --run-dir"
            )
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(self._fd, 64, 0).decode(errors="replace").strip()
            os.close(self._fd)
            raise MthpError(
                f"another mthp daemon is running{f': process {holder}' if holder else ''}",
                help="`mthp status` shows its work; stop it first (systemctl stop mthp, or SIGTERM)",
            ) from None
        # Only with the lock: until then the text is that of the holder.
        os.ftruncate(self._fd, 0)
        os.pwrite(self._fd, b"%d\n" % os.getpid(), 0)

    def close(self) -> None:
        """Release the lock."""
        os.ftruncate(self._fd, 0)
        os.close(self._fd)
