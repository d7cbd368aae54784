"""The daemon's socket: ``mthp status``, ``pause`` and ``resume`` ask here.

A client sends one JSON object in a line, ``{"command": "status"}``, and gets one back; then it may send the next.
Nobody can hold the daemon up: a client that sends too much, or does not read what it is given, is dropped.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import selectors
import socket
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mthp.errors import MthpError, NotPermittedError, UsageError

NAME = "daemon.sock"
MODE = 0o660

MAX_REQUEST = 4096
MAX_CLIENTS = 32
MAX_UNREAD = 16 << 20
"""Bytes of answers that wait for one client at most."""

CLIENT_TIMEOUT = 5.0

Answer = Callable[[dict[str, Any]], dict[str, Any]]


class ControlSocket:
    """Listens, and answers.

    Args:
        path: of the socket.
        selector: of the main loop; what is registered in it has a function as its data, called with the events.
        answer: gives the answer to a request.

    Raises:
        UsageError: the socket is taken, or cannot be made.
    """

    def __init__(self, path: Path, selector: selectors.BaseSelector, answer: Answer) -> None:
        self._path, self._selector, self._answer = path, selector, answer
        self._clients: dict[int, _Client] = {}
        self._socket = _bound(path)
        self._socket.setblocking(False)
        self._socket.listen(MAX_CLIENTS)
        selector.register(self._socket, selectors.EVENT_READ, self._accept)

    def _accept(self, _events: int) -> None:
        # Nobody is there any more, or there is no file descriptor left: no reason to end.
        with contextlib.suppress(OSError):
            connection, _ = self._socket.accept()
            if len(self._clients) >= MAX_CLIENTS:
                connection.close()
                return
            client = _Client(connection, self._answer)
            self._clients[client.fileno()] = client
            self._selector.register(connection, selectors.EVENT_READ, lambda events: self._serve(client, events))

    def _serve(self, client: _Client, events: int) -> None:
        if client.serve(events):
            wanted = selectors.EVENT_READ | (selectors.EVENT_WRITE if client.unread else 0)
            self._selector.modify(client.socket, wanted, lambda events: self._serve(client, events))
        else:
            self._drop(client)

    def _drop(self, client: _Client) -> None:
        self._clients.pop(client.fileno(), None)
        self._selector.unregister(client.socket)
        client.socket.close()

    def close(self) -> None:
        """Stop listening; the socket's file is removed."""
        for client in list(self._clients.values()):
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

    def fileno(self) -> int:
        return self.socket.fileno()

    def serve(self, events: int) -> bool:
        """Read, answer and write what can be; False once it is to be dropped."""
        try:
            if events & selectors.EVENT_READ and not self._read():
                return False
            if self.unread:
                self.unread = self.unread[self.socket.send(self.unread) :]
        except BlockingIOError:
            pass
        except OSError:
            return False
        return len(self.unread) <= MAX_UNREAD

    def _read(self) -> bool:
        part = self.socket.recv(MAX_REQUEST)
        self._asked += part
        while b"\n" in self._asked:
            line, _, self._asked = self._asked.partition(b"\n")
            self.unread += json.dumps(_answered(line, self._answer)).encode() + b"\n"
        return bool(part) and len(self._asked) <= MAX_REQUEST


def _answered(line: bytes, answer: Answer) -> dict[str, Any]:
    try:
        request = json.loads(line)
    except ValueError:
        request = None
    if not isinstance(request, dict):
        return {"error": "a request is one JSON object in a line", "help": '{"command": "status"}'}
    try:
        return answer(request)
    except MthpError as error:
        return {"error": error.message, "help": error.help}
    except Exception as error:  # A question that cannot be answered is no reason to end.
        return {"error": f"an error of mthp: {error!r}", "help": ""}


def _bound(path: Path) -> socket.socket:
    """A socket bound to `path`. What a daemon that was killed left there is removed; anything else is not."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    try:
        _clear(path)
        # The mode is right from the beginning on, not a moment later.
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
            f"socket {path}: {error.strerror or error}", help="give another directory with --run-dir"
        ) from error
    return sock


def _clear(path: Path) -> None:
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(mode):
        raise UsageError(f"{path} is there already, and is no socket", help="remove it, or give another --run-dir")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        sock.settimeout(1.0)
        try:
            sock.connect(str(path))
        except OSError as error:
            if error.errno != errno.ECONNREFUSED:
                raise
            path.unlink()
            return
    raise UsageError(f"socket {path} is taken: somebody listens there", help="`mthp status` asks who it is")


def ask(path: Path, command: str, **values: Any) -> dict[str, Any]:
    """Ask the running daemon, and give its answer.

    Raises:
        MthpError: no daemon is running, it does not answer, or it refuses.
        NotPermittedError: its socket is not ours to use.
    """
    request = json.dumps({"command": command} | values).encode() + b"\n"
    parts: list[bytes] = []
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        sock.settimeout(CLIENT_TIMEOUT)
        try:
            sock.connect(str(path))
            sock.sendall(request)
            while not parts or not parts[-1].endswith(b"\n"):
                part = sock.recv(1 << 16)
                if not part:
                    break
                parts.append(part)
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
        answer = json.loads(b"".join(parts))
    except ValueError:
        raise MthpError(f"the daemon at {path} ended in the middle of its answer") from None
    if "error" in answer:
        raise MthpError(answer["error"], help=answer.get("help", ""))
    assert isinstance(answer, dict)
    return answer
