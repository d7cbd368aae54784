"""The sources of heat on made-up machines: a tree that behaves like DAMON's in sysfs, and a bitmap of idle pages."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from fakes import FakeSpace, page_runs
from mthp.errors import MthpError, NotPermittedError, UnsupportedError
from mthp.geometry import X86_64
from mthp.heat import Heat, HeatRequest
from mthp.linux import heat as heat_package
from mthp.linux.heat import damon, idle_tracking, measure_heat, pmd_pieces, rounds
from mthp.linux.heat.damon import Damon
from mthp.linux.heat.frames import frame_segments, frames_of, to_virtual
from mthp.linux.heat.idle_tracking import IdlePages
from mthp.linux.heat.young import parse_referenced
from mthp.linux.journal import instance
from mthp.linux.journal.instance import INSTANCE, NONE, TAKEN, kdamonds_of, read_instance, write_instance
from mthp.linux.journal.putback import put_back
from mthp.linux.journal.store import Change, boot_id
from mthp.linux.journal.switches import SwitchJournal
from mthp.linux.sysfs import ThpSysfs
from mthp.ptes import Pte, PteColumns, Segment
from mthp.vma import Vma

BASE, PMD, PAGE = 1 << 40, X86_64.pmd_size, X86_64.page_size
RANGES, HOT = 8, 3
FRAME = 1 << 20


def never() -> bool:
    return False


class Space(FakeSpace):
    """A process with its pages in consecutive frames, from `FRAME` on."""

    def __init__(self, ranges: int = RANGES) -> None:
        vma = Vma(BASE, BASE + ranges * PMD, "rw-p")
        super().__init__([(vma, *page_runs((ranges * 512, Pte.PRESENT, 0)))])
        self.process = SimpleNamespace(pid=4711, check_alive=lambda: None)

    def read(self, segments: list[Segment]) -> PteColumns:  # type: ignore[override]
        columns = super().read(segments)
        pages = [np.arange((start - BASE) // PAGE, (end - BASE) // PAGE) for start, end in segments]
        return dataclasses.replace(columns, pfn=(np.concatenate(pages) + FRAME).astype(np.uint64))


class Kernel:
    """The kernel's behaviour at writes to DAMON's files (mm/damon/sysfs.c), as far as mthp uses them."""

    def __init__(self, root: Path, operations: str = "fvaddr paddr") -> None:
        self.mm = root / "mm"
        self.thp = ThpSysfs(self.mm / "transparent_hugepage")
        self.thp.root.mkdir(parents=True)
        self.kdamonds = kdamonds_of(self.thp.root)
        self.kdamonds.mkdir(parents=True)
        self.put("nr_kdamonds", "0")
        self.operations = operations
        self.refuses: dict[str, int] = {}
        self.words: list[str] = []
        self.on_update: Callable[[], None] = lambda: None
        self.hot: Segment = (0, 0)

    def put(self, name: str, text: str) -> None:
        path = self.kdamonds / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")

    def get(self, name: str) -> str:
        return (self.kdamonds / name).read_text().strip()

    @property
    def running(self) -> bool:
        return (self.kdamonds / "0").exists() and self.get("0/state") == "on"

    def write(self, path: Path, text: str) -> None:
        name = str(path.relative_to(self.kdamonds))
        if (error := self.refuses.get(text if name == "0/state" else name)) is not None:
            raise OSError(error, os.strerror(error), str(path))
        if name == "0/state":
            self.state(text)
            return
        if not path.exists():
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))
        if name == "nr_kdamonds":
            if self.running:
                raise OSError(errno.EBUSY, os.strerror(errno.EBUSY), str(path))
            for each in self.kdamonds.iterdir():
                if each.is_dir():
                    shutil.rmtree(each)
            if text != "0":
                for made, word in (("state", "off"), ("pid", "-1"), ("contexts/nr_contexts", "0")):
                    self.put(f"0/{made}", word)
        elif path.name.startswith("nr_") and path.name != "nr_accesses":
            for index in range(int(text)):
                self.make(name, index)
        path.write_text(text + "\n")

    def make(self, name: str, index: int) -> None:
        files = {
            "nr_contexts": [
                "avail_operations",
                "operations",
                "monitoring_attrs/intervals/sample_us",
                "monitoring_attrs/intervals/aggr_us",
                "monitoring_attrs/intervals/update_us",
                "monitoring_attrs/nr_regions/min",
                "monitoring_attrs/nr_regions/max",
                "targets/nr_targets",
                "schemes/nr_schemes",
            ],
            "nr_targets": ["pid_target", "regions/nr_regions"],
            "nr_regions": ["start", "end"],
            "nr_schemes": ["action", "tried_regions/total_bytes", *(f"access_pattern/{each}/max" for each in PATTERN)],
        }
        folder, _, kind = name.rpartition("/")
        for each in files[kind]:
            word = {"avail_operations": self.operations, "update_us": "60000000"}.get(each.rpartition("/")[2], "0")
            self.put(f"{folder}/{index}/{each}", word)

    def regions(self) -> list[Segment]:
        folder = "0/contexts/0/targets/0/regions"
        return [
            (int(self.get(f"{folder}/{index}/start")), int(self.get(f"{folder}/{index}/end")))
            for index in range(int(self.get(f"{folder}/nr_regions")))
        ]

    def state(self, word: str) -> None:
        self.words.append(word)
        if word == "on":
            attrs = "0/contexts/0/monitoring_attrs"
            assert int(self.get(f"{attrs}/intervals/sample_us")) <= int(self.get(f"{attrs}/intervals/aggr_us"))
            assert 3 <= int(self.get(f"{attrs}/nr_regions/min")) <= int(self.get(f"{attrs}/nr_regions/max"))
            bounds = [bound for region in self.regions() for bound in region]
            assert bounds == sorted(bounds)
            self.put("0/state", "on")
        elif word == "off":
            if not self.running:
                raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
            self.put("0/state", "off")
        elif word == "update_schemes_tried_regions":
            tried = "0/contexts/0/schemes/0/tried_regions"
            for index, (start, end) in enumerate(self.regions()):
                hits = 10 if self.hot[0] <= start < self.hot[1] else 0
                for key, value in (("start", start), ("end", end), ("nr_accesses", hits)):
                    self.put(f"{tried}/{index}/{key}", str(value))
            self.on_update()


PATTERN = ("sz", "nr_accesses", "age")


@pytest.fixture
def kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Kernel:
    kernel = Kernel(tmp_path)
    for module in (instance, damon):
        monkeypatch.setattr(module, "write_file", kernel.write)
    # No watcher process for a tree that only this process understands.
    monkeypatch.setattr(damon, "SwitchJournal", lambda root, sysfs: SwitchJournal(root, sysfs, watched=False))
    return kernel


def measured(kernel: Kernel, tmp_path: Path, stop: Callable[[], bool] = never, seconds: float = 0.05) -> Heat:
    return Damon(kernel.thp, tmp_path / "run" / "damon").measure(Space(), seconds, stop)  # type: ignore[arg-type]


@pytest.mark.parametrize("operations", ["fvaddr paddr", "paddr"])
def test_damon_tells_the_hot_range_and_leaves_nothing(kernel: Kernel, tmp_path: Path, operations: str) -> None:
    kernel.operations = operations
    low = BASE + HOT * PMD if "fvaddr" in operations else (FRAME + HOT * 512) * PAGE
    kernel.hot = (low, low + PMD)
    heat = measured(kernel, tmp_path)
    assert (heat.start.tolist(), heat.end.tolist()) == ([BASE + HOT * PMD], [BASE + (HOT + 1) * PMD])
    assert heat.source == f"damon ({operations.split(maxsplit=1)[0]})"
    assert heat.seconds > 0
    assert kernel.words[0] == "on"
    assert kernel.words[-1] == "off"
    assert read_instance(kernel.kdamonds) == NONE
    assert not (kernel.kdamonds / "0").exists()


def test_nothing_is_left_when_the_measurement_fails(kernel: Kernel, tmp_path: Path) -> None:
    kernel.refuses["update_schemes_tried_regions"] = errno.EINVAL
    with pytest.raises(MthpError, match="DAMON"):
        measured(kernel, tmp_path)
    assert not (kernel.kdamonds / "0").exists()


def test_an_exclusive_user_is_named(kernel: Kernel, tmp_path: Path) -> None:
    kernel.refuses["on"] = errno.EBUSY
    with pytest.raises(UnsupportedError, match="refuses a kdamond") as caught:
        measured(kernel, tmp_path)
    assert "damon_stat" in caught.value.help
    assert not (kernel.kdamonds / "0").exists()
    modules = tmp_path / "module"
    (modules / "damon_stat/parameters").mkdir(parents=True)
    (modules / "damon_stat/parameters/enabled").write_text("Y\n")
    assert "damon_stat is on" in damon.lack(kernel.mm, modules)[0]


def test_an_instance_that_was_ended_from_outside_is_an_error_without_leftovers(kernel: Kernel, tmp_path: Path) -> None:
    def vanish() -> None:
        kernel.put("0/state", "off")
        kernel.write(kernel.kdamonds / "nr_kdamonds", "0")

    kernel.on_update = vanish
    with pytest.raises(MthpError):
        measured(kernel, tmp_path)
    assert read_instance(kernel.kdamonds) == NONE


@pytest.mark.parametrize("contexts", ["0", "1"])
def test_another_programs_instance_is_not_touched(kernel: Kernel, tmp_path: Path, contexts: str) -> None:
    kernel.write(kernel.kdamonds / "nr_kdamonds", "1")
    kernel.write(kernel.kdamonds / "0/contexts/nr_contexts", contexts)
    kernel.put("0/state", "on")
    before = sorted(kernel.kdamonds.rglob("*"))
    with pytest.raises(UnsupportedError, match="another program"):
        measured(kernel, tmp_path)
    assert sorted(kernel.kdamonds.rglob("*")) == before
    assert kernel.words == []


def test_files_that_may_not_be_read_take_root(kernel: Kernel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(damon, "read_instance", lambda kdamonds: None)
    with pytest.raises(NotPermittedError) as caught:
        measured(kernel, tmp_path)
    assert "root" in caught.value.help


def test_a_kdamond_that_takes_too_much_is_slowed_down(
    kernel: Kernel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(damon, "_cpu_seconds", lambda pid: 1e6)
    intervals: list[int] = []
    kernel.on_update = lambda: intervals.append(int(kernel.get("0/contexts/0/monitoring_attrs/intervals/sample_us")))
    measured(kernel, tmp_path, seconds=0.3)
    assert "commit" in kernel.words
    assert intervals[1] == 2 * intervals[0]


def test_stopping_ends_it_before_the_time(kernel: Kernel, tmp_path: Path) -> None:
    assert measured(kernel, tmp_path, stop=lambda: True, seconds=1e6).spans == 0


# The journal.


def change(ours: str = "123") -> Change:
    return Change(INSTANCE, NONE, ours, boot_id(), "1:2:3")


def test_what_a_killed_run_left_is_ended_even_while_it_runs(kernel: Kernel) -> None:
    write_instance(kernel.kdamonds, "123")
    kernel.put("0/state", "on")
    assert [restored.put_back for restored in put_back(kernel.thp.root, [change()])] == [True]
    assert read_instance(kernel.kdamonds) == NONE


def test_an_instance_with_another_mark_stays(kernel: Kernel) -> None:
    write_instance(kernel.kdamonds, "777")
    kernel.put("0/state", "on")
    [restored] = put_back(kernel.thp.root, [change()])
    assert not restored.put_back
    assert "left alone" in str(restored)
    assert kernel.running
    kernel.put("nr_kdamonds", "2")
    assert read_instance(kernel.kdamonds) == TAKEN


def test_a_second_instance_is_not_made(kernel: Kernel) -> None:
    write_instance(kernel.kdamonds, "777")
    with pytest.raises(MthpError, match="in use"):
        write_instance(kernel.kdamonds, "778")


@pytest.mark.parametrize("writes", range(4))
def test_a_run_that_died_between_two_writes_hinders_no_other(
    kernel: Kernel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, writes: int
) -> None:
    left = iter(range(writes))

    def dying(path: Path, text: str) -> None:
        if next(left, None) is None:
            raise KeyboardInterrupt
        kernel.write(path, text)

    with monkeypatch.context() as patch:
        patch.setattr(instance, "write_file", dying)
        with contextlib.suppress(KeyboardInterrupt):
            write_instance(kernel.kdamonds, "123")
    put_back(kernel.thp.root, [change()])
    assert read_instance(kernel.kdamonds) == NONE
    measured(kernel, tmp_path)
    assert kernel.get("nr_kdamonds") == "0"


def test_an_instance_that_another_program_sets_up_is_not_ours_to_take(kernel: Kernel) -> None:
    kernel.write(kernel.kdamonds / "nr_kdamonds", "1")
    kernel.write(kernel.kdamonds / "0/contexts/nr_contexts", "1")
    kernel.write(kernel.kdamonds / "0/contexts/0/targets/nr_targets", "1")
    assert read_instance(kernel.kdamonds) not in (None, NONE)
    with pytest.raises(UnsupportedError, match="in use"):
        write_instance(kernel.kdamonds, "123")


@pytest.mark.parametrize(("was", "ours"), [("1", "2"), ("0", "on"), ("0", "-1"), ("0", "")])
def test_a_forged_entry_is_passed_over(was: str, ours: str) -> None:
    line = json.dumps({"switch": INSTANCE, "was": was, "ours": ours, "boot": boot_id()})
    assert Change.parse(line.encode()) is None
    assert Change.parse(json.dumps(dataclasses.asdict(change())).encode()) == change()


def test_without_damon_there_is_no_word(tmp_path: Path) -> None:
    assert read_instance(tmp_path) is None
    assert "no DAMON" in damon.lack(tmp_path)[0]


# Frames, pieces and rounds.


def test_frames_lead_back_to_the_pages() -> None:
    space: Any = Space()
    frames = frames_of(space, [(BASE, BASE + RANGES * PMD)])
    assert frame_segments(frames, PAGE, 10) == [(FRAME * PAGE, (FRAME + RANGES * 512) * PAGE)]
    low = (FRAME + HOT * 512) * PAGE
    heat = Heat.of_spans(np.array([low], np.uint64), np.array([low + PMD], np.uint64), np.array([8.0]))
    assert to_virtual(heat, frames, space).start.tolist() == [BASE + HOT * PMD]


def test_scattered_frames_come_in_no_more_segments_than_were_wanted() -> None:
    space: Any = Space(1)
    frames = frames_of(space, [(BASE, BASE + PMD)])
    scattered = dataclasses.replace(frames, frame=frames.frame * np.uint64(1000))
    segments = frame_segments(scattered, PAGE, 16)
    assert len(segments) <= 16
    assert segments[0][0] == FRAME * 1000 * PAGE
    assert frame_segments(dataclasses.replace(frames, frame=frames.frame[:0]), PAGE, 16) == []


def test_pieces_end_at_pmd_ranges_and_are_no_more_than_wanted() -> None:
    start, end = pmd_pieces([(PAGE, 3 * PMD), (4 * PMD, 5 * PMD)], PMD, 100)
    assert start.tolist() == [PAGE, PMD, 2 * PMD, 4 * PMD]
    assert end.tolist() == [PMD, 2 * PMD, 3 * PMD, 5 * PMD]
    assert len(pmd_pieces([(0, 1000 * PMD)], PMD, 100)[0]) == 100
    assert len(pmd_pieces([], PMD, 100)[0]) == 0


def test_rounds_grow_until_they_take_no_more_than_their_share(monkeypatch: pytest.MonkeyPatch) -> None:
    now = SimpleNamespace(wall=0.0, cpu=0.0)

    def sleep(seconds: float) -> None:
        now.wall += seconds

    fake = SimpleNamespace(monotonic=lambda: now.wall, process_time=lambda: now.cpu, sleep=sleep)
    monkeypatch.setattr(heat_package, "time", fake)
    taken = 0
    for _ in rounds(100.0, never):
        taken += 1
        now.cpu += 0.5
        now.wall += 0.5
    assert now.wall >= 100.0
    assert now.cpu / now.wall <= heat_package.MAX_SHARE + 0.02
    assert taken > 5


def test_every_source_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> Any:
        def measure(*_: object) -> Heat:
            raise UnsupportedError(f"no {name} here")

        return measure

    monkeypatch.setattr(Damon, "measure", missing("damon"))
    monkeypatch.setattr(IdlePages, "measure", missing("idle"))
    monkeypatch.setattr("mthp.linux.heat.young.measure_young", missing("young"))
    with pytest.raises(UnsupportedError, match=r"no damon here.*no idle here.*no young here"):
        measure_heat(Space(), HeatRequest("auto", 1.0), never)  # type: ignore[arg-type]


# Idle pages and young bits.


def test_idle_pages_tell_the_hot_range(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bitmap = tmp_path / "page_idle/bitmap"
    bitmap.parent.mkdir()
    frames = FRAME + RANGES * 512
    bitmap.write_bytes(bytes(frames // 8 + 8))

    def used(seconds: float, stop: object) -> Iterator[None]:
        for _ in range(3):
            data = bytearray(bitmap.read_bytes())
            low = (FRAME + HOT * 512) // 8
            data[low : low + 64] = bytes(64)
            with bitmap.open("r+b") as file:
                file.write(data)
            yield

    monkeypatch.setattr(idle_tracking, "rounds", used)
    heat = IdlePages(tmp_path).measure(Space(), 1.0, never)  # type: ignore[arg-type]
    assert heat.start.tolist() == [BASE + HOT * PMD]
    assert heat.end.tolist() == [BASE + (HOT + 1) * PMD]
    assert idle_tracking.lack(tmp_path) == ("", "")
    with pytest.raises(UnsupportedError, match="no idle page tracking"):
        IdlePages(tmp_path / "none").measure(Space(), 1.0, never)  # type: ignore[arg-type]


def test_smaps_tells_what_of_each_mapping_was_used() -> None:
    text = (
        b"00400000-00600000 r-xp 00000000 08:01 1    /bin/a-0123 \n"
        b"Size:               2048 kB\nReferenced:          12 kB\nVmFlags: rd\n"
        b"7f0000000000-7f0000200000 rw-p 00000000 00:00 0 \nReferenced:        2048 kB\n"
    )
    assert parse_referenced(text) == [
        (0x400000, 0x600000, 12 << 10),
        (0x7F0000000000, 0x7F0000200000, 2 << 20),
    ]
    assert parse_referenced(b"") == []
