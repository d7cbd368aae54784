"""An HTTP server for one page, which no client can make large: its connections are bounded, in number and in time.

A connection has a thread, as in wsgiref, which the official client of Prometheus uses. There it may have one for
ever: a client that connects and sends nothing holds it. Here a connection ends after :data:`CONNECTION_SECONDS`
whatever it does, and when all places are taken the oldest makes room, since one that is honest takes milliseconds.
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
"""Threads at a time. Prometheus asks with one connection every some seconds."""

CONNECTION_SECONDS = 10.0
"""How long a connection may take from its beginning to its end: Prometheus itself waits 10 s by default."""

_ROOM_SECONDS = 1.0
"""How long a new connection waits for the thread of the oldest to end."""


class _Handler(WSGIRequestHandler):
    timeout = CONNECTION_SECONDS

    def log_message(self, format: str, *args: Any) -> None:
        """Log nothing: who asks for metrics does so every few seconds."""


class BoundedServer(WSGIServer):
    """Serves a WSGI application; :meth:`serve_forever` runs it.

    Args:
        host: name or address to listen at, of IPv4 or IPv6.
        port: to listen at; 0 for any.
        application: the WSGI application.
        entered: called first in each thread that serves.

    Raises:
        OSError: the address cannot be listened at.
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
        """Bind, and do not look one's own name up, which may take seconds."""
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = str(self.server_address[0]), int(self.server_address[1])
        self.setup_environ()

    def process_request(self, request: Any, client_address: Any) -> None:
        """Give a connection a thread, if need be that of the oldest one."""
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
        # A client that went away is nothing to report.
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
        """Close a connection, and have its place free."""
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
    """Make a connection end: its thread reads the end of it, and cannot write."""
    if request is not None:
        # One that its client has closed is about to end.
        with contextlib.suppress(OSError):
            request.shutdown(socket.SHUT_RDWR)
