"""A target of the daemon over a fake address space, with a clock that a test sets."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
from numpy.typing import NDArray

from fakes import FakeSpace, page_runs
from mthp.daemon.config import Configuration
from mthp.daemon.environment import Environment
from mthp.daemon.pressure import FreeFolios
from mthp.daemon.rules import Rule, RuleSet, Settings
from mthp.daemon.target import Target
from mthp.daemon.worker import Worker
from mthp.errors import TargetVanishedError
from mthp.geometry import X86_64
from mthp.linux.process import Process
from mthp.means import Mechanism
from mthp.naming import Match, ProcessFacts
from mthp.ptes import ORDER_NONE, Block, Pte, PteColumns, Segment
from mthp.results import ScanResult
from mthp.trimming import TrimBy, TrimOutcome
from mthp.tunables import Switches, Tunables
from mthp.vma import Vma

G = X86_64


START = 1 << 30


N = G.ptes_per_pmd


FULL, HALF, EMPTY = ((N, Pte.PRESENT, 0),), ((N // 2, Pte.PRESENT, 0), (N // 2, 0, ORDER_NONE)), ((N, 0, ORDER_NONE),)


class FakeProcess:
    """The facts that a target reads of its process."""

    def __init__(self) -> None:
        self.faults, self.vanished, self.closed = 100, False, False
        self.cost: Callable[[], None] = lambda: None

    def read(self, name: str) -> bytes:
        if name == "cgroup":
            return b"0::/\n"
        assert name == "stat"
        self.cost()
        if self.vanished:
            raise TargetVanishedError("gone")
        fields = ["S", *"0" * 6, str(self.faults), "0", "3", *"0" * 10, "8000000", "50000", "0", "0"]
        return f"7 (a (b) c) {' '.join(fields)}\n".encode()

    def close(self) -> None:
        self.closed = True


class Stage:
    """A target over a fake address space, and a clock."""

    def __init__(self, *ranges: tuple[tuple[int, int, int], ...], **settings: Any) -> None:
        state, order = page_runs(*(run for each in ranges for run in each))
        vma = Vma(
            START,
            START + len(state) * G.page_size,
            "rw-p",
            flags=frozenset({"hg"}),
            has_anon_vma=True,
        )
        self.space = FakeSpace([(vma, state, order)])
        self.now = 1000.0
        self.events: list[tuple[str, dict[str, Any]]] = []
        self.said: list[str] = []
        self.opened = 0
        self.error: Exception | None = None
        tunables = Tunables.defaults(G)
        self.environment = Environment(
            geometry=G,
            configuration=Configuration(rules=RuleSet(())),
            switches=Switches.defaults(G),
            tunables=tunables,
            free=FreeFolios(Path("/nonexistent/buddyinfo"), self.clock),
            opened=self._open,
            event=lambda event, **values: self.events.append((event, values)),
            say=self.said.append,
            clock=self.clock,
        )
        self.process = FakeProcess()
        rule = Rule("all", Match(), settings=Settings(**settings))
        facts = ProcessFacts(7, 1, comm="seven")
        self.target = Target(cast("Process", self.process), facts, rule, self.environment)

    def clock(self) -> float:
        return self.now

    def _open(self, pid: int) -> FakeSpace:
        assert pid == 7
        if self.error is not None:
            raise self.error
        self.opened += 1
        return self.space

    def steps(self, seconds: float) -> None:
        """Let the worker take its turns for `seconds`."""
        end = self.now + seconds
        while self.target.next_at <= end:
            self.now = max(self.now, self.target.next_at)
            self.target.step()
        self.now = end

    @property
    def collapsed(self) -> list[int]:
        """Numbers of the PMD ranges that were tried, in that order."""
        return [(address - START) // G.pmd_size for address, _ in self.space.attempts]


HUGE = ((N, int(Pte.PRESENT | Pte.PMD_MAPPED), G.pmd_order),)


class Trimmable(FakeSpace):
    """A space with one folio, of which only some pages have contents."""

    trims_by: tuple[TrimBy, ...] = ("cold",)
    used = 100

    def read(self, segments: Sequence[Segment]) -> PteColumns:
        runs = [np.arange(start // G.page_size, end // G.page_size) for start, end in segments]
        pages = np.concatenate([np.empty(0, np.int64), *runs])
        return replace(super().read(segments), pfn=pages.astype(np.uint64))

    def zero_filled(self, columns: PteColumns) -> NDArray[np.bool_]:
        assert columns.pfn is not None
        return np.asarray(columns.pfn - START // G.page_size >= self.used)

    def trim_folios(self, folios: Sequence[Block], zero: Sequence[NDArray[np.bool_]], by: TrimBy) -> list[TrimOutcome]:
        return [
            TrimOutcome(address, order, ScanResult.SUCCEED, "", int(pages.sum()), {0: self.used})
            for (address, order), pages in zip(folios, zero, strict=True)
        ]


class Small(FakeSpace):
    """A space on a machine that makes folios of every order by `mechanism`."""

    def __init__(self, space: FakeSpace, mechanism: Mechanism) -> None:
        super().__init__(space._mappings, orders=G.anon_orders, switches=space.switches)
        self.mechanism = mechanism

    def splits(self) -> bool:
        return self.mechanism == "split"

    def drives_khugepaged(self, order: int) -> bool:
        return self.mechanism == "khugepaged"

    def take_calls(self) -> list[int]:
        return [1000] * len(self.attempts) if self.mechanism == "split" else []


BLOCK = ((16, Pte.PRESENT, 0), (N - 16, 0, ORDER_NONE))


def small_stage(mechanism: Mechanism, *ranges: tuple[tuple[int, int, int], ...], **settings: Any) -> Stage:
    stage = Stage(*ranges, **settings)
    stage.space = Small(stage.space, mechanism)
    return stage


def samples(stage: Stage, *targets: Target) -> dict[tuple[str, ...], float]:
    """Return the metrics of services, rules and the daemon, by metric and values of labels."""
    pytest.importorskip("prometheus_client")
    from prometheus_client import CollectorRegistry, generate_latest

    from mthp.daemon.exporter import DaemonCollector

    by_pid, calm = {target.facts.pid: target for target in targets}, SimpleNamespace(share=0.0)
    worker = SimpleNamespace(targets=by_pid, paused=False, pressure=calm)
    registry = CollectorRegistry()
    registry.register(DaemonCollector(stage.environment, cast("Worker", worker), "1.2.3"))
    assert generate_latest(registry)
    found = [sample for family in registry.collect() for sample in family.samples]
    return {(each.name, *each.labels.values()): each.value for each in found}
