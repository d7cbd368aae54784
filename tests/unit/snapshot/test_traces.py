"""Traces of standard tools: their formats, and the recordings made of them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from mthp.engine.census import take_census
from mthp.errors import UsageError
from mthp.ptes import Pte
from mthp.snapshot import Recording
from mthp.snapshot.fromtrace import RecordedTrace, record_trace
from mthp.snapshot.traces import Trace, _nanoseconds

pytest.importorskip("pyarrow")

LACKEY = """==12== Lackey, an example Valgrind tool
==12== Command: ./program
I  0401ab70,3
 S 1fff000778,8
 L 1fff000770,8
 M 04222000,4
I  04223000,4
what the program prints
 L 04222ff8,16
 S 04425010,8
==12== Exit code:       0
"""

PERF = """    redis-server  4711 [001] 12345.678901:          1 cpu/mem-loads,ldlat=30/P:     7f8a1c2d3040 |OP LOAD|
    redis-server  4711/4712 12345.700000: page-faults:     7f8a1c2d4ff8 55d5 main+0x10

    a b  4711 12345.800000:   100 page-faults:  ffffffff817554ea
    redis-server  4711 [000] 12347.100000:          1 page-faults:     7f8a1c4d3000
"""

DAMON_OLD = """base_time_absolute: 2 m 19.834 s

monitoring_start:                0 ns
monitoring_end:            104.599 ms
monitoring_duration:       104.599 ms
target_id: 0
nr_regions: 2
563ebaa00000-563ebaa04000(  16.000 KiB):    1
7f938d7e1000-7f938d7e3000(   8.000 KiB):    0

monitoring_start:       104.599 ms
monitoring_end:              1.200 s
monitoring_duration:      1.095 s
target_id: 0
nr_regions: 1
563ebaa04000-563ebaa05000(   4.000 KiB):    3
"""

DAMON_NEW = """base_time_absolute: 8 m 59.809 s
data source: unknown

monitoring_start:                 0
monitoring_end:         5000000000
monitoring_duration:    5000000000
target_id: 0
nr_regions: 3
# start_addr     end_addr        length    age probe_hits
563ebaa00000-563ebaa04000 (  16.000 KiB)     7 4
7f938d7e1000-7f938d7e3000 (   8.000 KiB)     7 0
7f938d7e3000-7f938d7e4000 (   4.000 KiB)    -1 0 2
"""


def made(tmp_path: Path, text: str, kind: str | None = None) -> RecordedTrace:
    (tmp_path / "trace").write_text(text)
    return record_trace(tmp_path / "trace", tmp_path / "r", kind=kind)


def uses(tmp_path: Path) -> list[list[int]]:
    return [pages.tolist() for pages in Recording(tmp_path / "r").accesses()]


def test_lackey_gives_data_accesses_in_order(tmp_path: Path) -> None:
    done = made(tmp_path, LACKEY)
    assert (done.kind, done.steps, done.accesses, done.pages, done.skipped) == ("lackey", 1, 5, 3, 1)
    assert uses(tmp_path) == [[0x1FFF000, 0x4222, 0x4425]]


def test_perf_samples_fall_into_seconds_and_the_kernel_is_left_out(tmp_path: Path) -> None:
    done = made(tmp_path, PERF)
    assert (done.kind, done.steps, done.accesses) == ("perf", 2, 3)
    assert uses(tmp_path) == [[0x7F8A1C2D3, 0x7F8A1C2D4], [0x7F8A1C4D3]]
    assert [step.seconds for step in Recording(tmp_path / "r").steps] == [1.0, 2.0]


@pytest.mark.parametrize("text", ["12952.841176:     55d52b082018 \n", "    55d52b082018\n"])
def test_perf_script_of_few_fields(tmp_path: Path, text: str) -> None:
    assert made(tmp_path, text).kind == "perf"
    assert uses(tmp_path) == [[0x55D52B082]]


def test_damon_regions_that_were_accessed(tmp_path: Path) -> None:
    assert made(tmp_path, DAMON_OLD).kind == "damon"
    first = 0x563EBAA00
    assert uses(tmp_path) == [[first, first + 1, first + 2, first + 3], [first + 4]]
    assert [step.seconds for step in Recording(tmp_path / "r").steps] == pytest.approx([0.104599, 1.2])


def test_damon_of_newer_damo(tmp_path: Path) -> None:
    assert made(tmp_path, DAMON_NEW).kind == "damon"
    first = 0x563EBAA00
    assert uses(tmp_path) == [[first, first + 1, first + 2, first + 3, 0x7F938D7E3]]
    assert Recording(tmp_path / "r").steps[0].seconds == 5.0


def test_times_of_damo() -> None:
    assert _nanoseconds("2 m 19.834 s") == pytest.approx(139.834e9)
    assert _nanoseconds("1 h 1 m") == pytest.approx(3660e9)
    assert _nanoseconds("512 us") == pytest.approx(512e3)
    assert _nanoseconds("104599") == 104599


def test_a_page_is_mapped_from_its_first_use_and_idle_when_it_is_not_used(tmp_path: Path) -> None:
    made(tmp_path, DAMON_OLD)
    recording = Recording(tmp_path / "r")
    first, last = recording.space(0), recording.space(1)
    assert take_census(first).total.resident == 4
    assert take_census(last).total.resident == 5
    [vma] = last.vmas()
    assert (vma.start, vma.end) == (0x563EBAA00000, 0x563EBAC00000)
    state = last.read([(vma.start, vma.start + 5 * 4096)]).state
    idle = (state & np.uint16(Pte.UNREFERENCED)) != 0
    assert idle.tolist() == [True] * 4 + [False]


def test_long_traces_make_several_steps(tmp_path: Path) -> None:
    path = tmp_path / "trace"
    path.write_text("".join(f" L {0x10000000 + at * 4096:08x},8\n" for at in range(250)))
    steps = list(Trace(path, None, 4096, at_most=100).steps())
    assert [len(step.pages) for step in steps] == [100, 100, 50]
    assert [step.accesses for step in steps] == [100, 100, 50]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "it is empty"),
        (b"once upon a time\nthere was a page\n", "not a trace that mthp knows: its first line is 'once upon a time'"),
        (b"PERFILE2\x00\x01", "is not text"),
        (bytes(range(256)) * 8, "not a trace that mthp knows"),
        (b"==1== Lackey\nI  0401ab70,3\n", "has no access to memory of a program"),
        (b"a 1 12.5: 1 page-faults: ffffffff817554ea\n", "has no access to memory of a program"),
    ],
)
def test_what_is_no_trace_is_refused_and_leaves_no_file(tmp_path: Path, content: bytes, words: str) -> None:
    (tmp_path / "trace").write_bytes(content)
    with pytest.raises(UsageError) as caught:
        record_trace(tmp_path / "trace", tmp_path / "r")
    assert words in caught.value.message
    assert caught.value.help
    assert not (tmp_path / "r").exists()


def test_the_wrong_kind_is_said_to_be_the_wrong_kind(tmp_path: Path) -> None:
    (tmp_path / "trace").write_text(PERF)
    with pytest.raises(UsageError, match="not a trace of the kind 'damon', it looks like 'perf'"):
        Trace(tmp_path / "trace", "damon", 4096)
    with pytest.raises(UsageError, match="unknown trace format 'strace'"):
        Trace(tmp_path / "trace", "strace", 4096)
    with pytest.raises(UsageError, match="No such file"):
        Trace(tmp_path / "nothing", None, 4096)
