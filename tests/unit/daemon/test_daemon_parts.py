"""The daemon's smaller parts: lock, socket, event log, signs of life, the system's knobs, the unit, metrics."""

from __future__ import annotations

import json
import os
import re
import selectors
import shutil
import socket
import stat
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mthp.daemon.config import parse_endpoint
from mthp.daemon.ipc import MAX_CLIENTS, MAX_REQUEST, ControlSocket, DaemonLock, ask
from mthp.daemon.knobs import SystemKnobs
from mthp.daemon.systemd import CAPABILITIES, Notifier, install, systemd_release, unit_text
from mthp.daemon.telemetry import PAUSE_BUCKETS, EventLog, Pauses
from mthp.errors import MthpError, NotPermittedError, UsageError
from mthp.geometry import X86_64
from mthp.linux.sysfs import ThpSysfs

# The lock.


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
    with pytest.raises(NotPermittedError, match="no file of its own"):
        DaemonLock(tmp_path)
    assert (tmp_path / "precious").read_text() == "precious"


def test_a_lock_that_cannot_be_made_is_a_matter_of_rights(tmp_path: Path) -> None:
    with pytest.raises(NotPermittedError):
        DaemonLock(tmp_path / "none")


# The socket.


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
    with pytest.raises(UsageError, match="is taken"):
        ControlSocket(server.path, selector, lambda request: {})
    file = tmp_path / "file"
    file.write_text("precious")
    with pytest.raises(UsageError, match="is no socket"):
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


# The event log.


def test_events_are_lines_and_a_log_that_was_moved_away_is_opened_anew(tmp_path: Path) -> None:
    said: list[str] = []
    path = tmp_path / "events"
    log = EventLog(path, said.append)
    log.write("start", pid=1)
    path.rename(tmp_path / "old")
    log.reopen()
    log.write("stop", pid=2)
    log.close()
    assert json.loads((tmp_path / "old").read_text())["event"] == "start"
    assert json.loads(path.read_text())["pid"] == 2
    assert said == []


def test_a_full_disk_is_said_once_and_what_is_missing_afterwards() -> None:
    said: list[str] = []
    log = EventLog(Path("/dev/full"), said.append)
    for number in range(5):
        log.write("collapsed", number=number)
    assert log.lost == 5
    assert len(said) == 1
    assert "No space left" in said[0]
    log.path = Path("/dev/null")
    log.reopen()
    log.write("collapsed")
    assert log.lost == 0
    assert "5 events are missing" in said[1]
    log.close()


def test_a_line_that_was_cut_short_is_ended_before_the_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "events"
    log = EventLog(path, lambda line: None)
    real = os.write
    monkeypatch.setattr(os, "write", lambda fd, text: real(fd, text[:10]))
    log.write("one")
    monkeypatch.setattr(os, "write", real)
    log.write("two")
    log.close()
    lines = path.read_bytes().split(b"\n")
    assert len(lines[0]) == 10
    assert [json.loads(line)["event"] for line in lines[1:-1]] == ["lost", "two"]


def test_a_log_that_leads_elsewhere_is_refused(tmp_path: Path) -> None:
    """Who may write in its directory could have the daemon write to any file."""
    precious = tmp_path / "precious"
    precious.write_text("precious")
    log = tmp_path / "events.jsonl"
    log.hardlink_to(precious)
    with pytest.raises(UsageError, match="several names"):
        EventLog(log, print)
    log.unlink()
    log.symlink_to(precious)
    if os.geteuid() == 0:
        os.lchown(log, 65534, 65534)
        with pytest.raises(UsageError, match="symbolic links"):
            EventLog(log, print)
        os.lchown(log, 0, 0)
    assert precious.read_text() == "precious"
    EventLog(log, print).close()


def test_a_log_that_is_a_pipe_holds_nobody_up(tmp_path: Path) -> None:
    pipe = tmp_path / "events"
    os.mkfifo(pipe)
    with pytest.raises(UsageError, match=re.escape(str(pipe))):
        EventLog(pipe, print)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    log = EventLog(pipe, print)
    while not log.lost:
        log.write("event", text="x" * 4096)
    os.close(reader)
    log.write("event")
    log.close()


def test_a_log_that_cannot_be_opened_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="event log"):
        EventLog(tmp_path / "none" / "events", lambda line: None)


# Signs of life.


