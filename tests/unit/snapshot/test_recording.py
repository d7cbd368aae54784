"""Recordings: what goes in comes out at every step, and what breaks off is whole up to there."""

from __future__ import annotations

import contextlib
import resource
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from fakes import FakeSpace, page_runs
from mthp.abilities import Watch
from mthp.addrspace import AddressSpace
from mthp.engine.census import take_census
from mthp.engine.planning import plan_space
from mthp.engine.select import PlanOptions
from mthp.errors import MthpError, TargetVanishedError, UnsupportedError, UsageError
from mthp.ptes import ORDER_NONE, Pte
from mthp.snapshot import Pace, Recorded, Recording, record_series
from mthp.targets import open_target
from mthp.vma import Vma

pytest.importorskip("pyarrow")

P = int(Pte.PRESENT)
BASE = 0x7F00_0000_0000
MB2 = 2 << 20

Columns = tuple[list[Vma], NDArray[np.uint16], NDArray[np.int8]]


class Clock:
    """A clock that advances only in sleeps, and a processor clock that advances at every reading."""

    def __init__(self, cpu_per_look: float = 0.0) -> None:
        self.now = 100.0
        self.cpu = 0.0
        self._per_look = cpu_per_look
        self.at: dict[float, Callable[[], object]] = {}

    def __call__(self) -> float:
        return self.now

    def cpu_clock(self) -> float:
        self.cpu += self._per_look
        return self.cpu

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        for due in [due for due in self.at if due <= self.now - 100.0 + 1e-9]:
            self.at.pop(due)()


class Counting(FakeSpace):
    faults = 0

    def counters(self) -> dict[str, int]:
        return {"minflt": self.faults, "thp_split_page": 7}


def space_of(ranges: int = 3) -> Counting:
    state, order = page_runs((512 * ranges, P, 0), (100, 0, ORDER_NONE))
    return Counting([(Vma(BASE, BASE + ranges * MB2 + (100 << 12), "rw-p", flags=frozenset({"rd"})), state, order)])


def recorded(
    space: AddressSpace,
    path: Path,
    clock: Clock,
    *,
    every: float = 1.0,
    duration: float = 4.5,
    cpu: float | None = None,
) -> Recorded:
    pace = Pace(every=every, duration=duration, cpu=cpu)
    return record_series(space, path, pace, clock=clock, sleep=clock.sleep, cpu_clock=clock.cpu_clock)


def columns(space: AddressSpace) -> Columns:
    read = space.read([(BASE, BASE + 16 * MB2)])
    return space.vmas(), read.state.copy(), read.folio_order.copy()


def same(one: Columns, other: Columns) -> bool:
    return one[0] == other[0] and np.array_equal(one[1], other[1]) and np.array_equal(one[2], other[2])


def eventful(path: Path) -> tuple[Recorded, list[Columns]]:
    """Return a recording of a target in which something of every kind happens, and its columns at every step."""
    space, clock = space_of(), Clock()
    history = [columns(space)]

    def then(change: Callable[[], object]) -> Callable[[], None]:
        def happen() -> None:
            change()
            history.append(columns(space))

        return happen

    def counted() -> None:
        space.faults = 12
        space.collapse(BASE + MB2, 9)

    def remapped() -> None:
        state, order = page_runs((600, P, 2))
        space._mappings.append((Vma(BASE + 8 * MB2, BASE + 8 * MB2 + (600 << 12), "rw-p"), state, order))

    clock.at = {
        0.5: then(lambda: space.write(BASE + 4096, 0, ORDER_NONE, 5)),
        1.5: then(counted),
        2.5: then(lambda: space.write(BASE, 0, ORDER_NONE, 512)),
        3.5: then(remapped),
        4.5: then(lambda: space._mappings.pop(0)),
    }
    done = recorded(space, path, clock, duration=5.5)
    return done, history


