"""The daemon's counters as Prometheus metrics, through the official client (the extra ``mthp[daemon]``).

The client's objects are made from the daemon's own counters when the page is read, so nothing is counted twice and a
page that is not read costs nothing.

The server of the page limits the number and the time of connections.
"""

from __future__ import annotations

import contextlib
import os
import socket
import socketserver
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer

from mthp.daemon.environment import Environment
from mthp.daemon.pressure import MachineReach, memory_used
from mthp.daemon.target import Target
from mthp.daemon.telemetry import PAUSE_BUCKETS, Pauses
from mthp.daemon.worker import Worker
from mthp.errors import UnsupportedError, UsageError
from mthp.results import ScanResult

try:
    from prometheus_client import CollectorRegistry, make_wsgi_app
    from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
    from prometheus_client.registry import Collector
except ImportError as error:
    raise UnsupportedError("metrics need prometheus_client", help="pip install 'mthp[daemon]'") from error


class MetricsServer:
    """The page of metrics, served by a thread of its own.

    Raises:
        UsageError: the port is taken, or this user may not use it.
    """

    def __init__(self, environment: Environment, worker: Worker, host: str, port: int, version: str) -> None:
        registry = CollectorRegistry()
        registry.register(DaemonCollector(environment, worker, version))
        try:
            self._server = BoundedServer(host, port, make_wsgi_app(registry), worker.cpu.leave_out)
        except OSError as error:
            raise UsageError(
                f"metrics cannot be served at {host}:{port}: {error.strerror or error}",
                help="another program may have that port (see ss -ltnp): use another one with --metrics",
            ) from error
        self._thread = threading.Thread(target=self._serve, args=(worker,), name="mthp-metrics", daemon=True)
        self._thread.start()
        self.url = f"http://{host}:{self._server.server_port}/metrics"

    def _serve(self, worker: Worker) -> None:
        # Readers of the page cause this work, so it must not use up the budget of the worker.
        worker.cpu.leave_out()
        self._server.serve_forever()

    def close(self) -> None:
        """Stop serving."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


class DaemonCollector(Collector):
    """The metrics of the daemon, of its rules and of the services in them.

    A PID is not a label, so processes that start and exit make no new series. Passes and trims have measured all of
    this: no process is read for the page.
    """

    def __init__(self, environment: Environment, worker: Worker, version: str) -> None:
        self._environment, self._worker, self._version = environment, worker, version
        self._reach = MachineReach(environment.geometry.pmd_order)

    def collect(self) -> Iterator[Metric]:
        yield from self._work()
        yield from self._daemon()
        yield from self._services()
        yield from self._rules()

    def _work(self) -> Iterator[Metric]:
        """Yield the work on all processes together."""
        counters, geometry = self._environment.total, self._environment.geometry
        made = {(geometry.label(order),): counters.collapsed.get(order, 0) for order in geometry.anon_orders}
        yield _counters("mthp_collapses", "Folios made by collapse.", ["size"], made)
        failed, ranges = _by_result(counters.failed), _by_result(counters.ranges)
        yield _counters("mthp_collapse_failures", "Attempts that failed, by scan result.", ["result"], failed)
        yield _counters("mthp_scanned_ranges", "PMD ranges scanned, by scan result.", ["result"], ranges)
        for name, meaning, count in (
            ("mthp_scanned_ptes", "PTEs scanned.", counters.scanned_ptes),
            ("mthp_skipped_ranges", "PMD ranges skipped because they had not changed.", counters.skipped),
            ("mthp_copied_bytes", "Bytes copied by collapses.", counters.copied_bytes),
            ("mthp_bloat_bytes", "Bytes added to processes by filling holes.", counters.bloat_bytes),
            ("mthp_trimmed_bytes", "Bytes given back out of large folios.", counters.trimmed_bytes),
            ("mthp_passes", "Passes through processes.", counters.passes),
            ("mthp_looks", "Checks of processes for changes.", counters.looks),
        ):
            yield CounterMetricFamily(name, meaning, count)
        yield _histogram("mthp_pause_seconds", "Pauses of all threads of a process (move).", counters.stopped)
        yield _histogram("mthp_call_seconds", "Calls of MADV_COLLAPSE.", counters.called)

    def _daemon(self) -> Iterator[Metric]:
        """Yield the state of the daemon and of the machine."""
        environment, worker, targets, times = self._environment, self._worker, self._targets, os.times()
        yield CounterMetricFamily("mthp_cpu_seconds", "CPU time of the daemon.", times.user + times.system)
        left_out = sum(bool(target.left_out) for target in targets)
        good, reload_at = not environment.reload_refused, environment.reload_at
        for name, meaning, value in (
            ("mthp_targets", "Processes worked on.", len(targets)),
            ("mthp_targets_left_out", "Of these, left out for now.", left_out),
            ("mthp_paused", "Whether the daemon is paused.", worker.paused),
            ("mthp_memory_pressure_ratio", "Share of time in which tasks wait.", worker.pressure.share),
            ("mthp_config_last_reload_successful", "Whether the configuration that was last read is in force.", good),
            ("mthp_config_last_reload_timestamp_seconds", "When it was last read.", reload_at),
            ("mthp_resident_memory_bytes", "Memory of the daemon.", memory_used()),
        ):
            yield GaugeMetricFamily(name, meaning, value)
        # Before the first pass there is no time to show.
        if environment.pass_at:
            yield GaugeMetricFamily("mthp_last_pass_timestamp_seconds", "When a pass last ended.", environment.pass_at)
        meaning = "Share of the machine's anonymous memory that lies in PMD folios or could."
        shares = {(when,): share for when, share in self._reach.shares().items()}
        yield _gauges("mthp_reachable_ratio", meaning, ["when"], shares)
        yield _gauges("mthp_build_info", "1, with the version as a label.", ["version"], {(self._version,): 1})

    def _services(self) -> Iterator[Metric]:
        """Yield the work and the memory of each service under each rule."""
        labels, services = ["rule", "service"], self._environment.services.all()
        for name, meaning, attribute in (
            ("mthp_service_collapsed_bytes", "Bytes in folios that were made.", "collapsed_bytes"),
            ("mthp_service_bloat_bytes", "Bytes added by filling holes.", "bloat_bytes"),
            ("mthp_service_trimmed_bytes", "Bytes given back.", "trimmed_bytes"),
        ):
            yield _counters(
                name, meaning, labels, {(one.rule, one.service): getattr(one, attribute) for one in services}
            )
        # Also services without a process now, so that their series do not end.
        nothing = dict.fromkeys(((one.rule, one.service) for one in services), 0)
        count, resident, huge, outside = (Counter(nothing) for _ in range(4))
        for target in self._targets:
            key = target.service.rule, target.service.service
            count[key] += 1
            resident[key] += target.resident
            huge[key] += target.huge
            outside[key] += target.out_of_reach_bytes
        yield _gauges("mthp_service_targets", "Processes worked on.", labels, count)
        yield _gauges("mthp_service_resident_bytes", "Their resident memory, as last read.", labels, resident)
        yield _gauges("mthp_service_huge_bytes", "Of that, mapped by PMD entries.", labels, huge)
        meaning = "Of that, in no whole PMD range of its mapping."
        yield _gauges("mthp_service_out_of_reach_bytes", meaning, labels, outside)

    def _rules(self) -> Iterator[Metric]:
        """Yield the work and the memory of each rule, by folio size."""
        geometry, labels = self._environment.geometry, ["rule", "size"]
        rules = list(self._environment.services.rules.items())
        for name, meaning, attribute in (
            ("mthp_rule_collapses", "Folios made by collapse.", "collapsed"),
            ("mthp_rule_collapse_failures", "Attempts that failed.", "failed"),
            ("mthp_rule_bloat_bytes", "Bytes added by filling holes.", "bloat_bytes"),
        ):
            orders = geometry.anon_orders
            counts = {(rule, geometry.label(at)): getattr(one, attribute)[at] for rule, one in rules for at in orders}
            yield _counters(name, meaning, labels, counts)
        pages: Counter[tuple[str, int]] = Counter()
        trimmable: Counter[tuple[str]] = Counter()
        for target in self._targets:
            rule = target.rule.name
            pages.update({(rule, order): count for order, count in enumerate(target.folio_pages) if count})
            if target.trimmable_bytes is not None:
                trimmable[rule,] += target.trimmable_bytes
        meaning = "Resident memory in folios of a size, where folios may be made, by the last passes."
        folios = {(rule, geometry.label(at)): n * geometry.page_size for (rule, at), n in sorted(pages.items())}
        yield _gauges("mthp_rule_folio_bytes", meaning, labels, folios)
        meaning = "Bytes in pages of zeroes of large folios that trims last found and left."
        yield _gauges("mthp_rule_trimmable_bytes", meaning, ["rule"], trimmable)

    @property
    def _targets(self) -> list[Target]:
        # A list of its own, because the main thread adds and drops targets meanwhile.
        return list(self._worker.targets.values())


def _counters(name: str, help: str, labels: list[str], values: Mapping[Any, float]) -> Metric:
    return _labelled(CounterMetricFamily(name, help, labels=labels), values)


def _gauges(name: str, help: str, labels: list[str], values: Mapping[Any, float]) -> Metric:
    return _labelled(GaugeMetricFamily(name, help, labels=labels), values)


def _labelled(family: CounterMetricFamily | GaugeMetricFamily, values: Mapping[Any, float]) -> Metric:
    for words, value in values.items():
        family.add_metric(words, value)
    return family


def _by_result(counted: Counter[ScanResult]) -> dict[tuple[str], int]:
    # Copied in one step, because the worker counts meanwhile.
    return {(result.name,): count for result, count in sorted(dict(counted).items())}


def _histogram(name: str, help: str, pauses: Pauses) -> Metric:
    bounds = [*(str(bound) for bound in PAUSE_BUCKETS), "+Inf"]
    total, buckets = 0, []
    for bound, count in zip(bounds, pauses.buckets, strict=True):
        # Buckets of Prometheus are cumulative.
        total += count
        buckets.append((bound, float(total)))
    return HistogramMetricFamily(name, help, buckets=buckets, sum_value=pauses.total_ns / 1e9)


MAX_CONNECTIONS = 16
"""Most threads at a time. Prometheus uses one connection every few seconds."""

CONNECTION_SECONDS = 10.0
"""Seconds from the beginning of a connection to its end: Prometheus itself waits 10 s by default."""

_ROOM_SECONDS = 1.0
"""Seconds that a new connection waits for the thread of the oldest to end."""


class _Handler(WSGIRequestHandler):
    def log_message(self, format: str, *args: Any) -> None:
        """Log nothing, because metrics are read every few seconds."""


class BoundedServer(WSGIServer):
    """Serves a WSGI application; :meth:`serve_forever` runs it.

    Args:
        host: name or address to listen at, of IPv4 or IPv6.
        port: port to listen at; 0 for any.
        entered: called first in each thread that serves.
        connection_seconds: seconds after which a connection is ended.

    Raises:
        OSError: the server cannot listen at the address.
    """

    request_queue_size = 128

    def __init__(
        self,
        host: str,
        port: int,
        application: Callable[..., Any],
        entered: Callable[[], None] = lambda: None,
        *,
        connection_seconds: float = CONNECTION_SECONDS,
    ) -> None:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        self.address_family, address = found[0][0], found[0][4]
        self._threads = ThreadPoolExecutor(MAX_CONNECTIONS, "mthp-metrics", entered)
        self._places = threading.BoundedSemaphore(MAX_CONNECTIONS)
        self._turn = threading.Lock()
        self._open: dict[socket.socket, float] = {}
        self._connection_seconds = connection_seconds
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
                # The oldest, because an honest connection takes milliseconds.
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
        # After an error socketserver closes a connection that may be closed, or never had a place.
        if counted is not None:
            self._places.release()

    def service_actions(self) -> None:
        """End connections that take too long; called every half second."""
        with self._turn:
            for request, since in self._open.items():
                if time.monotonic() - since > self._connection_seconds:
                    _shut(request)


def _shut(request: socket.socket | None) -> None:
    """Shut a connection down: its thread then reads the end of file, and cannot write."""
    if request is not None:
        # A connection that the client closed is about to end.
        with contextlib.suppress(OSError):
            request.shutdown(socket.SHUT_RDWR)