def test_a_service_manager_is_told(tmp_path: Path) -> None:
    path = str(tmp_path / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind(path)
        notifier = Notifier({"NOTIFY_SOCKET": path, "WATCHDOG_USEC": "3000000"})
        assert notifier.watchdog == 1.5
        notifier.ready("fine")
        notifier.alive("still")
        notifier.stopping()
        assert [sock.recv(100).split(b"\n")[0] for _ in range(3)] == [b"READY=1", b"WATCHDOG=1", b"STOPPING=1"]


def test_without_a_manager_or_for_another_process_there_is_nothing_to_tell() -> None:
    assert Notifier({}).watchdog is None
    Notifier({}).ready("")
    assert Notifier({"NOTIFY_SOCKET": "@x", "WATCHDOG_USEC": "1", "WATCHDOG_PID": "1"}).watchdog is None
    Notifier({"NOTIFY_SOCKET": "/nowhere/at/all"}).ready("")


# The system's knobs.


@pytest.fixture
def sysfs(tmp_path: Path) -> Path:
    root = tmp_path / "thp"
    (root / "hugepages-64kB").mkdir(parents=True)
    (root / "khugepaged").mkdir()
    (root / "enabled").write_text("always [madvise] never\n")
    (root / "hugepages-64kB/enabled").write_text("always inherit madvise [never]\n")
    (root / "khugepaged/max_ptes_none").write_text("511\n")
    return root


def test_switches_and_tunables_are_followed_live(sysfs: Path) -> None:
    knobs = SystemKnobs(ThpSysfs(sysfs), X86_64)
    assert not knobs.refresh()
    (sysfs / "hugepages-64kB/enabled").write_text("[always] inherit madvise never\n")
    (sysfs / "khugepaged/max_ptes_none").write_text("7\n")
    version = knobs.version
    assert knobs.refresh()
    assert knobs.switches.orders(advised=False) == (4,)
    assert knobs.tunables.max_ptes_none == 7
    assert knobs.version == version + 1
    knobs.close()


def test_what_a_window_of_another_run_has_set_is_not_taken_for_a_choice(sysfs: Path, tmp_path: Path) -> None:
    fcntl = pytest.importorskip("fcntl")
    lock = tmp_path / "switches.lock"
    lock.touch()
    knobs = SystemKnobs(ThpSysfs(sysfs), X86_64, lock)
    with lock.open("r+") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        (sysfs / "hugepages-64kB/enabled").write_text("[always] inherit madvise never\n")
        assert not knobs.refresh()
        assert knobs.switches.orders(advised=False) == ()
        (sysfs / "hugepages-64kB/enabled").write_text("always inherit [madvise] never\n")
    assert knobs.refresh()
    assert knobs.switches.orders(advised=True) == (4,)
    knobs.close()


def test_words_of_a_newer_kernel_leave_what_was_known(sysfs: Path) -> None:
    knobs = SystemKnobs(ThpSysfs(sysfs), X86_64)
    (sysfs / "hugepages-64kB/enabled").write_text("always [sometimes] never\n")
    (sysfs / "khugepaged/max_ptes_none").write_text("100000\n")
    knobs.refresh()
    assert knobs.switches.sizes[4] == "never"
    assert knobs.tunables.max_ptes_none == 511
    knobs.close()


# The unit.


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
        pytest.skip(f"systemd-analyze cannot judge units here: {done.stderr.strip()[:200]}")
    assert done.stderr == ""
    verified = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", str(unit)], capture_output=True, text=True, check=False
    )
    assert (verified.returncode, verified.stderr) == (0, "")
    level = float(done.stdout.rsplit("mthp.service: ", 1)[1].split()[0])
    assert level < 5.0


# Pauses, and where metrics are served.


def test_pauses_fall_into_their_buckets() -> None:
    pauses = Pauses()
    pauses.add([10_000, 1_000_000, 1_000_001, 10**9])
    assert sum(pauses.buckets) == pauses.count == 4
    assert pauses.buckets[0] == 1
    assert pauses.buckets[PAUSE_BUCKETS.index(1e-3)] == 1
    assert pauses.buckets[PAUSE_BUCKETS.index(2.5e-3)] == 1
    assert pauses.buckets[-1] == 1
    summary = pauses.durations
    assert summary.max == 1.0
    assert summary.p50 <= summary.p99 <= summary.max
    assert Pauses().durations.p99 == 0.0


@pytest.mark.parametrize(
    ("text", "endpoint"),
    [
        ("9464", ("127.0.0.1", 9464)),
        (":80", ("127.0.0.1", 80)),
        ("0.0.0.0:9464", ("0.0.0.0", 9464)),
        ("[::1]:9464", ("::1", 9464)),
        ("localhost", ("localhost", 9464)),
    ],
)
def test_metrics_are_on_the_loopback_unless_said_otherwise(text: str, endpoint: tuple[str, int]) -> None:
    assert parse_endpoint(text) == endpoint


@pytest.mark.parametrize("usec", ["9" * 5000, "x", "-1", "", "1e9"])
def test_a_watchdog_that_makes_no_sense_is_none(usec: str) -> None:
    assert Notifier({"NOTIFY_SOCKET": "/nowhere", "WATCHDOG_USEC": usec}).watchdog is None


@pytest.mark.parametrize("text", ["9" * 5000, "host:" + "9" * 5000, "host:\u0663", "host:0", "65536"])
def test_ports_that_there_are_not(text: str) -> None:
    with pytest.raises(UsageError, match="is not an address"):
        parse_endpoint(text)