@pytest.fixture(params=["r", "r.mthp"])
def r(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    """A recording that is an Arrow stream, and a plain one."""
    name: str = request.param
    return tmp_path / name


def test_every_step_is_what_the_target_was_then(r: Path) -> None:
    done, history = eventful(r)
    assert (done.steps, done.end) == (6, "the duration was over")
    assert done.seconds == pytest.approx(5.0)
    recording = Recording(r)
    assert (len(recording.steps), recording.end, recording.trouble) == (6, "the duration was over", "")
    assert [step.seconds for step in recording.steps] == pytest.approx([0, 1, 2, 3, 4, 5])
    for number, expected in enumerate(history):
        assert same(columns(recording.space(number)), expected), number
    assert all(same(columns(space), expected) for space, expected in zip(recording.walk(), history, strict=True))


def test_what_did_not_change_is_not_stored_again(r: Path) -> None:
    space, clock = space_of(), Clock()
    done = recorded(space, r, clock, duration=59.5)
    assert done.steps == 60
    recording = Recording(r)
    assert [step.rows for step in recording.steps[1:]] == [0] * 59
    assert done.bytes < 1 << 16


def test_counters_are_those_of_the_step(r: Path) -> None:
    eventful(r)
    recording = Recording(r)
    assert recording.space(1).counters() == {"minflt": 0, "thp_split_page": 7}
    assert recording.space(2).counters() == {"minflt": 12, "thp_split_page": 7}
    assert recording.steps[-1].counters["minflt"] == 12


def test_verbs_take_a_recording_at_any_step(r: Path) -> None:
    eventful(r)
    path = str(r)
    with open_target(path, at="0") as first, open_target(path, at="2.2s") as third, open_target(path) as last:
        assert take_census(first).total.by_order() == {0: 1536}
        assert take_census(third).total.by_order() == {0: 1019, 9: 512}
        assert take_census(last).total.by_order() == {2: 600}
        assert plan_space(first, PlanOptions()).folios_by_order == {9: 3}
        assert first.populated([(BASE, BASE + 16 * MB2)], MB2) == [(BASE, BASE + 3 * MB2)]
        with pytest.raises(UnsupportedError, match="is a recording, which cannot be collapsed"):
            first.collapse(BASE, 9)


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("0", 0),
        ("-1", 5),
        ("-6", 0),
        ("0s", 0),
        ("2.5s", 2),
        ("5.5s", 5),
        ("2 s", 2),
        ("0min", 0),
        ("999ms", 0),
        (None, 5),
    ],
)
def test_a_step_is_named_by_number_or_time(r: Path, text: str | None, number: int) -> None:
    eventful(r)
    assert Recording(r).step_at(text) == number


@pytest.mark.parametrize("text", ["6", "-7", "soon", "", "5x", "1e3", "1m", "9" * 400 + "s"])
def test_a_step_that_there_is_not_is_refused(r: Path, text: str) -> None:
    eventful(r)
    with pytest.raises(UsageError, match=r"no step|not a step"):
        Recording(r).step_at(text)


def test_the_processor_bound_puts_steps_off(r: Path) -> None:
    # 50 ms a step of 1% of a processor: one step every 5 s.
    done = recorded(space_of(), r, Clock(cpu_per_look=0.05), duration=31, cpu=0.01)
    assert done.interval == pytest.approx(5.0, abs=0.2)
    assert done.steps in (6, 7)


def test_stops_when_it_is_told_to(r: Path) -> None:
    clock, stopped = Clock(), []
    clock.at = {2.5: lambda: stopped.append(1)}
    done = record_series(
        space_of(),
        r,
        clock=clock,
        sleep=clock.sleep,
        cpu_clock=clock.cpu_clock,
        stop=lambda: bool(stopped),
    )
    assert (done.steps, done.end) == (3, "stopped")
    assert clock.now - 100 < 2.7
    assert Recording(r).end == "stopped"


def test_survives_the_end_of_its_target(r: Path) -> None:
    space, clock = space_of(), Clock()
    clock.at = {2.5: lambda: setattr(space, "vanished", True)}
    done = recorded(space, r, clock)
    assert (done.steps, done.end) == (3, "the target exited")
    assert Recording(r).steps[-1].seconds == pytest.approx(2)


def test_a_target_that_is_gone_at_once_leaves_no_file(tmp_path: Path, r: Path) -> None:
    space = space_of()
    space.vanished = True
    with pytest.raises(TargetVanishedError):
        recorded(space, r, Clock())
    assert list(tmp_path.iterdir()) == []


