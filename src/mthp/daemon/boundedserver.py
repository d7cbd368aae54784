"""An HTTP server for one page, with limits on the number and the time of connections.

A connection has a thread, as in wsgiref, which the official client of Prometheus uses. There a client that connects and
sends nothing holds its thread forever. Here a connection ends after :data:`CONNECTION_SECONDS`, and when all places are
taken the oldest is closed, because an honest one takes milliseconds.
"""

from __future__ import annotations

import contextlib
import socket
import socketserver
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer

MAX_CONNECTIONS = 16
"""Most threads at a time. Prometheus uses one connection every few seconds."""

CONNECTION_SECONDS = 10.0
"""Seconds from the beginning of a connection to its end: Prometheus itself waits 10 s by default."""

_ROOM_SECONDS = 1.0
"""Seconds that a new connection waits for the thread of the oldest to end."""


class _Handler(WSGIRequestHandler):
    timeout = CONNECTION_SECONDS

    def log_message(self, format: str, *args: Any) -> None:
        """Log nothing, because metrics are read every few seconds."""


class BoundedServer(WSGIServer):
    """Serves a WSGI application; :meth:`serve_forever` runs it.

    Args:
        host: name or address to listen at, of IPv4 or IPv6.
        port: port to listen at; 0 for any.
        application: the WSGI application.
        entered: called first in each thread that serves.

    Raises:
        OSError: the server cannot listen at the address.
    """

    request_queue_size = 128

    def __init__(
        self, host: str, port: int, application: Callable[..., Any], entered: Callable[[], None] = lambda: None
    ) -> None:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        self.address_family, address = found[0][0], found[0][4]
        self._threads = ThreadPoolExecutor(MAX_CONNECTIONS, "mthp-metrics", entered)
        self._places = threading.BoundedSemaphore(MAX_CONNECTIONS)
        self._turn = threading.Lock()
        self._open: dict[socket.socket, float] = {}
        super().__init__((str(address[0]), int(address[1])), _Handler)
        self.set_app(application)

    def server_bind(self) -> None:
        """Bind without resolving the host's own name, which may take seconds."""
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = str(self.server_address[0]), int(self.server_address[1])
        self.setup_environ()

    def process_request(self, request: Any, client_address: Any) -> None:
        """Start a thread for a connection, if necessary in place of the oldest connection."""
        if not self._places.acquire(blocking=False):
            with self._turn:
                _shut(next(iter(self._open), None))
            if not self._places.acquire(timeout=_ROOM_SECONDS):
                request.close()
                return
        with self._turn:
            self._open[request] = time.monotonic()
        self._threads.submit(self._serve, request, client_address)

    def _serve(self, request: Any, client_address: Any) -> None:
        # A client that disconnected is not worth a report.
        with contextlib.suppress(Exception):
            self.finish_request(request, client_address)
        self.shutdown_request(request)

    def server_close(self) -> None:
        """Stop listening, end all connections, and return once their threads have ended."""
        super().server_close()
        with self._turn:
            for request in self._open:
                _shut(request)
        self._threads.shutdown()

    def close_request(self, request: Any) -> None:
        """Close a connection, and free its place."""
        with self._turn:
            counted = self._open.pop(request, None)
            request.close()
        if counted is not None:
            self._places.release()

    def service_actions(self) -> None:
        """End connections that take too long; called every half second."""
        with self._turn:
            for request, since in self._open.items():
                if time.monotonic() - since > CONNECTION_SECONDS:
                    _shut(request)


def _shut(request: socket.socket | None) -> None:
    """Shut a connection down: its thread then reads the end of file, and cannot write."""
    if request is not None:
        # A connection that the client closed is about to end.
        with contextlib.suppress(OSError):
            request.shutdown(socket.SHUT_RDWR)
