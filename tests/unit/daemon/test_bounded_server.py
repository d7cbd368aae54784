"""The HTTP server of the metrics: many clients that say nothing neither hold it up nor make it large."""

from __future__ import annotations

import socket
import threading
import urllib.request
from collections.abc import Iterator
from typing import Any

import pytest

from mthp.daemon import exporter
from mthp.daemon.exporter import MAX_CONNECTIONS, BoundedServer
from waiting import wait_for


def page(environment: Any, start: Any) -> list[bytes]:
    start("200 OK", [("Content-Type", "text/plain")])
    return [environment["PATH_INFO"].encode()]


@pytest.fixture
def server() -> Iterator[BoundedServer]:
    made = BoundedServer("127.0.0.1", 0, page)
    thread = threading.Thread(target=made.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    yield made
    made.shutdown()
    made.server_close()
    thread.join()


def asked(server: BoundedServer) -> bytes:
    with urllib.request.urlopen(f"http://127.0.0.1:{server.server_port}/metrics", timeout=60) as answer:
        body: bytes = answer.read()
    return body


def connected(server: BoundedServer) -> socket.socket:
    return socket.create_connection(("127.0.0.1", server.server_port))


def test_half_open_connections_are_bounded(server: BoundedServer) -> None:
    before = threading.active_count()
    silent = []
    for _ in range(300):
        silent.append(connected(server))
        assert threading.active_count() <= before + MAX_CONNECTIONS + 1
    assert asked(server) == b"/metrics"
    for each in silent:
        each.close()
    assert asked(server) == b"/metrics"
    server.server_close()
    assert threading.active_count() <= before


def test_a_client_that_trickles_is_ended(server: BoundedServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exporter, "CONNECTION_SECONDS", 0.2)
    with connected(server) as slow:
        slow.settimeout(0.02)
        ended = False

        def trickle() -> bool:
            nonlocal ended
            try:
                slow.sendall(b"G")
                ended = ended or slow.recv(1) == b""
            except TimeoutError:
                pass
            except OSError:
                ended = True
            return ended

        assert wait_for(trickle)
    assert asked(server) == b"/metrics"
