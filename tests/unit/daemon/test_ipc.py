"""The lock of the daemon, and its socket against clients of every kind."""

from __future__ import annotations

import json
import os
import selectors
import socket
import stat
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mthp.daemon.ipc import MAX_CLIENTS, MAX_REQUEST, ControlSocket, DaemonLock, ask
from mthp.errors import MthpError, NotPermittedError, UsageError


def test_a_second_daemon_is_told_who_the_first_is(tmp_path: Path) -> None:
    lock = DaemonLock(tmp_path)
    with pytest.raises(MthpError, match=f"another mthp daemon is running: process {os.getpid()}") as caught:
        DaemonLock(tmp_path)
    assert "mthp status" in caught.value.help
    lock.close()
    DaemonLock(tmp_path).close()


def test_a_lock_with_another_name_is_not_written_to(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("precious")
    (tmp_path / "daemon.lock").hardlink_to(tmp_path / "precious")
    with pytest.raises(NotPermittedError, match="not a file with a single name"):
        DaemonLock(tmp_path)
    assert (tmp_path / "precious").read_text() == "precious"


def test_a_lock_that_cannot_be_made_is_a_matter_of_rights(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(NotPermittedError):
        DaemonLock(tmp_path / "file" / "none")


class Server:
    """A control socket, served by a thread."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.selector = selectors.DefaultSelector()
        self.control = ControlSocket(path, self.selector, self.answer)
        self.asked: list[dict[str, Any]] = []
        self._stop = False
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        self.asked.append(request)
        if request.get("command") == "no":
            raise UsageError("not that", help="this")
        return {"got": request, "filler": "x" * request.get("size", 0)}

    def _run(self) -> None:
        while not self._stop:
            for key, events in self.selector.select(0.02):
                key.data(events)

    def close(self) -> None:
        self._stop = True
        self._thread.join()
        self.control.close()
        self.selector.close()


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    made = Server(tmp_path / "s.sock")
    yield made
    made.close()


def test_it_answers_and_refuses(server: Server) -> None:
    assert ask(server.path, "status", size=3 << 20)["got"]["command"] == "status"
    with pytest.raises(MthpError, match="not that") as caught:
        ask(server.path, "no")
    assert caught.value.help == "this"
    assert stat.S_IMODE(server.path.stat().st_mode) == 0o660


def test_what_is_no_request_is_answered_and_what_is_too_long_is_dropped(server: Server) -> None:
    with socket.socket(socket.AF_UNIX) as sock:
        sock.connect(str(server.path))
        sock.sendall(b"what?\n[]\n")
        lines = b""
        while lines.count(b"\n") < 2:
            lines += sock.recv(4096)
        assert all("error" in json.loads(line) for line in lines.splitlines())
        sock.sendall(b"x" * (MAX_REQUEST + 1))
        assert sock.recv(10) == b""
    assert ask(server.path, "status")


def test_clients_that_say_nothing_or_do_not_read_hold_nobody_up(server: Server) -> None:
    silent = [socket.socket(socket.AF_UNIX) for _ in range(3)]
    for each in silent:
        each.connect(str(server.path))
    silent[0].sendall(b'{"command": "status", "size": 10000000}\n')
    silent[1].sendall(b'{"comm')
    assert ask(server.path, "status")["got"]
    for each in silent:
        each.close()
    assert ask(server.path, "status")["got"]


def test_clients_that_are_idle_make_room_for_others(server: Server) -> None:
    idle = [socket.socket(socket.AF_UNIX) for _ in range(3 * MAX_CLIENTS)]
    for each in idle:
        each.connect(str(server.path))
        each.sendall(b'{"comm')
    assert ask(server.path, "status")["got"]
    # One that is not idle keeps its place.
    with socket.socket(socket.AF_UNIX) as lively:
        lively.connect(str(server.path))
        for each in idle[: 2 * MAX_CLIENTS]:
            lively.sendall(b'{"command": "status"}\n')
            assert lively.recv(4096).endswith(b"\n")
            each.close()
            with socket.socket(socket.AF_UNIX) as more:
                more.connect(str(server.path))
                assert ask(server.path, "status")["got"]
    for each in idle:
        each.close()


def test_many_requests_at_once_take_no_more_memory_than_one(server: Server) -> None:
    asked = b'{"command": "status", "size": 8000000}\n' * 100
    with socket.socket(socket.AF_UNIX) as sock:
        sock.connect(str(server.path))
        sock.sendall(asked[: MAX_REQUEST - MAX_REQUEST % 39])
        assert ask(server.path, "status")["got"]
        # Answers that are not read are not made.
        assert len(server.asked) <= 3
    with socket.socket(socket.AF_UNIX) as sock:
        sock.connect(str(server.path))
        sock.sendall(b'{"command": "status"}\n' * 50)
        lines = b""
        while lines.count(b"\n") < 50:
            lines += sock.recv(1 << 16)


@pytest.mark.parametrize("line", [b"[" * 2000, b'{"a":' * 700, b"9" * 3000, b"\xff", b"\x00", b'{"command": [[]]}'])
def test_a_line_that_is_made_to_hurt_is_answered(server: Server, line: bytes) -> None:
    with socket.socket(socket.AF_UNIX) as sock:
        sock.connect(str(server.path))
        sock.sendall(line + b"\n")
        assert json.loads(sock.recv(1 << 16))
    assert ask(server.path, "status")["got"]


@pytest.mark.parametrize(
    "answer", [b"[]\n", b"null\n", b"[" * 5000 + b"\n", b'{"error": {"a": 1}}\n', b"\xff\n", b"", b"{"]
)
def test_an_answer_that_makes_no_sense_is_an_error(tmp_path: Path, answer: bytes) -> None:
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(tmp_path / "daemon.sock"))
        listening.listen()

        def speak() -> None:
            connection, _ = listening.accept()
            with connection:
                connection.recv(100)
                connection.sendall(answer)

        thread = threading.Thread(target=speak)
        thread.start()
        with pytest.raises(MthpError):
            ask(tmp_path / "daemon.sock", "status")
        thread.join()


def test_a_socket_that_is_taken_is_left_alone_and_a_dead_one_is_not(server: Server, tmp_path: Path) -> None:
    selector = selectors.DefaultSelector()
    with pytest.raises(UsageError, match="is in use"):
        ControlSocket(server.path, selector, lambda request: {})
    file = tmp_path / "file"
    file.write_text("precious")
    with pytest.raises(UsageError, match="is not a socket"):
        ControlSocket(file, selector, lambda request: {})
    assert file.read_text() == "precious"
    dead = tmp_path / "dead.sock"
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(dead))
    ControlSocket(dead, selector, lambda request: {}).close()
    assert not dead.exists()
    selector.close()


def test_asking_without_a_daemon_says_how_to_start_one(tmp_path: Path) -> None:
    with pytest.raises(MthpError, match="no daemon is running") as caught:
        ask(tmp_path / "none", "status")
    assert "mthp daemon" in caught.value.help
