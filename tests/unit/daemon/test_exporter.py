"""The page of metrics: its figures, and its server against clients that hold connections."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

from daemon_stage import FULL, HALF, HUGE, START, G, N, Stage, Trimmable, samples
from fakes import page_runs
from mthp.daemon.exporter import CONNECTION_SECONDS, MAX_CONNECTIONS, BoundedServer
from mthp.objects import to_object
from mthp.ptes import ORDER_NONE, Pte
from mthp.results import ScanResult
from waiting import wait_for


def page(environment: Any, start: Any) -> list[bytes]:
    start("200 OK", [("Content-Type", "text/plain")])
    return [environment["PATH_INFO"].encode()]


@contextlib.contextmanager
def serving(connection_seconds: float = CONNECTION_SECONDS) -> Iterator[BoundedServer]:
    made = BoundedServer("127.0.0.1", 0, page, connection_seconds=connection_seconds)
    thread = threading.Thread(target=made.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield made
    finally:
        made.shutdown()
        made.server_close()
        thread.join()


def asked(server: BoundedServer) -> bytes:
    with urllib.request.urlopen(f"http://127.0.0.1:{server.server_port}/metrics", timeout=60) as answer:
        body: bytes = answer.read()
    return body


def connected(server: BoundedServer) -> socket.socket:
    return socket.create_connection(("127.0.0.1", server.server_port))


def test_half_open_connections_are_bounded() -> None:
    with serving() as server:
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


@pytest.mark.parametrize("sent", [b"", b"G"], ids=["nothing", "trickles"])
def test_a_client_that_does_not_finish_its_request_is_ended(sent: bytes) -> None:
    with serving(connection_seconds=0.2) as server, connected(server) as slow:
        slow.settimeout(0.02)
        ended = False

        def is_ended() -> bool:
            nonlocal ended
            try:
                slow.sendall(sent)
                ended = ended or slow.recv(1) == b""
            except TimeoutError:
                pass
            except OSError:
                ended = True
            return ended

        assert wait_for(is_ended)
        assert asked(server) == b"/metrics"


def test_memory_is_counted_by_rule_and_size_as_passes_saw_it() -> None:
    # A range that is huge, one that becomes it, one of 64K folios and base pages that holds too little for a collapse.
    sparse = ((32, int(Pte.PRESENT), 4), (8, int(Pte.PRESENT), 0), (N - 40, 0, ORDER_NONE))
    stage = Stage(HUGE, FULL, sparse, orders=(G.pmd_order,), max_ptes_none=10)
    assert not [key for key in samples(stage, stage.target) if key[0] == "mthp_rule_folio_bytes"]
    stage.steps(20.0)
    opened = stage.opened
    found = samples(stage, stage.target)
    sizes = {key[2]: value for key, value in found.items() if key[0] == "mthp_rule_folio_bytes"}
    assert sizes == {"2M": 2 * G.pmd_size, "64K": 32 * G.page_size, "4K": 8 * G.page_size}
    assert found["mthp_rule_collapses_total", "all", "2M"] == 1
    assert found["mthp_rule_collapses_total", "all", "64K"] == 0
    assert stage.opened == opened, "the page of metrics has memory read"
    # The next pass drops unmapped memory.
    stage.space.write(START + G.pmd_size, 0, ORDER_NONE, N)
    stage.target.stale()
    stage.steps(20.0)
    assert samples(stage, stage.target)["mthp_rule_folio_bytes", "all", "2M"] == G.pmd_size
    assert not [key for key in samples(stage) if key[0] == "mthp_rule_folio_bytes"]


def test_bloat_and_failures_are_counted_by_rule_and_size() -> None:
    stage = Stage(HALF, FULL, orders=(G.pmd_order,))
    stage.space.fails = {START + G.pmd_size: ScanResult.PAGE_COUNT}
    stage.steps(1.0)
    found = samples(stage, stage.target)
    counters = stage.target.counters
    assert found["mthp_rule_bloat_bytes_total", "all", "2M"] == counters.bloat_bytes
    assert found["mthp_rule_collapse_failures_total", "all", "2M"] == counters.failed.total() > 0


def test_zeroes_that_a_trim_found_and_left_are_known_after_it() -> None:
    stage = Stage(HUGE, trim=0.5)
    assert not [key for key in samples(stage, stage.target) if key[0] == "mthp_rule_trimmable_bytes"]
    stage.space = Trimmable([(stage.space.vmas()[0], *page_runs(*HUGE))])
    stage.target.trim()
    assert samples(stage, stage.target)["mthp_rule_trimmable_bytes", "all"] == 0
    assert not [key for key in samples(stage) if key[0] == "mthp_rule_trimmable_bytes"]


def test_the_page_names_the_version_the_last_reload_and_the_last_pass() -> None:
    stage = Stage(FULL)
    found = samples(stage, stage.target)
    assert found["mthp_build_info", "1.2.3"] == 1
    assert found["mthp_config_last_reload_successful",] == 1
    assert ("mthp_last_pass_timestamp_seconds",) not in found
    before = time.time()
    assert found["mthp_config_last_reload_timestamp_seconds",] <= before
    stage.steps(20.0)
    stage.environment.reload_refused = True
    found = samples(stage, stage.target)
    assert before <= found["mthp_last_pass_timestamp_seconds",] <= time.time()
    assert found["mthp_config_last_reload_successful",] == 0


def test_work_is_counted_by_rule_and_service_also_after_the_process_has_ended() -> None:
    stage = Stage(HALF, FULL, FULL)
    stage.target.renew(replace(stage.target.facts, cgroup="/system.slice/redis.service"), stage.target.rule)
    stage.steps(20.0)
    key = "all", "unit:redis.service"
    counters = stage.target.counters
    stage.target.out_of_reach_bytes = 7 * G.page_size
    found = samples(stage, stage.target)
    assert found["mthp_service_collapsed_bytes_total", *key] == 3 * G.pmd_size
    assert found["mthp_service_bloat_bytes_total", *key] == counters.bloat_bytes > 0
    assert found["mthp_service_targets", *key] == 1
    assert found["mthp_service_resident_bytes", *key] == 50000 * G.page_size
    assert found["mthp_service_huge_bytes", *key] == stage.target.huge > 0
    assert found["mthp_service_out_of_reach_bytes", *key] == 7 * G.page_size
    after = samples(stage)
    assert after["mthp_service_collapsed_bytes_total", *key] == 3 * G.pmd_size
    assert after["mthp_service_targets", *key] == after["mthp_service_resident_bytes", *key] == 0
    assert to_object(stage.target, G)["service"] == key[1]