@contextlib.contextmanager
def room_for(size: int) -> Iterator[None]:
    """Files can have `size` bytes at most: what lies beyond is written in part, and then not at all, as on a disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_costs_the_last_step_and_says_what_is_there(r: Path) -> None:
    path, space, clock = r, space_of(15), Clock()
    history = [columns(space)]
    rng = np.random.default_rng(3)

    def change() -> None:
        _, state, order = space._mappings[0]
        there = rng.random(len(state)) < 0.5
        state[:], order[:] = np.where(there, P, 0), np.where(there, 0, ORDER_NONE)
        history.append(columns(space))

    clock.at = {0.5 + step: change for step in range(20)}
    with room_for(32 << 10), pytest.raises(MthpError, match="cannot be written: File too large") as caught:
        recorded(space, path, clock, duration=20)
    recording = Recording(path)
    steps = len(recording.steps)
    assert 2 < steps < 20
    assert caught.value.help == f"the steps recorded before can be read; steps: {steps}"
    for number in range(steps):
        assert same(columns(recording.space(number)), history[number])


def test_not_even_the_last_byte_of_a_step_may_be_missing(r: Path) -> None:
    def record(progress: Callable[[int, float, int], None] = lambda steps, at, size: None) -> None:
        clock = Clock()
        pace = Pace(duration=1.5)
        record_series(
            space_of(),
            r,
            pace,
            overwrite=True,
            progress=progress,
            clock=clock,
            sleep=clock.sleep,
            cpu_clock=clock.cpu_clock,
        )

    sizes: list[int] = []
    record(lambda steps, at, size: sizes.append(size))
    for short in range(1, 17):
        with room_for(sizes[1] - short), pytest.raises(MthpError) as caught:
            record()
        assert caught.value.help.endswith("steps: 1")
        assert len(Recording(r).steps) == 1


def test_a_disk_without_room_for_one_step_leaves_no_file(tmp_path: Path, r: Path) -> None:
    whole = record_series(space_of(), r.with_name(f"whole{r.suffix}"), Pace(duration=0.01)).bytes
    for size in (100, whole // 3, whole // 2):
        with room_for(size), pytest.raises(MthpError, match="cannot be written"):
            recorded(space_of(), r, Clock())
        assert [path.stem for path in tmp_path.iterdir()] == ["whole"]


def test_a_recording_cut_anywhere_has_all_steps_before(tmp_path: Path, r: Path) -> None:
    _, history = eventful(r)
    whole = r.read_bytes()
    cut = tmp_path / "cut"
    lengths = []
    for size in range(0, len(whole), 13):
        cut.write_bytes(whole[:size])
        try:
            with open_target(str(cut)) as space:
                recording = Recording(cut)
                assert same(columns(space), history[len(recording.steps) - 1])
                if recording.end:
                    continue
                assert "was cut off" in space.missing[-1]
                assert f"{len(recording.steps)} steps" in space.missing[-1]
                lengths.append(len(recording.steps))
        except UsageError as caught:
            error = caught.message
            lengths.append(0)
            words = ("cut off", "not a", "cut short")
            assert any(word in error for word in words), error
    assert sorted(lengths) == lengths
    assert set(lengths) >= {0, 1, 2, 3, 4, 5, 6}


def test_a_flipped_bit_never_makes_another_process(tmp_path: Path, r: Path) -> None:
    _, history = eventful(r)
    whole = r.read_bytes()
    bent = tmp_path / "bent"
    rng = np.random.default_rng(11)
    seen = {"error": 0, "prefix": 0}
    for at in rng.integers(0, len(whole), 250).tolist():
        data = bytearray(whole)
        data[at] ^= 1 << int(rng.integers(0, 8))
        bent.write_bytes(bytes(data))
        try:
            recording = Recording(bent)
            for number in range(len(recording.steps)):
                _, state, order = columns(recording.space(number))
                assert np.array_equal(state, history[number][1])
                assert np.array_equal(order, history[number][2])
            seen["prefix"] += len(recording.steps) < len(history)
        except MthpError:
            seen["error"] += 1
    assert min(seen.values()) > 0


def test_the_file_is_private_and_never_overwritten_unasked(tmp_path: Path, r: Path) -> None:
    path = r
    recorded(space_of(), path, Clock())
    assert path.stat().st_mode & 0o777 == 0o600
    before = path.read_bytes()
    with pytest.raises(UsageError, match="exists already"):
        recorded(space_of(), path, Clock())
    assert path.read_bytes() == before
    record_series(space_of(), path, Pace(duration=0.01), overwrite=True)
    assert len(Recording(path).steps) == 1


def test_what_is_replaced_stays_until_there_is_a_step(tmp_path: Path) -> None:
    path = tmp_path / "old"
    path.write_text("old")

    class Gone(Counting):
        def watch(self) -> Watch:
            raise TargetVanishedError("gone")

    with pytest.raises(TargetVanishedError):
        record_series(Gone([]), path, Pace(duration=0.01), overwrite=True)
    assert path.read_text() == "old"
    assert [each.name for each in tmp_path.iterdir()] == ["old"]


@pytest.mark.parametrize(("every", "duration", "cpu"), [(0.0, None, None), (1.0, -1.0, None), (1.0, None, 0.0)])
def test_a_pace_that_makes_no_sense_is_refused(every: float, duration: float | None, cpu: float | None) -> None:
    with pytest.raises(UsageError, match="not above 0"):
        Pace(every, duration, cpu)


def test_other_arrow_streams_are_no_recordings(tmp_path: Path) -> None:
    import pyarrow as pa

    path = tmp_path / "other.arrows"
    with pa.ipc.new_stream(path, pa.schema([("x", pa.int8())])) as writer:
        writer.write_batch(pa.record_batch([pa.array([1], pa.int8())], names=["x"]))
    with pytest.raises(UsageError, match="an Arrow stream of something else"):
        open_target(str(path))


def test_a_snapshot_has_no_steps(tmp_path: Path) -> None:
    from mthp.snapshot import record

    record(space_of(), tmp_path / "s")
    with pytest.raises(UsageError, match="is a snapshot, which has no step"):
        open_target(str(tmp_path / "s"), at="0")
    with pytest.raises(UsageError, match="a process has no step"):
        open_target("self", at="0")
