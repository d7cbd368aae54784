"""Measure memory in no whole PMD range, and its folios by the mover: Node with a heap of 500 MB, and CPython.

    python bench/bench_small.py [node|python ...]

Two processes of each program build the same objects and look them up at random. One is collapsed below the PMD size
with ``--small``, the other is not; then both are measured in turn. The cost of a look-up is its processor time, which
other programs on the machine hardly change. The contents of all objects are added up before and after: a different sum,
or a process that died, ends the bench with an error. The mover also verifies the bytes of every block.

Needs root, and Linux 6.8.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from mthp.engine.collapse import collapse_space
from mthp.engine.report import CollapseReport
from mthp.engine.select import PlanOptions
from mthp.linux.live import open_live
from mthp.means import Means
from mthp.metrics import Coverage
from mthp.units import format_size

MEGABYTES = int(os.environ.get("MTHP_BENCH_MEGABYTES", "500"))
"""Bytes of the heap."""

TURNS = 5
LOOK_UPS = 600_000

NODE = """
'use strict';
function build(bytes) {
  const objects = [];
  while (process.memoryUsage().heapUsed < bytes)
    for (let j = objects.length, end = j + 16384; j < end; j++)
      objects.push({ number: j, text: 'object ' + j, inner: { twice: 2 * j } });
  return objects;
}
function sum(objects) {
  let s = 0;
  for (let i = 0; i < objects.length; i++)
    s = (s + objects[i].number + objects[i].text.length + objects[i].inner.twice) % 1000003;
  return s;
}
function lookUp(objects, chosen, count) {
  let s = 0;
  for (let i = 0; i < count; i++) s += objects[chosen[i % chosen.length]].inner.twice & 2;
  return s;
}
const objects = build(process.argv[1] * 1e6);
const chosen = Int32Array.from({ length: 1 << 20 }, () => Math.floor(Math.random() * objects.length));
require('readline').createInterface({ input: process.stdin }).on('line', line => {
  const [verb, count] = line.split(' ');
  const begin = process.cpuUsage();
  const value = verb === 'sum' ? sum(objects) : lookUp(objects, chosen, +count);
  const { user, system } = process.cpuUsage(begin);
  console.log(JSON.stringify({ value, seconds: (user + system) / 1e6 }));
});
console.log(JSON.stringify({ objects: objects.length }));
"""

PYTHON = """
import gc, json, random, resource, sys, time
def resident():
    return int(open('/proc/self/statm').read().split()[1]) * resource.getpagesize()
objects, begin = [], resident()
while resident() - begin < float(sys.argv[1]) * 1e6:
    objects += [(j, 'object %d' % j, [2 * j]) for j in range(len(objects), len(objects) + 1024)]
gc.freeze()
def total():
    return sum(j + len(text) + inner[0] for j, text, inner in objects) % 1000003
def look_up(count):
    found = 0
    for at in chosen[:count]:
        found += objects[at][2][0] & 1
    return found
chosen = random.Random(1).choices(range(len(objects)), k=200000)
print(json.dumps({'objects': len(objects)}), flush=True)
for line in sys.stdin:
    verb, count = line.split()
    begin, value = time.process_time(), 0
    if verb == 'sum':
        value = total()
    for _ in range(int(count) // 200000):
        value += look_up(200000)
    print(json.dumps({'value': value, 'seconds': time.process_time() - begin}), flush=True)
"""

COMMANDS: dict[str, Callable[[], list[str]]] = {
    "node": lambda: [shutil.which("node") or sys.exit("needs node"), "--max-old-space-size=4000", "-e", NODE, "--"],
    "python": lambda: [sys.executable, "-c", PYTHON],
}


class Program:
    """A process that has built its objects."""

    def __init__(self, name: str) -> None:
        command = [*COMMANDS[name](), str(MEGABYTES)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.pid = self._process.pid
        self.objects = int(self._answer()["objects"])

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            sys.exit(f"process {self.pid} died: {self._process.wait()}")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def tell(self, verb: str, count: int = 0) -> dict[str, Any]:
        """Have it do something: the value, and the processor time that it took."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{verb} {count}\n")
        self._process.stdin.flush()
        return self._answer()

    def cost(self) -> float:
        """Processor time of a look-up in nanoseconds."""
        return float(self.tell("look", LOOK_UPS)["seconds"]) / LOOK_UPS * 1e9

    def end(self) -> None:
        """End it."""
        self._process.kill()
        self._process.wait()


@dataclass(frozen=True)
class Row:
    """What came of one program."""

    name: str
    mappings: int
    report: CollapseReport
    cost_without: float
    cost_with: float

    def lines(self) -> list[tuple[str, str, str]]:
        """Return the lines of its table: figure, before, after."""
        geometry, report = self.report.plan.geometry, self.report
        before, after = report.plan.before, report.after

        def share(order: int) -> tuple[str, str, str]:
            return f"{geometry.label(order)} and more", f"{before.share(order):.1%}", f"{after.share(order):.1%}"

        def size(coverage: Coverage) -> str:
            return format_size(coverage.resident_bytes(geometry))

        speed = f"{self.cost_with:.1f} ns, {self.cost_without / self.cost_with:.2f} of the speed"
        pauses = report.windows
        return [
            ("mappings", str(self.mappings), ""),
            ("anonymous memory", size(before), size(after)),
            ("out of reach of a kernel", f"{before.out_of_reach / max(before.resident, 1):.1%}", ""),
            *(share(order) for order in (2, 4, 6, 8, 9)),
            ("a look-up costs", f"{self.cost_without:.1f} ns", speed),
            ("pauses", "", f"{pauses.count}, p50 {pauses.p50 * 1e3:.2f} ms, p99 {pauses.p99 * 1e3:.2f} ms"),
            ("it took", "", f"{report.elapsed:.1f} s"),
            ("left", "", ", ".join(f"{n} {why}" for why, n in _left(report)) or "nothing"),
        ]


def _left(report: CollapseReport) -> list[tuple[str, int]]:
    reasons = [(each.reason, each.folios) for tally in report.folios.values() for each in tally.reasons]
    totals = {why: sum(n for other, n in reasons if other == why) for why, _ in reasons}
    return sorted(totals.items(), key=lambda item: -item[1])


def bench(name: str) -> Row:
    """Collapse one of two processes, and measure both by turns."""
    programs = [Program(name) for _ in range(2)]
    try:
        sums = [program.tell("sum")["value"] for program in programs]
        with open_live(programs[1].pid) as space:
            mappings = len(space.mapped())
            orders = space.geometry.anon_orders[:-1]
            choice = PlanOptions(small=True, orders=orders, max_ptes_none=0)
            report = collapse_space(space, choice, Means("move", verify=True, pause_share=0.5))
        if report.error is not None:
            sys.exit(f"{name}: {report.error}")
        costs = [[program.cost() for program in programs] for _ in range(TURNS)]
        if [program.tell("sum")["value"] for program in programs] != sums:
            sys.exit(f"{name}: its contents are not what they were")
        without, with_folios = (statistics.median(each) for each in zip(*costs, strict=True))
        return Row(name, mappings, report, without, with_folios)
    finally:
        for program in programs:
            program.end()


def main() -> None:
    """Print a table for each program."""
    for name in sys.argv[1:] or COMMANDS:
        row = bench(name)
        print(f"{name}, a heap of {MEGABYTES} MB: contents as before")
        for what, before, after in row.lines():
            print(f"  {what:26} {before:>10}  {after}")


if __name__ == "__main__":
    main()
